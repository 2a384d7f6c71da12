"""One command's work on a features directory: its generations, shard by shard."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbb_kernels.warning import warn_caller

from ..images.spec import ImageProcessorSpec
from .decode import RowError
from .executor import Executor
from .layout import (
    ExtractionError,
    PlanMismatchError,
    Shard,
    read_events,
)
from .listing import Listing
from .pipeline import FeatureBatch
from .pool import DEVICES_DIFFER, MAX_TRIES
from .progress import Progress
from .shards import Committed, Computed, Lost, shard_content
from .sources import InputError, Source, first_few
from .store import FeatureWriter

# number of rows from which a share of failures is meaningful
_MIN_BUDGET_ROWS = 20
# number of rows from which a speed is
_MIN_SPEED_ROWS = 100
_N_ERRORS_SHOWN = 3


class ErrorBudgetError(ExtractionError):
    """More rows failed than the caller allows."""

    exit_code = 4


@dataclass(frozen=True)
class Report:
    """The outcome of an extraction.

    Attributes:
        directory: the features directory.
        rows: images in the directory.
        ok: images that have features.
        errors: number of failed images by kind.
        resumed_rows: images that were done before, and not tried again now.
        tried: images that this run tried.
        seconds: time of this run, without loading the model.
        new: images among the inputs that the directory does not have.
        vanished: images of the directory that are not among the inputs any more.
        unreadable_directories: those whose images are missing, as they could not be read when the
            images were listed; each with the reason.
        left: images of shards that ended their workers, and have no rows.
        elsewhere: images of shards of other processes, which they have not finished.
    """

    directory: Path
    rows: int
    ok: int
    errors: dict[str, int]
    resumed_rows: int
    tried: int
    seconds: float
    new: int = 0
    vanished: int = 0
    unreadable_directories: tuple[str, ...] = ()
    left: int = 0
    elsewhere: int = 0

    def __repr__(self) -> str:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(self.errors.items()))
        failed = f", {self.rows - self.ok:,} failed ({kinds})" if kinds else ""
        speed = f", {self.tried / self.seconds:,.1f} images/s"
        if self.tried < _MIN_SPEED_ROWS:  # the start of a run says nothing about its speed
            speed = f", {self.seconds:,.1f} s" if self.tried else ", nothing was left to do"
        counts = f"{self.ok:,} of {self.rows:,} images have features{failed}{speed}"
        new = f"; {_counted(self.new, 'new image')} left out (--update adds)" if self.new else ""
        new += f"; {self.vanished:,} not among the inputs any more" if self.vanished else ""
        lost = self.unreadable_directories
        n_lost = f"{len(lost):,} director{'ies were' if len(lost) > 1 else 'y was'} not read"
        unread = f"; {n_lost}: {first_few(lost)}" if lost else ""
        left = f"; {_counted(self.left, 'image')} left, of shards that ended " if self.left else ""
        left += "their workers (--record-crashes makes them failed rows)" if left else ""
        n = self.elsewhere
        others = f"; {_counted(n, 'image')} left to other processes" if n else ""
        return f"{self.directory}: {counts}{new}{unread}{left}{others}"


class Run:
    """One command's work on a features directory that it holds for writing."""

    def __init__(
        self,
        executor: Executor,
        writer: FeatureWriter,
        bar: Progress,
        max_error_rate: float,
        inputs: Sequence[str],
        listing: Listing,
        sources: list[Source] | InputError,
        record_crashes: bool = False,
    ) -> None:
        self.executor = executor
        self.writer = writer
        self.bar = bar
        self.max_error_rate = max_error_rate
        self.listing = listing
        self.sources = sources
        self.record_crashes = record_crashes
        self._listed = {
            "inputs": tuple(map(os.path.abspath, inputs)),
            "archives": listing.archives,
            "unreadable": tuple(listing.unreadable),
        }
        self.resumed = bool(writer.plan)
        self._new: list[Source] = []
        self._n_vanished = self._n_twice = 0
        self._elsewhere: dict[int, tuple[Source, str]] = {}  # source, and the path before
        self._n_finished = writer.n_finished
        self._commits: list[dict[str, Any] | None] = []
        self._left: set[int] = set()  # shards that ended their workers in this run

    def start(
        self,
        mode: str | None,
        batch_size: int | None,
        shard_rows: int | None,
        limit: int | None,
    ) -> None:
        """Writes the plan and the first generation of a first start; cleans up for a resume."""
        writer, say = self.writer, self.bar.say
        environment = self.executor.environment
        if environment["device_type"] == "cpu":
            n = environment.get("workers", 1)
            each = f"{n} workers with " if n > 1 else ""
            n_threads = environment["torch_threads"]
            say(f"running on the CPU ({each}{n_threads} torch threads), no GPU in use")
        if not writer.plan:
            assert isinstance(self.sources, list), "a first start without a list was refused"
            n_rows = len(self.sources[:limit])
            n_parts = environment.get("workers", 1) * (writer.share[1] if writer.share else 1)
            plan = self.executor.make_plan(mode or "auto", shard_rows, n_rows, n_parts)
            writer.start(plan)
        else:
            writer.clean()
            given = {"batch_size": batch_size, "mode": mode, "shard_rows": shard_rows}
            if ImageProcessorSpec.from_dict(writer.plan["preprocessing"]).output_size is None:
                del given["batch_size"]  # images of many sizes run one by one
            for name, value in given.items():
                if value is not None and value != writer.plan[name]:
                    say(f"{name} stays {writer.plan[name]}, as at the first start, not {value}")
        if not writer.generations:
            if isinstance(self.sources, InputError):  # killed before it listed them, and now gone
                raise self.sources
            with writer.planning():
                if not writer.generations:
                    writer.append("start", enumerate(self.sources[:limit]), **self._listed)
            of_all = f" of {len(self.sources):,}" if writer.n_rows < len(self.sources) else ""
            say(f"{_counted(writer.n_rows, 'image')}{of_all}")
        if isinstance(self.sources, InputError):
            say(f"warning: {self.sources}; the images are those that were listed before")
            return
        self._compare_with_inputs(self.sources)
        if n := len(self.sources) - len({source.id for source in self.sources}):
            say(f"listed more than once: {_counted(n, 'image')}")
        if passed_over := self.listing.passed_over():
            say(passed_over)
        if self.listing.unreadable:
            say(f"cannot list {first_few(self.listing.unreadable)}")

    def _compare_with_inputs(self, sources: Sequence[Source]) -> None:
        """Finds the images that are new, have vanished or are elsewhere since they were listed."""
        self._n_vanished = self._n_twice = 0
        self._elsewhere.clear()
        waiting = defaultdict[str, list[Source]](list)  # an image may be listed more than once
        for source in reversed(sources):
            waiting[source.id].append(source)
        for row, frozen in self.writer.frozen():
            if not (same := waiting.get(frozen.id)):
                self._n_vanished += 1
            elif (source := same.pop()).path != frozen.path:
                self._elsewhere[row] = source, frozen.path
        left = {id(source) for same in waiting.values() for source in same}
        self._new = [source for source in sources if id(source) in left]
        if places := {_place(source) for source in self._new}:
            self._n_twice = sum(_place(frozen) in places for _, frozen in self.writer.frozen())

    def run(self, limit: int | None, update: bool, retry_failed: bool) -> Report:
        """Extracts what is left, with `update` what is new, and with `retry_failed` what failed."""
        writer = self.writer
        self._commits = [writer.committed(shard) for shard in writer.shards]
        done = writer.totals(self._commits)
        failed_before = writer.failures(self._commits) if retry_failed else {}
        self._say_what_is_there(done, update, retry_failed)
        if update or retry_failed:
            self._check_places()
        environment = self.executor.environment
        self._warn_of_another_device(environment["device"])
        writer.log({"event": "start", "time": time.time(), **environment})
        started = time.perf_counter()
        n_done = done["rows"] - self._n_replaced()
        n_tried = 0
        if retry_failed:
            # a retry that was interrupted is finished, and no other one begins
            unfinished = writer.generations[self._n_finished :]
            if not any(generation.kind == "retry" for generation in unfinished):
                n_tried += self._extract_pending(forgiving=True)  # to know all that fails
                if self._left:
                    self.bar.say("failed images are not tried again while a shard is left")
                else:
                    n_done -= len(failed_before.keys() & self._append_retry())
            else:
                self.bar.say("a retry was interrupted: it is finished now, and no other one begins")
        if update:
            self._append_update(limit)
        while True:
            n_tried += self._extract_pending(forgiving=retry_failed)
            with writer.planning():
                self._read_other_commits()
                if not self._pending():  # another process may have appended some
                    final = writer.totals(self._commits)
                    if None not in self._commits:
                        writer.finish(final)
                    break
        unreadable = tuple(self.listing.unreadable)
        if isinstance(self.sources, InputError):
            unreadable = writer.generations[-1].unreadable
        writer.log({"event": "end", "time": time.time()})
        return Report(
            writer.directory,
            final["rows"],
            final["ok"],
            final["errors"],
            resumed_rows=n_done,
            tried=n_tried,
            seconds=time.perf_counter() - started,
            new=len(self._new),
            vanished=self._n_vanished,
            unreadable_directories=unreadable,
            left=sum(writer.shards[number].rows for number in self._left),
            elsewhere=sum(
                shard.rows
                for shard, commit in zip(writer.shards, self._commits)
                if commit is None and not writer.is_mine(shard)
            ),
        )

    def _append_update(self, limit: int | None) -> None:
        """Freezes what is new among the inputs, unless another process has."""
        writer = self.writer
        with writer.planning():
            if writer.share:
                assert isinstance(self.sources, list), "an update without a list was refused"
                self._compare_with_inputs(self.sources)
            room = None if limit is None else max(limit - writer.n_rows, 0)
            if added := self._new[:room]:
                writer.append("update", enumerate(added, writer.n_rows), **self._listed)
                self._new = self._new[len(added) :]

    def _read_other_commits(self) -> None:
        """Reads what other processes have committed."""
        writer = self.writer
        self._commits += [None] * (writer.n_shards - len(self._commits))
        for shard in writer.shards:
            if self._commits[shard.shard] is None and not writer.is_mine(shard):
                self._commits[shard.shard] = writer.committed(shard)

    def _say_what_is_there(self, done: Mapping[str, Any], update: bool, retry_failed: bool) -> None:
        writer, say = self.writer, self.bar.say
        if not self.resumed:
            return
        say(
            f"resuming {writer.directory}: {done['shards']:,} of {writer.n_shards:,} shards are "
            "done"
        )
        n_failed = done["rows"] - done["ok"]
        found = [
            (len(self._new), "new", "" if update else " (--update adds them)"),
            (self._n_vanished, "vanished", ""),
            (n_failed, "failed", "" if retry_failed else " (--retry-failed tries them again)"),
        ]
        if text := ", ".join(f"{n:,} {what}{advice}" for n, what, advice in found if n):
            say(f"compared with the inputs now: {text}")
        inputs = writer.generations[0].inputs
        if self._n_vanished and inputs != self._listed["inputs"]:
            say(f"other inputs than at the first start, which had {first_few(inputs)}")
        if self._n_twice:
            say(f"warning: {self._n_twice:,} of the new ones are there already, under other ids")

    def _check_places(self) -> None:
        """Raises if an image that has features is another file now: ids would mean two images."""
        failed = self.writer.failures(self._commits)
        moved = [found for row, found in self._elsewhere.items() if row not in failed]
        if moved:
            source, was = moved[0]
            raise PlanMismatchError(
                f"{_counted(len(moved), 'image')} of {self.writer.directory} would be other files: "
                f"{source.id!r} was {was}, now {source.path}. Give the inputs of the first start, "
                "or another directory"
            )

    def _warn_of_another_device(self, device: str) -> None:
        others = sorted(
            {
                str(event["device"])
                for event in read_events(self.writer.directory)
                if event.get("event") == "start" and event.get("device", device) != device
            }
        )
        if others:
            warn_caller(
                f"this run is on {device}, an earlier one of {self.writer.directory} was on "
                f"{', '.join(others)}: {DEVICES_DIFFER}"
            )

    def _append_retry(self) -> set[int]:
        """Freezes the failed rows whose images are among the inputs, and returns their numbers."""
        writer = self.writer
        assert isinstance(self.sources, list), "retry_failed without a list was refused"
        source_of_id = {source.id: source for source in self.sources}
        failures = writer.failures(self._commits)
        rows = {row: f for row, f in failures.items() if f.id in source_of_id}
        if n_left := len(failures) - len(rows):
            what = _counted(n_left, "failed image")
            self.bar.say(f"not among the inputs, and not tried again: {what}")
        if rows:
            writer.append(
                "retry",
                [(row, source_of_id[failure.id]) for row, failure in rows.items()],
                {row: failure.kind for row, failure in rows.items()},
                **self._listed,
            )
        return set(rows)

    def _pending(self) -> list[Shard]:
        self._commits += [None] * (self.writer.n_shards - len(self._commits))
        return [
            shard
            for shard in self.writer.shards
            if self._commits[shard.shard] is None
            and shard.shard not in self._left
            and self.writer.is_mine(shard)
        ]

    def _n_replaced(self) -> int:
        """Number of rows that failed before and are to be tried again."""
        return sum(sum(shard.replaces.values()) for shard in self._pending())

    def _extract_pending(self, forgiving: bool = False) -> int:
        """Extracts and commits every shard that is not, and returns the number of its rows.

        Args:
            forgiving: do not count failures of earlier runs, which are tried again afterwards.
        """
        writer, bar = self.writer, self.bar
        todo = {shard.shard: shard for shard in self._pending()}
        if not todo:
            return 0
        budget = self._budget(forgiving)
        n_todo = sum(shard.rows for shard in todo.values())
        n_done = writer.totals(self._commits)["rows"] - self._n_replaced()
        bar.start(n_done + n_todo, n_done)
        shard_start = time.perf_counter()
        with closing(self.executor.compute(writer, [*todo.values()])) as events:
            for event in events:
                shard = todo[event.shard]
                if isinstance(event, Computed):
                    bar.advance(event.rows)
                    budget.count(shard, event)
                elif isinstance(event, Lost):
                    self._lose(shard, event, budget)
                elif isinstance(event, Committed):
                    self._commits[shard.shard] = event.commit
                    now = time.perf_counter()
                    logged = {"event": "shard", "shard": shard.shard, "rows": shard.rows}
                    writer.log({**logged, "time": time.time(), "seconds": now - shard_start})
                    shard_start = now
        return sum(shard.rows for shard in todo.values() if self._commits[shard.shard])

    def _lose(self, shard: Shard, event: Lost, budget: _Budget) -> None:
        """Notes that a worker has ended in a shard; the third time the shard is left."""
        writer = self.writer
        lost = {"event": "lost", "shard": shard.shard, "reason": event.reason}
        writer.log({**lost, "left": event.is_left, "time": time.time()})
        what = f"left after {MAX_TRIES} tries" if event.is_left else "tried again"
        self.bar.say(f"a worker has ended: {event.reason}; shard {shard.shard} is {what}")
        writer.remove_unfinished(shard)
        if event.is_left and (commit := writer.committed(shard, hashed=True)):
            self._commits[shard.shard] = commit  # the last worker had just done it
            return
        for computed in event.computed:
            self.bar.advance(-computed.rows)
            budget.uncount(shard, computed)
        if not event.is_left:
            return
        if not self.record_crashes:
            self._left.add(shard.shard)
            return
        message = f"its shard of {_counted(shard.rows, 'image')} ended {MAX_TRIES} workers"
        errors = [
            RowError(row, source.id, "worker_crash", message) for row, source in writer.rows(shard)
        ]
        content = shard_content([FeatureBatch([], {}, errors, [])], writer.plan["outputs"])
        self._commits[shard.shard] = writer.commit(shard, *content)
        self.bar.advance(shard.rows)
        budget.count(shard, Computed(shard.shard, shard.rows, tuple(errors)))

    def _budget(self, forgiving: bool) -> _Budget:
        """Counts the rows of generations that no earlier run has finished."""
        unfinished = self.writer.generations[self._n_finished :]
        new = (generation for generation in unfinished if generation.kind != "retry")
        listed = (shard for generation in new for shard in generation.shards)
        shards = {shard.shard for shard in listed if self.writer.is_mine(shard)}
        budget = _Budget(self.max_error_rate, shards)
        for number in sorted(budget.shards):
            if commit := self._commits[number]:
                budget.n_done += commit["rows"]
                budget.n_failed += 0 if forgiving else sum(commit["errors"].values())
        budget.check()
        return budget


