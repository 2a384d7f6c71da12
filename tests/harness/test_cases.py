"""Files and cases of every op and every family of models are found."""

from pathlib import Path

import pytest

import fastbb_kernels
from fastbb_kernels.cases import (
    FAMILIES,
    MODELS,
    checked_cases,
    model_cases,
    real_cases,
    small_cases,
)
from fastbb_kernels.op import find_op, op_names

PACKAGE = Path(fastbb_kernels.__file__).parent
TESTS = Path(__file__).parent.parent


def test_every_op_with_a_kernel_is_found() -> None:
    written = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    with_kernel = written & {path.stem for path in (PACKAGE / "triton_kernels").glob("*.py")}
    assert set(op_names()) == with_kernel - {"__init__"}
    with pytest.raises(AttributeError, match="has no attribute 'no_op'"):
        _ = fastbb_kernels.no_op  # pyright: ignore[reportAttributeAccessIssue] - it is not there


@pytest.mark.parametrize("op", op_names())
def test_every_op_has_a_budget_tests_and_cases(op: str) -> None:
    assert (PACKAGE / "budgets" / f"{op}.json").is_file()
    assert (TESTS / "ops" / f"test_{op}.py").is_file()
    assert find_op(op).call is getattr(fastbb_kernels, op)
    for cases in (small_cases(), checked_cases()):
        assert any(case.op == op for case in cases)


def test_every_family_is_found() -> None:
    files = list(PACKAGE.glob("*_cases.py"))
    assert len(FAMILIES) == len(files) >= 2
    assert {"swin_t", "resnet50"} <= set(MODELS) and len(set(MODELS)) == len(MODELS)
    for model in MODELS:
        names = {case.name for case in model_cases(model, (224, 224), 1)}
        assert names and names <= {case.name for case in real_cases()}


def test_case_names_are_unique() -> None:
    for cases in (small_cases(), real_cases()):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("model", MODELS)
def test_calls_of_a_model_have_names_of_their_own(model: str) -> None:
    names = [case.name for case in model_cases(model, (224, 224), 64)]
    assert len(set(names)) == len(names)  # `real_cases` drops the second of a name
