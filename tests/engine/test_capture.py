"""Recording and replaying CUDA graphs, on a fake CUDA on the CPU that tracks streams."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_models import images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbb.engine import graphs
from fastbb.engine.graphs import GraphPool
from fastbb.engine.trial import Run
from fastbb.weights.derived import derive

PIXELS, WIDE = images(64, 64), images(64, 96)


class Stream:
    """A stream that records the operations it has waited for.

    Attributes:
        after: numbers of the operations that end before its next one begins.
    """

    def __init__(self) -> None:
        self.after: set[int] = set()

    def wait_stream(self, other: "Stream") -> None:
        self.after |= other.after

    def wait_event(self, event: "Event") -> None:
        self.after |= event.after


class Event:
    def __init__(self) -> None:
        self.after: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.after = set(stream.after)


class Cuda(TorchDispatchMode):
    """Replaces `torch.cuda`: a graph repeats the operations that ran while it was recorded.

    Attributes:
        current: the stream that operations go to.
        recorded: the stream, memory and mode of each recording.
        at_once: operations that may overlap with another one.
        kept_for: streams that must finish before memory is reused, by address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = Stream()
        self.capturing: Any = None
        self.recorded: list[tuple[Any, ...]] = []
        self.n_runs = self.n_operations = 0
        self.at_once: list[str] = []
        self.kept_for: dict[int, list[Stream]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.capturing is None:
            self.operate(str(func))
        return func(*args, **kwargs or {})

    def operate(self, name: str) -> None:
        """Records an operation that may use the memory shared by all graphs."""
        if self.current.after != set(range(self.n_operations)):
            self.at_once.append(name)
        self.current.after.add(self.n_operations)
        self.n_operations += 1

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> Any:
        self.recorded.append((stream, pool, capture_error_mode))
        self.capturing = graph
        yield
        self.capturing = None

    def new_graph(self) -> Any:
        graph = SimpleNamespace()

        def replay() -> None:
            for old, new in zip(graph.maps, graph.run(graph.pixels)):
                old.copy_(new)

        graph.replay = replay
        return graph

    def recordable(self, run: Run) -> Run:
        def recorded(pixel_values: Tensor) -> tuple[Tensor, ...]:
            self.n_runs += 1
            maps = run(pixel_values)
            if self.capturing is not None:
                graph = self.capturing
                graph.run, graph.pixels, graph.maps = run, pixel_values, maps
            return maps

        return recorded

    def keep_for(self, x: Tensor, stream: Stream) -> None:
        self.kept_for.setdefault(x.data_ptr(), []).append(stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    fakes = {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: cuda.current,
        "stream": cuda.stream,
        "CUDAGraph": cuda.new_graph,
        "graph_pool_handle": object,
        "graph": cuda.graph,
        "device": lambda device: nullcontext(),
        "Event": Event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: cuda.keep_for(x, s))
    return cuda


def doubled(pixel_values: Tensor) -> tuple[Tensor, ...]:
    return (pixel_values * 2,)


def test_later_replays_leave_earlier_maps_unchanged(cuda: Cuda) -> None:
    pool = GraphPool(cuda.recordable(doubled))
    pixels = [images(8, 8, seed=seed) for seed in range(3)]
    maps = [pool(x)[0] for x in pixels]
    for x, y in zip(pixels, maps):
        assert torch.equal(y, 2 * x)
    kept = pixels[0].clone()
    maps[1].zero_()
    assert torch.equal(pool(pixels[0])[0], 2 * kept) and torch.equal(pixels[0], kept)


def test_warm_up_runs_only_before_the_recording(cuda: Cuda) -> None:
    pool = GraphPool(cuda.recordable(doubled))
    for _ in range(3):
        pool(PIXELS)
    assert cuda.n_runs == graphs._WARM_UP + 1


def test_graphs_share_one_memory_pool_and_do_not_block_threads(cuda: Cuda) -> None:
    pool = GraphPool(cuda.recordable(doubled))
    pool(PIXELS)
    pool(WIDE)
    one, other = cuda.recorded
    assert one == other  # graphs that were recorded on two streams share none
    assert one[0] is not cuda.current and one[2] == "thread_local"


def test_replays_on_several_streams_wait_for_each_other(cuda: Cuda) -> None:
    """Two shapes on two streams, each recorded while the other one may still compute."""
    pool = GraphPool(cuda.recordable(doubled), max_graphs=2)
    one, two = Stream(), Stream()
    calls = (
        (one, PIXELS),
        (two, WIDE),  # is recorded after a replay on another stream
        (one, PIXELS),
        (two, WIDE),
        (one, WIDE),
        (two, PIXELS),
        (one, images(8, 8)),  # one graph is dropped
        (two, WIDE),
    )
    maps = []
    with cuda:
        for stream, pixels in calls:
            with cuda.stream(stream):
                maps += pool(pixels)
    assert cuda.n_operations > 50 and cuda.at_once == []
    assert all(torch.equal(y, 2 * pixels) for y, (_, pixels) in zip(maps, calls))


def test_streams_wait_for_a_recording_that_is_never_replayed(cuda: Cuda) -> None:
    capture, run = graphs._Capture(), cuda.recordable(doubled)
    with cuda:
        for pixels in (PIXELS, WIDE):
            with cuda.stream(Stream()):
                capture(run, pixels)
    assert len(cuda.recorded) == 2 and cuda.at_once == []


@pytest.mark.parametrize("fault", ["warming up", "replaying"])
def test_streams_wait_for_a_call_that_failed(cuda: Cuda, fault: str) -> None:
    one, two = Stream(), Stream()
    fails = fault == "warming up"

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps = doubled(pixel_values)
        if fails:
            raise RuntimeError("out of memory")
        return maps

    pool = GraphPool(cuda.recordable(run))
    with cuda:
        if fault == "replaying":
            with cuda.stream(one):
                pool(PIXELS)
        fails = True
        with cuda.stream(one), pytest.raises(RuntimeError, match="out of memory"):
            pool(PIXELS)
        fails = False
        if fault == "warming up":  # the pixels were read, so their owner may free them
            assert one.after == set(range(cuda.n_operations))
        with cuda.stream(two):
            if fault == "warming up":
                two.wait_stream(one)
            pool(PIXELS)
    assert cuda.at_once == []


def test_memory_is_kept_for_every_stream_that_replays(cuda: Cuda) -> None:
    """A graph may go while a stream still computes it."""
    pool = GraphPool(cuda.recordable(doubled))
    one, two = Stream(), Stream()
    for stream in (one, two, one):
        with cuda.stream(stream):
            pool(PIXELS)
    graph: Any = next(iter(pool._graphs.values()))
    used = [x.data_ptr() for x in (graph._static, *graph._maps)]
    assert cuda.kept_for == {address: [one, two] for address in used}


def test_threads_replay_on_their_own_streams(cuda: Cuda) -> None:
    pool = GraphPool(cuda.recordable(doubled))
    pool(PIXELS)
    results: list[bool] = []

    def replay() -> None:
        results.extend(torch.equal(pool(PIXELS)[0], 2 * PIXELS) for _ in range(3))

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


def test_a_graph_that_recorded_nothing_returns_nan(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph captured on another device records nothing."""
    pool = GraphPool(cuda.recordable(doubled))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    assert pool(PIXELS)[0].isnan().all()


def test_a_graph_keeps_its_derived_weights_alive(cuda: Cuda) -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    values = []

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        (weight,) = derive(layer, "doubled", lambda weight: (weight * 2,), layer.weight)
        values.append(weight.data_ptr())
        return (pixel_values @ weight,)

    pool = GraphPool(cuda.recordable(run))
    pool(images(8, 8))
    graph: Any = next(iter(pool._graphs.values()))
    assert len(set(values)) == 1  # computed once, before
    assert [value.data_ptr() for (value,) in graph.held] == values[:1]


def test_backbones_do_not_record_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording begins with a wait for the whole device, which CUDA forbids during another."""
    n_at_once = most_at_once = 0

    @contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        nonlocal n_at_once, most_at_once
        n_at_once += 1
        most_at_once = max(most_at_once, n_at_once)
        time.sleep(0.02)
        yield
        n_at_once -= 1

    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None)
    for name, fake in {
        "graph": graph,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "graph_pool_handle": object,
        "Event": lambda: SimpleNamespace(record=lambda stream: None),
        "CUDAGraph": SimpleNamespace,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    captures = [graphs._Capture() for _ in range(3)]
    threads = [
        threading.Thread(target=capture, args=(lambda x: (x + 1,), torch.zeros(2)))
        for capture in captures
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_at_once == 1 and n_at_once == 0
