"""Cells of a bench: pretended workers on a pretended clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastbb.bench import measure
from fastbb.bench.measure import FEWEST_ROUNDS, ROUNDS, Bench
from fastbb.bench.processes import WorkerError
from fastbb.bench.results import Cell, Results
from fastbb.bench.subject import N_IMAGES, Truth, WaySpec
from fastbb.engine.interruption import Interrupted

UPSTREAM, OURS, COMPILED = "library eager", "fastbb eager", "library compiled"


class Room:
    """What the pretended workers share: a clock, and what each way does.

    Attributes:
        call_s: seconds of a call by way.
        start_s: seconds of a start by way.
        error: of the result, relative, by way.
        late_error: of the result after the warm-up.
        fails: what a way raises, by way and command.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.call_s: dict[str, float] = {UPSTREAM: 0.1, OURS: 0.05, COMPILED: 0.02}
        self.start_s = {COMPILED: 30.0}
        self.error: dict[str, float] = {}
        self.late_error: dict[str, float] = {}
        self.fails: dict[tuple[str, str], Callable[[int], None]] = {}
        self.turns: list[str] = []
        self.tried: list[str] = []
        self.open = 0

    def clock(self) -> float:
        return self.now

    def worker(self, folder: Path) -> PretendedWorker:
        folder.mkdir(parents=True)
        self.open += 1
        return PretendedWorker(self)


class PretendedWorker:
    def __init__(self, room: Room) -> None:
        self.room, self.way, self.batch, self.n_turns = room, "", 0, 0

    def start(self, spec: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        room = self.room
        self.way, self.batch = spec["way"], spec["batch"]
        room.tried.append(self.way)
        self._fail("start")
        seconds = room.start_s.get(self.way, 1.0)
        if timeout_s is not None and seconds > timeout_s:
            room.now += timeout_s
            raise WorkerError("timeout", "late")
        room.now += seconds
        self._write(spec["outputs"], room.error.get(self.way, 0.0))
        return {"import_s": 0.5, "load_s": 0.25, "start_s": seconds, "note": ""}

    def ask(self, do: str, timeout_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        self._fail(do)
        call_s = self.room.call_s[self.way]
        if do == "warm":
            room = self.room
            error = room.late_error.get(self.way, room.error.get(self.way, 0.0))
            self._write(arguments["outputs"], error)
            return {"seconds": [call_s] * 3}
        self.room.turns.append(self.way)
        n_calls = max(1, round(arguments["seconds"] / call_s))
        self.room.now += n_calls * call_s
        return {"seconds": [call_s] * n_calls, "inside": None, "peak_bytes": 1000}

    def _write(self, path: str, error: float) -> None:
        save_file({"stage1": torch.ones(self.batch, 4) * (1 + error)}, path)

    def close(self) -> None:
        self.room.open -= 1

    def _fail(self, do: str) -> None:
        if (fail := self.room.fails.get((self.way, do))) is not None:
            fail(self.batch)


class Subject:
    name, kind, upstream = "model", "backbone", UPSTREAM
    size: tuple[int, int] = (32, 32)
    stages: tuple[str, ...] = ("stage1",)
    params: int | None = None
    macs: int | None = None
    activations: int | None = None

    def __init__(self) -> None:
        self.notes = ["a note"]

    def ways(self, precision: str, batch: int, folder: Path) -> list[WaySpec]:
        return [
            WaySpec(name, {"way": name, "batch": batch}, name == OURS, name == COMPILED)
            for name in (UPSTREAM, COMPILED, OURS)
        ]

    def truth(self, precision: str, batch: int) -> Truth | None:
        ones = torch.ones(min(batch, N_IMAGES), 4)
        return Truth({"stage1": ones}, {"stage1": ones.double()}, 1e-5)

    def skipped(self, way: str) -> dict[str, str]:
        return {}


@pytest.fixture
def room() -> Room:
    return Room()


def make_bench(room: Room, folder: Path, **options: Any) -> Bench:
    return Bench(
        Results("command", {}), folder, make_worker=room.worker, clock=room.clock, **options
    )


def raising(error: Exception) -> Callable[[int], None]:
    def fail(batch: int) -> None:
        raise error

    return fail


def names_with_times(cell: Cell) -> list[str]:
    return [way.name for way in cell.ways if way.rounds_s]


def test_a_cell_has_every_way_with_paired_rounds(room: Room, tmp_path: Path) -> None:
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [8])
    (cell,) = bench.results.cells
    assert names_with_times(cell) == [UPSTREAM, COMPILED, OURS]
    assert {len(way.rounds_s) for way in cell.ways} == {ROUNDS}
    assert cell.way(OURS).ours and not cell.way(UPSTREAM).ours  # type: ignore[union-attr]
    compiled = cell.way(COMPILED)
    assert compiled is not None
    assert compiled.cold_start_s == pytest.approx(30.75)
    assert compiled.compile_s == pytest.approx(30 - 0.02)
    assert compiled.error == 0 and compiled.memory_bytes == 1000
    assert room.open == 0 and not list(tmp_path.iterdir())


def test_each_round_begins_with_another_way(room: Room, tmp_path: Path) -> None:
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [1])
    firsts = [room.turns[3 * i] for i in range(3)]
    assert sorted(firsts) == sorted([UPSTREAM, COMPILED, OURS])
    assert all(len(set(room.turns[3 * i : 3 * i + 3])) == 3 for i in range(ROUNDS))


