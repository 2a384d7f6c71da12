"""Results of a bench as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..engine.explanation import printable
from ..engine.measuring import duration, memory
from .noise import (
    FEW_ROUNDS,
    Best,
    Ratio,
    best,
    inside_ratio,
    inside_share,
    is_valid,
    ratio,
    speed,
)
from .rates import bound_shares
from .results import Cell, Results, Way

_BEST = " *"
_ENOUGH_CALLS = 100  # of which one is beyond the 99th percentile
_LEGEND = (
    "*: fastest of its cell. ratio: times as fast as {upstream}, in the same rounds{interval}."
)
_NOTHING = "0 s"
_INSIDE = "inside: share of the time inside the modules that fastbb replaces."
_NO_TIMES = "was not measured"
# versions beside a table; the JSON file has all of them
_SHOWN = (
    *("fastbb", "torch", "triton", "transformers", "timm", "torchvision"),
    *("openvino", "onnxruntime"),
)


class Notes:
    """Numbered footnotes; the same text has the same number.

    Args:
        about: begins each text, "" for nothing.
        texts: that there are; new ones are added.
    """

    def __init__(self, about: str = "", texts: list[str] | None = None) -> None:
        self._about = about
        self.texts: list[str] = [] if texts is None else texts

    def of(self, model: str) -> Notes:
        """The same footnotes, to which it adds those of one model."""
        return Notes(model, self.texts)

    def mark(self, text: str, way: str = "") -> str:
        """Returns the mark after a value of a table; "" for no text."""
        if not text:
            return ""
        about = ", ".join(filter(None, (self._about, way)))
        text = printable(f"{about}: {text}" if about else text)
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {text}" for number, text in enumerate(self.texts, 1)]


def text(results: Results) -> str:
    """Formats all cells: machine, one table, footnotes.

    Args:
        results: of a bench, complete or interrupted.
    """
    notes = Notes()
    parts = ["\n".join(filter(None, machine(results.environment).values()))]
    if results.cells:
        parts += [_cells(results.cells, notes)]
        parts += ["\n".join([*_legend(results.cells), *notes.lines()])]
    parts.append("\n".join(map(printable, end_notes(results))))
    return "\n\n".join(filter(None, parts))


def _cells(cells: Sequence[Cell], notes: Notes) -> str:
    """One table, so that the columns of all cells have the same place."""
    bests = [best(cell) for cell in cells]
    # row by row, so that footnotes are numbered as they are read
    rows = [
        [
            name_of(way, notes) + (_BEST if way is found.way else ""),
            *(show(cell, way, notes) for show in COLUMNS.values()),
        ]
        for cell, found in zip(cells, bests)
        for way in cell.ways
    ]
    columns = dict(zip(("", *COLUMNS), zip(*rows)))
    columns = {name: values for name, values in columns.items() if not name or has_values(values)}
    left, sections = list(zip(*columns.values())), []
    for cell, found in zip(cells, bests):
        of_cell, left = left[: len(cell.ways)], left[len(cell.ways) :]
        below = [*conclusions(found), *cell_notes(cell)]
        sections.append(Section(title(cell), of_cell, below))
    return with_headings(list(columns), sections)


class Section(NamedTuple):
    """Rows of a table below a heading.

    Attributes:
        heading: a line.
        rows: a name and numbers.
        below: lines after the rows.
    """

    heading: str
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()


def with_headings(header: Sequence[str], sections: Sequence[Section]) -> str:
    """One table with headings between its rows.

    Args:
        header: names of the columns.
        sections: in order.
    """
    indented = [[f"  {row[0]}", *row[1:]] for one in sections for row in one.rows]
    first, *lines = aligned([header, *indented])
    parts, place = [first], 0
    for number, one in enumerate(sections):
        end = place + len(one.rows)
        parts += [*([""] if number else []), one.heading, *lines[place:end]]
        parts += [f"  {line}" for line in one.below]
        place = end
    return "\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def has_values(column: Sequence[str]) -> bool:
    """Whether a column says anything: of ways that do not compile, "compile" does not."""
    return not {*column} <= {"", _NOTHING}


def title(cell: Cell) -> str:
    """Model, precision, batch and image size of a cell."""
    return f"{printable(cell.model)}, {setting(cell)}, {pixels(cell)}"


def setting(cell: Cell) -> str:
    """Precision and batch of a cell, also the batch that was asked for."""
    ran = f" (ran {cell.batch})" if cell.batch < cell.asked_batch else ""
    return f"{cell.precision}, batch {cell.asked_batch}{ran}"


def pixels(cell: Cell) -> str:
    height, width = cell.size
    return f"{height}x{width}"


def name_of(way: Way, notes: Notes) -> str:
    return printable(way.name) + notes.mark(way.note, way.name)


def images_per_s(cell: Cell, way: Way, notes: Notes) -> str:
    """The speed, WRONG, or "-"; the reasons are footnotes."""
    if way.wrong is not None:
        return "WRONG" + notes.mark(way.wrong, way.name)
    measured = speed(way, cell.batch)
    if way.reason is not None or measured is None:
        return "-" + notes.mark(way.reason or _NO_TIMES, way.name)
    return rate(measured.images_per_s)


def rate(value: float) -> str:
    """Images per second with three or more digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def percent(share: float) -> str:
    """A share in percent, without digits after the point."""
    return f"{100 * share:.0f} %"


