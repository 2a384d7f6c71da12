"""Pictures of a bench: their colours, heading and file. matplotlib is imported at first use."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extraction.layout import write_file

# Okabe and Ito's palette, which colour-blind readers can distinguish, and greys
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PURPLE = "#E69F00", "#D55E00", "#CC79A7"
DARK, QUIET, GREY, LIGHT = "#333333", "#555555", "#7F7F7F", "#CCCCCC"
_DPI = 160


def check_plot(path: str | os.PathLike[str]) -> None:
    """Checks before a measurement that a picture can be drawn.

    Raises:
        ValueError: matplotlib is missing, or the name has another suffix.
    """
    try:
        import matplotlib  # noqa: F401  # not there: one error, whatever of it is imported
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'fastbb[plot]'") from None
    known = [f".{name}" for name in sorted(FigureCanvasBase.get_supported_filetypes())]
    if (suffix := Path(path).suffix) not in known:
        raise ValueError(f"--plot {path}: wanted one of {', '.join(known)}, got {suffix!r}")


def new_figure(width: float, height: float, heading: float | None = None) -> Any:
    """Makes a figure of its own: no window system, and no state of pyplot.

    Args:
        width: inches.
        height: inches.
        heading: inches above the panels, which are laid out without overlap; None: they are placed
            by hand.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = None
    if heading is not None:
        rect = (0, 0, 1, 1 - heading / height)
        layout = ConstrainedLayoutEngine(rect=rect, wspace=0.04, hspace=0.04)
    return Figure(figsize=(width, height), dpi=_DPI, layout=layout)


def write_heading(
    figure: Any, title: str, lines: Sequence[str], top: float = 0.0, left: float = 0.1
) -> None:
    """Writes a title and lines below it.

    Args:
        figure: to write on.
        title: bold.
        lines: small and grey.
        top: inches from the upper edge.
        left: inches from the left edge.
    """
    x, height = left / figure.get_figwidth(), figure.get_figheight()
    words: dict[str, Any] = {"va": "top", "parse_math": False}
    figure.text(x, 1 - (top + 0.1) / height, title, size=12, weight="bold", **words)
    below = 1 - (top + 0.36) / height
    figure.text(x, below, "\n".join(lines), size=9, color=QUIET, **words)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format of the path's suffix.

    Raises:
        OutputError: the file cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:])
    write_file(Path(path), image.getvalue())


def shortened(text: str, n_chars: int) -> str:
    """A sentence without its last words where it is too long."""
    return textwrap.shorten(text, n_chars, placeholder="...")


def without_middle(name: str, n_chars: int) -> str:
    """A name without its middle where it is too long."""
    half = n_chars // 2 - 2
    return name if len(name) <= n_chars else f"{name[:half]}...{name[-half:]}"
