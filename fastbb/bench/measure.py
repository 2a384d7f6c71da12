"""Measures cells: one live process for each way, checked first, then timed in turns."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from ..engine.interruption import check_interrupted
from ..engine.measuring import describe
from .environment import gpu_state, throttled
from .processes import Worker, WorkerError
from .rates import Rates
from .results import Cell, Results, Way
from .subject import Subject, Truth, WaySpec

ROUNDS, FEWEST_ROUNDS = 10, 5
REPEATS = 2  # of a cell that seems to have regressed
SECONDS = 5.0  # of each way in a cell
_WARM_S = 5.0
# that a way takes to start which compiles nothing, and to get warm; for `--budget`
_START_S, _USUAL_WARM_S = 5.0, 1.0


class AnyWorker(Protocol):
    """What a bench asks of a worker, see `processes.Worker`."""

    def start(self, spec: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]: ...
    def ask(self, do: str, timeout_s: float | None = None, **arguments: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


class _IncomparableError(Exception):
    """There is no truth to compare with."""


class OutOfMemoryError(Exception):
    """A way ran out of memory in a batch that can be halved."""


class Bench:
    """Measures cells and collects them.

    Args:
        results: gets each cell when it is measured, and what there is of one that is interrupted.
        folder: for files and logs of the processes.
        gpu: of nvidia-smi, index or UUID; None: no GPU runs.
        seconds: of each way in a cell, without its start.
        budget_s: seconds for everything: ways whose compiling would pass it are dropped, the
            slowest first. None: no limit.
        say: is told what is going on, a line at a time.
        make_worker: makes a worker from a folder; tests replace it.
        clock: seconds from any start.
        rates: measures those of the machine for a precision, after each cell; None: not.
    """

    def __init__(
        self,
        results: Results,
        folder: Path,
        *,
        gpu: str | None = None,
        seconds: float = SECONDS,
        budget_s: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        make_worker: Callable[[Path], AnyWorker] = Worker,
        clock: Callable[[], float] = time.monotonic,
        rates: Callable[[str], Rates] | None = None,
    ) -> None:
        self.results, self.folder, self.gpu, self.rates = results, folder, gpu, rates
        self.seconds, self.say, self.make_worker, self.clock = seconds, say, make_worker, clock
        self._end = None if budget_s is None else clock() + budget_s
        # seconds of compiling by subject and way; of one that was ended, an estimate
        self.compile_s: dict[tuple[str, str], float] = {}
        self.n_planned = self.n_done = 0

    def run(
        self,
        subject: Subject,
        precisions: Sequence[str],
        batches: Sequence[int],
        once_more: Callable[[Cell], bool] = lambda cell: False,
    ) -> None:
        """Measures every combination into `results`.

        Args:
            subject: what is measured.
            precisions: of its cells.
            batches: of its cells.
            once_more: whether a cell has to be measured again, which then counts instead; at most
                twice, since memory lies otherwise in other processes.

        Raises:
            Interrupted: a signal came.
        """
        for precision in precisions:
            for batch in batches:
                cell = self.measure(subject, precision, batch)
                self.results.cells.append(cell)
                for _ in range(REPEATS):
                    if not once_more(self.results.cells[-1]):
                        break
                    self.say(f"{self.title(cell)}: seems to have regressed, measured once more")
                    self.results.cells[-1] = self.measure(subject, precision, batch)
                self.n_done += 1

    def measure(self, subject: Subject, precision: str, batch: int) -> Cell:
        """Measures one cell; halves the batch where memory runs out."""
        asked = batch
        notes: list[str] = []
        while True:
            cell = Cell(
                model=subject.name,
                kind=subject.kind,
                precision=precision,
                batch=batch,
                asked_batch=asked,
                size=subject.size,
                upstream=subject.upstream,
                stages=subject.stages,
                params=subject.params,
                macs=subject.macs,
                activations=subject.activations,
                notes=list(notes),
            )
            try:
                _CellRun(self, subject, cell).measure()
                if self.rates is not None:
                    cell.rates = asdict(self.rates(precision))
                return cell
            except OutOfMemoryError as error:
                notes.append(f"batch {batch}: {error}")
                self.say(f"{self.title(cell)}: {error}; half of it is measured")
                batch //= 2
            except KeyboardInterrupt:
                before = any(done.key == cell.key for done in self.results.cells)
                if any(way.rounds_s for way in cell.ways) and not before:
                    cell.notes.append("interrupted: fewer rounds than usual")
                    self.results.cells.append(cell)
                raise

    def title(self, cell: Cell) -> str:
        number = self.n_done + 1
        where = f"{cell.model}, {cell.precision}, batch {cell.batch}"
        return f"[{number}/{max(number, self.n_planned)}] {where}"

    def left_s(self) -> float | None:
        """Seconds of the budget that are left; None: any number."""
        return None if self._end is None else max(0.0, self._end - self.clock())

    @property
    def n_left(self) -> int:
        """Number of cells after the one that is measured."""
        return max(0, self.n_planned - self.n_done - 1)


class _CellRun:
    """The ways of one cell, each in its process."""

    def __init__(self, bench: Bench, subject: Subject, cell: Cell) -> None:
        self.bench, self.subject, self.cell = bench, subject, cell
        self.folder = bench.folder / f"cell-{bench.n_done + 1}"
        self.workers: dict[str, AnyWorker] = {}
        self.n_started = 0

    def measure(self) -> None:
        try:
            specs = self.subject.ways(self.cell.precision, self.cell.batch, self.folder)
            self.cell.ways = [Way(spec.name, ours=spec.ours) for spec in specs]
            try:
                truth = self._truth()
            except _IncomparableError as error:  # what cannot be compared is not timed
                for way in self.cell.ways:
                    way.reason, way.failed = f"upstream fails here: {error}", True
                self.bench.say(f"{self.bench.title(self.cell)}: upstream fails here: {error}")
                return
            self.cell.notes += self.subject.notes
            # those that compile come last, the quickest first: a budget drops the slowest
            for spec in sorted(specs, key=lambda spec: (spec.compiles, self._known(spec) or 0.0)):
                self._start(spec, truth, specs)
            self._rounds()
        finally:
            for worker in self.workers.values():
                worker.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _truth(self) -> Truth | None:
        try:
            return self.subject.truth(self.cell.precision, self.cell.batch)
        except (MemoryError, torch.OutOfMemoryError) as error:
            if self.cell.batch > 1:
                raise OutOfMemoryError(f"upstream in float64: {describe(error)}") from error
            raise _IncomparableError(describe(error)) from error
        except Exception as error:  # whatever upstream raises for this precision
            check_interrupted()
            raise _IncomparableError(describe(error)) from error

    def _start(self, spec: WaySpec, truth: Truth | None, specs: Sequence[WaySpec]) -> None:
        way = self._way(spec.name)
        way.reason = spec.reason
        timeout_s = self._time_for(spec, specs)
        known_s = self._known(spec) or 0.0
        if way.reason is None and timeout_s is not None and timeout_s <= known_s:
            way.dropped = True
            way.reason = (
                f"dropped: compiling takes about {known_s:.0f} s, --budget leaves it "
                f"{timeout_s:.0f} s"
            )
        if way.reason is not None:
            self._say(way, way.reason)
            return
        self.n_started += 1
        folder = self.folder / f"way-{self.n_started}"
        worker = self.bench.make_worker(folder)
        self.workers[way.name] = worker
        first, steady = (folder / f"{name}.safetensors" for name in ("first", "steady"))
        try:
            started = worker.start({**spec.spec, "outputs": str(first)}, timeout_s)
            warm = worker.ask("warm", max_s=_WARM_S, outputs=str(steady))["seconds"]
        except WorkerError as error:
            if error.kind == "timeout" and timeout_s is not None:
                self._remember(spec, 2 * timeout_s)  # it is not tried again for a little more
                way.dropped = True
                why = f"dropped: not compiled after the {timeout_s:.0f} s that --budget leaves it"
                error = WorkerError("timeout", why)
            self._lose(way, error)
            return
        steady_s = statistics.median(warm[-3:])
        way.cold_start_s = sum(started[name] for name in ("import_s", "load_s", "start_s"))
        prepares = spec.compiles or spec.ours
        way.compile_s = max(0.0, started["start_s"] - steady_s) if prepares else 0.0
        way.note = started["note"]
        self._remember(spec, way.compile_s)
        if truth is not None:
            self._judge(way, truth, first, steady)
        said = f"first result after {way.cold_start_s:.1f} s"
        self._say(way, f"WRONG, {way.wrong}" if way.wrong else said)

    def _judge(self, way: Way, truth: Truth, *files: Path) -> None:
        """Judges results of a way by the worst of them, and removes them."""
        skipped, batch = self.subject.skipped(way.name), self.cell.batch
        found = [truth.judge(load_file(file), batch, skipped) for file in files]
        worst = max(found, key=lambda one: (one.wrong is not None, one.error or 0.0))
        way.error, way.allowed, way.wrong = worst.error, worst.allowed, worst.wrong
        way.errors = worst.errors
        way.note = "; ".join(filter(None, (way.note, worst.note)))
        for file in files:
            file.unlink()

    def _rounds(self) -> None:
        """Times the ways in turns; each round begins with another way.

        A round that is not complete for every way is dropped, so that rounds pair.
        """
        seconds = 0.0
        if self.workers:
            about = len(self.workers) * self.bench.seconds
            number = f"{len(self.workers)} ways" if len(self.workers) > 1 else "one way"
            self.bench.say(f"{self.bench.title(self.cell)}: timing {number}, {about:.0f} s or more")
        try:
            for number in range(ROUNDS):
                names = list(self.workers)
                if not names or (
                    number >= FEWEST_ROUNDS and seconds > 2 * self.bench.seconds * len(names)
                ):
                    break
                first = number % len(names)
                with self._gpu_watched():
                    for name in names[first:] + names[:first]:
                        seconds += self._turn(self._way(name))
        finally:
            timed = [way for way in self.cell.ways if way.name in self.workers]
            n_complete = min((len(way.rounds_s) for way in timed), default=0)
            for way in timed:
                del way.rounds_s[n_complete:]
                if way.inside_s is not None:
                    del way.inside_s[n_complete:]
        if (note := throttled(self.cell.clocks)) is not None:
            self.cell.notes.append(note)

    @contextmanager
    def _gpu_watched(self) -> Iterator[None]:
        """Asks for the state of the GPU while the block keeps it busy."""
        if self.bench.gpu is None:
            yield
            return
        with ThreadPoolExecutor(1) as pool:
            state = pool.submit(gpu_state, self.bench.gpu)
            yield
        self.cell.clocks.append(state.result())

    def _turn(self, way: Way) -> float:
        try:
            turn = self.workers[way.name].ask("turn", seconds=self.bench.seconds / ROUNDS)
        except WorkerError as error:
            self._lose(way, error)
            return 0.0
        way.rounds_s.append(turn["seconds"])
        way.memory_bytes = turn["peak_bytes"]
        if turn["inside"] is not None:
            way.inside_s = [*(way.inside_s or []), turn["inside"]]
        return sum(turn["seconds"])

    def _lose(self, way: Way, error: WorkerError) -> None:
        """Ends the process of a way that cannot go on; its rounds are void.

        Raises:
            OutOfMemoryError: half the batch may do.
        """
        self.workers.pop(way.name).close()
        way.reason, way.rounds_s, way.inside_s = str(error), [], None
        way.failed = error.kind != "skip" and not way.dropped
        if error.kind == "memory" and self.cell.batch > 1:
            raise OutOfMemoryError(f"{way.name}: {error}")
        self._say(way, way.reason)

    def _time_for(self, spec: WaySpec, specs: Sequence[WaySpec]) -> float | None:
        """Seconds in which a way has to start, by the budget; None: any number.

        What compiles nothing is reserved, in this cell and in those that follow. Of what is left a
        cell may take twice its part, since others may take less.
        """
        left_s, n_left = self.bench.left_s(), self.bench.n_left
        if left_s is None or not spec.compiles:
            return None
        timing = (self.bench.seconds + _USUAL_WARM_S) * len(specs)
        plain = [one for one in specs if not one.compiles]
        waiting = [one for one in plain if not self._was_tried(one)]
        reserved = timing + _START_S * len(waiting)
        reserved += n_left * (timing + _START_S * len(plain))
        spare_s = max(0.0, left_s - reserved)
        return min(spare_s, 2 * spare_s / (n_left + 1))

    def _was_tried(self, spec: WaySpec) -> bool:
        return spec.name in self.workers or self._way(spec.name).reason is not None

    def _known(self, spec: WaySpec) -> float | None:
        """Seconds of compiling that this way took for this model before."""
        return self.bench.compile_s.get((self.subject.name, spec.name))

    def _remember(self, spec: WaySpec, seconds: float) -> None:
        key = self.subject.name, spec.name
        self.bench.compile_s[key] = max(seconds, self.bench.compile_s.get(key, 0.0))

    def _way(self, name: str) -> Way:
        way = self.cell.way(name)
        assert way is not None
        return way

    def _say(self, way: Way, text: str) -> None:
        self.bench.say(f"{self.bench.title(self.cell)}: {way.name}: {text}")
