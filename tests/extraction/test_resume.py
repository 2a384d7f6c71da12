"""Processes that are killed and resumed leave the same files as an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from check_interrupts import foreground_signals

from fastbb.extraction import open_features
from fastbb.extraction.job import extract
from fastbb.extraction.store import FeatureWriter

N_IMAGES, SHARD_ROWS = 2000, 256
CORRUPT = {3: b"", 400: b"text", 901: 30, 1300: 45, 1999: 50}
PAUSE_S = 120.0

COMMAND = "from fastbb.cli import main; main()"
# waits after each commit, so that the test sees it before the next
RESTS_AFTER_COMMIT = (
    """
import time
from fastbb.extraction.store import FeatureWriter
commit = FeatureWriter.commit
def resting(self, *content):
    done = commit(self, *content)
    time.sleep(0.3)
    return done
FeatureWriter.commit = resting
"""
    + COMMAND
)
# kills itself between storing the features of the last shard and its commit
DIES_BEFORE_COMMIT = (
    """
import os, signal
from fastbb.extraction import store
write = store.write_file
def dying(path, data):
    if path.name == "commit-00007.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
store.write_file = dying
"""
    + COMMAND
)


@pytest.fixture
def arguments(model: Path, make_images: Callable[..., Path], tmp_path: Path) -> list[str]:
    root = make_images(N_IMAGES)
    for i, content in CORRUPT.items():
        path = root / f"{i:05d}.png"
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    options = {"--out": tmp_path / "out", "--model": model, "--shard-rows": SHARD_ROWS}
    return ["extract", str(root), *(str(part) for pair in options.items() for part in pair)]


def start(arguments: list[str], program: str = COMMAND) -> subprocess.Popen[str]:
    # the order of sums may follow the number of threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", program, *arguments]
    with foreground_signals():
        return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)


def commits(out: Path) -> list[Path]:
    return sorted(out.glob("shards/commit-*.json"))


def committed_files(out: Path) -> list[Path]:
    return [path for commit in commits(out) for path in out.rglob(f"*-{commit.stem[-5:]}.*")]


def wait_for_commits(process: subprocess.Popen[str], out: Path, n: int) -> None:
    give_up = time.monotonic() + PAUSE_S
    while len(commits(out)) < n:
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()
        time.sleep(0.001)


def test_killed_and_resumed_run_is_byte_identical(
    arguments: list[str],
    model: Path,
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    out, root = tmp_path / "out", Path(arguments[1])
    report = extract(model, root, tmp_path / "whole", shard_rows=SHARD_ROWS)
    whole = tree(tmp_path / "whole")
    assert (report.rows, report.ok) == (N_IMAGES, N_IMAGES - len(CORRUPT))

    with start(arguments, RESTS_AFTER_COMMIT) as first:
        wait_for_commits(first, out, 1)
        first.send_signal(signal.SIGINT)
        _, message = first.communicate(timeout=PAUSE_S)
    assert first.returncode == 130 and "the same command again goes on" in message
    assert not list(out.rglob("*.tmp-*"))

    with start(arguments, RESTS_AFTER_COMMIT) as second:
        wait_for_commits(second, out, max(3, len(commits(out)) + 1))
        second.kill()
    n_done = len(commits(out))
    inodes = {path: path.stat().st_ino for path in committed_files(out)}
    assert 3 <= n_done < 8, "it was done before it was killed"

    with start(arguments, DIES_BEFORE_COMMIT) as third:
        _, message = third.communicate(timeout=PAUSE_S)
    assert third.returncode == -signal.SIGKILL, message
    assert f"{n_done} of 8 shards are done" in message
    assert len(commits(out)) == 7 and (out / "shards/index-00007.jsonl").exists()
    assert inodes.items() <= {p: p.stat().st_ino for p in committed_files(out)}.items()
    inodes = {path: path.stat().st_ino for path in committed_files(out)}

    report = extract(model, root, out, shard_rows=SHARD_ROWS)
    assert report.resumed_rows == 7 * SHARD_ROWS
    assert tree(out) == whole
    assert {path: path.stat().st_ino for path in inodes} == inodes

    features = open_features(out)
    assert [error.row for error in features.errors()] == sorted(CORRUPT)
    assert [error.id for error in features.errors()] == [f"{i:05d}.png" for i in sorted(CORRUPT)]
    assert {error.kind for error in features.errors()} <= {
        *("truncated", "corrupt", "unsupported_format")
    }
    assert len(features.ids) == len(features["embedding"]) == N_IMAGES - len(CORRUPT)


def test_a_second_process_is_refused(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    arguments = ["extract", str(make_images(1)), "--out", str(out), "--model", str(model)]
    with FeatureWriter(out), start(arguments) as process:
        _, message = process.communicate(timeout=PAUSE_S)
    assert process.returncode == 5 and f"another process is writing to {out}" in message
