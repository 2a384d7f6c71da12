"""Commands whose standard streams are closed, missing, full, or a pipe without a reader."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbb.extraction import open_features
from fastbb.extraction.progress import Progress

COMMAND = f"{sys.executable} -c 'from fastbb.cli import main; main()'"


def shell(arguments: str, redirections: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{COMMAND} {arguments} {redirections}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("redirections", "code"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 6),
        (">/dev/full 2>/dev/full", 6),
        ("| head -c 0; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_extraction_completes_with_closed_full_or_missing_streams(
    redirections: str, code: int, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = f"extract {images} --out {out} --model nano-resnet-digits"
    result = shell(arguments, redirections)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    features = open_features(out)
    assert features.complete and len(features) == 3
    if redirections == ">/dev/full":
        last = result.stderr.splitlines()[-1]
        assert last == "fastbb: cannot print to the standard output: No space left on device"
        assert shell(f"show {out}", redirections).returncode == 6


@pytest.mark.parametrize("arguments", ["--help", "show --help", "--version", "list nano-resnet*"])
def test_full_stdout_exits_with_6_and_a_closed_pipe_with_0(arguments: str) -> None:
    full = shell(arguments, ">/dev/full")
    assert (full.returncode, full.stderr.count("\n")) == (6, 1), full.stderr
    gone = shell(arguments, "| head -c 0; exit ${PIPESTATUS[0]}")
    assert (gone.returncode, gone.stderr) == (0, "")


@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&-", "", ">&- 2>&-"])
def test_usage_error_exits_with_2_if_stderr_is_full_or_closed(redirections: str) -> None:
    assert shell("nosuchcommand", redirections).returncode == 2
    assert shell("extract", redirections).returncode == 2


def test_progress_with_no_stderr_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(True) as progress:
        progress.say("nobody hears it")
        progress.start(3, 0)
        progress.advance(3)


class Full:
    def write(self, text: str) -> int:
        raise OSError(28, os.strerror(28))

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_progress_on_a_full_stderr_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = Full()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(True) as progress:
        progress.say("nobody hears it")
