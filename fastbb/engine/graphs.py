"""CUDA graphs: a forward pass recorded once per shape, replayed in one launch."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..weights.derived import holding_derived
from .trial import Run

MAX_GRAPHS = 8
_WARM_UP = 3  # runs before a capture, which must not allocate, tune or check anything new


class GraphPool:
    """Graphs of one way to run a backbone, by shape of the pixels; drops the least recently used.

    All graphs of a pool share memory, and a replay may overwrite the maps of an earlier one, so the
    maps are copied before they are returned. Threads and streams wait for each other: no two graphs
    compute at the same time.
    """

    def __init__(self, run: Run, max_graphs: int = MAX_GRAPHS, capture: Any = None) -> None:
        """
        Args:
            run: the function to record.
            max_graphs: number of shapes with a graph.
            capture: records `run(pixels)`; default: on the device of the pixels.
        """
        self._run = run
        self._max_graphs = max_graphs
        self._capture = capture or _Capture()
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple[Any, ...], Callable[[Tensor], tuple[Tensor, ...]]] = (
            OrderedDict()
        )

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Replays the graph of this shape; records it first if there is none.

        Raises:
            RuntimeError: the forward pass cannot be captured.
        """
        key = _key(pixel_values)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(self._run, pixel_values)
                self._graphs[key] = graph
                while len(self._graphs) > self._max_graphs:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return graph(pixel_values)

    def replayed(self, pixel_values: Tensor) -> tuple[Tensor, ...] | None:
        """Replays the graph of this shape; returns None if there is none, and records none."""
        with self._lock:
            graph = self._graphs.get(_key(pixel_values))
            return None if graph is None else graph(pixel_values)

    def __len__(self) -> int:
        return len(self._graphs)


def _key(pixel_values: Tensor) -> tuple[Any, ...]:
    return *pixel_values.shape, pixel_values.dtype, pixel_values.device


_recording = threading.Lock()


class _Memory:
    """Memory of one device that all graphs share.

    Attributes:
        pool: PyTorch's memory pool.
        stream: the recording stream, because only graphs of one stream share memory.
        idle: event after the last use by any graph on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.idle = torch.cuda.Event()


class _Capture:
    """Records on CUDA devices; the graphs of a device share one memory."""

    def __init__(self) -> None:
        self._memories: dict[torch.device, _Memory] = {}

    def __call__(self, run: Run, pixel_values: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        device = pixel_values.device
        with torch.cuda.device(device), torch.no_grad():
            if device not in self._memories:
                self._memories[device] = _Memory(device)
            memory = self._memories[device]
            current, side = torch.cuda.current_stream(device), memory.stream
            side.wait_stream(current)
            side.wait_event(memory.idle)
            try:
                with torch.cuda.stream(side):
                    static = pixel_values.clone()
                    for _ in range(_WARM_UP):
                        run(static)
            finally:
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with (
                _recording,  # its first wait for the device breaks other recordings
                holding_derived() as held,
                # other threads may go on: by default their first allocation breaks the recording
                torch.cuda.graph(
                    graph, pool=memory.pool, stream=side, capture_error_mode="thread_local"
                ),
            ):
                maps = run(static)
            for x in maps:  # maps of an empty graph must not pass for results
                x.fill_(torch.nan)
            memory.idle.record(current)
        return _Graph(graph, static, maps, held, memory)


class _Graph:
    """A recorded forward pass, with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        static: Tensor,
        maps: tuple[Tensor, ...],
        held: list[tuple[Tensor | None, ...]],
        memory: _Memory,
    ) -> None:
        """
        Args:
            graph: the recorded graph.
            static: the pixels that the graph reads.
            maps: the maps that it writes.
            held: further tensors that it reads, to keep them alive.
            memory: the memory of the graph.
        """
        self._graph, self._static, self._maps = graph, static, maps
        self._memory = memory
        self._streams: set[torch.cuda.Stream] = set()
        self.held = held

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(self._static.device)
        if stream not in self._streams:  # once is enough
            self._streams.add(stream)
            for x in (self._static, *self._maps):
                x.record_stream(stream)  # freed memory is not reused before the stream is done
        stream.wait_event(self._memory.idle)
        try:
            self._static.copy_(pixel_values)
            self._graph.replay()
            return tuple(x.clone() for x in self._maps)
        finally:
            self._memory.idle.record(stream)
