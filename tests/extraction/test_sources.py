import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from fastbb.extraction.sources import InputError, Source, list_sources, redact


def ids(*inputs: str | Path, skipped: Counter | None = None) -> list[str]:
    return [source.id for source in list_sources(inputs, Counter() if skipped is None else skipped)]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_directory_is_sorted_bytewise_on_the_whole_path(tmp_path: Path) -> None:
    names = ["a.jpg", "a/b.jpg", "a-b/c.jpg", "B.PNG", "é.jpg", "z/y/x/w.webp", "a0.jpg", "a/é.gif"]
    names += ["\N{WAVING HAND SIGN}.jpg", os.fsdecode(b"\xff.jpg")]  # text sorts them reversed
    touch(tmp_path, *names)
    assert ids(tmp_path) == sorted(names, key=os.fsencode)


def test_directory_listing_skips_and_counts_files_that_are_no_images(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "a.jpg", "labels.csv", ".hidden.jpg", ".git/x.png", "._a.jpg")
    outside = touch(tmp_path / "outside", "secret.jpg")
    (root / "link.jpg").symlink_to(outside / "secret.jpg")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    skipped = Counter()
    assert ids(root, skipped=skipped) == ["a.jpg"]
    assert skipped == {"symbolic links": 3, "files without an image suffix": 1}


