"""Inputs that would block a listing, or that end in errors of the libraries that read them."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import InputError

BLOCK = tarfile.BLOCKSIZE


def make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.parquet"])
def test_pipes_and_devices_in_a_directory_are_passed_over(
    tmp_path: Path, name: str, kind: str
) -> None:
    make_special(tmp_path / name, kind)
    listing = Listing([tmp_path], follow_symlinks=True)
    with pytest.raises(InputError, match="1 archive or Parquet file that is no plain file"):
        list(listing)
    (tmp_path / "b.jpg").touch()
    assert [source.id for source in listing] == ["b.jpg"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.parquet", "a.csv"])
def test_pipes_and_devices_are_no_inputs(tmp_path: Path, name: str, kind: str) -> None:
    make_special(tmp_path / name, kind)
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        list(Listing([tmp_path / name]))


def header(name: str, kind: bytes, data: bytes, **fields: Any) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def pax(**records: str) -> bytes:
    lines = b""
    for name, value in records.items():
        rest = f" {name.replace('__', '.')}={value}\n".encode()
        n = len(rest)
        while len(str(n)) + len(rest) != n:
            n = len(str(n)) + len(rest)
        lines += str(n).encode() + rest
    return header("pax", tarfile.XHDTYPE, lines)


HEADERS = {
    "chained long names": header("long", tarfile.GNUTYPE_LONGNAME, b"name\0") * 3000,
    "sparse size": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="x"),
    "sparse map": pax(GNU__sparse__map="a,b"),
    "huge size": header("a.jpg", tarfile.REGTYPE, b"", size=2**63 - 1) * 2,
    "huge long name": header("a", tarfile.GNUTYPE_LONGNAME, b"", size=2**62),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_archive_is_named(tmp_path: Path, name: str) -> None:
    file = header("a.jpg", tarfile.REGTYPE, b"x")
    (tmp_path / "x.tar").write_bytes(HEADERS[name] + file + bytes(2 * BLOCK))
    with pytest.raises(InputError, match=r"x\.tar: not a complete, uncompressed tar archive: \S"):
        list(Listing([tmp_path / "x.tar"]))


def parquet_file(path: Path, columns: dict[str, Any]) -> bytes:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    path.write_bytes(file.getvalue())
    return file.getvalue()


def test_paths_beside_images_are_texts(tmp_path: Path) -> None:
    parquet_file(tmp_path / "x.parquet", {"image": [{"bytes": b"x", "path": 3}]})
    with pytest.raises(InputError, match="column image.path: wanted texts, got int64"):
        list(Listing([tmp_path / "x.parquet"]))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.table([["a.jpg"], [1], [2]], names=["path", "label", "label"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="two columns have the name 'label'"):
        list(Listing([tmp_path / "x.parquet"]))


def test_any_damage_of_a_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    image = {"bytes": b"x", "path": "a.jpg"}
    data = parquet_file(path, {"image": [image, image], "label": [1, 2]})
    n_refused = 0
    for position in range(0, len(data), 4):
        damaged = bytearray(data)
        damaged[position] ^= 0x80
        path.write_bytes(damaged)
        try:
            list(Listing([path]))
        except InputError as error:
            assert "x.parquet" in str(error)
            n_refused += 1
    assert n_refused > 25
