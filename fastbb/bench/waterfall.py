"""A picture of `--end-to-end`: the time of an image, stage by stage, and of all together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .end_to_end import MAIN, EndToEnd, Stage, verdict
from .pictures import (
    BLUE,
    LIGHT,
    QUIET,
    SKY,
    VERMILION,
    check_plot,
    new_figure,
    save,
    shortened,
    without_middle,
    write_heading,
)
from .table import rate

_BOUND, _FEED, _MAIN, _TOGETHER = VERMILION, SKY, BLUE, QUIET
_BAR_HEIGHT = 0.66
_BAR_INCHES, _TITLE_INCHES, _FOOT_INCHES = 0.3, 0.68, 1.12
_ROOM = 1.25  # right end of the axis by that of the whiskers: numbers stand there
_NAME_CHARS, _LINE_CHARS = 52, 130
_KEY = (("decode threads", _FEED, 0.66), ("main thread", _MAIN, 0.795), ("bound by", _BOUND, 0.905))


def plot_waterfall(results: Sequence[EndToEnd], path: str | os.PathLike[str]) -> None:
    """Draws a panel for each result: a bar per stage from the end of the one before.

    Below them is the bar of all together. Whiskers are the lowest and highest of the rounds.

    Args:
        results: of `measure_end_to_end`; those without any stage are left out.
        path: of the picture, whose suffix is its format: .png, .svg, .pdf.

    Raises:
        ValueError: matplotlib is not installed, nothing was measured, or there is no such format.
        OutputError: the picture cannot be written.
    """
    check_plot(path)
    drawn = [result for result in results if result.stages]
    if not drawn:
        raise ValueError("--plot: there is nothing to draw, no stage was measured")
    heights = list(map(_inches, drawn))
    figure = new_figure(9, sum(heights))
    top = sum(heights)
    for result, height in zip(drawn, heights):
        bottom = top - height + _FOOT_INCHES
        inside = height - _TITLE_INCHES - _FOOT_INCHES
        axes = figure.add_axes((0.1, bottom / sum(heights), 0.87, inside / sum(heights)))
        _draw(axes, result)
        _write(figure, result, top)
        top -= height
    save(figure, path)


def _inches(result: EndToEnd) -> float:
    n_bars = len(result.stages) + (result.together is not None)
    return n_bars * _BAR_INCHES + _TITLE_INCHES + _FOOT_INCHES


def _draw(axes: Any, result: EndToEnd) -> None:
    end, ends = 0.0, list[float]()
    for row, stage in enumerate(result.stages):
        colour = _MAIN if stage.name in MAIN else _FEED
        if stage.name == result.bound_by:
            colour = _BOUND
        ends.append(_bar(axes, row, end, stage, colour))
        end += stage.ms
        if row + 1 < len(result.stages):  # to the next bar, which begins there
            edges = [row + _BAR_HEIGHT / 2, row + 1 - _BAR_HEIGHT / 2]
            axes.plot([end, end], edges, color="#999999", linewidth=0.8)
    names = [stage.name for stage in result.stages]
    if result.together is not None:
        axes.axhline(len(names) - 0.5, color=LIGHT, linewidth=0.8)
        ends.append(_bar(axes, len(names), 0.0, result.together, _TOGETHER))
        names.append(result.together.name)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(ends) * _ROOM)
    axes.tick_params(left=False, labelsize=9)
    for label in axes.get_yticklabels():
        if label.get_text() in (result.bound_by, "together"):
            label.set_weight("bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("ms per image", size=9, labelpad=2)


def _bar(axes: Any, row: int, start: float, stage: Stage, colour: str) -> float:
    """Draws a bar and returns where it and its whisker end."""
    axes.barh(row, stage.ms, left=start, height=_BAR_HEIGHT, color=colour)
    right = start + stage.ms
    if stage.interval is not None:
        ends = [start + 1e3 / images_per_s for images_per_s in stage.interval]
        axes.plot(ends, [row, row], color="black", linewidth=1)
        axes.plot(ends, [row, row], "|", color="black", markersize=5)
        right = max(right, *ends)
    axes.annotate(
        f"{rate(stage.images_per_s)} images/s",
        (right, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        size=9,
    )
    return right


def _write(figure: Any, result: EndToEnd, top: float) -> None:
    """Writes title and sentences of a panel, whose upper edge is at `top` inches."""
    name = without_middle(result.model.rstrip("/").rpartition("/")[2], _NAME_CHARS)
    title = f"{name}, null model (the feed alone)" if result.null_model else name
    how = f"{result.precision} on {result.device} ({result.mode}), batch {result.batch}"
    how += "; stages alone, one after the other"
    height = figure.get_figheight()
    write_heading(figure, title, [how], top=height - top, left=0.18)
    for what, colour, x in _KEY:
        y = (top - 0.36) / height
        figure.text(x, y, what, va="top", size=9, color=colour, weight="bold")
    bottom = top - _inches(result)
    for line, text in enumerate(verdict(result)):
        y = (bottom + _FOOT_INCHES - 0.45 - 0.18 * line) / height
        weight = "normal" if line else "bold"
        text = shortened(text, _LINE_CHARS)
        figure.text(0.02, y, text, va="top", size=9, weight=weight, parse_math=False)
