"""Times of calls, and times and errors in words."""

import time
from collections.abc import Callable

import torch

# seconds that a call takes, to the end of the device's work
Clock = Callable[[Callable[[], object]], float]


def wall_clock(device: torch.device) -> Clock:
    """A clock for a device: it waits for the device before and after the call."""

    def clock(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return clock


def synchronize(device: torch.device) -> None:
    """Waits until a device has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def duration(seconds: float) -> str:
    """Seconds for people: 1.23 ms, 45.6 ms, 7.89 s."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
