"""Floors of a forward pass: every launch is there once, and each counts by its largest floor."""

import pytest
import torch
from floors import OTHERS, ForwardFloors, forward_floors, kernels, summary

from fastbb import AutoBackbone, ResNetConfig, SwinConfig
from fastbb.bench.traffic import count_backbone
from fastbb_kernels.testing import ARCHITECTURES

CONFIG = SwinConfig(embed_dim=32, depths=[2], num_heads=[1], image_size=56)
PIXELS = torch.empty(2, 3, 56, 56, dtype=torch.bfloat16, device="meta")


@pytest.fixture(scope="module")
def found() -> ForwardFloors:
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(CONFIG).eval().to(torch.bfloat16)
    return forward_floors(backbone, PIXELS, ARCHITECTURES[90], "Swin")


def test_every_launch_counts(found: ForwardFloors) -> None:
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(CONFIG).eval()
    launches = count_backbone(backbone, PIXELS)
    assert sum(kernel.times for kernel in found.kernels) + found.n_others == len(launches)
    ours = [one for one in launches if one.name.endswith("_kernel")]
    assert sum(k.times * k.floors.minimal_bytes for k in found.kernels) == pytest.approx(
        sum(one.n_bytes for one in ours), rel=0.05
    )


def test_a_convolution_of_a_library_counts_once() -> None:
    config = ResNetConfig(embedding_size=32, hidden_sizes=[64, 128], depths=[1, 2])
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(config).eval().to(torch.bfloat16)
    row = forward_floors(backbone, PIXELS, ARCHITECTURES[90], "ResNet")
    launches = count_backbone(backbone, PIXELS)
    # one of stride 2, which cuDNN computes without an activation: a kernel of ours follows
    assert {"convolution", "_bias_act_fwd_kernel"} <= {one.name for one in launches}
    assert sum(kernel.times for kernel in row.kernels) + row.n_others == len(launches)
    # of maps as small as these, the bytes bound all of them
    others = [one for one in launches if "convolution" in one.name or "bias_act" in one.name]
    n_bytes = sum(one.n_bytes for one in others)
    assert row.n_others == len(others)
    assert row.others_us == pytest.approx(1e6 * n_bytes / ARCHITECTURES[90].dram_bytes_per_s)


def test_equal_calls_are_one_kernel(found: ForwardFloors) -> None:
    names = [kernel.floors.op for kernel in found.kernels]
    assert len(names) < sum(kernel.times for kernel in found.kernels)
    # the second block shifts its windows
    assert len(set(names)) < len(names)


def test_the_sum_is_that_of_the_largest_floors(found: ForwardFloors) -> None:
    assert found.us == pytest.approx(
        sum(k.times * max(k.floors.floors.values()) for k in found.kernels) + found.others_us
    )
    assert sum(found.bounds.values()) == pytest.approx(found.us)
    assert found.bounds[OTHERS] == found.others_us >= 0


def test_tables_have_a_row_for_each_model_and_kernel(found: ForwardFloors) -> None:
    assert f"| {found.us:.0f} |" in " ".join(summary([found]).split())
    assert len(kernels(found).splitlines()) == 2 + len(found.kernels)
    assert kernels(found).count("**") == 2 * len(found.kernels)  # the largest of each