def ratio_to_upstream(cell: Cell, way: Way) -> Ratio | None:
    """None for a way without a valid time, and where upstream has none."""
    upstream = cell.way(cell.upstream)
    if upstream is None or not is_valid(upstream) or not is_valid(way):
        return None
    return Ratio(1.0, 1.0, 1.0) if way is upstream else ratio(way, upstream)


def _ratio_column(cell: Cell, way: Way, notes: Notes) -> str:
    found = ratio_to_upstream(cell, way)
    return "1" if found and way.name == cell.upstream else str(found or "")


def _percentile(name: str) -> Callable[[Cell, Way, Notes], str]:
    def show(cell: Cell, way: Way, notes: Notes) -> str:
        measured = speed(way, cell.batch) if is_valid(way) else None
        return duration(getattr(measured, name)) if measured else ""

    return show


def _bound(cell: Cell, way: Way, notes: Notes) -> str:
    shares = bound_shares(cell, way)
    if shares is None:
        return ""
    name = max(shares, key=lambda name: shares[name])
    return f"{percent(shares[name])} {name}"


def _memory(cell: Cell, way: Way, notes: Notes) -> str:
    return "" if way.memory_bytes is None else memory(way.memory_bytes)


def _seconds(name: str) -> Callable[[Cell, Way, Notes], str]:
    def show(cell: Cell, way: Way, notes: Notes) -> str:
        seconds = getattr(way, name)
        return "" if seconds is None else duration(seconds) if seconds else _NOTHING

    return show


def _error(cell: Cell, way: Way, notes: Notes) -> str:
    return "" if way.error is None else f"{way.error:.1e}"


def inside_columns(cell: Cell, way: Way) -> tuple[str, str]:
    """Of a host: share of the time inside replaced modules, and the ratio of that time."""
    if cell.kind != "host" or not is_valid(way):
        return "", ""
    share, upstream = inside_share(way), cell.way(cell.upstream)
    if share is None or upstream is None or not is_valid(upstream):
        return "", ""
    found = "1" if way is upstream else str(inside_ratio(way, upstream) or "")
    return percent(share), found


# columns after the name; those without any value are left out
COLUMNS: Mapping[str, Callable[[Cell, Way, Notes], str]] = {
    "images/s": images_per_s,
    "ratio": _ratio_column,
    "inside": lambda cell, way, notes: inside_columns(cell, way)[0],
    "ratio inside": lambda cell, way, notes: inside_columns(cell, way)[1],
    "p50": _percentile("p50_s"),
    "p90": _percentile("p90_s"),
    "p99": _percentile("p99_s"),
    "bound": _bound,
    "memory": _memory,
    "cold start": _seconds("cold_start_s"),
    "compile": _seconds("compile_s"),
    "error": _error,
}


