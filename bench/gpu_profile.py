"""Profiles a forward pass: its kernels, their times, and whether the host keeps up."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_measure import host_us
from gpu_work import describe
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

_MOST_KERNELS = 40


def profiled(call: Callable[[], object], n_calls: int) -> dict[str, Any]:
    """Measures microseconds of the host, of the busy GPU and of each kernel in a forward pass.

    Args:
        call: a forward pass, which has run before.
        n_calls: number of calls, for each of the two measurements.

    Returns:
        `host_us`, `busy_us` and `kernels`: name, calls, us and share of the busy time, the longest
        first; if profiling fails on this machine, `profile_problem` instead of the last two.
    """
    found: dict[str, Any] = {"host_us": host_us(call, n_calls)}
    try:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        # called through its module, in which a dry run replaces it
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(n_calls):
                call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() or [] if _is_kernel(event)]
        if not events:
            raise RuntimeError("the profiler saw no kernel")
    except Exception as error:  # from CUPTI, which containers often lack
        return {**found, "profile_problem": describe(error)}
    return found | {"busy_us": _busy_us(events) / n_calls, "kernels": _kernels(events, n_calls)}


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _busy_us(events: Iterable[Any]) -> float:
    """Returns the time in which at least one kernel ran."""
    busy, until = 0.0, 0.0
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _kernels(events: Iterable[Any], n_calls: int) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {}
    for event in events:
        taken.setdefault(event.name, []).append(event.time_range.elapsed_us())
    total = sum(map(sum, taken.values()))
    rows = [
        {
            "name": name,
            "calls": len(us) / n_calls,
            "us": sum(us) / n_calls,
            "share": sum(us) / total,
        }
        for name, us in taken.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])[:_MOST_KERNELS]
