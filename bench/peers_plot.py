"""Plot of `peers.py`: one panel per cell, one bar per peer, ours coloured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's blue, which is the colour of most of our bytes in the plot of traffic, and greys
OURS, BEST_PEER, PEER, MISSING = "#0072B2", "#7F7F7F", "#CCCCCC", "#999999"
TITLE = "Images per second on a CPU, all four stages out"
BAR_HEIGHT = 0.7
HEADING = 0.62  # inches


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Draws a column per model, a row per dtype and batch.

    Args:
        data: the JSON of `peers.py`.
        path: the image file to write.
    """
    cells = data["cells"]
    models = list(dict.fromkeys(cell["name"] for cell in cells))
    kinds = list(dict.fromkeys((cell["dtype"], cell["batch"]) for cell in cells))
    # inches: a bar takes 0.21, the title of a panel 0.5
    height = len(kinds) * (0.21 * len(cells[0]["peers"]) + 0.5) + HEADING
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEADING / height), wspace=0.04)
    figure = Figure(figsize=(10, height), layout=layout)
    panels = figure.subplots(len(kinds), len(models), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for cell in cells:
        column = models.index(cell["name"])
        axes = panels[kinds.index((cell["dtype"], cell["batch"])), column]
        axes.set_axis_on()
        _draw(axes, cell, named=column == 0)
    figure.text(0.008, 1 - 0.1 / height, TITLE, va="top", size=12, weight="bold")
    figure.text(
        0.008, 1 - 0.36 / height, _subtitle(data["machine"]), va="top", size=9, color="#555555"
    )
    figure.savefig(path, dpi=160)


def _subtitle(machine: Mapping[str, Any]) -> str:
    versions = machine["versions"]
    libraries = ("torch", "transformers", "timm", "openvino", "onnxruntime")
    known = [f"{name} {versions[name]}" for name in libraries if versions.get(name)]
    where = f"{machine['cpu']}, {machine['capability']}, {machine['threads']} threads"
    return ", ".join([where, *known, machine["date"][:10]])


def _draw(axes: Axes, cell: Mapping[str, Any], named: bool) -> None:
    peers = cell["peers"]
    largest = max((row.get("images_per_s", 0) for row in peers.values()), default=0) or 1
    for place, (name, row) in enumerate(peers.items()):
        if "images_per_s" not in row:
            axes.text(0.01 * largest, place, "does not run", va="center", size=8, color=MISSING)
            continue
        speed = row["images_per_s"]
        best = name in (cell.get("best_ours"), cell.get("best_peer"))
        colour = OURS if name.startswith("fastbb") else BEST_PEER if best else PEER
        axes.barh(place, speed, BAR_HEIGHT, color=colour)
        # error bar from the slowest round to the fastest
        axes.plot([row["lowest"], row["highest"]], [place, place], color="black", linewidth=1)
        text = f"{speed:.1f}" + (" differs" if row["differs"] else "")
        right = max(speed, row["highest"]) + 0.015 * largest
        weight = "bold" if best else "normal"
        axes.text(right, place, text, va="center", size=8.5, weight=weight)
    ratio = f": {cell['ratio']:.2f} x the best peer" if "ratio" in cell else ""
    title = cell["title"].split(", ")[0]
    title = f"{title}, {cell['dtype']}, batch {cell['batch']}{ratio}"
    axes.set_title(title, size=9.5, weight="bold", loc="left", pad=4)
    axes.set_yticks(range(len(peers)), list(peers) if named else [""] * len(peers), size=9)
    axes.set_ylim(len(peers) - 0.5, -0.5)
    axes.set_xlim(0, 1.28 * largest)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
