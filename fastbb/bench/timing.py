"""Times of calls, one by one: by the clock on a CPU, by events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_MOST_CALLS = 1000
# warm-up: the median of so many calls, compared with that of as many before
_WINDOW = 3
_STABLE = 0.05
_MOST_WARM_CALLS = 50
# a first call that takes no more than this share of a turn does not count
_COLD = 0.25


def timed_calls(
    call: Callable[[], object],
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each of some calls in a row: at least one, else as many as fit.

    Another process ran before, so that caches are cold: a short first call does not count. On a GPU
    no first call does; the others are queued back to back, and each takes the time between two
    events, which is the longer of the times of the host and of the GPU.

    Args:
        call: returns when its work is done or, on a GPU, queued.
        seconds: duration of all calls.
        device: of the work.
        clock: of a CPU, seconds from any start.
    """
    if device.type == "cuda":
        return _by_events(call, seconds, device)

    def timed() -> float:
        start = clock()
        call()
        return clock() - start

    first = timed()
    taken = [] if first < _COLD * seconds else [first]
    while not taken or (sum(taken) < seconds and len(taken) < _MOST_CALLS):
        taken.append(timed())
    return taken


def _by_events(call: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    with torch.cuda.device(device):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        n_calls = int(seconds / max(time.perf_counter() - start, 1e-6))
        n_calls = min(max(n_calls, 1), _MOST_CALLS)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n_calls + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]


def warm_up(
    call: Callable[[], object],
    device: torch.device,
    max_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Calls until the time of a call is stable; returns the seconds of each.

    Stable means that the medians of the last three calls and of the three before differ by less
    than 5 %. Ends after `max_s` seconds or 50 calls, stable or not.
    """
    taken: list[float] = []
    while len(taken) < _MOST_WARM_CALLS and (not taken or sum(taken) < max_s):
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
        if len(taken) >= 2 * _WINDOW:
            last, before = taken[-_WINDOW:], taken[-2 * _WINDOW : -_WINDOW]
            now, then = statistics.median(last), statistics.median(before)
            if abs(now - then) <= _STABLE * then:
                break
    return taken
