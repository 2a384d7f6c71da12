"""Picture of a bench: a panel for each cell, a bar for each way, ours coloured."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from .noise import Best, best, is_valid, ratio, speed
from .pictures import (
    BLUE,
    GREY,
    LIGHT,
    QUIET,
    check_plot,
    new_figure,
    save,
    shortened,
    without_middle,
    write_heading,
)
from .results import Cell, Results, Way
from .table import machine, pixels, rate, setting

_OURS, _BEST_OTHER, _OTHER, _MISSING = BLUE, GREY, LIGHT, "#999999"
_BAR_HEIGHT = 0.7
_TITLE = "Images per second"
# inches
_COLUMN, _BAR, _PANEL, _LINE = 5.8, 0.23, 0.72, 0.17
_TITLE_HEIGHT, _MARGIN = 0.4, 0.1
# characters
_TITLE_CHARS, _SETTING_CHARS, _NAME_CHARS, _REASON_CHARS, _MACHINE_CHARS = 56, 70, 28, 56, 92


def plot(results: Results, path: str | os.PathLike[str]) -> None:
    """Draws the speed of all ways with its 95 % interval; cells follow each other by row.

    Args:
        results: of a bench, complete or interrupted.
        path: the image file to write.

    Raises:
        ValueError: matplotlib is missing, the name has another suffix, or nothing was measured.
    """
    check_plot(path)
    if not results.cells:
        raise ValueError("--plot: there is nothing to draw, no cell was measured")
    cells = results.cells
    n_columns = min(2, len(cells))
    lines = _machine_lines(results, _MACHINE_CHARS * n_columns)
    heading = _TITLE_HEIGHT + _LINE * len(lines) + _MARGIN
    rows = [cells[start : start + n_columns] for start in range(0, len(cells), n_columns)]
    n_bars = [max(len(cell.ways) for cell in row) for row in rows]
    height = sum(_BAR * number + _PANEL for number in n_bars) + heading
    figure = new_figure(_COLUMN * n_columns + 1.0, height, heading)
    panels = figure.subplots(len(rows), n_columns, squeeze=False, height_ratios=n_bars)
    for panel, cell in zip(panels.flat, cells):
        _draw(panel, cell)
    for row, number in zip(panels, n_bars):
        for panel in row:
            panel.set_ylim(number - 0.5, -0.5)  # bars of a row have the same height
    for panel in panels.flat[len(cells) :]:
        panel.set_axis_off()
    write_heading(figure, _TITLE, lines)
    save(figure, path)


def _machine_lines(results: Results, n_chars: int) -> list[str]:
    known = machine(results.environment)
    words = [known["hardware"], known["versions"], known["date"][:10]]
    lines = textwrap.wrap("; ".join(filter(None, words)), n_chars)
    return [*lines, "lines: 95 % intervals; in parentheses: times as fast as upstream"]


def _draw(axes: Any, cell: Cell) -> None:
    found, upstream = best(cell), cell.way(cell.upstream)
    speeds = {way.name: speed(way, cell.batch) for way in cell.ways if is_valid(way)}
    known = [one for one in speeds.values() if one is not None]
    largest = max((max(one.images_per_s, one.high or 0) for one in known), default=1.0)
    for place, way in enumerate(cell.ways):
        measured = speeds.get(way.name)
        if measured is None:
            _draw_missing(axes, way, place, largest)
            continue
        colour = _OURS if way.ours else _BEST_OTHER if way is found.other else _OTHER
        axes.barh(place, measured.images_per_s, _BAR_HEIGHT, color=colour)
        if measured.low is not None and measured.high is not None:
            axes.plot([measured.low, measured.high], [place, place], color="black", linewidth=1)
        label = rate(measured.images_per_s)
        if upstream is not None and is_valid(upstream) and way is not upstream:
            against = ratio(way, upstream)
            label += f" ({against.value:.2f})" if against else ""
        right = max(measured.images_per_s, measured.high or 0) + 0.015 * largest
        weight = "bold" if way is found.way else "normal"
        axes.text(right, place, label, va="center", size=8.5, weight=weight)
    axes.set_title(_panel_title(cell, found), size=9, loc="left", pad=4, parse_math=False)
    names = [shortened(way.name, _NAME_CHARS) for way in cell.ways]
    axes.set_yticks(range(len(names)), names, size=9, parse_math=False)
    axes.set_xlim(0, 1.32 * largest)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def _draw_missing(axes: Any, way: Way, place: int, largest: float) -> None:
    """Writes why there is no bar; a wrong way has a hatched stub."""
    why = way.wrong or way.reason or "was not measured"
    left = 0.01 * largest
    if way.wrong is not None:
        axes.barh(
            place,
            0.06 * largest,
            _BAR_HEIGHT,
            color="white",
            edgecolor=_MISSING,
            hatch="////",
            linewidth=0.5,
        )
        left += 0.06 * largest
    word = "WRONG" if way.wrong is not None else "does not run"
    text = shortened(f"{word}: {why}", _REASON_CHARS)
    axes.text(left, place, text, va="center", size=8, color=QUIET, parse_math=False)


def _panel_title(cell: Cell, found: Best) -> str:
    """The model, then its setting and what the best of ours achieves."""
    against = ratio(found.ours, found.other) if found.ours and found.other else None
    words = [f"{setting(cell)}, {pixels(cell)}"]
    if against is not None and found.other is not None:
        words.append(f"ours {against} x {found.other.name}")
    model = without_middle(cell.model, _TITLE_CHARS)
    return f"{model}\n{shortened(': '.join(words), _SETTING_CHARS)}"
