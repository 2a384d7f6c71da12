"""Floors of a forward pass on a GPU: of every launch the largest one, and their sum.

    PYTHONPATH=scripts python bench/floors.py    # docs/benchmarks/floors.md
    PYTHONPATH=scripts python bench/floors.py --model Swin-T --batch 1 --arch 80

All are PREDICTIONS, see `speed_of_light`. The calls are those of the model's own forward in bf16 on
the meta device. What libraries compute between our kernels counts by its bytes; all attention
together, and all 3x3 convolutions, by their products too.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_pages import stages_of, with_measured, write_configs
from speed_of_light import DTYPE, SpeedOfLight, floors_of, useful_flops
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastbb import AutoBackbone
from fastbb.backbone.base import Backbone
from fastbb.bench.launches import count_kernels
from fastbb.bench.markdown import table
from fastbb.inspect.loading import config_without_weights
from fastbb_kernels import use_impl
from fastbb_kernels.launching import Launch
from fastbb_kernels.op import Call, CustomOp
from fastbb_kernels.recorder import record_launches
from fastbb_kernels.testing import ARCHITECTURES, Architecture
from fastbb_kernels.testing.floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "floors.md"
MODELS = ("Swin-T", "Swin-S", "Swin-B", "ResNet-50", "DINOv2-B", "ConvNeXt-T")
OTHERS = "libraries"
# what `count_kernels` calls them
_ATTENTION = "scaled_dot_product_attention"
_CONVOLUTIONS = ("cudnn_convolution_add_relu", "convolution")
_AFTER_CONVOLUTION = "_bias_act_fwd_kernel"  # where cuDNN's has no activation


@dataclass(frozen=True)
class Kernel:
    """Equal launches of a forward pass.

    Attributes:
        times: how often.
        floors: of one of them.
    """

    times: int
    floors: SpeedOfLight

    @property
    def us(self) -> float:
        """The sum of the largest floors."""
        return self.times * self.floors.floor_us


@dataclass(frozen=True)
class ForwardFloors:
    """Floors of a forward pass.

    Attributes:
        model: its name.
        batch: images of 224x224.
        gpu: the product.
        kernels: ours, in order of first use.
        n_others: launches of libraries, and of our kernel that follows some of them.
        others_us: their floor.
    """

    model: str
    batch: int
    gpu: str
    kernels: list[Kernel]
    n_others: int
    others_us: float

    @property
    def us(self) -> float:
        """The sum of the largest floor of every launch."""
        return sum(kernel.us for kernel in self.kernels) + self.others_us

    @property
    def bounds(self) -> dict[str, float]:
        """Microseconds of the sum by what bounds them."""
        found = defaultdict(float, {OTHERS: self.others_us})
        for kernel in self.kernels:
            floors = kernel.floors.floors
            found[max(floors, key=lambda name: floors[name])] += kernel.us
        return dict(found)


@contextmanager
def recorded_calls() -> Iterator[list[tuple[CustomOp[Any], Call]]]:
    """Lists the calls of our kernels inside the block."""
    calls: list[tuple[CustomOp[Any], Call]] = []
    original = CustomOp.__call__

    def recorded(self: CustomOp[Any], call: Call) -> Tensor:
        calls.append((self, call))
        return original(self, call)

    with mock.patch.object(CustomOp, "__call__", recorded):
        yield calls


class _AttentionFlops(TorchFunctionMode):
    """Counts the products of PyTorch's attention; `FlopCounterMode` sets hooks on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.flops += 4 * query.numel() * key.shape[-2]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def forward_floors(
    backbone: Backbone, pixels: Tensor, gpu: Architecture, model: str
) -> ForwardFloors:
    """Computes the floors of a forward pass.

    Args:
        backbone: on the meta device, in eval mode.
        pixels: [B, C, H, W] on the meta device.
        gpu: that it would run on.
        model: name for the report.
    """
    weights = [*backbone.parameters(), *backbone.buffers()]
    with use_impl("auto"), record_launches(gpu.name):
        backbone(pixels)  # computes values that are made once per set of weights
    with (
        use_impl("auto"),
        count_kernels(weights, gpu.name) as launches,
        recorded_calls() as calls,
        _AttentionFlops() as attention,
    ):
        backbone(pixels)
    ours = [(kernel, call) for kernel, call in calls if isinstance(kernel.gpu, Launch)]
    convolved = sum(
        useful_flops(call) for kernel, call in calls if not isinstance(kernel.gpu, Launch)
    )
    others = [one for one in launches if not _is_call_of_ours(one.name)]
    assert len(ours) + len(others) == len(launches), "an op with several launches, or with none"

    def floor_s(of: list[str], flops: int) -> float:
        n_bytes = sum(one.n_bytes for one in others if one.name in of)
        return max(n_bytes / gpu.dram_bytes_per_s, flops / gpu.bf16_flops)

    pointwise = [one.name for one in others if one.name not in (_ATTENTION, *_CONVOLUTIONS)]
    others_s = floor_s([_ATTENTION], attention.flops)
    others_s += floor_s([*_CONVOLUTIONS], convolved) + floor_s(pointwise, 0)
    times = Counter(_key(kernel, call) for kernel, call in ours)
    distinct = {_key(kernel, call): (kernel, call) for kernel, call in ours}
    kernels = []
    for number, (key, (kernel, call)) in enumerate(distinct.items(), 1):
        name = kernel.overload._schema.name.removeprefix("fastbb::")
        print(f"{model}: kernel {number} of {len(distinct)}, {name}", file=sys.stderr)
        shape = "x".join(map(str, call[0].shape))
        kernels.append(Kernel(times[key], floors_of(kernel, call, gpu, name, shape)))
    return ForwardFloors(model, len(pixels), gpu.gpu, kernels, len(others), 1e6 * others_s)


