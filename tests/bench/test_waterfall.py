"""Picture of `--end-to-end`, and names that are neither markup nor mathematics."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_results import made_extraction
from PIL import Image

from fastbb.bench import waterfall
from fastbb.bench.end_to_end import FEED, MAIN, Stage, markdown
from fastbb.extraction.layout import OutputError


def test_the_waterfall_has_a_bar_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    bars: list[tuple[str, float, float, str]] = []
    bar = waterfall._bar

    def drawn(axes: Any, row: int, start: float, stage: Stage, colour: str) -> float:
        bars.append((stage.name, start, stage.ms, colour))
        return bar(axes, row, start, stage, colour)

    monkeypatch.setattr(waterfall, "_bar", drawn)
    result = made_extraction()
    waterfall.plot_waterfall([result, made_extraction(null_model=True)], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width == 9 * 160
    assert [name for name, *_ in bars] == [*FEED, *MAIN, "together"] * 2
    ends = list(itertools.accumulate(stage.ms for stage in result.stages))
    assert [start for _, start, *_ in bars[:7]] == pytest.approx([0.0, *ends[:-1], 0.0])
    coloured = [name for name, *_, colour in bars[:7] if colour == waterfall._BOUND]
    assert coloured == ["decode"]


def test_nothing_to_draw_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = made_extraction()
    empty.stages, empty.together = [], None
    with pytest.raises(ValueError, match="nothing to draw"):
        waterfall.plot_waterfall([empty], tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib: pip install 'fastbb\[plot\]'"):
        waterfall.plot_waterfall([made_extraction()], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_names_of_others_are_no_markup(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = made_extraction()
    result.model, result.failed = r"a|$\frac$<b>" + "long" * 50, ["c|d.png: corrupt"]
    page = markdown(result)
    assert r"a\|$\frac$&lt;b&gt;" in page and r"c\|d.png" in page
    waterfall.plot_waterfall([result], tmp_path / "a.png")  # no mathematics, which raises
    with pytest.raises(OutputError, match="cannot write"):
        waterfall.plot_waterfall([result], tmp_path / "none" / "a.png")
    assert not list(tmp_path.glob("*tmp-*"))
