"""Plot of counted traffic: one bar per way, divided by category of its bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

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

# Okabe and Ito's palette, which colour-blind readers can distinguish, and greys; colour of text
COLOURS = {
    GEMM: ("#0072B2", "white"),
    ATTENTION: ("#56B4E9", "black"),
    NORM: ("#009E73", "black"),
    ACTIVATION: ("#F0E442", "black"),
    RESIDUAL: ("#E69F00", "black"),
    COPY: ("#D55E00", "white"),
    POOL: ("#999933", "white"),
    ROLL: ("#CC79A7", "black"),
    PAD: ("#7F7F7F", "white"),
    MASK: ("#333333", "white"),
    OTHER: ("#CCCCCC", "black"),
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


def draw(
    counts: Mapping[str, Mapping[str, Sequence[Launch]]], path: str | os.PathLike[str]
) -> None:
    """Draws one panel per model.

    Args:
        counts: launches by model and way.
        path: the image file to write.
    """
    # inches: a bar takes 0.47, the names above a panel the same, the heading 0.6
    n_rows = [len(ways) + 1.3 for ways in counts.values()]
    height = 0.47 * sum(n_rows) + 0.6
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.6 / height))
    figure = Figure(figsize=(10, height), layout=layout)
    panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=n_rows)[:, 0]
    for axes, (model, ways) in zip(panels, counts.items()):
        _draw(axes, model, ways)
    figure.text(0.008, 1 - 0.1 / height, TITLE, va="top", size=12, weight="bold")
    figure.text(0.008, 1 - 0.36 / height, SUBTITLE, va="top", size=9, color="#555555")
    figure.savefig(path, dpi=160)


def _draw(axes: Axes, model: str, ways: Mapping[str, Sequence[Launch]]) -> None:
    # the longest bar comes first: its pieces have the most room for their names
    bars = sorted(ways.items(), key=lambda bar: -n_bytes(bar[1]))
    unit, scale = ("GB", 1e9) if n_bytes(bars[0][1]) >= 1e9 else ("MB", 1e6)
    longest = n_bytes(bars[0][1]) / scale
    named: set[str] = set()
    for row, (_, launches) in enumerate(bars):
        left = 0.0
        for category, category_bytes in bytes_by_category(launches).items():
            width = category_bytes / scale
            middle = left + width / 2
            colour, ink = COLOURS[category]
            axes.barh(row, width, BAR_HEIGHT, left, color=colour, edgecolor="white")
            left += width
            if width >= SMALLEST_NUMBER * longest:
                axes.text(
                    middle, row, f"{width:.1f}", color=ink, ha="center", va="center", size=8.5
                )
            if width >= SMALLEST_NAME * longest and category not in named:
                named.add(category)
                name, above = category.replace(" ", "\n"), row - BAR_HEIGHT / 2 - 0.1
                axes.text(middle, above, name, ha="center", va="baseline", size=8)
        total = f"  {left:.1f} {unit}, {len(launches)} launches"
        axes.text(left, row, total, va="center", size=9.5, weight="bold")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], size=9.5)
    axes.set_ylim(len(bars) - 0.6, -1.1)
    axes.set_xlim(0, 1.25 * longest)
    over_names = axes.get_yaxis_transform()
    axes.text(-0.012, -0.75, model, transform=over_names, ha="right", size=10.5, weight="bold")
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