def _is_call_of_ours(launch: str) -> bool:
    """Whether a launch is that of a call of our ops, by its name."""
    return launch.endswith("_kernel") and launch != _AFTER_CONVOLUTION


def _key(kernel: CustomOp[Any], call: Call) -> tuple[Any, ...]:
    """Equal for calls that launch the same on other values."""
    arguments = (
        (tuple(one.shape), one.stride(), one.dtype) if isinstance(one, Tensor) else repr(one)
        for one in call
    )
    return kernel, *arguments


def make_backbone(name: str) -> Backbone:
    """A model of `scripts/benchmark_pages.py`, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        config = config_without_weights(str(Path(folder) / name), stages_of(name))
    with torch.device("meta"):
        return AutoBackbone.from_config(config).eval().to(DTYPE)


def summary(rows: Iterable[ForwardFloors]) -> str:
    """Formats a row for each model."""
    header = ["model, batch", "launches", "sum of largest floors, µs"]
    bounds = [*FLOORS, OTHERS]
    lines = [[*header, *(f"of these {bound}" for bound in bounds)]]
    for row in rows:
        launches = sum(kernel.times for kernel in row.kernels) + row.n_others
        parts = (f"{row.bounds.get(bound, 0):.0f}" for bound in bounds)
        lines.append([f"{row.model}, {row.batch}", str(launches), f"{row.us:.0f}", *parts])
    return table(lines, readable=True)


def kernels(row: ForwardFloors) -> str:
    """Formats a row for each kernel of a model."""
    names = (f"{name}, µs" for name in FLOORS)
    lines = [["kernel", "input", "launches", *names, "registers"]]
    for kernel in row.kernels:
        floors, most = kernel.floors.floors, kernel.floors.floor_us
        cells = (
            "-" if us is None else f"**{us:.1f}**" if us == most else f"{us:.1f}"
            for us in map(floors.get, FLOORS)
        )
        one = kernel.floors
        lines.append([one.op, one.case, str(kernel.times), *cells, str(one.registers)])
    return table(lines, n_texts=2, readable=True)


def page(rows: Sequence[ForwardFloors]) -> str:
    """The tables of `docs/benchmarks/floors.md`."""
    parts = [f"On one {rows[0].gpu}, bf16:", summary(rows)]
    for row in rows:
        parts += [f"## {row.model}, batch {row.batch}", kernels(row)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Floors of a forward pass on a GPU.")
    archs = {str(arch): arch for arch in ARCHITECTURES}
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all, in docs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--arch", choices=list(archs), default="90")
    parser.add_argument("--json", type=Path, help="where to write every number")
    options = parser.parse_args()
    rows = []
    for name in options.model or MODELS:
        pixels = torch.empty(options.batch, 3, 224, 224, dtype=DTYPE, device="meta")
        gpu = ARCHITECTURES[archs[options.arch]]
        rows.append(forward_floors(make_backbone(name), pixels, gpu, name))
    text = page(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.model or (options.arch, options.batch) != ("90", 64):
        print(text)
    else:
        PAGE.write_text(with_measured(PAGE.read_text(), text))


if __name__ == "__main__":
    main()
