"""Measured choice: candidates run in turns, wrong ones drop out, the fastest wins."""

import logging
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .interruption import check_interrupted
from .measuring import TIE, Clock, describe, duration

logger = logging.getLogger(__name__)

# pixels [B, C, H, W] -> feature maps [B, C', h, w]
Run = Callable[[Tensor], tuple[Tensor, ...]]

# says in a few words what is being done
Report = Callable[[str], None]

_NOT_TRIED = "not tried, the time for measuring was over"

MIN_ROUNDS, MAX_ROUNDS = 3, 30


@dataclass(frozen=True)
class Candidate:
    """One way to run a backbone.

    Attributes:
        name: as `explain()` prints it.
        build: makes it ready and returns what runs.
        compiles: whether that needs a compiler, and a minute or more.
        is_charged: whether the seconds of making it ready leave fewer for others.
    """

    name: str
    build: Callable[[], Run]
    compiles: bool = False
    is_charged: bool = True


@dataclass(frozen=True)
class Trial:
    """Outcome of trying a candidate.

    Attributes:
        name: of the candidate.
        seconds: median time of a forward pass; None if it may not run or was not timed.
        problem: the reason why it may not run, or None.
    """

    name: str
    seconds: float | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Trial":
        """The inverse of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the value is something else.
        """
        seconds, problem = value["seconds"], value["problem"]
        is_time = seconds is None or (isinstance(seconds, float) and 0 <= seconds < math.inf)
        if not is_time or not isinstance(problem, str | None):
            raise ValueError(f"not a trial: {value}")
        return cls(str(value["name"]), seconds, problem)

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        return f"{self.name}: " + ("not timed" if self.seconds is None else duration(self.seconds))


def run_trials(
    candidates: Sequence[Candidate],
    pixels: Tensor,
    problem_of: Callable[[Sequence[Tensor]], str | None],
    *,
    clock: Clock,
    budget_s: float,
    report: Report,
) -> tuple[list[Trial], dict[str, Run]]:
    """Builds candidates, checks their maps, and times in turns those that pass.

    A candidate that raises, runs out of memory or is wrong in any of its runs drops out with the
    reason. Those that a compiler has to build come last, and only while there is time; all others
    are tried, however long the first use of their kernels takes.

    Args:
        candidates: simplest first.
        pixels: [B, C, H, W], what they run on.
        problem_of: why maps are not accepted, or None.
        clock: times a call.
        budget_s: seconds after which no candidate that compiles is begun; and those of the rounds,
            of which there are at least `MIN_ROUNDS`.
        report: is told what is going on, once for each candidate and each round.

    Returns:
        A trial of each candidate, in their order, and what runs of those without a problem.
    """
    runs: dict[str, Run] = {}
    problems: dict[str, str | None] = {}
    spent = 0.0

    def attempt(
        name: str, run: Callable[[], Sequence[Tensor]], is_charged: bool = True
    ) -> float | None:
        """Returns the seconds of a call; adds its problem, if any, to the problems."""
        nonlocal spent
        maps: list[Tensor] = []
        try:
            seconds = clock(lambda: maps.extend(run()))
            spent += seconds if is_charged else 0.0
            problems[name] = problem_of(maps)
        except Exception as error:  # another candidate runs after any error
            check_interrupted()  # not a fault of the candidate
            problems[name], seconds = describe(error), None
        if problems[name] is not None:
            runs.pop(name, None)
        return seconds

    for candidate in sorted(candidates, key=lambda candidate: candidate.compiles):
        if candidate.compiles and runs and spent >= budget_s:
            problems[candidate.name] = _NOT_TRIED
            continue
        report(f"preparing {candidate.name}")

        def first(candidate: Candidate = candidate) -> Sequence[Tensor]:
            runs[candidate.name] = candidate.build()
            return runs[candidate.name](pixels)

        attempt(candidate.name, first, candidate.is_charged)

    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = 0.0
    for index in range(MAX_ROUNDS):
        if not runs or (index >= MIN_ROUNDS and spent >= budget_s):
            break
        report(f"round {index + 1}")
        for name, run in list(runs.items()):
            seconds = attempt(name, lambda run=run: run(pixels))
            if problems[name] is not None:
                problems[name] = f"not the same every time: {problems[name]}"
            elif seconds is not None:
                times[name].append(seconds)
    trials = [
        Trial(name, statistics.median(times[name]) if name in runs else None, problem)
        for name, problem in ((c.name, problems[c.name]) for c in candidates)
    ]
    return trials, runs


def is_not_tried(trial: Trial) -> bool:
    """Whether there was no time for a candidate, so that nothing is known about it."""
    return trial.problem == _NOT_TRIED


def winner(trials: Sequence[Trial], tie: float = TIE) -> Trial | None:
    """The simplest trial that is as fast as the fastest, or None if none may run.

    Args:
        trials: simplest first.
        tie: share of the time within which two count as equally fast.
    """
    timed = [(trial.seconds, trial) for trial in trials if trial.seconds is not None]
    if not timed:
        return None
    fastest = min(seconds for seconds, _ in timed)
    return next(trial for seconds, trial in timed if seconds <= fastest * (1 + tie))


def tuning_bar(n_candidates: int) -> Report:
    """Makes a progress bar on a terminal, else lines in the log."""
    if sys.stderr is None or not sys.stderr.isatty():
        return logger.info
    from tqdm import tqdm

    bar = tqdm(total=n_candidates + MIN_ROUNDS, desc="measuring", leave=False)

    def report(text: str) -> None:
        bar.set_postfix_str(text)
        bar.update(bar.n < (bar.total or 0))

    return report