class _Budget:
    """The share of images that may fail.

    Args:
        rate: the share.
        shards: numbers of the shards that count. Images that failed in a run that ended were
            reported, and those of a retry have failed before.
    """

    def __init__(self, rate: float, shards: set[int]) -> None:
        self.rate, self.shards = rate, shards
        self.n_done = self.n_failed = 0
        self._last = deque[RowError](maxlen=_N_ERRORS_SHOWN)

    def count(self, shard: Shard, computed: Computed) -> None:
        """Counts rows of a shard.

        Raises:
            ErrorBudgetError: too many have failed.
        """
        if shard.shard in self.shards:
            self.n_done += computed.rows
            self.n_failed += len(computed.errors)
            self._last.extend(computed.errors)
            self.check()

    def uncount(self, shard: Shard, computed: Computed) -> None:
        """Forgets rows that a worker had computed, and that are computed again."""
        if shard.shard in self.shards:
            self.n_done -= computed.rows
            self.n_failed -= len(computed.errors)

    def check(self) -> None:
        """Raises ErrorBudgetError if too many have failed."""
        n_done, n_failed = self.n_done, self.n_failed
        if n_failed > self.rate * n_done and (n_done >= _MIN_BUDGET_ROWS or self.rate == 0):
            last = "; ".join(f"{e.id!r}: {e.kind}, {e.message}" for e in self._last)
            raise ErrorBudgetError(
                f"stopped: {n_failed:,} of {n_done:,} images failed, more than the share of "
                f"{self.rate:g} allowed{last and f' (last: {last})'}; mend the images and go on "
                "with --retry-failed, or allow more with --max-error-rate"
            )


def _place(source: Source) -> tuple[str, int | None, str | None]:
    return source.path, source.offset, source.member


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
