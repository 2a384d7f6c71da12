"""Trials: candidates are verified in every run and timed in turns; the fastest right one wins."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference_models import Pair, hf_pair, hf_resnet, hf_swin, images, timm_pair
from torch import Tensor

from fastbb.engine.computation import BackboneMaps, without_engine
from fastbb.engine.measuring import describe, duration, wall_clock
from fastbb.engine.trial import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Candidate,
    Run,
    Trial,
    is_not_tried,
    run_trials,
    tuning_bar,
    winner,
)
from fastbb.engine.truth import Truth
from fastbb_kernels.accuracy import FP32_REL, FP32_REL_FOLDED, allowed_rel

PIXELS = images(4, 4)
RIGHT = (torch.ones(2),)
WRONG = (torch.zeros(2),)


class Course:
    """Trials whose candidates take the declared times on a pretended clock.

    Attributes:
        log: builds ("+a") and runs ("a") of candidates, in order.
        said: the progress reports.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.said: list[str] = []
        self._seconds = 0.0

    def clock(self, call: Callable[[], object]) -> float:
        self._seconds = 0.0
        call()
        return self._seconds

    def candidate(
        self, name: str, seconds: Sequence[float] = (1.0,), build_s: float = 0.0, **more: Any
    ) -> Candidate:
        """Candidate whose runs take these seconds in turn, then repeat the last."""
        left = list(seconds)

        def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
            assert pixel_values is PIXELS
            self.log.append(name)
            self._seconds += left.pop(0) if len(left) > 1 else left[0]
            return RIGHT

        def build() -> Run:
            self.log.append(f"+{name}")
            self._seconds += build_s
            return run

        return Candidate(name, build, **more)

    def run(self, *candidates: Candidate, budget_s: float = 0.5) -> dict[str, Trial]:
        """Returns the trials by name."""
        trials, self.runs = run_trials(
            candidates,
            PIXELS,
            problem_of,
            clock=self.clock,
            budget_s=budget_s,
            report=self.said.append,
        )
        assert [trial.name for trial in trials] == [c.name for c in candidates]
        return {trial.name: trial for trial in trials}


def problem_of(maps: Sequence[Tensor]) -> str | None:
    return None if torch.equal(maps[0], RIGHT[0]) else "is wrong"


def returning(name: str, *results: Any) -> Candidate:
    """Candidate whose runs return (or raise) these results in turn, then repeat the last."""
    left = list(results)

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        result = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(result, BaseException):
            raise result
        return result

    return Candidate(name, lambda: run)


# trials


def test_candidates_are_built_one_by_one_and_then_run_in_turns() -> None:
    course = Course()
    course.run(course.candidate("a"), course.candidate("b"), budget_s=1.5)
    assert course.log == ["+a", "a", "+b", "b", *["a", "b"] * MIN_ROUNDS]
    assert course.said == ["preparing a", "preparing b", "round 1", "round 2", "round 3"]
    assert list(course.runs) == ["a", "b"]


def test_trial_time_is_the_median_without_the_first_run() -> None:
    course = Course()
    trials = course.run(course.candidate("a", [70, 5, 1, 2], build_s=100))
    assert trials["a"] == Trial("a", 2.0)


def test_compiling_candidates_are_tried_last_and_keep_their_place() -> None:
    course = Course()
    trials = course.run(
        course.candidate("compiled", compiles=True),
        course.candidate("a"),
        course.candidate("b"),
        budget_s=10,
    )
    assert [name for name in course.log if name.startswith("+")] == ["+a", "+b", "+compiled"]
    assert all(trial.seconds == 1.0 for trial in trials.values())


def test_nothing_is_compiled_after_the_budget_is_spent() -> None:
    """Candidates that do not compile are still tried after the budget is spent."""
    course = Course()
    trials = course.run(
        course.candidate("a"),
        course.candidate("b", build_s=5.0),
        course.candidate("compiled", compiles=True),
        course.candidate("c"),
        budget_s=6.0,
    )
    compiled = trials["compiled"]
    assert compiled == Trial("compiled", None, "not tried, the time for measuring was over")
    assert is_not_tried(compiled) and not is_not_tried(trials["c"])
    assert "+compiled" not in course.log and "compiled" not in course.runs
    # rounds run even if preparing took the whole budget
    assert {course.log.count(name) for name in "abc"} == {1 + MIN_ROUNDS}
    assert {trials[name].seconds for name in "abc"} == {1.0}


