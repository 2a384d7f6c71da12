"""Times of calls, on a pretended clock and a pretended GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastbb.bench.timing import timed_calls, warm_up

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Clock:
    def __init__(self, seconds: list[float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]


@pytest.mark.parametrize(("call_s", "n_calls"), [(0.3, 4), (1.0, 1), (9.0, 1)])
def test_a_turn_lasts_its_seconds(call_s: float, n_calls: int) -> None:
    clock = Clock([call_s])
    assert timed_calls(clock.call, 1.0, CPU, clock) == pytest.approx([call_s] * n_calls)


def test_a_short_first_call_does_not_count() -> None:
    clock = Clock([0.2, 0.1])
    assert timed_calls(clock.call, 0.95, CPU, clock) == pytest.approx([0.1] * 10)
    long = Clock([0.6, 0.5])
    assert timed_calls(long.call, 1.0, CPU, long) == pytest.approx([0.6, 0.5])


def test_warm_up_ends_when_times_are_stable() -> None:
    clock = Clock([9.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0])
    taken = warm_up(clock.call, CPU, 1000, clock)
    assert taken[-3:] == pytest.approx([1.0] * 3) and 8 <= len(taken) <= 12
    assert len(warm_up(clock.call, CPU, 2.5, clock)) == 3
    growing = Clock([1.1**i for i in range(200)])
    assert len(warm_up(growing.call, CPU, 1e9, growing)) == 50


class PretendedGPU:
    """A GPU that works through a queue while the host goes on."""

    def __init__(self, call_s: float) -> None:
        self.call_s, self.queued, self.n_calls = call_s, 0.0, 0

    def call(self) -> None:
        self.queued += self.call_s
        self.n_calls += 1

    def event(self, **options: Any) -> Any:
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = gpu.queued

            def elapsed_time(self, later: Any) -> float:
                assert gpu.is_done, "the events were read before the GPU had reached them"
                return 1e3 * (later.at - self.at)

        return Event()

    is_done = False

    def synchronize(self, device: torch.device) -> None:
        self.is_done = True


@pytest.mark.parametrize("call_s", [0.002, 0.5])
def test_a_gpu_is_timed_by_events(call_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGPU(call_s)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    ticks = iter([0.0, call_s])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    taken = timed_calls(gpu.call, 0.1, GPU)
    assert taken == pytest.approx([call_s] * max(1, round(0.1 / call_s)))
    assert gpu.n_calls == len(taken) + 1
