"""Comparison of two benches: whether a way of ours has become slower.

A way is judged by its ratio to upstream's eager way of the same run, which other load of the
machine and another temperature change little.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine.explanation import printable
from .noise import MIN_ROUNDS, is_valid, resampled_medians, round_ratios
from .results import Cell, Results, Way
from .table import Notes, Section, title, with_headings

SMALLEST_CHANGE = 0.05  # of the ratio that counts
_CONFIDENCE = 0.99
SAME, FASTER, SLOWER, WRONG, NO_TIMES = "same", "faster", "slower", "WRONG", "no times"
NOISY, _BLIND = "too noisy", 0.15  # a fall of the ratio that the interval must exclude
_UNKNOWN = "unknown"  # for lack of rounds or of upstream's times
# the first of these that a way of ours has is the verdict on its cell
_VERDICTS = (WRONG, NO_TIMES, SLOWER, FASTER, NOISY, SAME)
_HARDWARE = ("cpu", "gpu", "threads")

CellKey = tuple[str, str, str, int, tuple[int, int]]


@dataclass(frozen=True)
class Change:
    """A way of a cell in two benches.

    Attributes:
        way: its name.
        ours: whether fastbb runs.
        verdict: "same", "faster", "slower", "WRONG", "no times"; "too noisy" or "unknown" with the
            reason.
        old, new: ratio to upstream, above 1 is faster; None where it has none.
        low, high: of the 99 % interval of new divided by old; None with fewer than five rounds.
        reason: of the verdict, or "".
        regressed: whether it counts as a regression.
    """

    way: str
    ours: bool
    verdict: str
    old: float | None = None
    new: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    regressed: bool = False


@dataclass(frozen=True)
class CellChange:
    """A cell that both benches have.

    Attributes:
        key: of the cell, see `Cell.key`.
        title: in tables.
        ways: that both have.
    """

    key: CellKey
    title: str
    ways: tuple[Change, ...]

    @property
    def verdict(self) -> str:
        """Of the ways that run fastbb."""
        found = {change.verdict for change in self.ways if change.ours}
        return next((verdict for verdict in _VERDICTS if verdict in found), _UNKNOWN)


@dataclass(frozen=True)
class Comparison:
    """Two benches.

    Attributes:
        cells: that both have.
        notices: sentences: other hardware or versions, cells and ways that only one has.
        same_hardware: whether the machines are alike; else nothing is a regression.
    """

    cells: tuple[CellChange, ...]
    notices: tuple[str, ...]
    same_hardware: bool = True

    @property
    def regressed(self) -> bool:
        return bool(regressed_cells(self))

    @property
    def n_judged(self) -> int:
        """Number of ways of fastbb that have a verdict."""
        changes = (change for cell in self.cells for change in cell.ways)
        return sum(change.ours and change.verdict in _VERDICTS for change in changes)

    def __str__(self) -> str:
        return text(self)


def compare(old: Results, new: Results) -> Comparison:
    """Judges each way of a bench by an older one.

    A regression is a way of ours whose ratio to upstream fell by more than 5 %, where the 99 %
    interval of the change excludes none; or that had times and has none, or is WRONG. On other
    hardware nothing is a regression.

    Args:
        old: of an earlier run.
        new: of this run.
    """
    notices, same_hardware = _environments(old.environment, new.environment)
    if new.interrupted:
        notices.append("The new bench was interrupted: ways without times are no regressions.")
    before, after = ({cell.key: cell for cell in one.cells} for one in (old, new))
    cells = []
    for key, cell in after.items():
        was = before.get(key)
        if was is None:
            notices.append(f"Only in the new file: {title(cell)}.")
        elif (was.upstream, was.stages) != (cell.upstream, cell.stages):
            notices.append(f"Not compared, another upstream or other maps: {title(cell)}.")
        elif was.batch < cell.batch:
            notices.append(f"Not compared, it ran with batch {was.batch} before: {title(cell)}.")
        else:
            cells.append(_cell(was, cell, same_hardware, new.interrupted))
            notices += _ways_of_one(was, cell)
    notices += [
        f"Only in the old file: {title(cell)}." for key, cell in before.items() if key not in after
    ]
    return Comparison(tuple(cells), tuple(notices), same_hardware)


def regressed_cells(comparison: Comparison) -> list[CellKey]:
    """Keys of the cells with a regression."""
    return [cell.key for cell in comparison.cells if any(one.regressed for one in cell.ways)]


def _environments(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Differences in sentences, and whether the hardware is the same."""
    notices = []
    other = [
        f"{name} {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in _HARDWARE
        if old.get(name) != new.get(name)
    ]
    if other:
        notices.append(f"Other hardware, so nothing is a regression: {', '.join(other)}.")
    before, after = (one.get("versions") or {} for one in (old, new))
    versions = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if versions:
        notices.append(f"Other versions, which change other ways too: {', '.join(versions)}.")
    return notices, not other


def _shown(value: Any) -> str:
    return "none" if value is None else printable(str(value))


