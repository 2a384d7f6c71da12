"""Lower bounds of the time of every op on a GPU, beside its measured time.

    python bench/speed_of_light.py --arch 90 --model swin_t --batch 64 --json floors.json

Floors are PREDICTIONS by division: bytes over bandwidth, multiplications over peak, instructions
over the rate at which they are issued. They leave out latency, launches and all other costs, so a
measurement below a floor means that the model of the kernel is wrong. `measured_us` is null if
there is no such GPU.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbb_kernels._dispatch import Architecture as ArchitectureName
from fastbb_kernels._dispatch import architecture, pretend
from fastbb_kernels.case import REAL_INPUTS, Case
from fastbb_kernels.cases import MODELS, model_cases
from fastbb_kernels.op import Call, CustomOp, find_op
from fastbb_kernels.testing import ARCHITECTURES, Architecture, binary_facts, fake_gpu
from fastbb_kernels.testing.floors import FLOORS, launch_floors

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class SpeedOfLight:
    """One case on one GPU; one kernel launch.

    Attributes:
        flops: multiplications and additions that the result needs.
        mma_flops: those that `tl.dot` executes, including padding of tiles.
        minimal_bytes: every input read once, the output written once.
        requested_bytes: bytes that all programs request from caches.
        ctas: programs of the launch.
        waves: number of waves of CTAs.
        dram_us: floor from `minimal_bytes`.
        l2_us: floor from `requested_bytes` and an assumed bandwidth; null: it is unknown.
        mma_us: floor from `mma_flops`.
        issue_us: floor from the instructions of the binary, of which both sides of a branch count;
            null: they cannot be counted, or the clock is unknown.
        measured_us: median on the GPU; null without the GPU.
    """

    op: str
    case: str
    gpu: str
    flops: int
    mma_flops: int
    minimal_bytes: int
    requested_bytes: int
    ctas: int
    waves: float
    occupancy: float
    registers: int
    spills: int
    dram_us: float
    l2_us: float | None
    mma_us: float
    issue_us: float | None
    measured_us: float | None = None

    @property
    def floor_us(self) -> float:
        """The highest of the floors."""
        return max(self.floors.values())

    @property
    def floors(self) -> dict[str, float]:
        """The floors that are known, in microseconds by name."""
        found = zip(FLOORS, (self.dram_us, self.l2_us, self.mma_us, self.issue_us))
        return {name: us for name, us in found if us is not None}


@torch.no_grad()
def speed_of_light(case: Case, gpu: Architecture) -> SpeedOfLight | None:
    """Computes the floors of a case on a GPU; None if its kernel does not run there."""
    op = find_op(case.op)
    call = op.bind(**case.arguments("meta", DTYPE))
    with pretend(gpu.name):
        if call.unsupported():
            return None
    row = floors_of(op.kernel, call, gpu, case.op, case.name)
    return replace(row, measured_us=measured_us(case)) if is_here(gpu) else row


@torch.no_grad()
def floors_of(
    kernel: CustomOp[Any], call: Call, gpu: Architecture, op: str, case: str
) -> SpeedOfLight:
    """Computes the floors of a call.

    Args:
        kernel: launches it, once.
        call: with tensors on the meta device.
        gpu: that it would run on.
        op: name for the report.
        case: name for the report.
    """
    with fake_gpu(gpu.name) as compiled:
        kernel(call)
    (launch,) = compiled.launches
    assert launch.kernel is not None
    facts, minimal = binary_facts(launch.kernel), call.n_bytes()
    (one,) = launch_floors(compiled, lambda: kernel(call), gpu)
    return SpeedOfLight(
        op=op,
        case=case,
        gpu=gpu.gpu,
        flops=useful_flops(call),
        mma_flops=one.mma_flops,
        minimal_bytes=minimal,
        requested_bytes=one.requested_bytes,
        ctas=one.ctas,
        waves=one.ctas / (facts.ctas_per_sm * gpu.multiprocessors),
        occupancy=facts.occupancy,
        registers=facts.registers,
        spills=facts.spills,
        dram_us=1e6 * minimal / gpu.dram_bytes_per_s,
        l2_us=one.l2_us,
        mma_us=one.mma_us,
        issue_us=one.issue_us,
    )


def useful_flops(call: Call) -> int:
    """Multiplications and additions that the result of a call needs."""
    with FlopCounterMode(display=False) as useful:
        call.eager()
    return useful.get_total_flops()


def is_here(gpu: Architecture) -> bool:
    """Whether this machine has a GPU of that architecture."""
    return torch.cuda.is_available() and architecture(torch.device("cuda")) == gpu.name


@torch.no_grad()
def measured_us(case: Case) -> float:
    """Measures the median time of a case on this GPU, with flushed caches before each run."""
    from triton.testing import do_bench

    arguments = case.arguments("cuda", DTYPE)
    op = find_op(case.op)
    median_ms: Any = do_bench(lambda: op.call(**arguments, impl="triton"), return_mode="median")
    return 1e3 * float(median_ms)


def markdown(rows: Iterable[SpeedOfLight]) -> str:
    """Formats a table of the bounds of each case; all times but the last column are predictions."""
    lines = [
        "| op | case | GPU | GFLOP useful / executed | MB minimal / requested | CTAs (waves) "
        "| occupancy | spills | predicted floors dram / l2 / mma / issue µs "
        "| measured µs (of floor) |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        floors = map(row.floors.get, FLOORS)
        predicted = " / ".join("-" if us is None else f"{us:.1f}" for us in floors)
        measured = "not measured"
        if row.measured_us is not None:
            measured = f"{row.measured_us:.1f} ({row.measured_us / row.floor_us:.2f}x)"
        lines.append(
            f"| {row.op} | {row.case} | {row.gpu} | {row.flops / 1e9:.2f} / "
            f"{row.mma_flops / 1e9:.2f} | {row.minimal_bytes / 1e6:.1f} / "
            f"{row.requested_bytes / 1e6:.1f} | {row.ctas} ({row.waves:.2f}) | "
            f"{row.occupancy:.2f} | {row.spills} | {predicted} | "
            f"{measured} |"
        )
    return "\n".join(lines)


def report(
    model: str, size: tuple[int, int], batch: int, archs: Sequence[ArchitectureName]
) -> list[SpeedOfLight]:
    """Computes every case of a model on every GPU that runs it."""
    cases = model_cases(model, size, batch)
    rows = [speed_of_light(case, ARCHITECTURES[arch]) for arch in archs for case in cases]
    return [row for row in rows if row is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Floors of every op, and times where a GPU is.")
    archs = {str(arch): arch for arch in ARCHITECTURES}
    sizes = {f"{height}x{width}": (height, width) for (height, width), *_ in REAL_INPUTS}
    parser.add_argument("--arch", action="append", choices=list(archs), help="default: 90")
    parser.add_argument("--model", choices=MODELS, default="swin_t")
    parser.add_argument("--size", choices=list(sizes), default="224x224")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write every number")
    options = parser.parse_args()
    chosen = [archs[arch] for arch in options.arch or ["90"]]
    rows = report(options.model, sizes[options.size], options.batch, chosen)
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
