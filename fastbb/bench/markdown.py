"""Results of a bench as tables in Markdown, for pages of documentation."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from .noise import best, ratio
from .results import Cell, Results, Way
from .table import (
    COLUMNS,
    Notes,
    call_notes,
    cell_notes,
    end_notes,
    has_values,
    images_per_s,
    inside_columns,
    interval_words,
    machine,
    name_of,
    pixels,
    ratio_to_upstream,
    setting,
    traffic_rows,
)

# they have tables of their own
_ELSEWHERE = ("images/s", "inside", "ratio inside")


def markdown(results: Results) -> str:
    """Formats results as a table of the run, then for each model its tables and footnotes.

    Args:
        results: of a bench, complete or interrupted.
    """
    parts = [_run(results)]
    models: dict[Any, list[Cell]] = {}
    for cell in results.cells:
        models.setdefault((cell.kind, cell.model, cell.size), []).append(cell)
    parts += [_model(cells) for cells in models.values() if cells[0].kind != "host"]
    if hosts := [cells for cells in models.values() if cells[0].kind == "host"]:
        parts.append(_hosts(hosts))
    parts.append(_bullets(end_notes(results)))
    return "\n\n".join(filter(None, parts)) + "\n"


def _run(results: Results) -> str:
    command = "`" + results.command.replace("|", "\\|") + "`"
    known = {name: _escaped(value) for name, value in machine(results.environment).items()}
    rows = [[name, known[name]] for name in ("hardware", "date", "versions") if known[name]]
    return _table([["command", command], *rows], n_texts=2)


def _model(cells: Sequence[Cell]) -> str:
    notes, first = Notes(), cells[0]
    parts = [f"## {_escaped(first.model)}", _speeds(cells, notes), _details(cells, notes)]
    parts += [_traffic(cells, notes)]
    return "\n\n".join(filter(None, [*parts, _end(cells, notes)]))


def _speeds(cells: Sequence[Cell], notes: Notes) -> str:
    """A row for each way, a column for each cell."""
    bests = [best(cell) for cell in cells]
    header = [f"images/s, {pixels(cells[0])}", *map(setting, cells)]
    rows = []
    for name in dict.fromkeys(way.name for cell in cells for way in cell.ways):
        ways = [cell.way(name) for cell in cells]
        values = []
        for cell, way, found in zip(cells, ways, bests):
            value = "" if way is None else images_per_s(cell, way, notes)
            values.append(f"**{value}**" if way is not None and way is found.way else value)
        rows.append([_named([way for way in ways if way is not None], notes), *values])
    against = [
        str(ratio(found.ours, found.other) or "-") if found.ours and found.other else "-"
        for found in bests
    ]
    rows.append(["fastbb's best / best of the others", *against])
    return _table([header, *rows])


def _details(cells: Sequence[Cell], notes: Notes, with_model: bool = False) -> str:
    """A row for each way of each cell: ratio, latency, memory, start, error."""
    names = [name for name in COLUMNS if name not in _ELSEWHERE]
    there = [
        (cell, way)
        for cell in cells
        for way in cell.ways
        if any(COLUMNS[name](cell, way, Notes()) for name in names)
    ]
    columns = {name: [COLUMNS[name](*pair, notes) for pair in there] for name in names}
    columns = {name: values for name, values in columns.items() if has_values(values)}
    if not columns:
        return ""
    first = [
        [*_model_column(cell, with_model), setting(cell), _escaped(way.name)] for cell, way in there
    ]
    rows = [[*one, *values] for one, values in zip(first, zip(*columns.values()))]
    header = [*(["model"] if with_model else []), "cell", "way", *columns]
    return _table([header, *rows], n_texts=2 + with_model)


def _model_column(cell: Cell, with_model: bool) -> list[str]:
    return [_escaped(cell.model)] if with_model else []


def _hosts(hosts: Sequence[Sequence[Cell]]) -> str:
    """A row for each host, columns for each precision and batch."""
    notes, cells = Notes(), [cell for same in hosts for cell in same]
    settings = list(dict.fromkeys(map(setting, cells)))
    header = ["host", "image"]
    for name in settings:
        header += [name, "its backbone", "backbone's share of the time"]
    rows = []
    for same in hosts:
        by_setting = {setting(cell): cell for cell in same}
        row = [_escaped(same[0].model), pixels(same[0])]
        for name in settings:
            cell = by_setting.get(name)
            row += ["", "", ""] if cell is None else _host(cell, notes)
        rows.append(row)
    parts = ["## Accelerated models", _table([header, *rows], n_texts=2)]
    parts += [_details(cells, notes, with_model=True), _traffic(cells, notes, with_model=True)]
    return "\n\n".join(filter(None, [*parts, _end(cells, notes)]))


def _host(cell: Cell, notes: Notes) -> list[str]:
    """Ratio of the whole model, of its backbone, and the share before and after."""
    ours = best(cell).ours or next((way for way in cell.ways if way.ours), None)
    upstream = cell.way(cell.upstream)
    if ours is None or upstream is None:
        return ["-", "-", "-"]
    found = ratio_to_upstream(cell, ours)
    if found is None:
        lost = upstream if found is None and upstream.reason else ours
        return [images_per_s(cell, lost, notes), "-", "-"]
    shares = [inside_columns(cell, way)[0] for way in (upstream, ours)]
    inside = inside_columns(cell, ours)[1]
    return [str(found), inside or "-", " -> ".join(shares) if all(shares) else "-"]


def _traffic(cells: Sequence[Cell], notes: Notes, with_model: bool = False) -> str:
    rows = [
        [*_model_column(cell, with_model), setting(cell), *row]
        for cell in cells
        for row in traffic_rows(cell, notes)
    ]
    model = ["model"] if with_model else []
    header = [*model, "counted on a GPU", "way", "traffic (ratio)", "launches"]
    return _table([header, *rows], n_texts=2 + with_model) if rows else ""


def _end(cells: Sequence[Cell], notes: Notes) -> str:
    below = [f"{setting(cell)}: {note}" for cell in cells for note in cell_notes(cell)]
    upstream = " or ".join(dict.fromkeys(cell.upstream for cell in cells))
    about = f"Ratios: times as fast as {upstream}, in the same rounds{interval_words(cells)}."
    return _bullets([about, *call_notes(cells), *below, *notes.lines()])


def _named(ways: Sequence[Way], notes: Notes) -> str:
    """The name of a way with the marks of its notes in all cells."""
    marks = dict.fromkeys(name_of(way, notes).removeprefix(way.name) for way in ways)
    return _escaped(ways[0].name) + "".join(marks)


def _table(rows: Sequence[Sequence[str]], n_texts: int = 1) -> str:
    """A table whose first row is its header.

    Args:
        rows: cells, escaped.
        n_texts: number of the first columns that are aligned to the left.
    """
    n_numbers = len(rows[0]) - n_texts
    rule = "|" + "---|" * n_texts + "--:|" * n_numbers
    header, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, rule, *lines])


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {_escaped(sentence)}" for sentence in sentences)


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")
