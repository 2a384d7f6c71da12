"""Writes the table of docs/reference/model-types.md, which `fastbb list --type` prints too.

python scripts/model_types_page.py
"""

from pathlib import Path

from fastbb.auto import list_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "model-types.md"
BEGIN, END = "<!-- begin: scripts/model_types_page.py -->\n", "<!-- end -->\n"


def table() -> str:
    """The model types as a Markdown table."""
    rows = [
        (
            f"`{row.model_type}`",
            f"`{row.loads_as}`",
            "yes" if row.is_native else "no",
            row.needs if row.needs == "-" else f"`{row.needs}`",
            f"`{row.upstream}`",
            f"`{row.example}`",
        )
        for row in list_types()
    ]
    head = ("model_type", "loads as", "native", "needs", "computes as", "for example")
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(page: str) -> str:
    """Returns the text of the page with the table of now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
