"""What `explain()` shows: at a prompt, printed, in a notebook; each thing once."""

import code
import re
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import torch
from engine_rig import PIXELS, EngineRig, resnet_pair, swin_pair
from pretended_device import gpu, only_row

from fastbb.engine.explanation import Explanation, Report, Row
from fastbb.engine.measuring import memory

ODD = "<script>alert('x')</script> & \"y\""


class Cells(HTMLParser):
    """Reads the cells of every row of a table, and fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def at_a_prompt(line: str, **names: Any) -> str:
    """What Python's prompt prints after a line."""
    with redirect_stdout(StringIO()) as shown:
        code.InteractiveInterpreter(dict(names)).runsource(line)
    return shown.getvalue()


def test_a_prompt_and_a_script_show_an_explanation_once() -> None:
    backbone = resnet_pair().ours
    text = str(backbone.explain())
    assert text.splitlines()[0] == "ResNetBackbone in torch.float32 on cpu, not prepared"
    assert "Explanation(" not in text and " object at " not in text
    assert at_a_prompt("backbone.explain()", backbone=backbone) == f"{text}\n"
    assert at_a_prompt("print(backbone.explain())", backbone=backbone) == f"{text}\n"
    assert at_a_prompt("found = backbone.explain()", backbone=backbone) == ""


def test_html_shows_the_same_cells_escaped_and_without_colors() -> None:
    explanation = Explanation(
        f"title {ODD}", (Row("2x64x64", "eager", ODD), Row("1x32x32", "compile", "fast")), ODD
    )
    shown = Cells(explanation._repr_html_())
    assert shown.rows == [
        ["what", "runs", "why"],
        ["2x64x64", "eager", ODD],
        ["1x32x32", "compile", "fast"],
    ]
    assert "script" not in shown.tags and explanation._repr_html_().count("&lt;script&gt;") == 3
    shown_without = explanation._repr_html_().replace("color: inherit", "")
    assert not re.search("color|background|#[0-9a-f]{3}", shown_without)


def test_columns_without_a_value_and_an_empty_table_are_left_out() -> None:
    report = Report("title", [("a", "b", "c"), ("1", "", "2"), ("3", "", "")], ["note"])
    assert report.text() == "title\na  c\n1  2\n3\nnote"
    assert Cells(report.html()).rows == [["a", "c"], ["1", "2"], ["3"]]
    assert Report("title").text() == "title" and not Cells(Report("title").html()).rows


def test_the_winner_has_a_time_beside_those_of_the_others(rig: EngineRig) -> None:
    with gpu(), torch.no_grad():
        backbone = rig.prepare(rig.candidate("fast", 0.25), rig.candidate("slow", 1.5))
        backbone(PIXELS)
    row = only_row(backbone)
    assert (row.runs, row.time) == ("fast", "250 ms")
    assert "slow: 1.5 s" in row.others and "fast" not in row.others
    assert [line.split()[:3] for line in str(backbone.explain()).splitlines()[1:3]] == [
        ["what", "runs", "time"],
        ["2x64x64", "fast", "250"],
    ]


def n_bytes(backbone: Any) -> int:
    return sum(p.nbytes for p in (*backbone.parameters(), *backbone.buffers()))


def copies(backbone: Any) -> str:
    return str(backbone.explain().copies)


def test_copies_are_counted_after_the_first_run() -> None:
    backbone = swin_pair().ours
    assert backbone.explain().copies is None
    with torch.no_grad():
        backbone(PIXELS)
    found = re.fullmatch("copies of weights: (.*) kB fused, folded or packed", copies(backbone))
    assert found and 0 < float(found[1]) * 1e3 < 3 * n_bytes(backbone)
    assert str(backbone.explain()).endswith(f"\n{found[0]}")
    assert found[0] in backbone.explain()._repr_html_()
    backbone.refresh()
    assert backbone.explain().copies is None


def test_a_converted_copy_is_counted_and_shared_weights_are_not() -> None:
    backbone = resnet_pair().ours
    assert backbone.prepare("eager", "fp32").explain().copies is None
    prepared = backbone.prepare("eager", "bf16")
    assert copies(prepared) == f"copies of weights: {memory(n_bytes(prepared))} converted to bf16"


def test_what_a_compiler_keeps_is_named_and_not_counted(rig: EngineRig) -> None:
    backbone = rig.prepare(mode="compile", example=PIXELS)
    assert rig.compiler.compiled and "those inside what was compiled" in copies(backbone)


def test_amounts_of_memory_have_three_digits() -> None:
    amounts = {0: "0 B", 999: "999 B", 1000: "1 kB", 27_460: "27.5 kB", 110_200_000: "110 MB"}
    assert {n: memory(n) for n in amounts} == amounts
    assert memory(999_600_000) == "1 GB" and memory(12_300_000_000) == "12.3 GB"


def test_a_table_without_values_is_left_out() -> None:
    assert repr(Explanation("title", ())) == "title"
    assert "<table" not in Explanation("title", ())._repr_html_()


def test_a_path_stays_in_one_piece() -> None:
    path = "photos/" + "a-long-name/" * 9 + "photo.jpg"
    assert path in Report("title", [("what",), (path,)]).text()


def test_the_memory_of_copies_in_any_dtype_is_shown() -> None:
    prepared = resnet_pair().ours.prepare(mode="eager", precision="bf16").double()
    assert "converted to float64" in str(prepared.explain())
