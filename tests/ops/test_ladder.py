"""Checks of every op: results in the interpreter, and budgets of its binaries on every GPU."""

import pytest
import torch

from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.case import Case
from fastbb_kernels.cases import small_cases
from fastbb_kernels.check import (
    DTYPE_NAMES,
    check_interpreted,
    compiled_costs,
    compiled_dtypes,
    distinct_cases,
    op_names,
    traced_cost,
)
from fastbb_kernels.testing import ARCHITECTURES
from fastbb_kernels.testing.budget import Budget, read_budget, source_hash, violations

SMALL = small_cases()
# the paths of a kernel do not depend on fp16 or bf16, so fp16 runs one case of each op
ONE_EACH = list({case.op: case for case in reversed(SMALL)}.values())


ALWAYS_COMPILED: tuple[Architecture, ...] = (90, "gfx942")


def within_budget(op: str, costs: dict) -> list[str]:
    return violations(Budget(op, source_hash(op), costs), read_budget(op))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case}")
def test_bf16_kernel_equals_the_reference_within_its_traffic_budget(case: Case) -> None:
    result = check_interpreted(case, torch.bfloat16)
    assert result.problem is None, result.problem
    assert within_budget(case.op, {f"{case}-bf16": traced_cost(result)}) == []


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in SMALL] + [(case, torch.float16) for case in ONE_EACH],
    ids=lambda value: DTYPE_NAMES.get(value) or f"{value.op}-{value}",
)
def test_kernel_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    result = check_interpreted(case, dtype)
    assert result.problem is None, result.problem


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", op_names())
def test_binaries_keep_their_budget(
    op: str, arch: Architecture, request: pytest.FixtureRequest
) -> None:
    if arch not in ALWAYS_COMPILED and not request.config.getoption("--all-architectures"):
        # only the source hash is compared
        assert within_budget(op, {}) == []
        pytest.skip("only its sources are compared; `make test-all` compiles for it")
    cases = distinct_cases()[op]
    costs = compiled_costs(cases, compiled_dtypes(arch), [arch])
    assert within_budget(op, costs) == []
    # a case that compiled before must not become unsupported
    committed = read_budget(op).cases
    for case in cases:
        for dtype in compiled_dtypes(arch):
            name = f"{case}-{DTYPE_NAMES[dtype]}"
            assert (name in costs) == (name in committed and arch in committed[name].binaries), name
