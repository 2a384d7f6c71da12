"""A table of the ways that run, the reasons, and the alternatives that were tried."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_WIDTH = 60  # of the columns that hold sentences


@dataclass(frozen=True)
class Row:
    """A line of an explanation.

    Attributes:
        what: an input shape of the whole backbone; "note" and "cache" hold for every shape.
        runs: what runs for it.
        why: the reason.
        others: what else was tried, each with its time or what was wrong with it.
    """

    what: str
    runs: str
    why: str
    others: str = ""


@dataclass(frozen=True)
class Explanation:
    """The result of `explain()`; prints as a table.

    Attributes:
        title: the backbone, its precision and device, the mode that was asked for.
        rows: the decisions.
    """

    title: str
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        header = ("what", "runs", "why", "others")
        rows = [header, *((r.what, r.runs, r.why, r.others) for r in self.rows)]
        return f"{self.title}\n{table(rows)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of columns as text; long cells are wrapped."""
    cells = [[textwrap.wrap(text, _WIDTH) or [""] for text in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells)]
    lines = []
    for row in cells:
        for index in range(max(map(len, row))):
            parts = [cell[index] if index < len(cell) else "" for cell in row]
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return "\n".join(lines)
