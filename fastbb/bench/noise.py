"""Speeds of ways, and whether they differ by more than the noise.

Other load of a machine slows all ways of a round. So a way is compared with another one within each
round, by the medians of its calls, and the ratio is the median over the rounds. Its interval is a
bootstrap over rounds.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.openvino import OPENVINO
from .results import Cell, Way

CONFIDENCE = 0.95
# the range of n rounds holds the median with 1 - 2^(1-n): with fewer no interval reaches 94 %
MIN_ROUNDS = 5
FEW_ROUNDS = "too few rounds"
_RESAMPLES = 4000


@dataclass(frozen=True)
class Speed:
    """Of all calls of a way.

    Attributes:
        images_per_s: by the median of the calls.
        low, high: of its 95 % interval; None with fewer than five rounds.
        p50_s, p90_s, p99_s: percentiles of the seconds of a call.
        n_calls: number of calls.
    """

    images_per_s: float
    low: float | None
    high: float | None
    p50_s: float
    p90_s: float
    p99_s: float
    n_calls: int


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one way is as another, in the same rounds; above 1 is faster.

    Attributes:
        value: median over rounds.
        low, high: of its 95 % interval; None with fewer than five rounds.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """ "faster", "slower", "within noise", or "too few rounds" to tell."""
        if self.low is None or self.high is None:
            return FEW_ROUNDS
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "within noise"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Best:
    """The fastest ways of a cell, of those that are right and have times.

    Attributes:
        way: of all.
        ours: of those that run fastbb.
        other: of those that do not.
        torch: of those that run fastbb in PyTorch, without another engine.
    """

    way: Way | None
    ours: Way | None
    other: Way | None
    torch: Way | None


def is_valid(way: Way) -> bool:
    """Whether a way has times, of a right result."""
    return way.reason is None and way.wrong is None and any(way.rounds_s)


def speed(way: Way, batch: int) -> Speed | None:
    """Summarises the calls of a way; None without times.

    Args:
        way: of a cell.
        batch: images per call.
    """
    calls = [seconds for one_round in way.rounds_s for seconds in one_round]
    if not calls:
        return None
    p50, p90, p99 = (float(one) for one in np.percentile(calls, [50, 90, 99]))
    medians = [statistics.median(one_round) for one_round in way.rounds_s if one_round]
    low, high = interval(medians)
    value = batch / p50
    if low is not None and high is not None:
        # rounds with few calls count as much as others, so the median of the calls may be outside
        low, high = min(batch / high, value), max(batch / low, value)
    return Speed(value, low, high, p50, p90, p99, len(calls))


def ratio(way: Way, base: Way) -> Ratio | None:
    """How many times as fast a way is as another one of its cell; None without times."""
    return _ratio(round_ratios(way.rounds_s, base.rounds_s))


def inside_ratio(way: Way, base: Way) -> Ratio | None:
    """The same of the time inside the modules that fastbb replaces."""
    return _ratio(round_ratios(way.inside_s or [], base.inside_s or []))


def inside_share(way: Way) -> float | None:
    """Share of a call inside the modules that fastbb replaces; None where it was not measured."""
    shares = round_ratios(way.rounds_s, way.inside_s or [])
    return statistics.median(shares) if shares else None


def best(cell: Cell) -> Best:
    """Finds the fastest ways of a cell by images/s."""
    valid = [way for way in cell.ways if is_valid(way)]

    def fastest(ways: list[Way]) -> Way | None:
        calls = {way.name: [s for one_round in way.rounds_s for s in one_round] for way in ways}
        return min(ways, key=lambda way: statistics.median(calls[way.name]), default=None)

    return Best(
        fastest(valid),
        fastest([way for way in valid if way.ours]),
        fastest([way for way in valid if not way.ours]),
        fastest([way for way in valid if way.ours and not _runs_openvino(way)]),
    )


def _runs_openvino(way: Way) -> bool:
    """Whether a way of fastbb runs OpenVINO: its note says what runs if its name does not."""
    said = re.match("runs ([^,:]+)", way.note)
    return (said[1] if said else way.name.split()[-1]) == OPENVINO


def round_ratios(
    rounds_s: Sequence[Sequence[float]], base_s: Sequence[Sequence[float]]
) -> list[float]:
    """The base's median divided by the median, of each round that both have."""
    pairs = zip(rounds_s, base_s)  # an interrupted round is shorter in some ways
    medians = [tuple(map(statistics.median, pair)) for pair in pairs if all(pair)]
    return [base / ours for ours, base in medians if ours > 0]


def resampled_medians(values: Sequence[float], seed: int = 0) -> NDArray[Any] | None:
    """Medians of values drawn with replacement, many times; None for fewer than five values.

    Args:
        values: one for each round.
        seed: another one for values that are independent.
    """
    if len(values) < MIN_ROUNDS:
        return None
    return np.median(np.asarray(values)[_draws(len(values), seed)], axis=1)


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the median of rounds; None for fewer than five."""
    samples = resampled_medians(values)
    if samples is None:
        return None, None
    tail = _tail(len(values))
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _tail(n_values: int) -> float:
    """Share of the samples on each side of an interval.

    Percentiles of few values make too short intervals, so Student's t and the bias of a variance
    move them outwards: Hesterberg, What Teachers Should Know about the Bootstrap (2014), "expanded
    percentile interval".
    """
    normal, nu = NormalDist(), n_values - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    # Cornish and Fisher's expansion of Student's quantile
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    return normal.cdf(-t * (n_values / nu) ** 0.5)


@lru_cache(maxsize=64)
def _draws(n_values: int, seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(n_values, size=(_RESAMPLES, n_values))


def _ratio(ratios: list[float]) -> Ratio | None:
    if not ratios:
        return None
    return Ratio(statistics.median(ratios), *interval(ratios))
