"""Broken launchers for ops: one for each way in which a kernel fails on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastbb_kernels._dispatch import pretend
from fastbb_kernels.comparison import Hardware
from fastbb_kernels.launching import note_binary, noting
from fastbb_kernels.machine import Machine
from fastbb_kernels.op import find_op
from fastbb_kernels.result_cache import ResultCache
from fastbb_kernels.self_check import SelfCheck

Launch = Callable[..., Any]

MACHINE = Machine("Pretended GPU", "9.0", "570", "2.9", "3.5", "0.1.0", "abc", "")
CPU = torch.device("cpu")


class PretendedHardware(Hardware):
    """A GPU whose memory may be full, and that may be lost or be capturing a graph."""

    def __init__(self) -> None:
        self.full = self.lost = self.capturing = False

    def synchronize(self, device: torch.device) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def has_room(self, device: torch.device, n_bytes: int) -> bool:
        return not self.full

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing


def self_check(
    folder: Path, hardware: Hardware | None = None, machine: Machine = MACHINE, **options: Any
) -> SelfCheck:
    """Returns a check of a pretended GPU that remembers in `folder`."""
    return SelfCheck(
        machine_of=lambda device: machine,
        cache_of=lambda machine: ResultCache(machine, folder),
        hardware=hardware or PretendedHardware(),
        **options,
    )


def correct(op: str) -> Launch:
    """Returns a launcher that computes the op in float64 and rounds once.

    In fp32, results of a CPU depend on the memory of the operands; a check wants equal results.
    """
    function = getattr(torch.ops.fastbb, op).default

    def rounded(*args: Any) -> Tensor:
        is_wide = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]
        wide = [arg.double() if widens else arg for arg, widens in zip(args, is_wide)]
        return function(*wide).to(launch_of(op).dtype(args))

    return rounded


def launch_of(op: str) -> Any:
    """Returns the launcher that an op runs on GPUs."""
    return find_op(op).launch


@contextmanager
def launching(**launches: Launch) -> Iterator[dict[str, mock.Mock]]:
    """Treats CPU tensors as a GPU's, and replaces the launchers of the given ops."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(pretend(None))
        mocks = {op: mock.Mock(side_effect=_as_a_binary(launch)) for op, launch in launches.items()}
        for op, launch in mocks.items():
            stack.enter_context(mock.patch.object(launch_of(op), "run", launch))
        yield mocks


def _as_a_binary(launch: Launch) -> Launch:
    """Records one binary for a launch that records none itself."""

    def noted(*args: Any) -> Any:
        with noting() as launched:
            try:
                return launch(*args)
            finally:
                if not launched.binaries:
                    note_binary("pretended")

    return noted


def wrong(op: str) -> Launch:
    """Returns a launcher whose last value is off by a tenth of the largest."""

    def launch(*args: Any) -> Tensor:
        y = correct(op)(*args)
        y[..., -1, -1] += y.abs().max() / 10
        return y

    return launch


def nan(op: str) -> Launch:
    def launch(*args: Any) -> Tensor:
        y = correct(op)(*args)
        y[..., -1, -1] = torch.nan
        return y

    return launch


def flaky(op: str) -> Launch:
    """Returns a launcher whose right results differ in the last bit from call to call."""
    calls = iter(range(10**6))

    def launch(*args: Any) -> Tensor:
        y = correct(op)(*args)
        if next(calls) % 2:
            y[..., -1, -1].nextafter_(y.new_tensor(torch.inf))
        return y

    return launch


def other_shape(op: str) -> Launch:
    return lambda *args: correct(op)(*args)[:, 1:]


def other_dtype(op: str) -> Launch:
    return lambda *args: correct(op)(*args).half()


def nothing(op: str) -> Launch:
    return lambda *args: None


def raising(error: Exception) -> Callable[[str], Launch]:
    def launcher(op: str) -> Launch:
        def launch(*args: Any) -> Tensor:
            raise error

        return launch

    return launcher


out_of_resources = raising(OutOfResources(262144, 232448, "shared memory"))
out_of_memory = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"))
driver_out_of_memory = raising(RuntimeError("Triton Error [CUDA]: out of memory"))
crashing = raising(ZeroDivisionError("at\n  line 3"))
