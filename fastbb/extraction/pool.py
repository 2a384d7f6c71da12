"""Workers that compute the shards of a run, seen from the process that hands the shards out.

One class serves all kinds of workers: processes of this machine (`local_workers`) and actors of Ray
(`ray_workers`). A shard whose worker ends goes to another one, and after three of them it is left.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fastbb_kernels.warning import warn_caller

from ..engine.interruption import check_interrupted
from .decode import RowError
from .layout import DamagedError, ExtractionError, OutputError, PlanMismatchError, Shard
from .shards import Committed, Computed, Lost, ShardEvent
from .sources import InputError
from .store import FeatureWriter
from .worker import Message, Start

MAX_TRIES = 3
DEVICES_DIFFER = "features of different devices may differ in their last bits"
_POLL_S = 0.5
_SAY_S = 30.0
# errors that a worker may answer with, and that mean the same in this process
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        *(PlanMismatchError, DamagedError, OutputError, ExtractionError),
        *(InputError, ValueError, TypeError, OSError, ImportError),
        *(FileNotFoundError, PermissionError, ModuleNotFoundError, MemoryError),
    )
}


class WorkerError(ExtractionError):
    """Workers end before they have done anything."""

    exit_code = 7


class Worker(Protocol):
    """A worker, which answers one request at a time."""

    def ask(self, request: Message) -> None:
        """Sends a request; its answers come by `Backend.wait`."""
        ...

    def close(self) -> None:
        """Ends it, whatever it does."""
        ...


@dataclass(frozen=True)
class Ended:
    """A worker has ended by itself.

    Attributes:
        reason: how, for a user.
    """

    reason: str


class Backend(Protocol):
    """Starts workers and hears them.

    Attributes:
        starts: how each worker begins; the number of them is the number of workers.
        min_ready: workers that must be ready before the first shard is handed out.
    """

    starts: Sequence[Start]
    min_ready: int

    def start(self) -> Worker:
        """Starts a worker, without waiting for it."""
        ...

    def wait(self, workers: Sequence[Any], timeout_s: float) -> list[tuple[Any, Message | Ended]]:
        """Returns what some of the workers have answered; nothing after the timeout."""
        ...

    def close(self) -> None:
        """Lets go of what it needs beside the workers."""
        ...


@dataclass
class _Place:
    """A place for a worker.

    Attributes:
        start: how a worker begins here.
        worker: the one that is there.
        is_ready: whether it has loaded the model.
        shard: what it computes.
        computed: what it has computed of it.
        n_failed_starts: workers in a row that ended before they were ready.
    """

    start: Start
    worker: Worker | None = None
    is_ready: bool = False
    shard: Shard | None = None
    computed: list[Computed] = field(default_factory=list)
    n_failed_starts: int = 0

    @property
    def is_given_up(self) -> bool:
        """Whether workers end here before they have the model, time after time."""
        return self.n_failed_starts >= MAX_TRIES


class Pool:
    """An `Executor` of several workers; a context manager that ends them.

    The first worker starts at once and makes or compares the plan. The others start with the first
    shards, no more of them than there are shards.
    """

    def __init__(self, backend: Backend, say: Callable[[str], None] = lambda text: None) -> None:
        """Starts nothing yet.

        Args:
            backend: starts and hears the workers.
            say: shows a line.
        """
        self._backend, self._say = backend, say
        self._places = [_Place(start) for start in backend.starts]
        self._tries = Counter[int]()
        self._computes = self._has_begun = False
        self._said_at = 0.0
        self._environment: Message = {}
        self._warnings: set[str] = set()

    def __enter__(self) -> Pool:
        try:
            self._start_first()
        except BaseException:
            self.close()
            raise
        return self

    def _start_first(self) -> None:
        """Starts the first worker, and waits until it is ready."""
        first = self._places[0]
        self._said_at = time.monotonic()
        while not first.is_ready:
            if first.worker is None:
                self._start(first)
            self._say_at_times("waiting for the first worker to be ready")
            for place, answer in self._wait():
                self._heard(place, answer)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers."""
        for place in self._places:
            if place.worker is not None:
                place.worker.close()
                place.worker = None
        self._backend.close()

    @property
    def environment(self) -> Message:
        return {**self._environment, "workers": len(self._places)}

    def make_plan(
        self, mode: str, shard_rows: int | None, n_rows: int, n_parts: int
    ) -> dict[str, Any]:
        arguments: Message = {"mode": mode, "shard_rows": shard_rows}
        arguments |= {"n_rows": n_rows, "n_parts": n_parts}
        reason = ""
        for _ in range(MAX_TRIES):
            self._start_first()
            first = self._places[0]
            assert first.worker is not None
            first.worker.ask({"do": "plan", "arguments": arguments})
            while first.is_ready:
                for place, answer in self._wait():
                    self._heard(place, answer)
                    if isinstance(answer, Ended):
                        reason = answer.reason
                    elif "plan" in answer:
                        return answer["plan"]
        raise WorkerError(f"{MAX_TRIES} workers ended while they made the plan: {reason}")

    def check_plan(self, writer: FeatureWriter) -> None:
        """Does nothing: every worker has compared its own settings."""

    def compute(
        self, writer: FeatureWriter, shards: Sequence[Shard]
    ) -> Generator[ShardEvent, None, None]:
        """Hands shards out, each to the next worker that has none.

        Raises:
            ExtractionError, ValueError, OSError: that of a worker, which ends the run.
            WorkerError: no worker gets as far as to compute.
        """
        self._computes = True
        todo = deque(shards)
        n_left, n_committed, reason = 0, 0, ""
        while todo or any(place.shard for place in self._places):
            self._hand_out(todo)
            for place, answer in self._wait():
                event = self._heard(place, answer)
                n_committed += isinstance(event, Committed)
                if isinstance(event, Lost):
                    n_left, reason = n_left + event.is_left, event.reason
                    if not event.is_left:
                        todo.appendleft(next(s for s in shards if s.shard == event.shard))
                if event is not None:
                    yield event
                if todo and n_left >= MAX_TRIES and not n_committed:
                    raise WorkerError(
                        f"no shard was finished, and {n_left} ended {MAX_TRIES} workers each: "
                        f"{reason}"
                    )

    def _hand_out(self, todo: deque[Shard]) -> None:
        n_ready = sum(place.is_ready for place in self._places)
        n_places = sum(not place.is_given_up for place in self._places)
        n_wanted = min(self._backend.min_ready, len(todo), n_places)
        self._has_begun = self._has_begun or n_ready >= n_wanted
        if not self._has_begun:
            self._say_at_times(f"waiting for {n_wanted} workers, of which {n_ready} are ready")
        for place in self._places if self._has_begun else ():
            if todo and place.is_ready and place.shard is None:
                assert place.worker is not None
                place.shard = todo.popleft()
                place.worker.ask({"do": "shard", "shard": place.shard.shard})
        n_free = sum(p.worker is not None and p.shard is None for p in self._places)
        empty = [p for p in self._places if p.worker is None and not p.is_given_up]
        for place in empty[: max(0, len(todo) - n_free)]:
            self._start(place)

    def _say_at_times(self, text: str) -> None:
        if time.monotonic() - self._said_at > _SAY_S:
            self._said_at = time.monotonic()
            self._say(text)

    def _start(self, place: _Place) -> None:
        place.worker = self._backend.start()
        place.worker.ask({"do": "start", "start": asdict(place.start)})

    def _wait(self) -> Iterator[tuple[_Place, Message | Ended]]:
        """Yields what is heard of workers, in a loop that a signal ends."""
        place_of = {id(place.worker): place for place in self._places if place.worker is not None}
        workers = [place.worker for place in place_of.values() if place.worker is not None]
        for worker, answer in self._backend.wait(workers, _POLL_S):
            check_interrupted()
            yield place_of[id(worker)], answer
        check_interrupted()

    def _heard(self, place: _Place, answer: Message | Ended) -> ShardEvent | None:
        if isinstance(answer, Ended):
            return self._ended(place, answer.reason)
        if "error" in answer:
            raise _error(answer)
        if "warning" in answer:
            self._warn(answer["warning"])
        elif "environment" in answer:
            self._environment = self._environment or answer["environment"]
            devices = {worker["device"] for worker in (self._environment, answer["environment"])}
            if len(devices) > 1:
                self._warn(f"workers run on {' and '.join(sorted(devices))}: {DEVICES_DIFFER}")
            place.is_ready, place.n_failed_starts = True, 0
        elif "rows" in answer:
            assert place.shard is not None
            errors = tuple(RowError(**error) for error in answer["errors"])
            place.computed.append(Computed(place.shard.shard, answer["rows"], errors))
            return place.computed[-1]
        elif "committed" in answer:
            place.shard, place.computed = None, []
            return Committed(answer["committed"], answer["commit"])
        return None

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            warn_caller(text)

    def _ended(self, place: _Place, reason: str) -> Lost | None:
        assert place.worker is not None
        place.worker.close()
        shard, computed, was_ready = place.shard, tuple(place.computed), place.is_ready
        place.worker, place.is_ready, place.shard, place.computed = None, False, None, []
        if shard is not None:
            self._tries[shard.shard] += 1
            is_left = self._tries[shard.shard] >= MAX_TRIES
            return Lost(shard.shard, computed, reason, is_left)
        if not was_ready:
            place.n_failed_starts += 1
            if place.is_given_up:
                text = f"{MAX_TRIES} workers ended before they had the model: {reason}"
                # before the first shards only the first place has workers
                if not self._computes or all(other.is_given_up for other in self._places):
                    raise WorkerError(text)
                self._say(f"{text}; the others go on")
        return None


def _error(answer: Message) -> Exception:
    """Returns the error that a worker answered with."""
    known = [_ERRORS[name] for name in answer["kinds"] if name in _ERRORS]
    if not known:
        return RuntimeError(f"in a worker: {answer['error']}")
    error: Any = known[0](answer["error"])
    if answer["exit_code"] is not None:
        error.exit_code = answer["exit_code"]
    return error