def conclusions(found: Best) -> list[str]:
    """Says how the best of ours stands to the best other way, with and without OpenVINO."""
    said = [_conclusion(found.ours, found.other)]
    if found.torch is not None and found.torch is not found.ours:
        said.append(f"Without fastbb's OpenVINO: {_conclusion(found.torch, found.other)}")
    return said


def _conclusion(best_of_ours: Way | None, best_other: Way | None) -> str:
    if best_of_ours is None or best_other is None:
        whose = "fastbb" if best_of_ours is None else "other"
        return f"No comparison: no {whose} way has times of a right result."
    against = ratio(best_of_ours, best_other)
    ours, other = printable(best_of_ours.name), printable(best_other.name)
    if against is None:
        return f"No comparison: {ours} and {other} have no round in common."
    if against.verdict == FEW_ROUNDS:
        return (
            f"{ours} is {against} times as fast as {other}; too few rounds to tell it from noise."
        )
    if against.verdict == "within noise":
        return f"{ours} and {other} differ by less than the noise: {against}."
    return f"{ours} is {against} times as fast as {other}: {against.verdict}, beyond the noise."


def cell_notes(cell: Cell) -> list[str]:
    """Sentences about a cell."""
    notes = []
    if cell.batch < cell.asked_batch:
        notes.append(f"Batch {cell.batch} instead of {cell.asked_batch}: memory ran out.")
    return notes + [printable(note) for note in cell.notes]


def _legend(cells: Sequence[Cell]) -> list[str]:
    upstream = dict.fromkeys(cell.upstream for cell in cells)
    return [
        _LEGEND.format(
            upstream=" or ".join(map(printable, upstream)),
            interval=interval_words(cells),
        ),
        *call_notes(cells),
        *([_INSIDE] if any(cell.kind == "host" for cell in cells) else []),
    ]


def interval_words(cells: Sequence[Cell]) -> str:
    """Words for the parentheses after ratios; "" where no ratio has any."""
    ratios = [ratio_to_upstream(cell, way) for cell in cells for way in cell.ways]
    known = any(one is not None and one.low not in (None, 1.0) for one in ratios)
    return ", with its 95 % interval" if known else ""


def call_notes(cells: Sequence[Cell]) -> list[str]:
    """Sentences about the numbers of all cells."""
    notes = []
    speeds = [speed(way, cell.batch) for cell in cells for way in cell.ways if is_valid(way)]
    if any(one is not None and one.n_calls < _ENOUGH_CALLS for one in speeds):
        notes.append(f"p99 of fewer than {_ENOUGH_CALLS} calls is about their slowest.")
    return notes


def end_notes(results: Results) -> list[str]:
    """Sentences about the whole bench."""
    cut = ["Interrupted: these are the measurements up to then."] if results.interrupted else []
    return [*cut, *results.notes]


def machine(environment: Mapping[str, Any]) -> dict[str, str]:
    """Hardware, date and versions in words; "" for what is not known."""

    def known(template: str, name: str) -> str:
        value = environment.get(name)
        return "" if value in (None, "", [], {}) else template.format(_plain(value))

    threads = known("{} threads", "threads")
    if environment.get("threads") == 1:
        threads = "1 thread"
    if threads and environment.get("cores"):
        threads += f" of {environment['cores']} cores"
    hardware = [
        known("{}", "gpu"),
        known("driver {}", "driver"),
        known("{}", "cpu"),
        known("{}", "capability"),
        known("{}", "flags"),
        threads,
        known("load average {}", "load_average"),
    ]
    libraries = environment.get("versions") or {}
    versions = [f"{name} {libraries[name]}" for name in _SHOWN if libraries.get(name)]
    if commit := environment.get("fastbb_commit"):
        versions.append(f"fastbb at {commit[:10]}")
    versions.append(known("Python {}", "python"))
    return {
        "hardware": printable(", ".join(filter(None, hardware))),
        "versions": printable(", ".join(filter(None, versions))),
        "date": printable(known("{}", "date")),
    }


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:.2g}" if isinstance(value, float) else str(value)
