"""A .tar archive: complete, damaged, cut off, replaced."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbb.extraction import InputError, PlanMismatchError, extract, open_features
from fastbb.extraction.sources import list_sources

BLOCK = tarfile.BLOCKSIZE


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def names(path: Path) -> list[str]:
    return [source.id for source in list_sources([path], Counter())]


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
