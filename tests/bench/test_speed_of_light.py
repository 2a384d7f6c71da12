"""Report of floors: a kernel executes at least as much as its result needs."""

import pytest
from speed_of_light import markdown, speed_of_light

from fastbb_kernels.swin_cases import SWINS, swin_cases
from fastbb_kernels.testing import ARCHITECTURES

CASES = {case.name: case for case in swin_cases(SWINS["swin_t"], (224, 224), 7, 64)}


@pytest.mark.parametrize("place", ["stage1-proj", "stage1-attention-shifted", "stage2-mlp"])
def test_floors_are_those_of_the_launched_binary(place: str) -> None:
    row = speed_of_light(CASES[f"swin_t-224-b64-{place}"], ARCHITECTURES[90])
    assert row is not None
    assert row.mma_flops >= row.flops > 0
    assert row.requested_bytes >= row.minimal_bytes > 0
    assert row.issue_us is not None
    assert row.floor_us >= max(row.dram_us, row.issue_us) > 0
    assert row.spills == 0
    assert "not measured" in markdown([row])


def test_kernel_that_does_not_run_on_an_architecture_has_no_row() -> None:
    cases = {case.name: case for case in swin_cases(SWINS["swin_b"], (224, 224), 7, 1)}
    case = cases["swin_b-224-b1-stage2-block"]
    assert speed_of_light(case, ARCHITECTURES[120]) is None


def test_instructions_of_tensor_memory_are_not_counted() -> None:
    row = speed_of_light(CASES["swin_t-224-b64-stage1-proj"], ARCHITECTURES[100])
    assert row is not None and row.issue_us is None
