"""Archives: their members, sidecars of WebDataset, damages, replacement."""

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbb.extraction import ImageError, InputError, PlanMismatchError, extract, open_features
from fastbb.extraction import decode as decoding
from fastbb.extraction.decode import read_bytes
from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import Source

BLOCK = tarfile.BLOCKSIZE


def add_member(
    archive: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE
) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
    archive.addfile(member, io.BytesIO(data))


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add_member(archive, name, data)
    return path


def write_zip(
    path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, n_before: int = 0
) -> Path:
    with open(path, "wb") as file:
        file.write(bytes(n_before))
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    return path


WRITERS = {"tar": write_tar, "zip": write_zip}


def names(path: Path) -> list[str]:
    return [source.id for source in Listing([path])]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three members of one header and one block of data each."""
    return write_tar(tmp_path / "x.tar", {f"{i}.jpg": b"data" for i in range(3)})


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "header": lambda data: data[: 2 * BLOCK] + b"\xff" * 200 + data[2 * BLOCK + 200 :],
    "zeroed header": lambda data: data[: 2 * BLOCK] + bytes(BLOCK) + data[3 * BLOCK :],
    "cut in a header": lambda data: data[: 2 * BLOCK + 100],
    "cut between members": lambda data: data[: 4 * BLOCK],
    "cut in the end mark": lambda data: data[: 6 * BLOCK + 100],
    "two in one": lambda data: data + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_refused(archive: Path, damage: str) -> None:
    archive.write_bytes(DAMAGES[damage](archive.read_bytes()))
    with pytest.raises(InputError, match="not a complete, .* damaged or cut off at byte"):
        names(archive)


@pytest.mark.parametrize("n_zeros", [BLOCK, 2 * BLOCK, 3 * 2**20 + BLOCK])
def test_any_number_of_zero_blocks_ends_an_archive(archive: Path, n_zeros: int) -> None:
    archive.write_bytes(archive.read_bytes()[: 6 * BLOCK] + bytes(n_zeros))
    assert names(archive) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_replaced_archive_is_not_resumed(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    files = {f"{i}.bmp": encoded(i, format="BMP") for i in range(4)}
    path = write_tar(tmp_path / "x.tar", files)
    extract(model, path, tmp_path / "out", shard_rows=2)
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    assert extract(model, path, tmp_path / "out", shard_rows=2).resumed_rows == 2
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
    write_tar(path, dict(reversed(files.items())))
    os.utime(path, ns=(time_ns, time_ns + 1))
    assert path.stat().st_size == size
    with pytest.raises(PlanMismatchError, match=f"{path} has changed or is gone since"):
        extract(model, path, tmp_path / "out", shard_rows=2)
    assert open_features(tmp_path / "out").ids == ["0.bmp", "1.bmp"]


def test_tar_members_are_located_and_never_extracted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    long_name = "d" * 150 + "/long.png"
    with tarfile.open(path, "w") as archive:
        add_member(archive, "./b.jpg", b"bbb")
        add_member(archive, "../../escape.jpg", b"eeeee")
        add_member(archive, "a.json", b"{}")
        add_member(archive, "link.jpg", b"", tarfile.SYMTYPE)
        add_member(archive, "device.jpg", b"", tarfile.CHRTYPE)
        add_member(archive, long_name, b"llll")
    listing = Listing([path])
    listed = list(listing)
    assert [source.id for source in listed] == ["b.jpg", "../../escape.jpg", long_name]
    data = path.read_bytes()
    spans = [data[s.offset : (s.offset or 0) + (s.n_bytes or 0)] for s in listed]
    assert spans == [b"bbb", b"eeeee", b"llll"]
    assert listing.skipped == {
        "members that are no plain file": 2,
        "files without an image suffix": 1,
    }
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


@pytest.mark.parametrize(
    "text",
    ["7", "-3", "0", "007", "1_000", "\u0663", "+7", "9" * 5000],
    ids=lambda text: ascii(text[:9]),
)
def test_a_class_is_a_number_only_if_it_is_written_as_one(tmp_path: Path, text: str) -> None:
    (source,) = Listing([write_tar(tmp_path / "x.tar", {"a.jpg": b"x", "a.cls": text.encode()})])
    is_number = text in ("7", "-3", "0")
    assert source.columns == {"cls": int(text) if is_number else text, "__key__": "a"}


FILES = {
    "0001.jpg": b"image 1",
    "0001.json": b'{"caption": "one", "size": [1, 2], "score": NaN, "txt": "hidden by the file"}',
    "0001.txt": "\ufeffgr\u00fcn\n".encode(),
    "0001.cls": b"7\n",
    "sub.d/0002.cls": b"cat",
    "sub.d/0002.seg.png": b"image 2",
    "sub.d/0002.JPG": b"image 3",
    "sub.d/0002.npy": b"array",
    "0003.jpg": b"image 4",
    "0004.json": b"[1]",
    "0004.jpg": b"image 5",
    "0005.jpg": b"image 6",
    "0005.json": b"{broken",
    "0006.txt": b"no image",
    "0007.jpg": b"image 7",
    "0007.json": b"[" * 100_000,
    "0008.jpg": b"image 8",
    "0008.txt": b"",
    "0008.json": b"1" * (2**20 + 1),
    ".hidden.jpg": b"",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_sidecars_become_columns_of_the_images_with_their_key(tmp_path: Path, kind: str) -> None:
    listing = Listing([WRITERS[kind](tmp_path / f"x.{kind}", FILES)])
    listed = list(listing)
    second = {"cls": "cat", "__key__": "sub.d/0002"}
    assert {source.id: source.columns for source in listed} == {
        "0001.jpg": {"caption": "one", "size": [1, 2], "score": None, "txt": "gr\u00fcn", "cls": 7}
        | {"__key__": "0001"},
        "sub.d/0002.seg.png": second,
        "sub.d/0002.JPG": second,
        "0003.jpg": None,
        "0004.jpg": {"json": [1], "__key__": "0004"},
        "0005.jpg": {"__key__": "0005"},
        "0007.jpg": {"__key__": "0007"},
        "0008.jpg": {"txt": "", "__key__": "0008"},
    }
    assert [read_bytes(source) for source in listed] == [b"image %d" % i for i in range(1, 9)]
    assert listing.skipped == {
        "unreadable sidecars": 3,
        "files without an image suffix": 2,
        "hidden files": 1,
    }


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("n_before", [0, 1000])
def test_zip_members_are_read_in_place(tmp_path: Path, method: int, n_before: int) -> None:
    files = {"b.jpg": b"b" * 200_000, "gr\u00fcn/a.jpg": bytes(range(256)), "folder/": b""}
    path = write_zip(tmp_path / "x.zip", files, method, n_before)
    listed = list(Listing([path]))
    assert [source.id for source in listed] == ["b.jpg", "gr\u00fcn/a.jpg"]
    assert [read_bytes(source) for source in listed] == list(files.values())[:2]
    assert os.listdir(tmp_path) == ["x.zip"]


class Unseekable(io.RawIOBase):
    """A stream, in which sizes and checksums of a zip follow the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += data
        return len(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_that_were_streamed_are_read_and_checked(tmp_path: Path, method: int) -> None:
    stream = Unseekable()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a.jpg", b"first")
        archive.writestr("b.jpg", b"second")
    (tmp_path / "x.zip").write_bytes(stream.data)
    first, second = Listing([tmp_path / "x.zip"])
    assert [read_bytes(first), read_bytes(second)] == [b"first", b"second"]
    start = stream.data.index(b"PK\7\x08")
    stream.data[start + 4] ^= 1
    (tmp_path / "x.zip").write_bytes(stream.data)
    with pytest.raises(ImageError, match="corrupt: the checksum in the zip archive differs"):
        read_bytes(first)


def bad_member(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A row of a zip that cannot be read."""
    method = {"lzma": zipfile.ZIP_LZMA, "bit": zipfile.ZIP_STORED}.get(kind, zipfile.ZIP_DEFLATED)
    write_zip(path, {"a.jpg": bytes(100_000)}, method)
    (source,) = Listing([path])
    data = bytearray(path.read_bytes())
    if kind == "encrypted":
        data[6] |= 1
    elif kind == "bit":
        data[1000] ^= 1
    elif kind == "renamed":
        data[30:31] = b"b"
    elif kind == "damaged":
        data[35:45] = b"\xff" * 10
    elif kind == "cut off":
        del data[50:]
    elif kind == "no header":
        del data[20:]
    elif kind == "bomb":
        source = Source("a.jpg", str(path), 0, 1000, "a.jpg")
    elif kind == "short":
        source = Source("a.jpg", str(path), 0, 200_000, "a.jpg")
    elif kind == "large":
        monkeypatch.setattr(decoding, "MAX_BYTES", 99_999)
    path.write_bytes(data)
    return source


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encrypted", "unsupported_format: encrypted in the zip archive"),
        ("lzma", "unsupported_format: zip compression method 14; stored and deflated"),
        ("bit", "corrupt: the checksum in the zip archive differs"),
        ("renamed", "corrupt: not the member that was listed"),
        ("damaged", "corrupt: zip archive: "),
        ("cut off", "truncated: "),
        ("no header", "truncated: the zip archive is cut off"),
        ("bomb", "corrupt: inflates to more than the 1000 bytes it claims"),
        ("short", "truncated: 100000 of 200000 bytes in the zip archive"),
        ("large", "too_many_bytes: 100000 bytes, at most 99999"),
    ],
)
def test_a_bad_zip_member_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        read_bytes(bad_member(kind, tmp_path / "x.zip", monkeypatch))


def test_links_in_a_zip_are_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("__MACOSX/._a.jpg", b"x")
        archive.writestr("a.jpg", b"x")
    listing = Listing([tmp_path / "x.zip"])
    assert [source.id for source in listing] == ["a.jpg"]
    assert listing.skipped == {"members that are no plain file": 1, "hidden files": 1}


@pytest.mark.parametrize("damage", ["cut off", "text", "version"])
def test_a_damaged_zip_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.jpg": b"x"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"PK\1\2") + 6, 99)
    path.write_bytes({"cut off": data[:-30], "text": b"text", "version": bytes(data)}[damage])
    with pytest.raises(InputError, match="not a complete zip archive"):
        names(path)


def test_features_of_a_zip_resume_and_notice_another_archive(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    files = {f"{i}.bmp": encoded(i, format="BMP") for i in range(4)}
    (tmp_path / "in").mkdir()
    path = write_zip(tmp_path / "in" / "x.zip", files)
    extract(model, tmp_path / "in", tmp_path / "out", shard_rows=2)
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    assert extract(model, tmp_path / "in", tmp_path / "out", shard_rows=2).resumed_rows == 2
    assert open_features(tmp_path / "out").ids == [f"x.zip/{i}.bmp" for i in range(4)]
    write_zip(path, dict(reversed(files.items())))
    assert extract(model, tmp_path / "in", tmp_path / "out").tried == 0  # nothing is left in it
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    with pytest.raises(PlanMismatchError, match=f"{path} has changed or is gone since"):
        extract(model, tmp_path / "in", tmp_path / "out")
    path.unlink()
    with pytest.raises(PlanMismatchError, match=f"{path} has changed or is gone since"):
        extract(model, tmp_path / "in", tmp_path / "out")
