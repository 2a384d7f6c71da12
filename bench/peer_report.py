"""Makes the tables of `peers.py` from its JSON."""

from collections.abc import Callable, Mapping
from typing import Any

from fastbb.bench.traffic import table

Row = Mapping[str, Any]


class Notes:
    """Numbered footnotes; the same text has the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str, peer: str = "") -> str:
        """Returns the mark after a cell of a table; "" for no text."""
        if not text:
            return ""
        text = f"{peer}: {text}" if peer else text
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def __str__(self) -> str:
        return "\n".join(f"[{i + 1}] {text}" for i, text in enumerate(self.texts))


def report(data: Row, with_machine: bool = True) -> str:
    """Formats all measurements as text.

    Args:
        data: the data saved by `measure_all`.
        with_machine: whether the machine and the libraries come first.
    """
    footnotes = Notes()
    parts = [_machine(data["machine"])] if with_machine else []
    parts += _cell_tables(data, footnotes)
    parts += _extra_tables(data, footnotes)
    if footnotes.texts:
        parts.append(str(footnotes))
    return "\n\n".join(parts)


def _machine(machine: Row) -> str:
    versions = machine["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}, "
        f"{' '.join(machine['flags'])}\n{libraries}\n{machine['date']}"
    )


def _cell_tables(data: Row, footnotes: Notes) -> list[str]:
    tables = []
    for model in dict.fromkeys(cell["name"] for cell in data["cells"]):
        cells = [cell for cell in data["cells"] if cell["name"] == model]
        header = [f"{cells[0]['title'].rsplit(', ', 2)[0]}: images/s"]
        header += [f"{cell['dtype']}, batch {cell['batch']}" for cell in cells]
        rows = [
            [name, *(_speed(cell["peers"][name], footnotes) for cell in cells)]
            for name in cells[0]["peers"]
        ]
        rows.append(["fastbb's best / best peer", *(_ratio(cell, "ratio") for cell in cells)])
        for number, one in enumerate(data["repeats"]):
            name = f"the same, new process {number + 1}" + footnotes.mark(one.get("reason", ""))
            rows.append([name, *(_ratio(_same(cell, one), "ratio") for cell in cells)])
        rows.append(
            ["fastbb eager / transformers eager", *(_ratio(cell, "eager_ratio") for cell in cells)]
        )
        tables.append(table(header, rows))
    return tables


def _same(cell: Row, repeated: Row) -> Row:
    """Finds the same cell in another run; empty if there is none."""
    keys = ("name", "dtype", "batch", "size")
    for other in repeated.get("cells", []):
        if all(other[key] == cell[key] for key in keys):
            return other
    return {}


def _speed(row: Row, footnotes: Notes) -> str:
    peer = row["peer"]
    if row["reason"]:
        return "-" + footnotes.mark(row["reason"], peer)
    text = f"{row['images_per_s']:.1f} ({row['lowest']:.1f}-{row['highest']:.1f})"
    if row["differs"]:
        worst = max(row["differences"].values())
        text += " differs" + footnotes.mark(f"a map is {worst:.1g} away", peer)
    text += footnotes.mark(row["note"], peer)
    return text + footnotes.mark("fewer than three repetitions a round" if _few(row) else "")


def _few(row: Row) -> bool:
    return any(len(one_round) < 3 for one_round in row["rounds_s"])


def _ratio(cell: Row, name: str) -> str:
    return f"{cell[name]:.2f}" if name in cell else "-"


def _extra_tables(data: Row, footnotes: Notes) -> list[str]:
    tables = []
    for section, (title, columns) in _EXTRA.items():
        for cell in data.get(section, []):
            rows = [
                [name, *(show(row, footnotes) for show in columns.values())]
                for name, row in cell["peers"].items()
            ]
            tables.append(table([f"{cell['title']}: {title}", *columns], rows))
    for cell in data.get("early_exit", []):
        title = f"{cell['title']}: out_indices=(1,), images/s"
        rows = [[name, _speed(row, footnotes)] for name, row in cell["peers"].items()]
        rows.append(["fastbb / transformers", _ratio(cell, "eager_ratio")])
        tables.append(table([title, "stage 1 only"], rows))
    return tables


def _value(name: str, template: str) -> Callable[[Row, Notes], str]:
    def show(row: Row, footnotes: Notes) -> str:
        if name in row:
            return template.format(row[name])
        return "-" + footnotes.mark(row.get("reason", ""), row["peer"])

    return show


_EXTRA: dict[str, tuple[str, Mapping[str, Callable[[Row, Notes], str]]]] = {
    "first_result": (
        "from a loaded model to the first result",
        {"cold": _value("cold_s", "{:.1f} s"), "warm cache": _value("warm_s", "{:.1f} s")},
    ),
    "second_size": (
        "second image size",
        {
            "pixels": _value("size", "{}"),
            "first result": _value("first_s", "{:.1f} s"),
            "after that": _value("next_s", "{:.3f} s"),
        },
    ),
    "memory": (
        "peak memory of the process",
        {
            "loading and starting": _value("start_mb", "{:.0f} MB"),
            "running": _value("run_mb", "{:.0f} MB"),
        },
    ),
}
