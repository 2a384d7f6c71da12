"""Time of the host for a forward pass on a GPU, measured without the GPU.

    python bench/host_time.py --json host.json

The launch code of production runs on a pretended H100, with a trusted self-check and torch's
dispatcher, down to a driver that returns at once. Not included are Triton's launcher in C, the
CUDA calls of a replay and the allocator of a GPU. Models with attention by PyTorch are not here,
as it would be computed. The yardstick is a call of torch.relu on one number, in the same process:
its time says how fast the host is.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbb import AutoBackbone, ResNetConfig, SwinConfig
from fastbb.backbone.base import Backbone
from fastbb.bench.timing import timed_calls
from fastbb.engine.choose import Plan
from fastbb.engine.graphs import GraphPool
from fastbb.engine.ways import GRAPH, Way
from fastbb.models.convnext import ConvNextConfig
from fastbb.weights.watch import ModuleStamp
from fastbb_kernels import KernelWarning, find_op, op_names, use_impl
from fastbb_kernels.ops.conv3x3_bn_act import _fastest
from fastbb_kernels.pretend_gpu import counting_gpu
from fastbb_kernels.self_check import SelfCheck
from fastbb_kernels.self_check import use as use_check
from fastbb_kernels.triton_kernels import kernel

ARCHITECTURE = 90
DTYPE = torch.bfloat16
MODELS = {
    "Swin-T": SwinConfig(),
    "Swin-B": SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
    "ResNet-50": ResNetConfig(),
    "ConvNeXt-T": ConvNextConfig(),
}


@dataclass(frozen=True)
class HostTime:
    """Medians for one model.

    Attributes:
        launches: of our kernels in a forward pass.
        forward_us: op by op.
        looked_up_us: op by op, where Triton looks up the binary of every launch.
        replay_us: of a prepared backbone whose graph is replayed, checks of its modules included.
        relu_us: of the yardstick.
    """

    model: str
    batch: int
    launches: int
    forward_us: float
    looked_up_us: float
    replay_us: float
    relu_us: float


class _Trusting(SelfCheck):
    """A self-check that has found every binary right."""

    def _remembered(self, key: Any) -> tuple[None]:
        return (None,)

    def _trusted_of(self, key: Any) -> Any:
        return self._trusted.setdefault(key, _Everything())


class _Everything(set):
    """A set that contains everything."""

    def __bool__(self) -> bool:
        return True

    def __ge__(self, other: object) -> bool:
        return True


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """Has ops pass torch's dispatcher on the way to their launch, as on a GPU."""
    for name in op_names():
        torch.library.register_kernel(f"fastbb::{name}", "cpu", find_op(name).kernel.gpu)
    # of a convolution that a GPU gives to a library; here its check fails, and our kernel runs
    torch.library.register_kernel("fastbb::fastest_conv3x3_bn_act", "cpu", _fastest.gpu)
    with mock.patch("fastbb_kernels.op.launches_directly", lambda: False):
        yield


def median_us(call: Callable[[], object], seconds: float) -> float:
    """Median microseconds of the calls that fit into some seconds."""
    return 1e6 * statistics.median(timed_calls(call, seconds, torch.device("cpu")))


@torch.inference_mode()
def host_time(backbone: Backbone, pixels: Tensor, name: str, seconds: float = 1.0) -> HostTime:
    """Measures a backbone in eval mode; `pixels` [B, C, H, W] are on a CPU, as its weights."""
    one = torch.zeros(1)
    relu_us = median_us(lambda: [torch.relu(one) for _ in range(100)], seconds) / 100
    with counting_gpu(ARCHITECTURE) as gpu, use_check(_Trusting()), use_impl("auto"):
        with through_dispatcher():
            backbone(pixels)  # compiles
            before = gpu.n_launches
            maps = backbone(pixels).feature_maps
            launches = gpu.n_launches - before
            forward_us = median_us(lambda: backbone(pixels), seconds)
            with mock.patch.object(kernel, "_IS_TESTED", False):
                looked_up_us = median_us(lambda: backbone(pixels), seconds)
        prepared = _replayed(backbone, maps, pixels)
        replay_us = median_us(lambda: prepared(pixels), seconds)
    batch = len(pixels)
    return HostTime(name, batch, launches, forward_us, looked_up_us, replay_us, relu_us)


def _replayed(backbone: Backbone, maps: tuple[Tensor, ...], pixels: Tensor) -> Backbone:
    """The backbone, prepared with a graph whose replay takes no time."""
    prepared = backbone.prepare(mode="triton", cuda_graph=False)
    pool = GraphPool(lambda _: maps, capture=lambda run, _: run)
    engine = prepared._engine
    assert engine is not None
    prepared(pixels)
    # nothing else can record a graph without a GPU
    engine._stamp = ModuleStamp(engine.module)
    engine._plans[tuple(pixels.shape)] = Plan(Way(f"triton{GRAPH}", pool, True), "")
    return prepared


def make_backbone(config: Any) -> Backbone:
    """A backbone with random weights."""
    return AutoBackbone.from_config(config).eval().to(DTYPE)


def markdown(rows: list[HostTime]) -> str:
    """Formats a table."""
    lines = [
        "| model | batch | launches | forward, µs | µs a launch | with look-ups, µs | replay, µs "
        "| torch.relu, µs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.batch} | {row.launches} | {row.forward_us:.0f} | "
            f"{row.forward_us / row.launches:.1f} | {row.looked_up_us:.0f} | "
            f"{row.replay_us:.0f} | {row.relu_us:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the host for a forward pass on a GPU.")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write every number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", KernelWarning)
    rows = []
    for name in options.model or MODELS:
        pixels = torch.zeros(options.batch, 3, 224, 224, dtype=DTYPE)
        rows.append(host_time(make_backbone(MODELS[name]), pixels, name))
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