def _ways_of_one(old: Cell, new: Cell) -> list[str]:
    return [
        f"Only in the {which} file: {printable(way.name)} of {title(new)}."
        for which, cell, other in (("new", new, old), ("old", old, new))
        for way in cell.ways
        if other.way(way.name) is None
    ]


def _cell(old: Cell, new: Cell, same_hardware: bool, interrupted: bool) -> CellChange:
    counting = {WRONG, SLOWER} if interrupted else {WRONG, SLOWER, NO_TIMES}
    changes = []
    for way in new.ways:
        was = old.way(way.name)
        if was is None or way.name == new.upstream:
            continue
        if (found := _change(old, new, was, way)) is not None:
            regressed = same_hardware and way.ours and found.verdict in counting
            changes.append(replace(found, regressed=regressed))
    return CellChange(new.key, title(new), tuple(changes))


def _change(old: Cell, new: Cell, was: Way, way: Way) -> Change | None:
    """Judges a way, except whether it counts; None where it has times in neither bench."""
    before, after = _ratios(old, was), _ratios(new, way)
    change = Change(
        way.name,
        way.ours,
        _UNKNOWN,
        statistics.median(before) if before else None,
        statistics.median(after) if after else None,
    )
    if not is_valid(was):
        return replace(change, reason="had no times") if is_valid(way) else None
    if way.wrong is not None:
        return replace(change, verdict=WRONG, reason=way.wrong)
    if way.dropped:
        return replace(change, reason=way.reason or "was dropped")
    if not is_valid(way):
        return replace(change, verdict=NO_TIMES, reason=way.reason or "was not measured")
    if change.old is None or change.new is None:
        return replace(change, reason="upstream has no times")
    if new.batch < old.batch:
        why = f"memory ran out: batch {new.batch}, {old.batch} before"
        return replace(change, verdict=NO_TIMES, reason=why)
    # the runs are independent, and so are their samples
    old_samples, new_samples = resampled_medians(before, seed=1), resampled_medians(after, seed=2)
    if old_samples is None or new_samples is None:
        return replace(change, reason=f"fewer than {MIN_ROUNDS} rounds")
    tail = (1 - _CONFIDENCE) / 2
    low, high = (float(one) for one in np.quantile(new_samples / old_samples, [tail, 1 - tail]))
    factor, verdict = change.new / change.old, SAME
    if factor < 1 - SMALLEST_CHANGE and high < 1:
        verdict = SLOWER
    elif factor > 1 / (1 - SMALLEST_CHANGE) and low > 1:
        verdict = FASTER
    elif low < 1 - _BLIND:
        why = f"a fall by {1 - low:.0%} would not show; take a larger --seconds"
        return replace(change, verdict=NOISY, low=low, high=high, reason=why)
    return replace(change, verdict=verdict, low=low, high=high)


def _ratios(cell: Cell, way: Way) -> list[float]:
    """Ratios to upstream by round; none where one of them has no times."""
    upstream = cell.way(cell.upstream)
    if upstream is None or not is_valid(upstream) or not is_valid(way):
        return []
    return round_ratios(way.rounds_s, upstream.rounds_s)


def text(comparison: Comparison) -> str:
    """Formats a comparison for the terminal: notices, a table, footnotes, the regressions."""
    notes = Notes()
    sections = [
        Section(f"{cell.title}: {cell.verdict}", [_row(change, notes) for change in cell.ways])
        for cell in comparison.cells
    ]
    parts = ["\n".join(comparison.notices)]
    if sections:
        header = ("", "old ratio", "new ratio", "new / old", "99 % interval", "verdict")
        parts.append(with_headings(header, sections))
    about = ["ratio: times as fast as upstream in the same run."]
    if any(not change.ours for cell in comparison.cells for change in cell.ways):
        about.append("(In parentheses: not fastbb, never a regression.)")
    regressed = [
        f"{cell.title}, {printable(change.way)}: {change.verdict}"
        for cell in comparison.cells
        for change in cell.ways
        if change.regressed
    ]
    n_judged = comparison.n_judged
    end = f"No regression in {n_judged} way{'s' * (n_judged != 1)} of fastbb."
    if regressed:
        end = f"Regressions: {'; '.join(regressed)}."
    elif not n_judged:
        end = "Nothing was compared: no way of fastbb has times in both."
    return "\n\n".join(filter(None, [*parts, "\n".join([*about, *notes.lines()]), end]))


def _row(change: Change, notes: Notes) -> tuple[str, ...]:
    factor = span = ""
    if change.old and change.new:
        factor = f"{change.new / change.old:.2f}"
    if change.low is not None and change.high is not None:
        span = f"{change.low:.2f}-{change.high:.2f}"
    verdict = change.verdict if change.ours else f"({change.verdict})"
    ratios = ("-" if one is None else f"{one:.2f}" for one in (change.old, change.new))
    mark = notes.mark(change.reason, change.way)
    return printable(change.way) + mark, *ratios, factor, span, verdict
