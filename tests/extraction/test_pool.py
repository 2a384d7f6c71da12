"""The pool hands shards out to workers that answer by a script."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from fastbb.extraction import pool
from fastbb.extraction.layout import Shard
from fastbb.extraction.pool import Ended, Pool, WorkerError
from fastbb.extraction.shards import Committed, Lost, ShardEvent
from fastbb.extraction.store import FeatureWriter
from fastbb.extraction.worker import Message, Start

Answers = list[Message | Ended]
READY: Message = {"environment": {"device": "x"}}


class ScriptedWorker:
    def __init__(self, number: int, script: Callable[[int, Message], Answers]) -> None:
        self.number, self.script = number, script
        self.answers: Answers = []
        self.is_closed = False

    def ask(self, request: Message) -> None:
        self.answers += self.script(self.number, request)

    def close(self) -> None:
        self.is_closed = True


class Scripted:
    """A backend of workers that answer by a script.

    Args:
        script: answers of the worker of a number, in the order of their starts, to a request.
        n: workers at a time.
        min_ready: see `Backend`.
    """

    def __init__(
        self, script: Callable[[int, Message], Answers], n: int = 2, min_ready: int = 1
    ) -> None:
        self.script, self.min_ready = script, min_ready
        self.starts: Sequence[Start] = [Start("/nowhere", None, {}, None)] * n
        self.workers: list[ScriptedWorker] = []

    def start(self) -> ScriptedWorker:
        self.workers.append(ScriptedWorker(len(self.workers), self.script))
        return self.workers[-1]

    def wait(
        self, workers: Sequence[ScriptedWorker], timeout_s: float
    ) -> list[tuple[ScriptedWorker, Message | Ended]]:
        heard = [(worker, answer) for worker in workers for answer in worker.answers]
        for worker in workers:
            worker.answers = []
        return heard

    def close(self) -> None:
        pass


def computes(number: int, request: Message) -> Answers:
    """The script of a worker that does what it is asked for."""
    if request["do"] == "start":
        return [READY]
    shard = request["shard"]
    return [{"rows": 4, "errors": []}, {"committed": shard, "commit": {"shard": shard}}]


def compute(backend: Scripted, n: int, said: list[str] | None = None) -> list[ShardEvent]:
    shards = [Shard(i, 4, "", {}) for i in range(n)]
    with Pool(backend, [].append if said is None else said.append) as executor:
        return [*executor.compute(cast(FeatureWriter, None), shards)]


def committed(events: Sequence[ShardEvent]) -> list[int]:
    return [event.shard for event in events if isinstance(event, Committed)]


def test_every_shard_is_handed_out_once() -> None:
    backend = Scripted(computes, n=3)
    assert sorted(committed(compute(backend, 7))) == [*range(7)]
    assert len(backend.workers) == 3 and all(worker.is_closed for worker in backend.workers)


@pytest.mark.parametrize("min_ready", [1, 2])
def test_no_more_workers_start_than_there_are_shards(min_ready: int) -> None:
    backend = Scripted(computes, n=8, min_ready=min_ready)
    assert committed(compute(backend, 2)) == [0, 1] and len(backend.workers) == 2


def test_nothing_begins_before_enough_workers_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_SAY_S", -1.0)
    said: list[str] = []
    ready: set[int] = set()

    def script(number: int, request: Message) -> Answers:
        if request["do"] == "start":
            ready.add(number)
        else:
            assert ready == {0, 1, 2}
        return computes(number, request)

    assert len(committed(compute(Scripted(script, n=3, min_ready=3), 5, said))) == 5
    assert said[0] == "waiting for the first worker to be ready"
    assert said[1] == "waiting for 3 workers, of which 1 are ready"


def test_a_shard_of_a_worker_that_ended_is_tried_three_times() -> None:
    def script(number: int, request: Message) -> Answers:
        if request.get("shard") == 1:
            return [{"rows": 2, "errors": []}, Ended(f"worker {number}")]
        return computes(number, request)

    events = compute(Scripted(script), 4)
    lost = [event for event in events if isinstance(event, Lost)]
    assert [event.is_left for event in lost] == [False, False, True]
    assert len({event.reason for event in lost}) == 3
    assert all(sum(computed.rows for computed in event.computed) == 2 for event in lost)
    assert sorted(committed(events)) == [0, 2, 3]


def test_workers_that_end_while_they_load_the_model_end_the_run() -> None:
    backend = Scripted(lambda *_: [Ended("process 7 was killed")])
    with pytest.raises(WorkerError, match="3 workers ended before they had the model: process 7"):
        compute(backend, 1)
    assert len(backend.workers) == 3 and WorkerError.exit_code == 7


def test_a_place_where_no_worker_starts_is_given_up_and_the_others_go_on() -> None:
    def script(number: int, request: Message) -> Answers:
        return computes(number, request) if number == 0 else [Ended("no memory")]

    backend, said = Scripted(script), list[str]()
    assert committed(compute(backend, 9, said)) == [*range(9)]
    assert len(backend.workers) == 4
    assert said == ["3 workers ended before they had the model: no memory; the others go on"]


def test_enough_workers_are_those_that_can_be_had() -> None:
    def script(number: int, request: Message) -> Answers:
        return computes(number, request) if number < 2 else [Ended("no memory")]

    assert len(committed(compute(Scripted(script, n=3, min_ready=3), 9))) == 9


def test_a_run_ends_when_no_shard_gets_done() -> None:
    def script(number: int, request: Message) -> Answers:
        return [READY] if request["do"] == "start" else [Ended("no memory")]

    backend = Scripted(script, n=1)
    with pytest.raises(WorkerError, match="no shard was finished, and 3 ended 3 workers each: no"):
        compute(backend, 100)
    assert len(backend.workers) == 9
    lost = compute(Scripted(script, n=1), 3)  # all that there are
    assert sum(isinstance(event, Lost) and event.is_left for event in lost) == 3


@pytest.mark.parametrize("n_ends", [0, 1, 2, 3])
def test_a_plan_is_made_by_the_next_worker_if_one_ends(n_ends: int) -> None:
    def script(number: int, request: Message) -> Answers:
        if request["do"] == "start":
            return [READY]
        return [Ended("gone")] if number < n_ends else [{"plan": {"runs": "eager"}}]

    with Pool(Scripted(script)) as executor:
        if n_ends < 3:
            assert executor.make_plan("auto", None, 10, 1) == {"runs": "eager"}
        else:
            with pytest.raises(WorkerError, match="3 workers ended while they made the plan: gone"):
                executor.make_plan("auto", None, 10, 1)


def test_workers_on_different_devices_are_warned_of() -> None:
    def script(number: int, request: Message) -> Answers:
        if request["do"] == "start":
            return [{"environment": {"device": "T4" if number else "A100"}}]
        return computes(number, request)

    with pytest.warns(UserWarning, match="workers run on A100 and T4: features of different"):
        compute(Scripted(script), 9)


def test_the_same_warning_of_several_workers_is_given_once() -> None:
    def script(number: int, request: Message) -> Answers:
        return [{"warning": "hot"}, {"warning": "hot"}, *computes(number, request)]

    with pytest.warns(UserWarning, match="hot") as heard:
        compute(Scripted(script), 3)
    assert len(heard) == 1


def test_a_defect_in_a_worker_is_told_with_its_place() -> None:
    answer: Message = {"error": "Traceback ...\nAssertionError", "exit_code": None}
    answer["kinds"] = ["AssertionError", "Exception"]
    with pytest.raises(RuntimeError, match=r"in a worker: Traceback(.|\n)*AssertionError"):
        compute(Scripted(lambda *_: [answer]), 1)


def test_errors_of_a_worker_keep_their_exit_code() -> None:
    kinds = ["CannotComputeError", "ImportError", "Exception"]
    answer: Message = {"error": "pip install x", "kinds": kinds, "exit_code": 2}
    with pytest.raises(ImportError, match="pip install x") as error:
        compute(Scripted(lambda *_: [answer]), 1)
    assert cast(Any, error.value).exit_code == 2