def test_one_candidate_is_compiled_for_any_budget() -> None:
    course = Course()
    failing = returning("failing", RuntimeError("no"))
    one, other = (course.candidate(name, compiles=True) for name in "ab")
    trials = course.run(failing, one, other, budget_s=0.0)
    assert trials["a"].seconds == 1.0 and trials["b"].problem is not None


def test_rounds_are_limited_by_budget_and_number() -> None:
    course = Course()
    course.run(course.candidate("a", [1.0]), budget_s=10.0)
    assert course.log.count("a") == 1 + 10
    course = Course()
    course.run(course.candidate("a", [0.001]), budget_s=10.0)
    assert course.log.count("a") == 1 + MAX_ROUNDS


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        ([WRONG], "is wrong"),
        ([RIGHT, WRONG], "not the same every time: is wrong"),
        ([RIGHT, RIGHT, RIGHT, WRONG, RIGHT], "not the same every time: is wrong"),
        ([RuntimeError("no\nline 2")], "RuntimeError: no"),
        ([RIGHT, KeyError("no")], "not the same every time: KeyError: 'no'"),
        ([torch.OutOfMemoryError("80 GiB")], "out of memory: 80 GiB"),
        ([None], "TypeError: 'NoneType' object is not iterable"),
    ],
    ids=["wrong", "wrong-second", "wrong-fourth", "raises", "raises-second", "memory", "nothing"],
)
def test_a_candidate_that_fails_once_is_out(results: list[Any], problem: str) -> None:
    course = Course()
    trials = course.run(returning("bad", *results), course.candidate("good"))
    assert trials["bad"] == Trial("bad", None, problem)
    assert trials["good"].seconds == 1.0 and list(course.runs) == ["good"]


def test_there_is_no_winner_if_all_fail() -> None:
    course = Course()
    trials = course.run(returning("a", WRONG), returning("b", RIGHT, ValueError()))
    assert course.runs == {} and winner(list(trials.values())) is None
    assert str(trials["b"]) == "b: not the same every time: ValueError"
    assert course.run() == {}


def test_keyboard_interrupt_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        Course().run(returning("a", KeyboardInterrupt()))


# the winner


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ([1.0], 0),
        ([1.0, 0.5, 0.7], 1),
        ([1.0, 1.0], 0),
        ([1.029, 1.0], 0),
        ([1.031, 1.0], 1),
        ([1.05, 1.02, 1.0], 1),
        ([None, 2.0, None, 3.0], 1),
        ([None], None),
        ([], None),
    ],
    ids=str,
)
def test_the_simplest_of_the_fastest_wins(seconds: list[float | None], best: int | None) -> None:
    trials = [Trial(str(i), s) for i, s in enumerate(seconds)]
    assert winner(trials) == (None if best is None else trials[best])


def test_winner_takes_the_margin_of_a_tie_as_an_argument() -> None:
    trials = [Trial("a", 1.2), Trial("b", 1.0)]
    assert winner(trials, tie=0.25) == trials[0] and winner(trials, tie=0.0) == trials[1]


# storing and printing


@pytest.mark.parametrize(
    "trial", [Trial("a", 0.5), Trial("a", None, "is wrong"), Trial("a")], ids=str
)
def test_a_trial_survives_json(trial: Trial) -> None:
    assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "a: not timed"), (2.5e-6, "a: 2.5 us"), (1.234e-3, "a: 1.23 ms"), (7.891, "a: 7.89 s")],
)
def test_a_trial_prints_its_time(seconds: float | None, text: str) -> None:
    assert str(Trial("a", seconds)) == text


def test_durations_print_in_readable_units() -> None:
    seconds = (0.0, 9.994e-4, 9.996e-4, 0.4567, 0.9996, 89.96, 12345.6)
    texts = ["0 us", "999 us", "1 ms", "457 ms", "1 s", "90 s", "12346 s"]
    assert [duration(s) for s in seconds] == texts


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("  first\nsecond"), "RuntimeError: first"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (MemoryError("4 GiB"), "out of memory: 4 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory: CUDA out of memory."),
    ],
    ids=str,
)
def test_an_error_prints_in_one_line(error: Exception, text: str) -> None:
    assert describe(error) == text


