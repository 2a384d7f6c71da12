"""Results of a bench as tables in Markdown, for pages of documentation."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..engine.explanation import printable
from ..engine.measuring import memory
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
    text = "\n\n".join(filter(None, parts)) + "\n"
    return re.sub(r"\[(\d+)\]", r"\\[\1\\]", text)  # two marks in a row would be a link


def _run(results: Results) -> str:
    command = "`" + results.command.replace("|", "\\|") + "`"
    known = {name: escaped(value) for name, value in machine(results.environment).items()}
    rows = [[name, known[name]] for name in ("hardware", "date", "versions") if known[name]]
    return table([["command", command], *rows], n_texts=2)


def _model(cells: Sequence[Cell]) -> str:
    notes, first = Notes(), cells[0]
    parts = [f"## {escaped(first.model)}", _speeds(cells, notes), _details(cells, notes)]
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
    rows.append(["fastbb's best / best of the others", *[_against(b.ours, b.other) for b in bests]])
    if any(found.torch is not found.ours for found in bests):
        alone = [_against(found.torch, found.other) for found in bests]
        rows.append(["the same without fastbb's OpenVINO", *alone])
    return table([header, *rows])


def _against(ours: Way | None, other: Way | None) -> str:
    return str(ratio(ours, other) or "-") if ours and other else "-"


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
    first = [[setting(cell), escaped(way.name)] for cell, way in there]
    if with_model:  # its first table has no names of ways, which footnotes follow
        first = [
            [escaped(cell.model), setting(cell), _named([way], notes.of(cell.model))]
            for cell, way in there
        ]
    rows = [[*one, *values] for one, values in zip(first, zip(*columns.values()))]
    header = [*(["model"] if with_model else []), "cell", "way", *columns]
    return table([header, *rows], n_texts=2 + with_model)


def _hosts(hosts: Sequence[Sequence[Cell]]) -> str:
    """A row for each host, columns for each precision and batch."""
    notes, cells = Notes(), [cell for same in hosts for cell in same]
    settings = list(dict.fromkeys(map(setting, cells)))
    header = ["host", "image"]
    for name in settings:
        header += [name, "its backbone", "backbone's share of the time"]
    rows = []
    with_traffic = any(cell.traffic for cell in cells)
    if with_traffic:
        header.append("GPU traffic (counted), launches")
    for same in hosts:
        of_model = notes.of(same[0].model)
        by_setting = {setting(cell): cell for cell in same}
        row = [escaped(same[0].model), pixels(same[0])]
        for name in settings:
            cell = by_setting.get(name)
            row += ["", "", ""] if cell is None else _host(cell, of_model)
        if with_traffic:
            row.append(_traffic(same, of_model))
        rows.append(row)
    parts = ["## Accelerated models", table([header, *rows], n_texts=2)]
    parts += [_details(cells, notes, with_model=True)]
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


def _traffic(cells: Sequence[Cell], notes: Notes) -> str:
    """Bytes and launches of a host as it is and accelerated, which no precision changes."""
    found = next((cell for cell in cells if cell.traffic), None)
    if found is None:
        return ""
    upstream = found.traffic.get(found.upstream)
    way, ours = next((one for one in found.traffic.items() if one[0] != found.upstream), ("", {}))
    for name, counted in ((found.upstream, upstream or {}), (way, ours)):
        if "reason" in counted:
            return "-" + notes.mark(counted["reason"], name)
    if upstream is None or not ours:
        return "-"
    sizes = f"{memory(upstream['bytes'])} -> {memory(ours['bytes'])}"
    return f"{sizes}, {upstream['launches']} -> {ours['launches']}"


def _end(cells: Sequence[Cell], notes: Notes) -> str:
    below = [
        f"{f'{cell.model}, ' if cell.kind == 'host' else ''}{setting(cell)}: {note}"
        for cell in cells
        for note in cell_notes(cell)
    ]
    upstream = " or ".join(dict.fromkeys(cell.upstream for cell in cells))
    about = f"Ratios: times as fast as {upstream}, in the same rounds{interval_words(cells)}."
    return _bullets([about, *call_notes(cells), *below, *notes.lines()])


def _named(ways: Sequence[Way], notes: Notes) -> str:
    """The name of a way with the marks of its notes in all cells."""
    marks = dict.fromkeys(name_of(way, notes).removeprefix(printable(way.name)) for way in ways)
    return escaped(ways[0].name) + "".join(marks)


def table(rows: Sequence[Sequence[str]], n_texts: int = 1, readable: bool = False) -> str:
    """A table whose first row is its header.

    Args:
        rows: cells, `escaped`.
        n_texts: number of the first columns that are aligned to the left.
        readable: aligns the source as well, for a terminal.
    """
    sizes = [max(map(len, column)) if readable else 0 for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        sides = [str.ljust] * n_texts + [str.rjust] * (len(row) - n_texts)
        return f"| {' | '.join(side(one, size) for side, one, size in zip(sides, row, sizes))} |"

    rule = ["-" * max(3, size + 2) for size in sizes]
    rule[n_texts:] = [f"{one[:-1]}:" for one in rule[n_texts:]]
    header, *lines = map(line, rows)
    return "\n".join([header, f"|{'|'.join(rule)}|", *lines])


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {escaped(sentence)}" for sentence in sentences)


def escaped(text: str) -> str:
    """Text that can stand in a table, or anywhere in Markdown, without being markup."""
    return html.escape(text, quote=False).replace("|", "\\|")