def test_slow_calls_have_fewer_rounds(room: Room, tmp_path: Path) -> None:
    room.call_s = dict.fromkeys(room.call_s, 40.0)
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [1])
    assert {len(way.rounds_s) for way in bench.results.cells[0].ways} == {FEWEST_ROUNDS}


def test_a_wrong_way_is_marked_and_timed(room: Room, tmp_path: Path) -> None:
    room.error[COMPILED] = 1e-3
    said: list[str] = []
    bench = make_bench(room, tmp_path, say=said.append)
    bench.run(Subject(), ["fp32"], [2])
    wrong = bench.results.cells[0].way(COMPILED)
    assert wrong is not None and wrong.wrong is not None and "stage1" in wrong.wrong
    assert wrong.error == pytest.approx(1e-3, rel=1e-2) and wrong.rounds_s
    assert bench.results.cells[0].way(OURS).wrong is None  # type: ignore[union-attr]
    assert any("WRONG" in line for line in said)


def test_a_way_that_is_wrong_after_its_warm_up_is_found(room: Room, tmp_path: Path) -> None:
    room.late_error[OURS] = 1e-3
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [9])
    ours = bench.results.cells[0].way(OURS)
    assert ours is not None and ours.wrong is not None
    assert bench.results.cells[0].way(COMPILED).wrong is None  # type: ignore[union-attr]


def test_a_batch_without_memory_is_halved_for_every_way(room: Room, tmp_path: Path) -> None:
    def fail(batch: int) -> None:
        if batch > 16:
            raise WorkerError("memory", "out of memory: wanted 9 GB")

    room.fails[OURS, "start"] = fail
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [64])
    (cell,) = bench.results.cells
    assert (cell.batch, cell.asked_batch) == (16, 64)
    assert names_with_times(cell) == [UPSTREAM, COMPILED, OURS]
    assert [note for note in cell.notes if "wanted 9 GB" in note and OURS in note]
    assert room.open == 0


def test_a_single_image_without_memory_loses_one_way(room: Room, tmp_path: Path) -> None:
    room.fails[OURS, "turn"] = raising(WorkerError("memory", "no memory"))
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [1])
    (cell,) = bench.results.cells
    assert names_with_times(cell) == [UPSTREAM, COMPILED]
    assert cell.way(OURS).reason == "no memory"  # type: ignore[union-attr]


@pytest.mark.parametrize("do", ["start", "warm", "turn"])
def test_a_way_that_fails_leaves_the_others_running(room: Room, tmp_path: Path, do: str) -> None:
    room.fails[OURS, do] = raising(WorkerError("error", "RuntimeError: no compiler"))
    bench = make_bench(room, tmp_path)
    bench.run(Subject(), ["fp32"], [4])
    (cell,) = bench.results.cells
    assert names_with_times(cell) == [UPSTREAM, COMPILED]
    assert cell.way(OURS).reason == "RuntimeError: no compiler"  # type: ignore[union-attr]
    assert cell.way(OURS).failed  # type: ignore[union-attr]
    assert {len(way.rounds_s) for way in cell.ways if way.rounds_s} == {ROUNDS}


