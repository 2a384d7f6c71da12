"""Number of binaries of a model: other batch sizes add few, whichever came first.

The models are on the meta device and run every batch from 1 to 64; nothing compiles. They have two
blocks per stage instead of up to six; a test checks that more blocks add no binary.
"""

from functools import cache
from typing import Any

import pytest
import torch

from fastbb import ResNetConfig, SwinConfig
from fastbb.backbone.base import Backbone
from fastbb.models.resnet import ResNetBackbone
from fastbb.models.swin import SwinBackbone
from fastbb_kernels import use_impl
from fastbb_kernels.testing import ARCHITECTURES, record_launches

STAGES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BATCHES = range(1, 65)
MOST_NEW = 11
TWO = (2, 2, 2, 2)
DEPTHS = {"swin_t": (2, 2, 6, 2), "resnet50": (3, 4, 6, 3)}


@cache
def backbone(name: str, depths: tuple[int, ...]) -> Backbone:
    with torch.device("meta"):
        if name == "swin_t":
            model = SwinBackbone(SwinConfig(**STAGES, depths=depths))
        else:
            model = ResNetBackbone(ResNetConfig(**STAGES, depths=depths))
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def binaries(name: str, arch: int | str, batch: int, depths: tuple[int, ...] = TWO) -> set[str]:
    """Specializations of all launches of a forward pass, Triton's 3x3 convolution included."""
    pixels = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    with use_impl("auto"), record_launches(arch) as recording:
        backbone(name, depths)(pixels)
    return {launch.specialization for launch in recording.launches}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", DEPTHS)
def test_other_batch_sizes_add_few_binaries(name: str, arch: int | str) -> None:
    of_batch = {batch: binaries(name, arch, batch) for batch in BATCHES}
    together = set().union(*of_batch.values())
    new = {first: len(together - of_batch[first]) for first in (1, 8, 64)}
    assert max(new.values()) <= MOST_NEW, f"{name} on {arch}, of {len(together)}: {new}"


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_adds_no_binary(name: str) -> None:
    for batch in (1, 64):
        assert binaries(name, 90, batch, DEPTHS[name]) == binaries(name, 90, batch)


@pytest.mark.parametrize("name", DEPTHS)
def test_binaries_do_not_depend_on_the_exact_batch(name: str) -> None:
    assert binaries(name, 90, 63) == binaries(name, 90, 64)
