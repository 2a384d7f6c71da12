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
from triton.compiler import CompiledKernel

from fastbb_kernels._dispatch import Architecture as ArchitectureName
from fastbb_kernels._dispatch import architecture, pretend
from fastbb_kernels.case import REAL_INPUTS, Case
from fastbb_kernels.cases import MODELS, model_cases
from fastbb_kernels.op import Call, CustomOp, find_op
from fastbb_kernels.testing import ARCHITECTURES, Architecture, binary_facts, fake_gpu, trace
from fastbb_kernels.testing.binary import SCHEDULERS
from fastbb_kernels.testing.issue import Work, issued
from fastbb_kernels.testing.trace_report import LaunchTrace

DTYPE = torch.bfloat16
FLOORS = ("dram", "l2", "mma", "issue")  # names of the floors of a launch


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
    facts = binary_facts(launch.kernel)
    # one program in the middle represents all: at the edges of a map they do a little less
    with trace(programs=middle, data=False) as traced, pretend(gpu.name):
        kernel(call)
    (program,) = traced.launches
    assert program.grid == launch.grid  # traced and compiled tiles are equal
    ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
    minimal, requested = call.n_bytes(), ctas * program.requested_bytes
    mma_flops = ctas * program.dot_flops
    return SpeedOfLight(
        op=op,
        case=case,
        gpu=gpu.gpu,
        flops=useful_flops(call),
        mma_flops=mma_flops,
        minimal_bytes=minimal,
        requested_bytes=requested,
        ctas=ctas,
        waves=ctas / (facts.ctas_per_sm * gpu.multiprocessors),
        occupancy=facts.occupancy,
        registers=facts.registers,
        spills=facts.spills,
        dram_us=1e6 * minimal / gpu.dram_bytes_per_s,
        l2_us=1e6 * requested / gpu.l2_bytes_per_s if gpu.l2_bytes_per_s else None,
        mma_us=1e6 * mma_flops / gpu.bf16_flops,
        issue_us=_issue_us(launch.kernel, program, ctas, gpu),
    )


def useful_flops(call: Call) -> int:
    """Multiplications and additions that the result of a call needs."""
    with FlopCounterMode(display=False) as useful:
        call.eager()
    return useful.get_total_flops()


def _issue_us(
    kernel: CompiledKernel, program: LaunchTrace, ctas: int, gpu: Architecture
) -> float | None:
    """Microseconds in which all multiprocessors issue the instructions of a launch."""
    loads, stores = zip(
        *((t.load.requested_bytes, t.store.requested_bytes) for t in program.tensors.values())
    )
    n_issued = issued(kernel, Work(program.dot_flops, sum(stores), sum(loads)))
    if n_issued is None or gpu.clock_hz is None:
        return None
    warps = ctas * kernel.metadata.num_warps
    return 1e6 * warps * n_issued.cycles / (SCHEDULERS * gpu.multiprocessors * gpu.clock_hz)


def middle(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Returns the program in the middle of a launch."""
    x, y, z = grid
    return [(x // 2, y // 2, z // 2)]


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