def test_a_budget_drops_what_compiles_too_slowly(room: Room, tmp_path: Path) -> None:
    room.start_s[COMPILED] = 500.0
    bench = make_bench(room, tmp_path, budget_s=200)
    bench.n_planned = 2
    bench.run(Subject(), ["fp32"], [1, 2])
    first, second = bench.results.cells
    for cell in (first, second):
        assert names_with_times(cell) == [UPSTREAM, OURS]
        assert "--budget" in cell.way(COMPILED).reason  # type: ignore[union-attr, operator]
    # it was tried while there was time; then it is known to be too slow
    assert room.tried.count(COMPILED) == 1
    assert room.now < 200


def test_a_budget_keeps_what_fits(room: Room, tmp_path: Path) -> None:
    bench = make_bench(room, tmp_path, budget_s=400)
    bench.n_planned = 2
    bench.run(Subject(), ["fp32"], [1, 2])
    assert all(names_with_times(c) == [UPSTREAM, COMPILED, OURS] for c in bench.results.cells)


@pytest.mark.parametrize("n_turns", [1, 4, 17])
def test_an_interrupted_cell_keeps_whole_rounds(room: Room, tmp_path: Path, n_turns: int) -> None:
    left = n_turns

    def interrupt(batch: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    for way in (UPSTREAM, OURS, COMPILED):
        room.fails[way, "turn"] = interrupt
    bench = make_bench(room, tmp_path)
    with pytest.raises(Interrupted):
        bench.run(Subject(), ["fp32"], [1])
    whole = n_turns // 3
    assert len(bench.results.cells) == (1 if whole else 0)
    for cell in bench.results.cells:
        assert {len(way.rounds_s) for way in cell.ways} == {whole}
        assert any("interrupted" in note for note in cell.notes)
    assert room.open == 0


def test_a_cell_that_seems_slower_is_measured_once_more(room: Room, tmp_path: Path) -> None:
    bench = make_bench(room, tmp_path)
    asked: list[Cell] = []
    bench.run(Subject(), ["fp32"], [1], lambda cell: not asked.append(cell))
    assert len(bench.results.cells) == 1 and bench.results.cells[0] is not asked[0]
    assert room.tried.count(OURS) == 3 and len(asked) == 2
    bench.run(Subject(), ["fp32"], [2], lambda cell: len(asked) < 3 and not asked.append(cell))
    assert room.tried.count(OURS) == 5  # the second one was well


def test_what_cannot_be_compared_is_not_timed(room: Room, tmp_path: Path) -> None:
    class Unknown(Subject):
        def truth(self, precision: str, batch: int) -> Truth | None:
            raise RuntimeError("not implemented for 'Half'")

    bench = make_bench(room, tmp_path)
    bench.run(Unknown(), ["fp16"], [1])
    (cell,) = bench.results.cells
    assert all("not implemented for 'Half'" in str(way.reason) for way in cell.ways)
    assert all(way.failed and not way.rounds_s for way in cell.ways) and not room.tried


def test_the_batch_is_halved_if_the_truth_has_no_memory(room: Room, tmp_path: Path) -> None:
    class Large(Subject):
        def truth(self, precision: str, batch: int) -> Truth | None:
            if batch > 2:
                raise MemoryError("9 GB")
            return super().truth(precision, batch)

    bench = make_bench(room, tmp_path)
    bench.run(Large(), ["fp32"], [8])
    (cell,) = bench.results.cells
    assert (cell.batch, cell.asked_batch) == (2, 8)
    assert all(way.error == 0 and way.rounds_s for way in cell.ways)


def test_the_gpu_is_watched_while_it_works(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([{"reasons": 0x4, "sm_mhz": 1200.0, "max_sm_mhz": 1980.0}] * ROUNDS)
    monkeypatch.setattr(measure, "gpu_state", lambda gpu: next(states))
    bench = make_bench(room, tmp_path, gpu="GPU-1")
    bench.run(Subject(), ["fp32"], [1])
    (cell,) = bench.results.cells
    assert len(cell.clocks) == ROUNDS
    assert "the GPU was throttled by its power limit (1200 to 1200 of 1980 MHz)" in cell.notes
