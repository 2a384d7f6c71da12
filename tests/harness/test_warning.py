"""Warnings point at the line of the program, whatever libraries lie between."""

import linecache
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from fastbb_kernels.warning import warn_caller


def function_of(package: str, source: str, **names: Any) -> Callable[..., Any]:
    """Returns the function `run` of a module that pretends to be in a package."""
    module = types.ModuleType(package)
    module.__dict__.update(names)
    exec(compile(source, f"/site-packages/{package}.py", "exec"), module.__dict__)
    return module.run


BETWEEN = ["fastbb.engine.choose", "fastbb_kernels.op", "torch.nn.modules.module", "transformers.m"]


@pytest.mark.parametrize("package", BETWEEN)
def test_the_line_of_the_program_is_named(package: str) -> None:
    inner = function_of("fastbb.inner", "def run(): warn('text', UserWarning)", warn=warn_caller)
    between = function_of(package, "def run(): inner()", inner=inner)
    with pytest.warns(UserWarning, match="^text$") as warned:
        between()  # this line
    (warning,) = warned
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).strip() == "between()  # this line"


def test_code_that_torch_generated_is_passed_over() -> None:
    names: dict[str, Any] = {"warn": warn_caller}  # without a __name__, as that of torch.fx
    exec("def run(): warn('text')", names)
    del names["__builtins__"]
    with pytest.warns(UserWarning) as warned:
        names["run"]()
    assert [warning.filename for warning in warned] == [__file__]


def test_the_usual_filter_shows_a_line_once_and_another_again() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_caller("text")
        warn_caller("text")
    assert len(shown) == 2 and shown[0].lineno + 1 == shown[1].lineno


def test_a_program_of_ours_alone_is_named_itself() -> None:
    program = (
        "from fastbb_kernels.warning import warn_caller; __name__ = 'fastbb'; warn_caller('t')"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stderr.splitlines()[0] == "<string>:1: UserWarning: t"