def test_formats_that_are_not_read_are_listed_so_that_they_fail_visibly(tmp_path: Path) -> None:
    touch(tmp_path, "phone.HEIC", "drawing.svg", "print.eps")
    assert ids(tmp_path) == ["drawing.svg", "phone.HEIC", "print.eps"]


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(raw, "wb") as file:
        file.write(b"x")
    (source,) = list_sources([tmp_path], Counter())
    assert os.fsencode(source.id) == b"caf\xe9.jpg" and os.fsencode(source.path) == raw


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a.jpg", "x/b.jpg", "x/y/c.jpg"]),
        ("x/**", ["b.jpg", "d.png", "y/c.jpg"]),
        ("*/[bd].*", ["x/b.jpg", "x/d.png"]),
        ("x/?.png", ["d.png"]),
    ],
    ids=str,
)
def test_glob_ids_start_at_the_fixed_part(
    tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    touch(tmp_path, "a.jpg", "x/b.jpg", "x/y/c.jpg", "x/d.png", "x/notes.txt")
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    assert ids(f"{tmp_path}/{pattern}") == expected


def test_one_image_keeps_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/odd[1].jpg")
    monkeypatch.chdir(tmp_path)
    (source,) = list_sources(["./x/odd[1].jpg"], Counter())
    assert source == Source("x/odd[1].jpg", str(tmp_path / "x/odd[1].jpg"))


LISTED = [("a.jpg", None), ("sub/b, c.png", "named"), ("../é.gif", None)]


def write_list(path: Path) -> None:
    records = [{"path": image, "id": name or image, "label": 3} for image, name in LISTED]
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\r\n".join(image for image, _ in LISTED) + "\n\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "path", "id"])
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(records), path, row_group_size=2
        )


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_list_keeps_its_order_and_resolves_paths_from_its_directory(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"list{suffix}"
    write_list(path)
    named = suffix != ".txt"
    assert list(list_sources([path], Counter())) == [
        Source((name if named else None) or image, os.path.normpath(tmp_path / image))
        for image, name in LISTED
    ]


def test_file_name_column_of_image_folders_is_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,hello\n")
    assert ids(tmp_path / "metadata.csv") == ["a.jpg"]


def test_every_line_of_a_text_list_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# a.jpg\n b .jpg \n\npipe:x.jpg\n")
    assert ids(tmp_path / "list.txt") == ["# a.jpg", " b .jpg ", "pipe:x.jpg"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "id,path\n,a.jpg\n,b.jpg\n"),
        ("list.jsonl", '{"id": "", "path": "a.jpg"}\n{"id": null, "path": "b.jpg"}\n'),
    ],
)
def test_an_empty_id_counts_as_missing(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert ids(tmp_path / name) == ["a.jpg", "b.jpg"]


SECRET_URL = "https://user:pa55@host.org:8080/a/b.jpg?X-Signature=s3cret&x=1#frag"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SECRET_URL, "https://host.org:8080/a/b.jpg"),
        ("s3://key:s3cret@bucket/x@2x.png", "s3://bucket/x@2x.png"),
        ("https://host.org?token=s3cret", "https://host.org"),
        ("pipe:x.jpg", "pipe:x.jpg"),
        ("a/b?c@d.jpg", "a/b?c@d.jpg"),
    ],
)
def test_redact_removes_credentials(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_urls_in_a_list_become_rows_without_their_credentials(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{SECRET_URL}\na.jpg\n")
    listed = list(list_sources([path], Counter()))
    assert listed[0] == Source("https://host.org:8080/a/b.jpg", "https://host.org:8080/a/b.jpg")
    assert "s3cret" not in repr(listed) and "pa55" not in repr(listed)


def add(
    archive: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE
) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
    archive.addfile(member, io.BytesIO(data))


def test_tar_members_are_located_and_never_extracted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    long_name = "d" * 150 + "/long.png"
    with tarfile.open(path, "w") as archive:
        add(archive, "./b.jpg", b"bbb")
        add(archive, "../../escape.jpg", b"eeeee")
        add(archive, "a.json", b"{}")
        add(archive, "link.jpg", b"", tarfile.SYMTYPE)
        add(archive, "device.jpg", b"", tarfile.CHRTYPE)
        add(archive, long_name, b"llll")
    skipped = Counter()
    listed = list(list_sources([path], skipped))
    assert [source.id for source in listed] == ["b.jpg", "../../escape.jpg", long_name]
    data = path.read_bytes()
    spans = [data[s.offset : (s.offset or 0) + (s.n_bytes or 0)] for s in listed]
    assert spans == [b"bbb", b"eeeee", b"llll"]
    assert skipped == {"members that are no plain file": 2, "files without an image suffix": 1}
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def bad_input(kind: str, root: Path) -> tuple[list[str | Path], str]:
    touch(root, "one/a.jpg", "two/a.jpg", "none/readme.md", "x.tar.gz", "short.tar")
    with tarfile.open(root / "cut.tar", "w") as archive:
        add(archive, "a.jpg", b"x" * 5000)
    os.truncate(root / "cut.tar", 3000)
    with tarfile.open(root / "twice.tar", "w") as archive:
        add(archive, "a.jpg", b"1")
        add(archive, "a.jpg", b"2")
    texts = {
        "no_column.csv": "name\na.jpg\n",
        "quote.csv": 'path\n"a.jpg\nb.jpg\nc.jpg\n',
        "cells.csv": "path,id\na, b.jpg,7\n",
        "same.csv": "path,id\na.jpg,7\nb.jpg,7\n",
        "number.jsonl": '{"path": 3}\n',
        "array.jsonl": '["a.jpg"]\n',
        "broken.jsonl": '{"path": \n',
        "long.txt": "x" * 70_000,
        "long_id.txt": "x" * 5000,
        "nul.txt": "a\0.jpg\n",
        "empty.txt": "\n",
        "text.parquet": "PAR1 not",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    return {
        "missing": ([root / "nothing.jpg"], "no such file or directory"),
        "url": ([SECRET_URL], r"https://host.org:8080/a/b.jpg: addresses are not fetched"),
        "no images": ([root / "none"], "no images found .*1 files without an image suffix"),
        "no match": ([f"{root}/one/*.png"], "no images found"),
        "glob root": ([f"{root}/nowhere/*.png"], "no such directory"),
        "same id": (
            [root / "one", root / "two"],
            "two images would have the id 'a.jpg'.* give their common parent directory",
        ),
        "same member": (
            [root / "twice.tar"],
            "two images would have the id 'a.jpg'.*; rename one of them, or extract each archive",
        ),
        "compressed": ([root / "x.tar.gz"], "only uncompressed .tar is read"),
        "no tar": ([root / "short.tar"], "not a complete, uncompressed tar archive"),
        "cut tar": ([root / "cut.tar"], "not a complete, uncompressed tar archive"),
        **{
            name: ([root / name], pattern)
            for name, pattern in {
                "no_column.csv": "row 1 has no text in the column `path`.*columns: name",
                "quote.csv": "not readable as CSV: unexpected end of data",
                "cells.csv": "row 1 has more cells than the header has columns",
                "same.csv": "two images would have the id '7'.*; give every row an `id` of its own",
                "number.jsonl": "row 1 has no text in the column `path`.*got 3",
                "array.jsonl": "row 1 is no object",
                "broken.jsonl": "row 1 is not JSON",
                "long.txt": "line 1 is longer than 65536 bytes",
                "long_id.txt": "at most 4096 characters",
                "nul.txt": "no NUL",
                "empty.txt": "no images found",
                "text.parquet": "not readable as Parquet|need pyarrow",
            }.items()
        },
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["missing", "url", "no images", "no match", "glob root", "same id", "same member", "compressed"]
    + [
        "no tar",
        "cut tar",
        "no_column.csv",
        "quote.csv",
        "cells.csv",
        "same.csv",
        "number.jsonl",
        "array.jsonl",
        "broken.jsonl",
    ]
    + ["long.txt", "long_id.txt", "nul.txt", "empty.txt", "text.parquet"],
)
def test_bad_input_raises_input_error(tmp_path: Path, kind: str) -> None:
    inputs, pattern = bad_input(kind, tmp_path)
    with pytest.raises(InputError, match=pattern) as caught:
        ids(*inputs)
    assert "s3cret" not in str(caught.value)


def test_the_same_image_may_be_listed_twice(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    assert ids(tmp_path / "list.txt") == ["a.jpg", "b.jpg", "a.jpg"]