def test_a_clock_measures_a_call() -> None:
    clock = wall_clock(torch.device("cpu"))
    assert 0.02 <= clock(lambda: time.sleep(0.02)) < 1
    with pytest.raises(KeyError):
        clock(lambda: {}["no"])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_log_elsewhere(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with caplog.at_level(logging.INFO, logger="fastbb"):
        report = tuning_bar(2)
        report("preparing a")
    assert ("preparing a" in capsys.readouterr().err) == is_terminal
    assert ("preparing a" in caplog.text) == (not is_terminal)


# the truth


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair(hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
@torch.no_grad()
def test_truth_accepts_upstreams_maps_and_rejects_wrong_ones(pair: Pair, batch: int) -> None:
    pixels = images(64, 96, batch)
    truth, maps = Truth.of(BackboneMaps(pair.ours), pixels), pair.maps(pixels)
    assert truth.rows == sorted({0, 1, batch - 2, batch - 1} & set(range(batch)))
    assert truth.problem(maps) is None
    for image in truth.rows:
        wrong = [x.clone() for x in maps]
        wrong[1][image, 0, 0, 0] += 2 * FP32_REL * wrong[1].abs().max()
        problem = truth.problem(wrong)
        assert problem is not None and problem.startswith("map 1 is wrong: error")
    for value in (torch.nan, torch.inf):
        wrong = [x.clone() for x in maps]
        wrong[2][batch // 2, 0, 0, 0] = value
        assert truth.problem(wrong) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_other_dtypes_are_allowed_the_error_of_eager(dtype: torch.dtype) -> None:
    pair = hf_pair(hf_swin(depths=(2, 1), num_heads=(2, 4), out_indices=[0, 1, 2]))
    backbone, upstream = pair.ours.to(dtype), pair.upstream.to(dtype)
    pixels = images(64, 64).to(dtype)
    truth = Truth.of(BackboneMaps(backbone), pixels)
    assert truth.problem(upstream(pixels).feature_maps) is None
    wrong = [x * 1.1 for x in upstream(pixels).feature_maps]
    assert truth.problem(wrong) is not None


def test_computing_the_truth_leaves_the_backbone_unchanged(pair: Pair) -> None:
    before = {name: id(tensor) for name, tensor in pair.ours.named_parameters()}
    Truth.of(BackboneMaps(pair.ours), images(64, 64))
    assert {name: id(tensor) for name, tensor in pair.ours.named_parameters()} == before
    assert pair.ours.dtype == torch.float32


def test_without_engine_shares_weights_and_copied_copies_them(pair: Pair) -> None:
    prepared = pair.ours.prepare("eager")
    shared, copied = without_engine(prepared), BackboneMaps(prepared).copied().module
    for other, is_copy in ((shared, False), (copied, True)):
        assert other._engine is None and prepared._engine is not None
        pairs = zip(prepared.parameters(), other.parameters())
        assert all((a is not b) == is_copy for a, b in pairs)
        assert other.config is not prepared.config


def test_fp32_tolerance_is_twice_eagers_error_and_at_least_fp32_rel() -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    near, far = exact.float() * (1 + 1e-6), exact.float() * 1.01
    assert allowed_rel(near, exact, FP32_REL) == FP32_REL
    assert allowed_rel(far, exact, FP32_REL) == pytest.approx(0.02, rel=1e-3)
    assert allowed_rel(far.bfloat16(), exact, FP32_REL) == FP32_REL
    assert allowed_rel(far, torch.zeros_like(exact), FP32_REL) == FP32_REL
    assert allowed_rel(torch.empty(0), exact[:0], FP32_REL) == FP32_REL


@pytest.mark.parametrize(
    ("name", "rel"), [("resnet18", FP32_REL), ("test_efficientnet", FP32_REL_FOLDED)]
)
def test_folded_batch_norms_are_allowed_a_larger_error(name: str, rel: float) -> None:
    assert timm_pair(name).ours.exactness == rel
