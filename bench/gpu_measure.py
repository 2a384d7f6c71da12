"""Measures times on a device, and computes lower bounds of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastbb_kernels._dispatch import architecture
from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.fp32_precision import fp32_products

PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
_FLUSH_BYTES = 256 << 20  # larger than any L2 cache
_CALL_S = 5e-3  # shorter calls are repeated this long between two events
_MAX_CALLS = 50
_SLEEP_CYCLES = 2_000_000  # about 1 ms
_MOST_CYCLES = 64 * _SLEEP_CYCLES
_QUEUED_CALLS = 8  # behind one sleep


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Sets the precision `name` of fp32 products inside the block; yields the dtype of tensors."""
    with fp32_products("tf32" if name == "tf32" else "ieee"):
        yield PRECISIONS[name]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median and extremes of the rounds."""

    median_ms: float
    min_ms: float
    max_ms: float
    n_rounds: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class NotQueued(RuntimeError):
    """The GPU was faster than this process could launch work: the time would be the host's."""


class Clock:
    """Times calls on a GPU, by its events.

    By default it times calls back to back, as a user runs them: the longer of the times of the host
    and the GPU. With `flush` it measures the time of the GPU alone, with empty caches.
    """

    def __init__(self, device: torch.device, flush: bool = False) -> None:
        """
        Args:
            device: of the calls.
            flush: empties the L2 cache before each call, and excludes the time of the host.
        """
        self._flushed: Tensor | None = None
        self._cycles = _SLEEP_CYCLES
        if flush:
            n_bytes = _FLUSH_BYTES if device.type == "cuda" else 1
            self._flushed = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def times(
        self, calls: Mapping[str, Callable[[], object]], max_s: float, max_rounds: int = 30
    ) -> dict[str, Times]:
        """Times calls in turns, so that other load of the machine affects all of them.

        Args:
            calls: by name; each has run before.
            max_s: seconds after which no round begins, after the first 5.
            max_rounds: maximum number of rounds.

        Raises:
            NotQueued: with `flush`, if the host takes far longer than the GPU.
        """
        repeats = {name: self._repeats(call) for name, call in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for index in range(max_rounds):
            if index >= 5 and time.perf_counter() - begin > max_s:
                break
            for name, call in calls.items():
                taken[name].append(self._ms(call, repeats[name]))
        return {
            name: Times(statistics.median(ms), min(ms), max(ms), len(ms))
            for name, ms in taken.items()
        }

    def _repeats(self, call: Callable[[], object]) -> int:
        if self._flushed is not None:
            return _QUEUED_CALLS
        self._ms(call, 1)
        once_s = 1e-3 * self._ms(call, 1)
        return max(1, min(_MAX_CALLS, round(_CALL_S / once_s)))

    def _ms(self, call: Callable[[], object], n_calls: int) -> float:
        if self._flushed is None:
            begin, end = _event(), _event()
            begin.record()
            for _ in range(n_calls):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / n_calls
        while True:
            queued = self._queued_ms(call, n_calls, self._flushed)
            if queued is not None:
                return queued
            if self._cycles >= _MOST_CYCLES:
                raise NotQueued(f"not queued within {self._cycles:,} cycles of the GPU")
            self._cycles *= 2

    def _queued_ms(self, call: Callable[[], object], n_calls: int, flushed: Tensor) -> float | None:
        """Returns the median of calls that were all queued before the first began, else None."""
        torch.cuda.synchronize()
        torch.cuda._sleep(self._cycles)
        events = [(_event(), _event()) for _ in range(n_calls)]
        for begin, end in events:
            flushed.zero_()
            begin.record()
            call()
            end.record()
        was_late = events[0][0].query()
        events[-1][1].synchronize()
        return None if was_late else statistics.median(b.elapsed_time(e) for b, e in events)


def host_us(call: Callable[[], object], n_calls: int) -> float:
    """Returns the median time, in us, that this process takes to launch a call on an idle GPU."""
    taken = []
    for _ in range(n_calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(taken)


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Records calls, each of which has run before, one after the other as one CUDA graph.

    `torch.cuda.graph` would first collect garbage and empty the allocator's cache, in 0.1 s.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def graph_us(graph: torch.cuda.CUDAGraph, n_calls: int, max_s: float) -> float:
    """Returns the time, in us, of one of the calls in a graph: the median of some replays."""
    taken: list[float] = []
    begin_s = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - begin_s < max_s:
        begin, end = _event(), _event()
        torch.cuda._sleep(_SLEEP_CYCLES // 10)  # a replay takes the host some 10 us
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(1e3 * begin.elapsed_time(end) / (2 * n_calls))
    return statistics.median(taken)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a GPU.

    Attributes:
        source: of the figures.
        dram_bytes_per_s: of its memory, None if unknown.
        flops: multiplications and additions per second by precision; unknown ones are missing.
    """

    source: str
    dram_bytes_per_s: float | None
    flops: dict[str, float]

    def __str__(self) -> str:
        figures = [f"{name} {flops / 1e12:.0f} TF/s" for name, flops in self.flops.items()]
        if self.dram_bytes_per_s is not None:
            figures.insert(0, f"{self.dram_bytes_per_s / 1e9:.0f} GB/s")
        return f"{', '.join(figures)} ({self.source})"

    def floor_ms(self, n_bytes: float, n_flops: float, precision: str) -> float | None:
        """Returns the longer of the times to move and to multiply; None: a peak is unknown."""
        if self.dram_bytes_per_s is None or precision not in self.flops:
            return None
        return 1e3 * max(n_bytes / self.dram_bytes_per_s, n_flops / self.flops[precision])


PRETENDED = Peaks("pretended", 1e10, dict.fromkeys(PRECISIONS, 1e11))


@cache
def peaks(device: torch.device) -> Peaks:
    """Returns the peaks of this GPU: memory from the driver, arithmetic from the data sheet."""
    if device.type != "cuda":
        return PRETENDED
    known = ARCHITECTURES.get(architecture(device) or "")
    dram, memory = None, "memory unknown"
    if torch.version.hip is None:  # on AMD the driver's clock is not the memory's data rate
        try:
            from triton.testing import get_dram_gbps

            dram, memory = 1e9 * get_dram_gbps(device.index or 0), "memory by the driver"
        except Exception:  # other versions of triton may raise any error
            dram = None
    if known is None:
        return Peaks(f"{memory}, arithmetic unknown", dram, {})
    if dram is None:
        dram, memory = known.dram_bytes_per_s, f"memory of {known.gpu}"
    flops = {
        "bf16": known.bf16_flops,
        "fp16": known.fp16_flops,
        "tf32": known.bf16_flops / 2,  # on all data sheets that mention TF32
        "fp32": known.fp32_flops,
    }
    return Peaks(f"{memory}, arithmetic of {known.gpu}", dram, flops)


class OurBytes(TorchDispatchMode):
    """Sums the least traffic of launches of our ops, each distinct tensor once."""

    # arguments of which a 1x1 convolution with a stride reads only some pixels
    _STRIDED: ClassVar = {"conv1x1_bn_act": "x", "conv1x1_dual": "shortcut"}

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0
        self.n_launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastbb":
            named = {argument.name: x for argument, x in zip(func._schema.arguments, args)}
            self.n_bytes += self._moved(func._schema.name.partition("::")[2], named, result)
            self.n_launches += 1
        return result

    def _moved(self, op: str, arguments: dict[str, Any], result: Tensor) -> int:
        tensors = {id(x): x for x in (*arguments.values(), result) if isinstance(x, Tensor)}
        n_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
        x = arguments.get(self._STRIDED.get(op, ""))
        stride = arguments.get("stride", 1)
        if x is not None and stride > 1:
            used = x[..., ::stride, ::stride]
            n_bytes -= (x.numel() - used.numel()) * x.element_size()
        return n_bytes
