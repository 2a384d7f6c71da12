"""Warnings of a command: one line that says what, without the file that raised it."""

import subprocess
import sys
import warnings
from typing import Any

import click
import pytest
from cli_runner import cli_runner

from fastbb.cli import main
from fastbb.engine.settings import EngineWarning


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that warns."""

    @click.command()
    def warning() -> None:
        warnings.warn("eager runs: \x1b[2J", EngineWarning, stacklevel=1)
        warnings.warn("of another library", stacklevel=1)

    monkeypatch.setitem(main.commands, "warning", warning)
    return "warning"


def test_a_command_shows_warnings_without_paths(command: str) -> None:
    before: Any = warnings.showwarning
    result = cli_runner().invoke(main, [command])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        r"fastbb: warning: eager runs: \x1b[2J",
        "fastbb: warning: of another library",
    ]
    assert warnings.showwarning is before


def test_a_warning_of_the_engine_is_one_line_of_the_process() -> None:
    program = (
        "from fastbb.cli import main\n"
        "from fastbb.engine import ways\n"
        "def compile_maps(*_): raise RuntimeError('no compiler here')\n"
        "ways.compile_maps = compile_maps\n"
        "main(['verify-model', 'nano-resnet-digits', '--mode', 'compile', '--size', '32x32'])\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    (line,) = [line for line in shown.stderr.splitlines() if "no compiler here" in line]
    assert line.startswith("fastbb: warning: ResNetBackbone in fp32 on cpu: compile is off, ")
    assert "Warning:" not in shown.stderr and "warn_" not in shown.stderr
