"""Floors of launches on a GPU model: times that they hardly beat. Predictions, by division."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triton.compiler import CompiledKernel

from .._dispatch import pretend
from ..architectures import Architecture
from ..recorder import Recording
from .binary import SCHEDULERS
from .issue import Work, issued
from .trace_report import LaunchTrace
from .tracer import trace

FLOORS = ("dram", "l2", "mma", "issue")


@dataclass(frozen=True)
class LaunchFloors:
    """What a launch does at least, from one program in its middle, and how long that takes.

    Attributes:
        ctas: programs.
        requested_bytes: bytes that all programs request from caches.
        mma_flops: multiplications and additions of `tl.dot`, including padding of tiles.
        l2_us: floor from `requested_bytes` and an assumed bandwidth; None: it is unknown.
        mma_us: floor from `mma_flops` and the peak of 16-bit types.
        issue_us: floor from the instructions of the binary, of which both sides of a branch count;
            None: they cannot be counted, or the clock is unknown.
    """

    ctas: int
    requested_bytes: int
    mma_flops: int
    l2_us: float | None
    mma_us: float
    issue_us: float | None


def launch_floors(
    recording: Recording, run: Callable[[], object], gpu: Architecture
) -> list[LaunchFloors]:
    """Computes the floors of each launch of a call with tensors on the meta device.

    Args:
        recording: of the call, by `fake_gpu`.
        run: makes the call again.
        gpu: of the recording.
    """
    # at the edges of a map programs do a little less
    with trace(programs=middle, data=False) as traced, pretend(gpu.name):
        run()
    found = []
    for launch, program in zip(recording.launches, traced.launches, strict=True):
        assert launch.kernel is not None and program.grid == launch.grid  # tiles are equal
        ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
        requested, flops = ctas * program.requested_bytes, ctas * program.dot_flops
        found.append(
            LaunchFloors(
                ctas,
                requested,
                flops,
                l2_us=1e6 * requested / gpu.l2_bytes_per_s if gpu.l2_bytes_per_s else None,
                mma_us=1e6 * flops / gpu.bf16_flops,
                issue_us=_issue_us(launch.kernel, program, ctas, gpu),
            )
        )
    return found


def call_floors(
    launches: Sequence[LaunchFloors], minimal_bytes: int, gpu: Architecture
) -> dict[str, float]:
    """Microseconds of a call by the names of `FLOORS`, without those that are unknown.

    Args:
        launches: of the call.
        minimal_bytes: every input read once, every output written once.
        gpu: on which they run.
    """
    found = {"dram": 1e6 * minimal_bytes / gpu.dram_bytes_per_s}
    for name in FLOORS[1:]:
        of_launches = [getattr(one, f"{name}_us") for one in launches]
        if None not in of_launches:
            found[name] = sum(of_launches)
    return found


def middle(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Returns the program in the middle of a launch."""
    x, y, z = grid
    return [(x // 2, y // 2, z // 2)]


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
