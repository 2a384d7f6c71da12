"""Coverage of the first-launch check: it launches every binary of the production models."""

from unittest import mock

import pytest
import torch

from fastbb_kernels import launching
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.check import first_launches, report_first_launches

BATCHES = (1, 8, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize("model", ["swin_t", "swin_b", "resnet50"])
def test_every_production_binary_is_covered(
    model: str, arch: Architecture, dtype: torch.dtype
) -> None:
    found = first_launches(model, BATCHES, dtype, arch)
    assert found.n_binaries >= 10
    assert found.missed == ()


def test_launch_without_its_configuration_is_not_covered() -> None:
    """Control for the test above."""
    with mock.patch("fastbb_kernels.check.forced", lambda configs: launching.forced({})):
        assert len(first_launches("swin_t", BATCHES, torch.bfloat16, 90).missed) > 5


def test_the_report_counts_binaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_first_launches([90], [torch.bfloat16]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.endswith(", all are covered") for line in lines[1:])
