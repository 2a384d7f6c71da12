"""A picture of `--end-to-end`: the time of an image, stage by stage, and of all together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .end_to_end import MAIN, EndToEnd, Stage, number, verdict

# Okabe and Ito's palette, which colour-blind readers can distinguish
_BOUND, _FEED, _MAIN, _TOGETHER = "#D55E00", "#56B4E9", "#0072B2", "#555555"
_BAR_HEIGHT = 0.66
_BAR_INCHES, _TITLE_INCHES, _FOOT_INCHES = 0.3, 0.75, 0.85
_ROOM = 1.34  # right end of the axis by that of the bars: numbers stand there


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
    heights = [
        (len(result.stages) + 1) * _BAR_INCHES + _TITLE_INCHES + _FOOT_INCHES for result in drawn
    ]
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


def _draw(axes: Any, result: EndToEnd) -> None:
    end = 0.0
    ends = [result.ms]
    for row, stage in enumerate(result.stages):
        colour = _MAIN if stage.name in MAIN else _FEED
        if stage.name == result.bound_by:
            colour = _BOUND
        _bar(axes, row, end, stage, colour)
        end += stage.ms
        if row + 1 < len(result.stages):  # to the next bar, which begins there
            edges = [row + _BAR_HEIGHT / 2, row + 1 - _BAR_HEIGHT / 2]
            axes.plot([end, end], edges, color="#999999", linewidth=0.8)
    names = [stage.name for stage in result.stages]
    if result.together is not None:
        axes.axhline(len(names) - 0.5, color="#cccccc", linewidth=0.8)
        _bar(axes, len(names), 0.0, result.together, _TOGETHER)
        names.append(result.together.name)
        ends.append(result.together.ms)
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


def _bar(axes: Any, row: int, start: float, stage: Stage, colour: str) -> None:
    axes.barh(row, stage.ms, left=start, height=_BAR_HEIGHT, color=colour)
    low, high = stage.interval
    fastest, slowest = start + 1e3 / high, start + 1e3 / low
    axes.plot([fastest, slowest], [row, row], color="black", linewidth=1)
    axes.plot([fastest, slowest], [row, row], "|", color="black", markersize=5)
    axes.annotate(
        f"{number(stage.images_per_s)} images/s",
        (max(slowest, start + stage.ms), row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        size=9,
    )


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
    how = (
        f"{result.precision} on {result.device} ({result.mode}), batch {result.batch}; bars are "
        "stages alone, one after the other"
    )
    figure.text(0.02, top - 0.14 * inch, heading, va="top", size=12, weight="bold")
    figure.text(0.02, top - 0.4 * inch, how, va="top", size=9, color="#555555")
    bottom = top - ((len(result.stages) + 1) * _BAR_INCHES + _TITLE_INCHES + _FOOT_INCHES) * inch
    sentences = verdict(result)
    shown = [sentences[0], *(text for text in sentences if "overlap" in text)]
    for line, text in enumerate(shown):
        y = bottom + (0.4 - 0.18 * line) * inch
        figure.text(0.02, y, text, va="top", size=9, weight="normal" if line else "bold")
