"""Runs a call twice against its reference in float64, for every check of a kernel."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Impl, unchecked
from .accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude
from .case import Case
from .launching import Launch
from .op import find_op, in_float64

SEED = 0
_N_RUNS = 2
# more than a small case needs, including its copy in float64
_ROOM_BYTES = 128 * 2**20
_MAX_ERROR_CHARACTERS = 300


class NotChecked(RuntimeError):
    """A case could not be checked, for a reason outside its op; the message says why."""


class Hardware:
    """Operations of a device that a check needs, besides running ops."""

    def synchronize(self, device: torch.device) -> None:
        """Waits for the current stream; raises errors of its earlier kernels.

        It does not wait for the device: CUDA forbids that while another thread captures a graph.
        """
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def has_room(self, device: torch.device, n_bytes: int) -> bool:
        """Whether so much memory can be allocated."""
        try:
            torch.empty(n_bytes, dtype=torch.uint8, device=device)
        except RuntimeError:  # of PyTorch or of the driver
            return False
        return True

    def is_capturing(self, device: torch.device) -> bool:
        """Whether a CUDA graph is being captured, which forbids waiting for the device."""
        if device.type != "cuda":
            return False
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()


def run_case(case: Case, arguments: dict[str, Any], impl: Impl) -> Tensor:
    """Calls the op of a case."""
    return find_op(case.op).call(**arguments, impl=impl)


@torch.no_grad()
def case_problem(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    impl: Impl = "auto",
    run_case: Callable[[Case, dict[str, Any], Impl], Tensor] = run_case,
    hardware: Hardware | None = None,
) -> str | None:
    """Runs a case on a device, twice, against the op's reference there.

    Args:
        case: of one op.
        dtype: of its tensors.
        device: where it runs.
        impl: "auto" runs the same as a model would, "triton" the kernel even if it is off.
        run_case: calls the op of a case.
        hardware: operations of the device.

    Returns:
        a sentence that describes the problem; None: no problem, or the kernels refuse the case.

    Raises:
        NotChecked: PyTorch's own ops fail, or the device has no memory left.
    """
    hardware = hardware or Hardware()
    op = find_op(case.op)

    def run() -> Tensor:
        with unchecked() if impl == "triton" else nullcontext():
            return run_case(case, arguments, impl)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            arguments = case.arguments(device, dtype, SEED)
            if op.unsupported(**arguments):
                return None
        except Exception as error:
            raise NotChecked(f"PyTorch's own ops fail on {device}: {_name(error)}") from error
        return _problem_of(
            run=run,
            eager=lambda: op.eager(**arguments),
            exact=lambda: op.eager(**in_float64(arguments)),
            device=device,
            hardware=hardware,
        )


@torch.no_grad()
def launch_problem(
    launch: Launch,
    args: Sequence[Any],
    device: torch.device,
    hardware: Hardware,
    run: Callable[[], Tensor] | None = None,
) -> str | None:
    """Does the same as `case_problem` for a launch with given arguments, or for `run` if given."""
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    return _problem_of(
        run=run or (lambda: launch.run(*args)),
        eager=lambda: launch.eager(*args),
        exact=lambda: launch.eager(*wide),
        device=device,
        hardware=hardware,
    )


def _problem_of(
    *,
    run: Callable[[], Tensor],
    eager: Callable[[], Tensor],
    exact: Callable[[], Tensor],
    device: torch.device,
    hardware: Hardware,
) -> str | None:
    """Calls `run` twice and describes the problem of its results, or returns None."""
    try:
        eager_result, exact_result = eager(), exact()
        hardware.synchronize(device)
    except Exception as error:
        raise NotChecked(f"PyTorch's own ops fail on {device}: {_name(error)}") from error
    results: list[Tensor] = []
    for _ in range(_N_RUNS):
        _fill_free_memory(eager_result)
        try:
            results.append(run())
            hardware.synchronize(device)
        except Exception as error:  # any error of a launch turns the op off and is the reason
            return _failure(error, device, hardware, 4 * eager_result.nbytes)
        problem = _difference(results[-1], eager_result, exact_result)
        if problem is not None:
            return problem
    if not torch.equal(results[0], results[1]):
        return f"two runs with the same inputs differ by {max_error(*results):.3g}"
    return None


def _difference(got: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    if not isinstance(got, Tensor):
        return f"wanted a tensor, got {type(got).__name__}"
    if got.isnan().any() and not eager.isnan().any():
        return "NaN where eager PyTorch has numbers"
    # by default PyTorch convolves in TF32 on NVIDIA GPUs
    largest = max_magnitude(exact)
    lost = 2 * max_error(eager, exact) / largest if largest else 0.0
    return accuracy_problem(got, eager, exact, max(FP32_REL, lost))


def _failure(error: Exception, device: torch.device, hardware: Hardware, n_bytes: int) -> str:
    """Describes the exception of a launch.

    Args:
        error: the exception.
        device: of the launch.
        hardware: operations of the device.
        n_bytes: memory that the launch may need, besides that of small launches.

    Raises:
        NotChecked: the device has no memory left.
    """
    problem = _name(error)
    lost = why_lost(device, hardware)
    if lost is not None:
        return f"{problem}; {lost}"
    if is_out_of_memory(error):
        if not hardware.has_room(device, n_bytes + _ROOM_BYTES):
            raise NotChecked(f"{device} has no memory left: {problem}") from error
        return f"asks for more memory than such a call may take: {problem}"
    return problem


def why_lost(device: torch.device, hardware: Hardware) -> str | None:
    """Returns why this process lost the device, or None: some CUDA errors persist."""
    try:
        hardware.synchronize(device)
    except Exception as error:
        return f"{device} is lost to this process, which has to be restarted: {_name(error)}"
    return None


def _fill_free_memory(like: Tensor) -> None:
    """Fills the memory of the next results with NaN.

    PyTorch's allocator reuses the block that was freed last. PyTorch can also fill fresh memory,
    but only under `use_deterministic_algorithms`, which selects other kernels.
    """
    blocks = [torch.full_like(like, torch.nan) for _ in range(4)]
    del blocks


def is_out_of_memory(error: Exception) -> bool:
    # a driver reports it as a RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in _name(error).lower()


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, NotChecked) else _name(error)


def _name(error: BaseException) -> str:
    """Formats an exception on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    cut = len(text) > _MAX_ERROR_CHARACTERS
    return f"{text[:_MAX_ERROR_CHARACTERS]}..." if cut else text
