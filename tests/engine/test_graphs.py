"""CUDA graphs: limited in number, recorded only if that pays, recorded again for new weights."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, WIDE, EngineRig, resnet_pair
from pretended_device import Device, baked, explained, gpu, no_warning, only_row
from reference_models import Pair, images
from torch import Tensor, nn

from fastbb.backbone.base import Backbone
from fastbb.engine import choose, graphs
from fastbb.engine.choose import Chooser
from fastbb.engine.computation import BackboneMaps, without_engine
from fastbb.engine.engine import Engine
from fastbb.engine.graphs import GraphPool
from fastbb.engine.memory import tensor_memory
from fastbb.engine.settings import EngineWarning, Settings
from fastbb.engine.trial import Run
from fastbb.weights.watch import ModuleStamp

OFTEN = choose.SEEN_BEFORE_TUNED


# the pool


class Recorder:
    """A capture that remembers what it recorded."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []
        self.n_at_once = self.most_at_once = 0

    def __call__(self, run: Run, pixel_values: Tensor) -> Run:
        self.recorded.append((tuple(pixel_values.shape), pixel_values.dtype))

        def replay(pixel_values: Tensor) -> tuple[Tensor, ...]:
            self.n_at_once += 1
            self.most_at_once = max(self.most_at_once, self.n_at_once)
            time.sleep(0.001)
            self.n_at_once -= 1
            return run(pixel_values)

        return replay


def doubled(pixel_values: Tensor) -> tuple[Tensor, ...]:
    return (pixel_values * 2,)


def test_a_shape_and_dtype_is_recorded_once() -> None:
    recorder = Recorder()
    pool = GraphPool(doubled, capture=recorder)
    for x in (PIXELS, PIXELS + 1, WIDE, PIXELS.half(), PIXELS[:1], WIDE):
        assert torch.equal(pool(x)[0], x * 2)
    assert len(recorder.recorded) == len(set(recorder.recorded)) == len(pool) == 4


def test_the_least_recently_used_graph_is_dropped() -> None:
    recorder = Recorder()
    pool = GraphPool(doubled, max_graphs=2, capture=recorder)
    one, two, three = (torch.ones(n) for n in (1, 2, 3))
    for x in (one, two, one, three, one):
        pool(x)
    assert len(recorder.recorded) == 3 and len(pool) == 2
    pool(two)
    assert len(recorder.recorded) == 4 and len(pool) == 2


