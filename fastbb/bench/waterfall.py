"""A picture of `--end-to-end`: the time of an image, stage by stage, and of all together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .end_to_end import MAIN, EndToEnd, Stage, number, verdict

# Okabe and Ito's palette, which colour-blind readers can distinguish
_BOUND, _FEED, _MAIN, _TOGETHER = "#D55E00", "#56B4E9", "#0072B2", "#555555"
_BAR_HEIGHT = 0.66
_BAR_INCHES, _TITLE_INCHES, _FOOT_INCHES = 0.3, 0.68, 1.12
_ROOM = 1.25  # right end of the axis by that of the whiskers: numbers stand there
_KEY = (("decode threads", _FEED, 0.66), ("main thread", _MAIN, 0.795), ("bound by", _BOUND, 0.905))


def plot_waterfall(results: Sequence[EndToEnd], path: str | os.PathLike[str]) -> None:
    """Draws a panel for each result: a bar per stage from the end of the one before.

    Below them is the bar of all together. Whiskers are the lowest and highest of the rounds.

    Args:
        results: of `measure_end_to_end`; those without any stage are left out.
        path: of the picture, whose suffix is its format: .png, .svg, .pdf.

    Raises:
        ValueError: matplotlib is not installed, nothing was measured, or there is no such format.
        OSError: the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: needs matplotlib; pip install 'fastbb[plot]'") from error
    drawn = [result for result in results if result.stages]
    if not drawn:
        raise ValueError("plot: no stage was measured, so there is nothing to draw")
    heights = list(map(_inches, drawn))
    figure = Figure(figsize=(9, sum(heights)))
    top = sum(heights)
    for result, height in zip(drawn, heights):
        bottom = top - height + _FOOT_INCHES
        inside = height - _TITLE_INCHES - _FOOT_INCHES
        axes = figure.add_axes((0.1, bottom / sum(heights), 0.87, inside / sum(heights)))
        _draw(axes, result)
        _write(figure, result, top / sum(heights), 1 / sum(heights))
        top -= height
    figure.savefig(path, dpi=160)


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
        axes.axhline(len(names) - 0.5, color="#cccccc", linewidth=0.8)
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
    low, high = stage.interval
    fastest, slowest = start + 1e3 / high, start + 1e3 / low
    axes.plot([fastest, slowest], [row, row], color="black", linewidth=1)
    axes.plot([fastest, slowest], [row, row], "|", color="black", markersize=5)
    right = max(slowest, start + stage.ms)
    axes.annotate(
        f"{number(stage.images_per_s)} images/s",
        (right, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        size=9,
    )
    return right


def _write(figure: Any, result: EndToEnd, top: float, inch: float) -> None:
    """Writes title and sentences of a panel.

    Args:
        figure: to write on.
        result: of the panel.
        top: of the panel, as a share of the figure.
        inch: the same of an inch.
    """
    name = result.model.rstrip("/").rpartition("/")[2]
    heading = f"{name}, null model (the feed alone)" if result.null_model else name
    how = f"{result.precision} on {result.device} ({result.mode}), batch {result.batch}"
    how += "; stages alone, one after the other"
    figure.text(0.02, top - 0.14 * inch, heading, va="top", size=12, weight="bold")
    figure.text(0.02, top - 0.4 * inch, how, va="top", size=9, color="#555555")
    for what, colour, x in _KEY:
        figure.text(x, top - 0.4 * inch, what, va="top", size=9, color=colour, weight="bold")
    bottom = top - _inches(result) * inch
    for line, text in enumerate(verdict(result)):
        y = bottom + (_FOOT_INCHES - 0.45 - 0.18 * line) * inch
        figure.text(0.02, y, text, va="top", size=9, weight="normal" if line else "bold")
