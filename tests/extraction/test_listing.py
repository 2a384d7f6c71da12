import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import InputError, Source


def ids(*inputs: str | Path) -> list[str]:
    return [source.id for source in Listing(inputs)]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def write_tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    return path


def write_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


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
    listing = Listing([root])
    assert [source.id for source in listing] == ["a.jpg"]
    assert listing.skipped == {
        "symbolic links": 3,
        "files without an image suffix": 1,
        "hidden files": 2,
        "hidden folders": 1,
    }
    assert listing.passed_over() == (
        "passed over: 3 symbolic links (--follow-symlinks follows them), "
        "1 file without an image suffix, 2 hidden files, 1 hidden folder"
    )
    assert list(listing) and listing.skipped["symbolic links"] == 3  # an iteration starts anew


def test_nothing_passed_over_is_no_line(tmp_path: Path) -> None:
    listing = Listing([touch(tmp_path, "a.jpg")])
    assert list(listing) and listing.passed_over() == ""


def test_one_link_and_one_archive_are_named_in_the_singular(tmp_path: Path) -> None:
    write_tar(touch(tmp_path, "a.jpg") / "x.tar", "b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    listing = Listing([tmp_path])
    assert [source.id for source in listing] == ["a.jpg"]
    assert listing.passed_over() == (
        "passed over: 1 symbolic link (--follow-symlinks follows it), "
        "1 archive (name it as an input)"
    )


def test_links_are_followed_on_demand_and_loops_counted(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "a.jpg", "sub/b.jpg", ".hidden/x.jpg")
    outside = touch(tmp_path / "outside", "deep/c.jpg", "d.jpg")
    (root / "file.jpg").symlink_to(outside / "d.jpg")
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(outside)  # two ways to a directory are no loop
    (outside / "deep" / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to("..")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "broken.jpg").symlink_to("nothing.jpg")  # a failed row, as any missing file
    listing = Listing([root], follow_symlinks=True)
    listed = {source.id: source.path for source in listing}
    assert list(listed) == [
        *("a.jpg", "again/d.jpg", "again/deep/c.jpg", "broken.jpg", "file.jpg"),
        *("linked/d.jpg", "linked/deep/c.jpg", "sub/b.jpg"),
    ]
    assert listed["linked/d.jpg"] == f"{root}/linked/d.jpg"
    assert listing.skipped == {"symbolic link loops": 4, "hidden folders": 1}
    assert "4 symbolic link loops" in listing.passed_over()


def test_links_are_followed_in_globs(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "a.jpg")
    (root / "linked").symlink_to(touch(tmp_path / "outside", "b.jpg", "c.png"))
    listing = Listing([f"{root}/*/*.jpg"], follow_symlinks=True)
    assert [source.id for source in listing] == ["linked/b.jpg"]


def test_a_link_given_as_the_input_is_followed(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a.jpg")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "one.jpg").symlink_to("real/a.jpg")
    assert ids(tmp_path / "link") == ["a.jpg"]
    assert ids(f"{tmp_path}/link/*.jpg") == ["a.jpg"]
    assert ids(tmp_path / "one.jpg") == [str(tmp_path / "one.jpg")]


def test_formats_that_are_not_read_are_listed_so_that_they_fail_visibly(tmp_path: Path) -> None:
    touch(tmp_path, "phone.HEIC", "drawing.svg", "print.eps")
    assert ids(tmp_path) == ["drawing.svg", "phone.HEIC", "print.eps"]


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(raw, "wb") as file:
        file.write(b"x")
    (source,) = Listing([tmp_path])
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
    (source,) = Listing(["./x/odd[1].jpg"])
    assert source == Source("x/odd[1].jpg", str(tmp_path / "x/odd[1].jpg"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    write_tar(root / "b" / "1.tar", "x.jpg", "y.jpg")
    write_tar(root / "a.tar", "x.jpg")
    write_zip(root / "c.zip", "z.png")
    write_tar(root / "empty.tar", "readme.md")
    return touch(root, "sizes.json", ".hidden.tar", "meta.parquet", "old.tar.gz")


def test_a_directory_without_images_is_a_set_of_archives(shards: Path) -> None:
    listing = Listing([shards])
    listed = list(listing)
    assert [s.id for s in listed] == [
        "a.tar/x.jpg",
        "b/1.tar/x.jpg",
        "b/1.tar/y.jpg",
        "c.zip/z.png",
    ]
    assert listed[0].path == str(shards / "a.tar")
    assert sorted(listing.archives) == [f"{shards}/{n}" for n in ("a.tar", "b/1.tar", "c.zip")]
    status = os.stat(shards / "a.tar")
    state = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert listing.archives[str(shards / "a.tar")] == state
    assert listing.passed_over() == (
        "passed over: 2 files without an image suffix, 1 hidden file, "
        "1 Parquet file (name it as an input), 1 compressed archive (unpack it)"
    )


def test_archives_beside_images_are_counted(shards: Path) -> None:
    touch(shards, "b/cover.jpg")
    listing = Listing([shards])
    assert [source.id for source in listing] == ["b/cover.jpg"]
    assert listing.skipped["archives"] == 4 and not listing.archives
    assert "4 archives (name them as inputs)" in listing.passed_over()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", ["a.tar/x.jpg"]),
        ("**/*.tar", ["a.tar/x.jpg", "b/1.tar/x.jpg", "b/1.tar/y.jpg"]),
        ("b/*", ["1.tar/x.jpg", "1.tar/y.jpg"]),
        ("[ac].*", ["a.tar/x.jpg", "c.zip/z.png"]),
        ("{c.zip,a.tar}", ["c.zip/z.png", "a.tar/x.jpg"]),
        ("{b,a}{/1,}.tar", None),
        ("{b,.}/*.tar", ["b/1.tar/x.jpg", "b/1.tar/y.jpg", "./a.tar/x.jpg"]),
        ("b/{1..1}.tar", ["1.tar/x.jpg", "1.tar/y.jpg"]),
        ("{b,a.tar}", ["b/1.tar/x.jpg", "b/1.tar/y.jpg", "a.tar/x.jpg"]),
    ],
    ids=str,
)
def test_globs_and_braces_of_archives_are_sets(
    shards: Path, pattern: str, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(InputError, match=r"2 of the 4 files of this pattern do not exist: .*"):
            ids(f"{shards}/{pattern}")
    else:
        assert ids(f"{shards}/{pattern}") == expected


def test_braces_expand_in_order_with_leading_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"{part}/{i:03}.jpg" for part in ("val", "train") for i in range(8, 12)))
    touch(tmp_path, "val/7.jpg", "odd{1,2}.jpg")
    monkeypatch.chdir(tmp_path)
    names = [f"{part}/{i:03}.jpg" for part in ("train", "val") for i in (11, 10, 9, 8)]
    assert ids("{train,val}/{011..008}.jpg") == names
    assert ids("val/{7..7}.jpg") == ["7.jpg"]
    assert ids("odd{1,2}.jpg") == ["odd{1,2}.jpg"]  # a file of this name is there
    with pytest.raises(InputError, match=r"1 of the 2 files .* do not exist: val/8.jpg"):
        ids("val/{7..8}.jpg")
    with pytest.raises(InputError, match="names at most 1,000,000 files"):
        ids("val/{0..99999999999}.jpg")


def test_archives_given_one_by_one_keep_the_names_of_their_members(shards: Path) -> None:
    assert ids(shards / "b" / "1.tar", shards / "c.zip") == ["x.jpg", "y.jpg", "z.png"]
    with pytest.raises(InputError, match=r"the id 'x.jpg': .*a.tar and .*1.tar; give their common"):
        ids(shards / "a.tar", shards / "b" / "1.tar")


METADATA = {
    "metadata.csv": "file_name,label\r\nsub/b.jpg,7\r\n./a.jpg,\r\ngone.jpg,1\r\n",
    "metadata.jsonl": '{"file_name": "sub/b.jpg", "label": "7"}\n'
    '{"file_name": "./a.jpg", "label": ""}\n{"file_name": "gone.jpg", "label": "1"}\n',
}


@pytest.mark.parametrize("name", METADATA)
def test_columns_of_metadata_travel_with_the_images_of_a_directory(
    tmp_path: Path, name: str
) -> None:
    (touch(tmp_path, "a.jpg", "c.jpg", "sub/b.jpg") / name).write_text(METADATA[name])
    listing = Listing([tmp_path])
    columns = {source.id: source.columns for source in listing}
    assert columns == {"a.jpg": {"label": ""}, "c.jpg": None, "sub/b.jpg": {"label": "7"}}
    assert listing.passed_over() == "passed over: 1 metadata row without an image"


def test_metadata_without_a_file_name_is_an_ordinary_file(tmp_path: Path) -> None:
    (touch(tmp_path, "a.jpg") / "metadata.csv").write_text('name\n"a\n')
    listing = Listing([tmp_path])
    assert [source.columns for source in listing] == [None]
    assert listing.skipped == {"files without an image suffix": 1}


def test_metadata_that_names_an_image_twice_is_an_error(tmp_path: Path) -> None:
    (touch(tmp_path, "a.jpg") / "metadata.csv").write_text("file_name\na.jpg\n./a.jpg\n")
    with pytest.raises(InputError, match="'a.jpg' is in two rows; give the file itself"):
        ids(tmp_path)
    assert ids(tmp_path / "metadata.csv") == ["a.jpg", "./a.jpg"]


def test_the_same_image_may_be_listed_twice(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    assert ids(tmp_path / "list.txt") == ["a.jpg", "b.jpg", "a.jpg"]
