"""Result cache on disk: results outlive a process, and broken files do no harm."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest

from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

MACHINE = Machine("GPU", "9.0", "570", "2.9", "3.5", "0.1.0", "abc", "")
OTHER = replace(MACHINE, fastbb="0.2.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fastbb"


def content(**changes: object) -> bytes:
    good = {"format": 1, "machine": asdict(MACHINE), "results": {"times": {"a": 1}}}
    return json.dumps({**good, **changes}).encode()


def test_results_are_read_by_a_new_cache_object(folder: Path) -> None:
    cache = ResultCache(MACHINE, folder)
    assert cache.get("times", "a") is None and cache.items("times") == {}
    cache.put("times", "a", {"median_s": 0.25, "name": "größer", "tries": (1, 2)})
    cache.put("times", "b", None)
    cache.put("self_check", "a", False)
    for same in (cache, ResultCache(MACHINE, folder)):
        # values are converted as by JSON, at once
        assert same.get("times", "a") == {"median_s": 0.25, "name": "größer", "tries": [1, 2]}
        assert same.items("times").keys() == {"a", "b"}
        assert same.items("self_check") == {"a": False}
        assert same.notes == []
    assert cache.path.parent == folder and cache.path.name == f"{MACHINE.key}.json"
    assert [path.suffix for path in sorted(folder.iterdir())] == [".json", ".lock"]


def test_a_value_that_json_cannot_hold_is_refused_and_leaves_nothing(folder: Path) -> None:
    cache = ResultCache(MACHINE, folder)
    with pytest.raises(TypeError):
        cache.put("times", "a", object())
    assert cache.items("times") == {} and not folder.exists()


def test_machines_do_not_share_results(folder: Path) -> None:
    ResultCache(MACHINE, folder).put("times", "a", 1)
    other = ResultCache(OTHER, folder)
    assert other.get("times", "a") is None and other.notes == []


UNUSABLE = {
    "empty": (b"", "Expecting value"),
    "cut": (content()[:-9], ""),
    "binary": (b"\x80\x04\x95\xff", ""),
    "nested": (b"[" * 100_000, ""),
    "list": (b"[]", "not a cache of format 1"),
    "format": (content(format=2), "not a cache of format 1"),
    "version": (content(machine=asdict(OTHER)), "another machine or version"),
    "results": (content(results=[1]), "not sections of results"),
    "section": (content(results={"times": 3}), "not sections of results"),
}


@pytest.mark.parametrize("written, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_is_ignored_then_replaced(
    written: bytes, reason: str, folder: Path
) -> None:
    folder.mkdir(parents=True)
    (folder / f"{MACHINE.key}.json").write_bytes(written)
    cache = ResultCache(MACHINE, folder)
    assert cache.items("times") == {}
    (note,) = cache.notes
    assert note.startswith(f"ignored {cache.path}: ") and reason in note
    cache.put("times", "b", 2)
    assert len(cache.notes) == 1
    again = ResultCache(MACHINE, folder)
    assert again.items("times") == {"b": 2} and again.notes == []


def test_valid_file_is_read(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / f"{MACHINE.key}.json").write_bytes(content())
    assert ResultCache(MACHINE, folder).items("times") == {"a": 1}


def test_a_large_file_is_not_read(folder: Path) -> None:
    folder.mkdir(parents=True)
    path = folder / f"{MACHINE.key}.json"
    path.write_bytes(content() + b" " * 16 * 2**20)
    cache = ResultCache(MACHINE, folder)
    assert cache.items("times") == {} and "wanted at most 16777216" in cache.notes[0]


def directory(path: Path) -> None:
    path.mkdir(parents=True)


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path)


def file_above(path: Path) -> None:
    path.parent.parent.mkdir(parents=True)
    path.parent.write_text("in the way")


@pytest.mark.parametrize(
    "make, writable",
    [(directory, False), (pipe, True), (loop, True), (file_above, False)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_path_that_is_no_file_is_ignored(
    make: Callable[[Path], None], writable: bool, folder: Path
) -> None:
    make(folder / f"{MACHINE.key}.json")
    cache = ResultCache(MACHINE, folder)
    assert cache.items("times") == {} and cache.notes[0].startswith(f"ignored {cache.path}: ")
    cache.put("times", "a", 1)
    assert cache.get("times", "a") == 1
    assert (ResultCache(MACHINE, folder).get("times", "a") == 1) == writable
    assert any("cannot be written" in note for note in cache.notes) == (not writable)


def test_failed_writes_keep_results_in_memory(folder: Path) -> None:
    cache = ResultCache(MACHINE, folder)
    with mock.patch("tempfile.mkstemp", side_effect=OSError(28, "No space left on device", "x1")):
        cache.put("times", "a", 1)
    with mock.patch("os.replace", side_effect=PermissionError(13, "Permission denied", "x2")):
        cache.put("times", "b", 2)
        cache.put("times", "c", 3)
    assert cache.items("times") == {"a": 1, "b": 2, "c": 3}
    assert [note.rpartition(": ")[2] for note in cache.notes] == [
        "No space left on device",
        "Permission denied",
    ]
    assert list(folder.glob("*.tmp")) == list(folder.glob(".*.tmp")) == []
    # when the disk has room again, nothing is missing
    cache.put("times", "d", 4)
    assert ResultCache(MACHINE, folder).items("times") == {"a": 1, "b": 2, "c": 3, "d": 4}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_keeps_results_in_memory(folder: Path) -> None:
    ResultCache(MACHINE, folder).put("times", "a", 1)
    folder.chmod(0o500)
    try:
        cache = ResultCache(MACHINE, folder)
        cache.put("times", "b", 2)
    finally:
        folder.chmod(0o700)
    assert cache.items("times") == {"a": 1, "b": 2} and "Permission denied" in cache.notes[0]


def test_results_of_another_process_are_kept(folder: Path) -> None:
    ours, theirs = ResultCache(MACHINE, folder), ResultCache(MACHINE, folder)
    theirs.put("times", "a", "theirs")
    theirs.put("self_check", "a", "theirs")
    ours.put("times", "b", "ours")
    assert ours.get("self_check", "a") == "theirs"
    theirs.put("times", "a", "newer")
    theirs.put("times", "b", "newer")
    ours.put("times", "c", "ours")
    assert ResultCache(MACHINE, folder).items("times") == {"a": "newer", "b": "newer", "c": "ours"}


def test_another_process_waits_while_one_writes(folder: Path) -> None:
    ours, theirs = ResultCache(MACHINE, folder), ResultCache(MACHINE, folder)
    writer = threading.Thread(target=theirs.put, args=("times", "theirs", 1))
    write = ours._write

    def slowly() -> None:  # after our last look at the file
        writer.start()
        writer.join(0.2)
        write()

    with mock.patch.object(ours, "_write", slowly):
        ours.put("times", "ours", 1)
    writer.join()
    assert ResultCache(MACHINE, folder).items("times") == {"ours": 1, "theirs": 1}


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from fastbb_kernels.machine import Machine\n"
        "from fastbb_kernels.result_cache import ResultCache\n"
        f"cache = ResultCache({MACHINE!r}, Path({str(folder)!r}))\n"
        "sys.stdin.readline()\n"
        "for i in range(40): cache.put(sys.argv[1], str(i), i)\n"
        "assert cache.notes == [], cache.notes"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, name], stdin=subprocess.PIPE)
        for name in ("a", "b")
    ]
    path = folder / f"{MACHINE.key}.json"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    while any(process.poll() is None for process in processes):
        if path.exists():
            json.loads(path.read_bytes())  # never torn
        time.sleep(0.001)
    assert [process.returncode for process in processes] == [0, 0]
    cache = ResultCache(MACHINE, folder)
    for name in ("a", "b"):
        assert cache.items(name) == {str(i): i for i in range(40)}


def test_threads_that_write_at_once_lose_nothing(folder: Path) -> None:
    cache = ResultCache(MACHINE, folder)

    def write(name: str) -> None:
        for i in range(20):
            cache.put("times", f"{name}{i}", i)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ResultCache(MACHINE, folder).items("times")) == 40


def test_a_lock_that_is_never_released_is_not_waited_for(folder: Path) -> None:
    import fcntl

    cache = ResultCache(MACHINE, folder)
    folder.mkdir(parents=True)
    with (
        open(cache.path.with_suffix(".lock"), "w") as held,
        mock.patch("fastbb_kernels.result_cache._LOCK_TIMEOUT_S", 0.05),
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.put("times", "a", 1)
    assert ResultCache(MACHINE, folder).get("times", "a") == 1


def test_cache_path_follows_xdg_cache_home_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ResultCache(MACHINE).path.parent == tmp_path / "xdg" / "fastbb"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert ResultCache(MACHINE).path.parent == tmp_path / "home" / ".cache" / "fastbb"


def test_user_without_a_home_keeps_results_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with mock.patch("os.path.expanduser", lambda path: path):
        cache = ResultCache(MACHINE)
    cache.put("times", "a", 1)
    assert cache.get("times", "a") == 1 and "cannot be written" in cache.notes[-1]
