"""CUDA graphs: a forward pass recorded once per shape, replayed in one launch."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..derived import holding_derived
from .trial import Run

MAX_GRAPHS = 8
_WARM_UP = 3  # runs before a capture, which must not allocate, tune or check anything new


class GraphPool:
    """Graphs of one way to run a backbone, by shape of the pixels; the least recently used goes.

    All graphs of a pool share memory: one replay after the other may overwrite the maps of the one
    before, so maps are copied out before they are returned, and never alias. Threads wait for each
    other.
    """

    def __init__(self, run: Run, max_graphs: int = MAX_GRAPHS, capture: Any = None) -> None:
        """
        Args:
            run: what is recorded.
            max_graphs: shapes that are kept.
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
        """Replays the graph of this shape, recording it first where there is none.

        Raises:
            RuntimeError: the forward pass cannot be captured.
        """
        key = (*pixel_values.shape, pixel_values.dtype, pixel_values.device)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(self._run, pixel_values)
                self._graphs[key] = graph
                while len(self._graphs) > self._max_graphs:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return graph(pixel_values)

    def __len__(self) -> int:
        return len(self._graphs)


class _Capture:
    """Records on CUDA devices; the graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run, pixel_values: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        device = pixel_values.device
        with torch.cuda.device(device), torch.no_grad():
            static = pixel_values.clone()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    run(static)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with (
                holding_derived() as held,
                torch.cuda.graph(graph, pool=self._pool, stream=side),
            ):
                maps = run(static)
            for x in maps:  # a graph that recorded nothing must not pass for one that did
                x.fill_(torch.nan)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))

        def replay(pixel_values: Tensor, held: Any = held) -> tuple[Tensor, ...]:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)  # another stream may still replay or copy
            static.copy_(pixel_values)
            graph.replay()
            copies = tuple(x.clone() for x in maps)
            done.record(stream)
            return copies

        return replay
