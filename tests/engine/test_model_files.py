"""Folders of converted models: what stays, what goes, and disks that refuse."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbb.engine import model_files
from fastbb.engine.model_files import ModelFiles


def content(size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "data").write_bytes(bytes(size))

    return write


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "models", max_bytes=3500)
    for age, key in enumerate(("a", "b", "c")):
        assert files.keep(key, content(1000))
        os.utime(files.directory / key, (10 + age, 10 + age))
    assert files.find("a")  # which is used now
    assert files.keep("d", content(1000))
    assert sorted(entry.name for entry in files.directory.iterdir()) == ["a", "c", "d"]
    assert files.find("b") is None and not files.notes


def test_a_crashed_process_leaves_nothing_for_ever(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, max_bytes=1500)
    left = tmp_path / ".new-crashed"
    left.mkdir()
    content(1000)(left)
    assert files.keep("a", content(1000)) and left.exists()  # it may be written still
    os.utime(left, (1, 1))
    assert files.keep("b", content(1000)) and not left.exists()


def test_a_kept_folder_of_another_process_is_taken(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    first = files.keep("a", content(10))
    assert files.keep("a", content(20)) == first
    assert first is not None and (first / "data").stat().st_size == 10 and not files.notes


def refused(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("method", ["exists", "read_bytes"])
def test_what_cannot_be_read_is_left_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(tmp_path)
    entry = files.keep("a", content(10))
    assert entry is not None
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refused)
        assert files.find("a") is None
    assert files.notes == [f"{entry} cannot be read: Permission denied"]
    assert files.find("a") == entry


def test_what_cannot_be_removed_costs_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(tmp_path)
    files.keep("a", content(10))
    monkeypatch.setattr(Path, "is_dir", refused)
    files.remove("a", "it is wrong")
    assert files.notes == [f"converted anew, {tmp_path / 'a'} is broken: it is wrong"]


def test_a_model_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, max_bytes=2**30 // 10**3)
    assert files.keep("a", content(10)) and files.keep("b", content(2 * 10**6)) is None
    assert files.notes == [f"not kept in {tmp_path}: larger than 0.001 GiB"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_stays_on_disk_is_not_counted_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(tmp_path, max_bytes=2500)
    for age, key in enumerate(("a", "b")):
        files.keep(key, content(1000))
        os.utime(tmp_path / key, (10 + age, 10 + age))
    delete = model_files._delete
    # the files of the first are another user's
    monkeypatch.setattr(
        model_files, "_delete", lambda folder: None if folder.name == "a" else delete(folder)
    )
    assert files.keep("c", content(1000))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "c"]


def test_where_no_room_can_be_made_the_model_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(tmp_path)
    monkeypatch.setattr(Path, "iterdir", fails_in(tmp_path, Path.iterdir))
    assert files.keep("a", content(10)) == tmp_path / "a"
    assert files.notes == [f"{tmp_path} may grow too large: Permission denied"]


def fails_in(folder: Path, iterdir: Any) -> Any:
    return lambda path: refused() if path == folder else iterdir(path)
