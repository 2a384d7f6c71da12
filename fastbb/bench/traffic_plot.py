"""Plot of counted traffic: one bar per way, divided by category of its bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.measuring import memory
from .launches import (
    ACTIVATION,
    ATTENTION,
    COPY,
    GEMM,
    MASK,
    NORM,
    OTHER,
    PAD,
    POOL,
    RESIDUAL,
    ROLL,
    Launch,
    bytes_by_category,
    n_bytes,
)
from .pictures import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    check_plot,
    new_figure,
    save,
    without_middle,
    write_heading,
)

# of a bar, and of text on it
COLOURS = {
    GEMM: (BLUE, "white"),
    ATTENTION: (SKY, "black"),
    NORM: (GREEN, "black"),
    ACTIVATION: (YELLOW, "black"),
    RESIDUAL: (ORANGE, "black"),
    COPY: (VERMILION, "white"),
    POOL: ("#999933", "white"),
    ROLL: (PURPLE, "black"),
    PAD: (GREY, "white"),
    MASK: (DARK, "white"),
    OTHER: (LIGHT, "black"),
}
TITLE = "Memory traffic of one forward pass"
SUBTITLE = (
    "bf16; every launch reads its inputs once and writes its outputs once; "
    "a fused kernel counts where its main work is"
)
BAR_HEIGHT = 0.64
# share of the longest bar: shorter pieces have no room for their number, or the name above
SMALLEST_NUMBER = 0.03
SMALLEST_NAME = 0.02
HEADING = 0.6  # inches
TITLE_CHARS, NAME_CHARS = 72, 32


def draw(
    counts: Mapping[str, Mapping[str, Sequence[Launch]]], path: str | os.PathLike[str]
) -> None:
    """Draws one panel per model.

    Args:
        counts: launches by model and way.
        path: the image file to write.

    Raises:
        ValueError: nothing was counted, matplotlib is missing, or the name has another suffix.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    if not counts:
        raise ValueError("--plot: there is nothing to draw, no launches were counted")
    # inches: a bar takes 0.47, the names above a panel and its title 0.8
    heights = [0.47 * len(ways) + 0.8 for ways in counts.values()]
    height = sum(heights) + HEADING
    figure = new_figure(10, height, HEADING)
    panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (model, ways) in zip(panels, counts.items()):
        _draw(axes, model, ways)
    write_heading(figure, TITLE, [SUBTITLE])
    save(figure, path)


def _draw(axes: Any, model: str, ways: Mapping[str, Sequence[Launch]]) -> None:
    # the longest bar comes first: its pieces have the most room for their names
    bars = sorted(ways.items(), key=lambda bar: -n_bytes(bar[1]))
    longest = n_bytes(bars[0][1])
    scale = 10.0 ** (3 * (len(f"{longest:,}".split(",")) - 1))  # of the unit that `memory` takes
    named: set[str] = set()
    for row, (_, launches) in enumerate(bars):
        left = 0.0
        for category, category_bytes in bytes_by_category(launches).items():
            width = category_bytes
            middle = left + width / 2
            colour, ink = COLOURS[category]
            axes.barh(row, width, BAR_HEIGHT, left, color=colour, edgecolor="white")
            left += width
            if width >= SMALLEST_NUMBER * longest:
                number = f"{width / scale:.1f}"
                axes.text(middle, row, number, color=ink, ha="center", va="center", size=8.5)
            if width >= SMALLEST_NAME * longest and category not in named:
                named.add(category)
                name, above = category.replace(" ", "\n"), row - BAR_HEIGHT / 2 - 0.1
                axes.text(middle, above, name, ha="center", va="baseline", size=8)
        many = "1 launch" if len(launches) == 1 else f"{len(launches)} launches"
        total = f"  {memory(n_bytes(launches))}, {many}"
        axes.text(left, row, total, va="center", size=9.5, weight="bold")
    names = [without_middle(name, NAME_CHARS) for name, _ in bars]
    axes.set_yticks(range(len(bars)), names, size=9.5, parse_math=False)
    axes.set_ylim(len(bars) - 0.6, -1.1)
    axes.set_xlim(0, 1.25 * longest)
    title = without_middle(model, TITLE_CHARS)
    axes.set_title(title, loc="left", size=10.5, weight="bold", parse_math=False)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
