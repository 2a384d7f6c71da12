"""The results of `gpu.py` as markdown tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

DRY_RUN = "dry run, not a measurement"

Row = dict[str, Any]


def markdown(data: dict[str, Any]) -> str:
    """All tables of one run.

    Args:
        data: as in the JSON file: label, date, stages and sections.
    """
    is_dry = data["label"] == DRY_RUN
    mark = f" ({DRY_RUN})" if is_dry else ""
    facts = {row["item"]: row.get("value", "") for row in data["sections"].get("environment", [])}
    title = f"# fastbb on {facts.get('GPU', 'an unknown GPU')}, {data['date'][:10]}{mark}"
    parts = [title, f"## Stages{mark}", _stages(data["stages"])]
    for name, section in SECTIONS.items():
        rows = data["sections"].get(name)
        if rows:
            parts += [f"## {name.capitalize()}{mark}", section(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _stages(stages: Sequence[Row]) -> str:
    text = _table(
        ["stage", "outcome", "seconds"],
        [[stage["stage"], stage["outcome"], f"{stage['seconds']:.0f}"] for stage in stages],
    )
    lines = [
        f"- {stage['stage']}: not reached: {'; '.join(stage['not_reached'])}"
        for stage in stages
        if stage["not_reached"]
    ]
    return "\n\n".join(part for part in (text, "\n".join(lines)) if part)


def _environment(rows: Sequence[Row]) -> str:
    return _table(["", ""], [[row["item"], row["value"]] for row in rows])


def _check(rows: Sequence[Row]) -> str:
    """One line per op: its small and its real cases in each precision."""
    found = {tuple(row["item"].split(", ", 1)): row for row in rows}
    ops, columns = (list(dict.fromkeys(part)) for part in zip(*found))
    header = ["op", *columns]
    cells = [[op, *(_verdict(found.get((op, column))) for column in columns)] for op in ops]
    problems = [f"- {row['item']}: {text}" for row in rows for text in _problems(row)]
    return "\n\n".join(filter(None, [_table(header, cells), "\n".join(problems)]))


def _verdict(row: Row | None) -> str:
    if row is None:
        return "not reached"
    if "n_cases" not in row:
        return "failed"
    if row["problems"]:
        return f"wrong, {row['n_cases']} cases"
    return f"{row['n_cases']} ok" if row["n_cases"] else "-"


def _problems(row: Row) -> list[str]:
    return [*row.get("problems", []), *([row["problem"]] if "problem" in row else [])]


def _build(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        seconds = (f"{batch}: {s:.1f} s" for batch, s in row.get("seconds", {}).items())
        lines.append([row["item"], ", ".join(seconds), "; ".join(_problems(row))])
    return _table(["model", "first forward by batch", "problems"], lines)


def _tune(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for decision in row.get("decisions", []):
            values = [decision[name] for name in ("runs", "why", "others")]
            lines.append([row["item"], f"{row['seconds']:.1f}", *values])
        if "problem" in row:
            lines.append([row["item"], "", "", row["problem"], ""])
    return _table(["cell", "seconds to choose", "runs", "why", "others"], lines)


def _ops(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times = row.get("times")
        if times is None:
            problem = row.get("problem", "")
            lines.append([row.get("op", ""), row["item"], *[""] * 7, problem])
            continue
        triton, eager = times["triton"], times["eager"]
        others = [f"{name}: {_us(t)}" for name, t in times.items() if name not in _OWN]
        gb_per_s = 1e-6 * row["n_bytes"] / triton["median_ms"]
        lines.append(
            [
                row["op"],
                row["item"],
                _us(triton),
                _us(eager),
                f"{eager['median_ms'] / triton['median_ms']:.2f}",
                f"{gb_per_s:.0f}",
                "" if row["floor_ms"] is None else f"{1e3 * row['floor_ms']:.1f}",
                _share(row["floor_ms"], triton["median_ms"]),
                str(triton["n_rounds"]),
                "; ".join(others),
            ]
        )
    header = ["op", "case", "triton µs", "eager µs", "ratio", "GB/s", "floor µs", "% of floor"]
    return _table([*header, "rounds", "others µs, problems"], lines)


_OWN = ("triton", "eager")


def _us(times: Row) -> str:
    low, high = 1e3 * times["min_ms"], 1e3 * times["max_ms"]
    return f"{1e3 * times['median_ms']:.1f} ({low:.1f}-{high:.1f})"


def _share(floor_ms: float | None, ms: float) -> str:
    """The floor in percent of the time."""
    return "" if floor_ms is None else f"{100 * floor_ms / ms:.0f}"


def _models(rows: Sequence[Row]) -> str:
    """A line per cell and column; cells that were measured again count once, the fullest one."""
    fullest: dict[tuple[Any, ...], Row] = {}
    problems = []
    for row in rows:
        if "columns" not in row:
            problems.append(f"- {row['item']}: {row.get('problem', 'no result')}")
            continue
        key = row["model"], row["precision"], row["batch"], *_compilers(row)
        fullest[key] = row
    lines = [line for row in fullest.values() for line in _model_lines(row)]
    header = ["cell", "what", "ms", "min-max", "images/s", "upstream / this", "peak MB"]
    libraries = sorted({f"- eager upstream: {row['upstream']}" for row in fullest.values()})
    table = _table([*header, "% of floor", "problem"], lines)
    return "\n\n".join(filter(None, [table, "\n".join(libraries + problems)]))


def _compilers(row: Row) -> Iterable[str]:
    return [name for name in row["columns"] if name.startswith("upstream,")]


def _model_lines(row: Row) -> list[list[str]]:
    cell = f"{row['model']}, {row['precision']}, batch {row['batch']}"
    upstream = row["columns"].get("eager upstream", {}).get("median_ms")
    lines = []
    for name, column in row["columns"].items():
        peak = column.get("peak_mb")
        start, end = [cell, name], ["" if peak is None else f"{peak:.0f}"]
        ms = column.get("median_ms")
        if ms is None:
            lines.append([*start, *[""] * 4, *end, "", column.get("problem", "")])
            continue
        lines.append(
            [
                *start,
                f"{ms:.3f}",
                f"{column['min_ms']:.3f}-{column['max_ms']:.3f}",
                f"{column['images_per_s']:.0f}",
                "" if upstream is None else f"{upstream / ms:.2f}",
                *end,
                _share(row.get("floor_ms"), ms),
                "",
            ]
        )
    return lines


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "environment": _environment,
    "check": _check,
    "build": _build,
    "tune": _tune,
    "ops": _ops,
    "models": _models,
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