def test_a_failed_recording_leaves_no_graph() -> None:
    def fail(run: Run, pixel_values: Tensor) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    pool = GraphPool(doubled, capture=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            pool(PIXELS)
    assert len(pool) == 0


def test_threads_replay_one_after_the_other() -> None:
    recorder = Recorder()
    pool = GraphPool(doubled, capture=recorder)
    threads = [threading.Thread(target=lambda: [pool(PIXELS) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.most_at_once == 1 and len(recorder.recorded) == 1


# recordings of the engine


class Graphs:
    """Replaces recording: bakes a backbone, and replays it.

    Attributes:
        recorded: batch and width of each recording, in order.
        backbone: the backbone that is baked.
        error: raised by a recording, unless None.
        broken: raised by a replay, unless None.
        spoil: changes the maps of a replay.
    """

    def __init__(self, backbone: Backbone, device: Device) -> None:
        self.recorded: list[tuple[int, int]] = []
        self.backbone, self.device = backbone, device
        self.error: Exception | None = None
        self.broken: Exception | None = None
        self.spoil: Callable[[Tensor], Tensor] = lambda x: x

    def __call__(self, run: Run, pixel_values: Tensor) -> Run:
        self.recorded.append((len(pixel_values), pixel_values.shape[3]))
        if self.error is not None:
            raise self.error
        run(pixel_values)
        frozen, static = baked(self.backbone), pixel_values.clone()

        def replay(pixel_values: Tensor) -> tuple[Tensor, ...]:
            if self.broken is not None:
                raise self.broken
            self.device.say(0.1)
            static.copy_(pixel_values)
            return tuple(self.spoil(x) for x in frozen(static))

        return replay


@pytest.fixture
def pair() -> Pair:
    """A backbone for one test, since its weights change."""
    return resnet_pair()


@pytest.fixture
def recording(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """A GPU that can record graphs."""
    recording = Graphs(rig.pair.ours, rig.device)
    monkeypatch.setattr(graphs, "_Capture", lambda: recording)
    monkeypatch.setattr(
        Chooser, "_may_capture", lambda self, pixels: self._settings.cuda_graph is not False
    )
    monkeypatch.setattr(choose, "free_bytes", lambda device: 10**9)
    return recording


def prepared_with(backbone: Backbone, cuda_graph: Any) -> Any:
    """Prepares without `prepare`, which refuses cuda_graph=True on a pretended GPU."""
    prepared = without_engine(backbone)
    prepared._engine = Engine(BackboneMaps(prepared), Settings("triton", cuda_graph=cuda_graph))
    return prepared


def test_the_first_shape_is_recorded_at_once_and_others_after_several_calls(
    rig: EngineRig, recording: Graphs
) -> None:
    with gpu(), no_warning():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, PIXELS, PIXELS)
        assert only_row(prepared).runs == "triton + CUDA graph"
        rig.assert_right(prepared, *[WIDE] * OFTEN)
        row = explained(prepared).rows[-1]
        assert row.runs == "triton" and "when the shape came more often" in row.why
        assert recording.recorded == [(2, 64)]
        rig.assert_right(prepared, WIDE, WIDE)
        assert explained(prepared).rows[-1].runs == "triton + CUDA graph"
    assert recording.recorded == [(2, 64), (2, 96)]


@pytest.mark.parametrize("graph", ["auto", True, False], ids=str)
def test_a_graph_that_would_fill_the_memory_is_recorded_only_with_cuda_graph_true(
    graph: Any,
    rig: EngineRig,
    recording: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with gpu():
        needed = tensor_memory(rig.pair.ours, PIXELS).peak
    monkeypatch.setattr(choose, "free_bytes", lambda device: 4 * needed - 1)
    with gpu(), no_warning():
        prepared = prepared_with(rig.pair.ours, graph)
        rig.assert_right(prepared, *[PIXELS] * (OFTEN + 2), PIXELS[:1], *[PIXELS[:1]] * OFTEN)
        rows = explained(prepared).rows
    if graph is True:
        assert recording.recorded == [(2, 64), (1, 64)]  # each at its first call
    else:  # a smaller batch fits
        assert recording.recorded == ([(1, 64)] if graph == "auto" else [])
        assert rows[0].runs == "triton"
        assert ("more than 25% of the" in rows[0].why) == (graph == "auto")


def test_auto_measures_no_graph_that_would_fill_the_memory(
    rig: EngineRig, recording: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "free_bytes", lambda device: 1000)
    with gpu(), no_warning():
        prepared = rig.prepare()
        rig.assert_right(prepared, PIXELS, PIXELS)
        assert only_row(prepared).runs == "triton" and not recording.recorded


def test_no_graph_is_recorded_before_the_modules_are_read(
    rig: EngineRig, recording: Graphs
) -> None:
    """A graph that was dropped would be recorded from layers with a hook, and kept."""
    called: list[nn.Module] = []
    with gpu():
        prepared = prepared_with(rig.pair.ours, True)
        batches = [images(32, 32 * n) for n in range(1, graphs.MAX_GRAPHS + 2)]
        rig.assert_right(prepared, *batches)
        n_recorded = len(recording.recorded)
        layer = list(rig.pair.ours.modules())[-1]
        hook = layer.register_forward_hook(lambda module, *_: called.append(module))
        with hook, pytest.warns(EngineWarning, match="hooks"):
            rig.assert_right(prepared, batches[0])
        assert len(recording.recorded) == n_recorded and called == [layer]


def test_the_number_of_graphs_is_limited(rig: EngineRig, recording: Graphs) -> None:
    with gpu(), no_warning():
        prepared = prepared_with(rig.pair.ours, True)
        batches = [images(32, 32 * n) for n in range(1, graphs.MAX_GRAPHS + 2)]
        rig.assert_right(prepared, *batches, batches[-1])
        assert len(recording.recorded) == graphs.MAX_GRAPHS + 1
        rig.assert_right(prepared, batches[0])
    assert recording.recorded[-1] == (2, 32) and len(recording.recorded) == graphs.MAX_GRAPHS + 2


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("raises", "RuntimeError: not permitted"), ("wrong", "map 0 is wrong"), ("nan", "error nan")],
)
def test_graph_that_fails_or_is_wrong_is_off(
    fault: str, problem: str, rig: EngineRig, recording: Graphs
) -> None:
    recording.error = RuntimeError("not permitted\nat") if fault == "raises" else None
    recording.spoil = lambda x: x * {"wrong": 1.001, "nan": torch.nan}.get(fault, 1)
    with gpu():
        prepared = rig.pair.ours.prepare("triton")
        with pytest.warns(
            EngineWarning, match=rf"triton \+ CUDA graph is off, triton runs: .*{problem}"
        ):
            rig.assert_right(prepared, PIXELS)
        with no_warning():
            rig.assert_right(prepared, *[PIXELS] * (OFTEN + 1))
        row = only_row(prepared)
    assert row.runs == "triton" and problem in row.others
    assert len(recording.recorded) == 1


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [(PIXELS[:1], "map 0 is of 2 images"), (WIDE, "RuntimeError: The size of tensor")],
    ids=["broadcast", "refused"],
)
def test_a_graph_with_the_buffer_of_another_shape_is_off(
    pixels: Tensor,
    problem: str,
    rig: EngineRig,
    recording: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_key", lambda pixel_values: pixel_values.dtype)
    with gpu():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, *[PIXELS] * 2, *[pixels] * OFTEN)
        with pytest.warns(EngineWarning, match=rf"triton \+ CUDA graph is off, .*{problem}"):
            rig.assert_right(prepared, pixels)
        assert explained(prepared).rows[-1].runs == "triton"
    assert recording.recorded == [(2, 64)]


def test_a_graph_that_fails_later_is_replaced_by_eager(rig: EngineRig, recording: Graphs) -> None:
    with gpu():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, PIXELS)
        recording.broken = RuntimeError("CUDA error")
        with pytest.warns(EngineWarning, match=r"triton \+ CUDA graph failed, eager runs: Runtime"):
            rig.assert_right(prepared, PIXELS)
        assert only_row(prepared).runs == "eager"


def test_auto_measures_graphs_too(rig: EngineRig, recording: Graphs) -> None:
    with gpu(), no_warning():
        prepared = rig.prepare()
        rig.assert_right(prepared, PIXELS, PIXELS)
        row = only_row(prepared)
        assert row.runs == "triton + CUDA graph"
        assert row.others == "triton: 1 s; eager: 1 s; eager + CUDA graph: 100 ms"
        rig.assert_right(prepared, WIDE)
        # another shape is not recorded because this one was
        row = explained(prepared).rows[-1]
        assert row.runs == "triton" and row.why == "what won for 2x64x64"


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_changed_weights_are_recorded_again(mode: str, rig: EngineRig, recording: Graphs) -> None:
    with gpu(), no_warning():
        prepared = rig.prepare(mode=mode)
        rig.assert_right(prepared, PIXELS)
        n_recorded = len(recording.recorded)
        for model in (rig.pair.ours, rig.pair.upstream):
            for p in model.parameters():
                p.mul_(0.5)
        rig.assert_right(prepared, PIXELS, PIXELS)
        assert only_row(prepared).runs == "triton + CUDA graph"
    assert len(recording.recorded) == 2 * n_recorded


@pytest.fixture
def order(recording: Graphs, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a call: "replay", or "read" of the modules."""
    found: list[str] = []
    is_current = ModuleStamp.is_current
    monkeypatch.setattr(ModuleStamp, "is_current", lambda s: found.append("read") or is_current(s))
    recording.spoil = lambda x: found.append("replay") or x
    return found


def test_modules_are_read_while_the_gpu_replays(rig: EngineRig, order: list[str]) -> None:
    with gpu(), no_warning():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, PIXELS)
        order.clear()
        rig.assert_right(prepared, PIXELS)
    n_maps = len(rig.pair.ours.out_features)
    assert order == [*["replay"] * n_maps, "read"]


def test_no_graph_is_replayed_that_reads_memory_which_weights_left(
    rig: EngineRig, recording: Graphs, order: list[str]
) -> None:
    with gpu(), no_warning():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, PIXELS)
        weight = next(rig.pair.ours.parameters())
        weight.data = weight.data.clone()  # the memory of before may be unmapped
        order.clear()
        rig.assert_right(prepared, PIXELS)
    assert order[0] == "read" and len(recording.recorded) == 2


@pytest.mark.parametrize("reason", ["gradient", "autocast", "hook"])
def test_nothing_is_replayed_where_it_may_not_run(
    reason: str, rig: EngineRig, order: list[str]
) -> None:
    called: list[nn.Module] = []
    with gpu():
        prepared = rig.pair.ours.prepare("triton")
        rig.assert_right(prepared, PIXELS)
        order.clear()
        if reason == "gradient":
            with torch.enable_grad(), pytest.warns(EngineWarning, match="gradient"):
                prepared(PIXELS.clone().requires_grad_())
        elif reason == "autocast":
            with torch.no_grad(), torch.autocast("cpu"):
                prepared(PIXELS)
        else:
            handle = torch.nn.modules.module.register_module_forward_hook(
                lambda module, *_: called.append(module)
            )
            with torch.no_grad(), handle, pytest.warns(EngineWarning, match="hooks"):
                prepared(PIXELS)
            assert len(called) > 1
    assert "replay" not in order
