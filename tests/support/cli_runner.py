"""Test runner of click with separate stdout and stderr, which click before 8.2 mixes."""

import inspect
from typing import Any

from click.testing import CliRunner


def cli_runner() -> CliRunner:
    apart: dict[str, Any] = {"mix_stderr": False}
    old = "mix_stderr" in inspect.signature(CliRunner).parameters
    return CliRunner(**apart) if old else CliRunner()
