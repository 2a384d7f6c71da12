"""Inputs that are refused, each with a reason and an advice."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import InputError

SECRET_URL = "https://user:pa55@host.org:8080/a/b.jpg?X-Signature=s3cret&x=1#frag"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write_tar(path: Path, *groups: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in (item for files in groups for item in files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def bad_input(kind: str, root: Path) -> tuple[list[str | Path], str]:
    touch(root, "one/a.jpg", "two/a.jpg", "none/readme.md", "x.tar.gz", "x.7z", "short.tar")
    write_tar(root / "cut.tar", {"a.jpg": b"x" * 5000})
    os.truncate(root / "cut.tar", 3000)
    write_tar(root / "twice.tar", {"a.jpg": b"1"}, {"a.jpg": b"2"})
    write_tar(root / "links" / "real.tar", {"a.jpg": b"1"}).rename(root / "real.tar")
    (root / "links" / "x.tar").symlink_to(root / "real.tar")
    write_tar(root / "packed" / "x.tar.gz", {})
    texts = {
        "no_column.csv": "name\na.jpg\n",
        "case.csv": "Path,label\na.jpg,1\n",
        "two_names.csv": "path,label,label\na.jpg,1,2\n",
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
    for suffix in ("txt", "csv", "jsonl"):
        (root / f"utf16.{suffix}").write_text("path\na.jpg\n", encoding="utf-16")
    return {
        "missing": ([root / "nothing.jpg"], "no such file or directory"),
        "url": ([SECRET_URL], r"https://host.org:8080/a/b.jpg: addresses are not fetched"),
        "no images": (
            [root / "none"],
            "no images found; .*1 file without an image suffix; a list can",
        ),
        "no match": ([f"{root}/one/*.png"], "no images found"),
        "glob root": ([f"{root}/nowhere/*.png"], "no such directory"),
        "same id": (
            [root / "one", root / "two"],
            "two images would have the id 'a.jpg'.* give their common parent directory",
        ),
        "same member": (
            [root / "twice.tar"],
            "two images would have the id 'a.jpg'.*; rename one of them",
        ),
        "compressed": (
            [root / "x.tar.gz"],
            r"compressed archive, as it has no random access; unpack it, .*gunzip -k .*x.tar.gz\)",
        ),
        "7z": ([root / "x.7z"], "no random access; unpack it, or pack it again as .* a .zip$"),
        "only links": ([root / "links"], r"1 symbolic link \(--follow-symlinks follows it\)"),
        "only compressed": ([root / "packed"], r"no images .*1 compressed archive \(unpack it\)"),
        "no tar": ([root / "short.tar"], "not a complete, uncompressed tar archive"),
        "cut tar": ([root / "cut.tar"], "not a complete, uncompressed tar archive"),
        **{
            name: ([root / name], pattern)
            for name, pattern in {
                "no_column.csv": "row 1 has no text in the column `path`.*columns: name",
                "case.csv": "names are case-sensitive: wanted `path`, got `Path`; columns",
                "two_names.csv": "two columns have the name 'label'",
                "utf16.txt": "not UTF-8 but UTF-16",
                "utf16.csv": "not UTF-8 but UTF-16",
                "utf16.jsonl": "not UTF-8 but UTF-16",
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
    + ["7z", "only links", "only compressed"]
    + [
        "no tar",
        "cut tar",
        "no_column.csv",
        "case.csv",
        "two_names.csv",
        "utf16.txt",
        "utf16.csv",
        "utf16.jsonl",
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
        list(Listing(inputs))
    assert "s3cret" not in str(caught.value)
