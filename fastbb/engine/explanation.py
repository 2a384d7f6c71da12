"""Reports as tables, in text and in HTML, and the explanation of the ways that run."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

_WIDTH = 60  # of the columns that hold sentences
# the colors of the page, light or dark
_TABLE = "color: inherit; font: inherit"
_CELL = "text-align: left; vertical-align: top; padding: 0.2em 1em 0.2em 0"


class Report(NamedTuple):
    """A title, a table, and notes below it.

    Attributes:
        title: one line.
        rows: of the table, the first one names the columns; columns without a value are left out.
        notes: sentences.
    """

    title: str
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        rows = self._filled()
        return "\n".join([self.title, *([table(rows)] if rows else []), *self.notes])

    def html(self) -> str:
        parts = [f"<p>{html.escape(self.title)}</p>"]
        filled = self._filled()
        if filled:
            header, *rows = filled
            body = "".join(_html_row(row, "td") for row in rows)
            head = _html_row(header, "th")
            parts.append(
                f'<table style="{_TABLE}"><thead>{head}</thead><tbody>{body}</tbody></table>'
            )
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        return f"<div>{''.join(parts)}</div>"

    def _filled(self) -> list[list[str]]:
        """The rows, without the columns that have no value; none if no column has."""
        filled = [any(values) for values in zip(*self.rows[1:])]
        if not any(filled):
            return []
        return [[cell for cell, there in zip(row, filled) if there] for row in self.rows]


def _html_row(cells: Sequence[str], tag: str) -> str:
    shown = (f'<{tag} style="{_CELL}">{html.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{''.join(shown)}</tr>"


@dataclass(frozen=True)
class Row:
    """A line of an explanation.

    Attributes:
        what: an input shape of the whole backbone; "some calls" ran otherwise; "note" and "cache"
            hold for every shape.
        runs: what runs for it.
        why: the reason.
        others: what else was tried, each with its time or what was wrong with it.
        time: of what runs, where it was measured.
    """

    what: str
    runs: str
    why: str
    others: str = ""
    time: str = ""


@dataclass(frozen=True)
class Explanation:
    """The result of `explain()`; shown as a table.

    Attributes:
        title: the backbone, its precision and device, the mode that was asked for.
        rows: the decisions.
        copies: memory of the copies of weights that inference keeps, in a sentence.
    """

    title: str
    rows: tuple[Row, ...]
    copies: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        header = ("what", "runs", "time", "why", "others")
        rows = [header, *((r.what, r.runs, r.time, r.why, r.others) for r in self.rows)]
        return Report(self.title, rows, [] if self.copies is None else [self.copies])


def printable(text: str) -> str:
    """Escapes characters that cannot be encoded, that control a terminal, or that break a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of columns as text; long cells are wrapped."""
    # paths stay whole, so that they can be copied
    wrap = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False).wrap
    cells = [[wrap(text) or [""] for text in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells)]
    lines = []
    for row in cells:
        for index in range(max(map(len, row))):
            parts = [cell[index] if index < len(cell) else "" for cell in row]
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return "\n".join(lines)
