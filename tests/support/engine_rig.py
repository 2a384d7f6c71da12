"""Test rig of the engine: a tiny backbone, a pretended device and compiler, a result cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from broken_kernels import MACHINE
from pretended_device import Compiler, Device, baked
from reference_models import Pair, hf_pair, hf_resnet, hf_swin, images
from tolerance import assert_equals_upstream
from torch import Tensor

from fastbb.backbone.base import Backbone
from fastbb.engine.prepare import prepare
from fastbb.engine.trial import Candidate, Run
from fastbb_kernels.machine import Machine

PIXELS, WIDE = images(64, 64), images(64, 96)


def resnet_pair() -> Pair:
    return hf_pair(hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]))


def swin_pair() -> Pair:
    return hf_pair(hf_swin(depths=(2, 1), num_heads=(2, 4), out_indices=[0, 1, 2]))


@torch.no_grad()
def assert_right(backbone: Backbone, pair: Pair, *batches: Tensor) -> None:
    """Compares the maps of each batch of pixels with upstream's; default: of `PIXELS`."""
    for pixels in batches or (PIXELS,):
        assert_equals_upstream(backbone(pixels).feature_maps, pair.maps(pixels))


@dataclass(frozen=True)
class EngineRig:
    """Prepares a backbone on a pretended device and compares it with upstream's.

    Attributes:
        pair: the backbone and upstream's.
        device: the clock that `prepare` measures with.
        compiler: runs in the place of torch's.
        folder: holds the result cache.
        machine: whose results the cache holds.
        pixels: the batch that `assert_right` runs by default.
    """

    pair: Pair
    device: Device
    compiler: Compiler
    folder: Path
    machine: Machine = MACHINE
    pixels: Tensor = PIXELS

    def candidate(
        self,
        name: str = "fast",
        seconds: float = 0.1,
        build: Callable[[], Run] | None = None,
        compiles: bool = False,
    ) -> Candidate:
        """Returns a candidate whose runs take `seconds`; default: with the right maps."""
        build = build or (lambda: baked(self.pair.ours))
        return self.device.candidate(name, seconds, build, compiles)

    def prepare(self, *candidates: Candidate, mode: str = "auto", **options: Any) -> Any:
        """Returns the prepared backbone, with candidates besides the engine's own ways."""
        tools = self.device.tools(self.folder, *candidates, machine=self.machine)
        return prepare(self.pair.ours, mode, tools=tools, **options)

    def assert_right(self, backbone: Backbone, *batches: Tensor) -> None:
        assert_right(backbone, self.pair, *(batches or (self.pixels,)))
