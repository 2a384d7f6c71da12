"""The results of `gpu.py` as markdown tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

DRY_RUN = "dry run, not a measurement"

Row = dict[str, Any]


def markdown(data: dict[str, Any]) -> str:
    """Formats all tables of a run.

    Args:
        data: as in the JSON file: label, run, date, stages and sections.
    """
    is_dry = data["label"] == DRY_RUN
    mark = f" ({DRY_RUN})" if is_dry else ""
    facts = {row["item"]: row.get("value", "") for row in data["sections"].get("environment", [])}
    gpu = facts.get("GPU", "an unknown GPU")
    title = f"# fastbb on {gpu}, run {data['run']}, {data['date'][:10]}{mark}"
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


def _checks(rows: Sequence[Row]) -> str:
    """Formats a line per op: its cases by model and batch, its small cases by precision."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.get("op", row["item"]), _where(row)), []).append(row)
    ops, columns = (list(dict.fromkeys(part)) for part in zip(*found))
    columns.sort()
    cells = [[op, *(_verdict(found.get((op, column), [])) for column in columns)] for op in ops]
    problems = [f"- {row['item']}: {text}" for row in rows for text in _problems(row)]
    return "\n\n".join(filter(None, [_table(["op", *columns], cells), "\n".join(problems)]))


def _where(row: Row) -> str:
    if "model" in row:
        return f"{row['model']}, batch {row['batch']}"
    return row.get("precision", "without a result")


def _verdict(rows: Sequence[Row]) -> str:
    """Formats how many cases are correct; a case whose process crashed counts as a problem."""
    n_cases = sum(row.get("n_cases", 1) for row in rows)
    n_wrong = sum(len(_problems(row)) for row in rows)
    return f"{n_wrong} of {n_cases} wrong" if n_wrong else f"{n_cases} ok" if n_cases else "-"


def _problems(row: Row) -> list[str]:
    return [*row.get("problems", []), *([row["problem"]] if "problem" in row else [])]


def _said(rows: Sequence[Row]) -> str:
    """Formats rows of text."""
    return _table(
        ["what", "found"],
        [[row["item"], "; ".join([*_problems(row), row.get("value", "")])] for row in rows],
    )


def _tools(rows: Sequence[Row]) -> str:
    counters = [row for row in rows if "metrics" in row]
    names = list(dict.fromkeys(name for row in counters for name in row["metrics"]))
    lines = [
        [row["item"], row["kernel"], *(row["metrics"].get(name, "") for name in names)]
        for row in counters
    ]
    said = _said([row for row in rows if "metrics" not in row])
    return "\n\n".join([said, *([_table(["case", "kernel", *names], lines)] if lines else [])])


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
    """Formats the floor in percent of the time."""
    return "" if floor_ms is None else f"{100 * floor_ms / ms:.0f}"


def _models(rows: Sequence[Row]) -> str:
    """Formats a line per cell and column; of repeated cells the last one."""
    fullest: dict[tuple[Any, ...], Row] = {}
    problems = []
    for row in rows:
        problems += [f"- {row['item']}: {text}" for text in row.get("off", [])]
        if "columns" not in row:
            if set(row) <= {"item", "stage", "label", "seconds"}:  # a row of the compilation
                continue
            problems.append(f"- {row['item']}: {row.get('problem', 'no result')}")
            continue
        key = row["model"], row["precision"], row["batch"], *_compilers(row)
        fullest[key] = row
    lines = [line for row in fullest.values() for line in _model_lines(row)]
    header = ["cell", "what", "ms", "min-max", "images/s", "upstream / this", "peak MB"]
    libraries = sorted(
        {f"- eager upstream of {row['model']}: {row['upstream']}" for row in fullest.values()}
    )
    table = _table([*header, "% of floor", "host µs", "GPU busy µs", "problem"], lines)
    kernels = [text for row in fullest.values() for text in _kernels(row)]
    return "\n\n".join(filter(None, [table, "\n".join(libraries + problems), *kernels]))


def _kernels(row: Row) -> list[str]:
    """Formats tables of kernels: ours, and those of the compiled peer."""
    parts = []
    for name in ("fastbb", "upstream, compiled"):
        kernels = row["columns"].get(name, {}).get("kernels")
        if kernels:
            lines = [
                [k["name"][:80], f"{k['calls']:.0f}", f"{k['us']:.1f}", f"{100 * k['share']:.1f}"]
                for k in kernels[:_MOST_KERNELS]
            ]
            header = [f"{_cell_of(row)}, {name}: kernel", "calls", "µs", "% of all"]
            parts.append(_table(header, lines))
    return parts


_MOST_KERNELS = 15


def _cell_of(row: Row) -> str:
    """Formats the cell, its stage, and a mark for dry runs, which a copied line has to show."""
    model = f"tiny {row['model']} of a dry run" if row.get("label") == DRY_RUN else row["model"]
    stage = row.get("stage", "").partition(", ")[2]
    where = f" ({stage})" if stage else ""
    return f"{model}, {row['precision']}, batch {row['batch']}{where}"


def _compilers(row: Row) -> Iterable[str]:
    return [name for name in row["columns"] if name.startswith("upstream,")]


def _model_lines(row: Row) -> list[list[str]]:
    upstream = row["columns"].get("eager upstream", {}).get("median_ms")
    lines = []
    for name, column in row["columns"].items():
        peak = column.get("peak_mb")
        start, end = [_cell_of(row), name], ["" if peak is None else f"{peak:.0f}"]
        problem = column.get("problem", column.get("profile_problem", ""))
        ms = column.get("median_ms")
        if ms is None:
            lines.append([*start, *[""] * 4, *end, *[""] * 3, problem])
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
                *(f"{column[us]:.0f}" if us in column else "" for us in ("host_us", "busy_us")),
                problem,
            ]
        )
    return lines


def _sweep(rows: Sequence[Row]) -> str:
    """Formats a line per shape: the present configuration, the fastest one, and libraries."""
    lines, notes = [], []
    for row in rows:
        if "us" not in row:
            notes += [f"- {row['item']}: {text}" for text in _problems(row)]
            continue
        libraries = (f"{name}: {_number(us)}" for name, us in row["libraries"].items())
        lines.append(
            [
                row["op"],
                row["item"],
                f"{row['n_tried']} of {row['n_candidates']}",
                _number(row["default_us"]),
                _number(row["us"]),
                f"{row['default_us'] / row['us']:.2f}",
                str(row["config"]),
                "; ".join(libraries),
                "; ".join(f"{config}: {why}" for config, why in row["refused"].items()),
            ]
        )
    header = ["op", "case", "tried", "default µs", "best µs", "ratio", "best", "libraries µs"]
    return "\n\n".join(filter(None, [_table([*header, "refused"], lines), "\n".join(notes)]))


def _contest(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("us", {})))
    lines = [
        [
            row["item"],
            *(_number(row.get("us", {}).get(name)) for name in names),
            row.get("wins", ""),
            "; ".join([*_problems(row), *row.get("refused", [])]),
        ]
        for row in rows
    ]
    return _table(["case", *(f"{name} µs" for name in names), "wins", "problems"], lines)


def _number(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "environment": _environment,
    "checks": _checks,
    "devices": _said,
    "models": _models,
    "sweep": _sweep,
    "libraries": _contest,
    "conv3x3": _contest,
    "ops": _ops,
    "tools": _tools,
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
