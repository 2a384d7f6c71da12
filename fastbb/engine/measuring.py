"""Times of calls; times, amounts of memory and errors in words."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# seconds that a call takes, to the end of the device's work
Clock = Callable[[Callable[[], object]], float]


def wall_clock(device: torch.device) -> Clock:
    """Makes a clock for a device, which waits for the device before and after the call."""

    def clock(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return clock


class Comparison(NamedTuple):
    """Medians over pairs of calls.

    Attributes:
        ours: seconds of ours.
        theirs: seconds of the other call.
        ratio: ours to theirs within a pair; above 1 if ours is slower.
    """

    ours: float
    theirs: float
    ratio: float


TIE = 0.03  # nearer than this share of the time counts as equally fast
MIN_PAIRS, MAX_PAIRS, ENOUGH_S = 5, 10, 0.1  # seconds of ours


def compare(ours: Callable[[], float], theirs: Callable[[], float], tie: float = TIE) -> Comparison:
    """Times two calls in turns, so that other load of the machine slows both.

    The result is the median ratio of at least five pairs, so no single call decides. If ours seems
    slower, as many pairs again must confirm it.

    Args:
        ours: makes a call and returns its seconds.
        theirs: the same.
        tie: share of the time by which ours may be slower.
    """
    pairs: list[tuple[float, float]] = []

    def measure(n_wanted: int) -> Comparison:
        while len(pairs) < n_wanted:
            pairs.append((ours(), theirs()))
        # of a call that took no time by the clock nothing can be said
        ratio = statistics.median(a / b if b else 1.0 for a, b in pairs)
        first, second = (statistics.median(seconds) for seconds in zip(*pairs))
        return Comparison(first, second, ratio)

    found = measure(MIN_PAIRS)
    n_pairs = min(MAX_PAIRS, max(MIN_PAIRS, round(ENOUGH_S / max(found.ours, 1e-9))))
    found = measure(n_pairs)
    return found if found.ratio <= 1 + tie else measure(2 * n_pairs)


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(error: BaseException) -> str:
    """Formats an error in one line."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def memory(n_bytes: int) -> str:
    """Bytes for people: 12 kB, 110 MB, 1.25 GB."""
    for unit, scale in (("B", 1), ("kB", 10**3), ("MB", 10**6)):
        if n_bytes < 999.5 * scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes / 10**9:.3g} GB"


def duration(seconds: float) -> str:
    """Formats seconds: 1.23 ms, 45.6 ms, 7.89 s."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
