"""Picture of a bench: texts and sizes of its panels, and errors."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_results import made_cell, made_host, made_results

from fastbb.bench.end_to_end import FEED, MAIN, EndToEnd, Stage
from fastbb.bench.launches import GEMM, Launch
from fastbb.bench.plot import check_plot, plot
from fastbb.bench.results import Results, Way
from fastbb.bench.traffic import Traffic
from fastbb.bench.traffic import plot as plot_traffic
from fastbb.bench.waterfall import plot_waterfall

pytest.importorskip("matplotlib")
SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def texts_of(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_file_has_the_format_of_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    plot(made_results(made_host()), path)
    assert path.read_bytes().startswith(SIGNATURES[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_panel_has_bars_reasons_and_the_ratio(figures: list[Any], tmp_path: Path) -> None:
    cell = made_cell(precision="bf16", batch=8)
    cell.ways[1].wrong = r"stage4: $\frac$ is off"  # no mathematics of matplotlib, which raises
    cell.ways.append(Way("ONNX Runtime", reason="RuntimeError: " + "long " * 30))
    plot(made_results(cell), tmp_path / "a.png")
    (panel,) = figures[0].axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == [way.name for way in cell.ways]
    texts = texts_of(panel)
    assert texts[1] == r"WRONG: stage4: $\frac$ is off"
    assert texts[4].startswith("does not run: RuntimeError: long") and texts[4].endswith("...")
    assert re.fullmatch(r"18\d\.\d \(1\.8\d\)", texts[3])
    # upstream, a stub of WRONG, two of ours
    assert len(panel.patches) == 4 and panel.patches[1].get_hatch()
    colours = [bar.get_facecolor() for bar in panel.patches]
    assert colours[2] == colours[3] and colours[2] not in colours[:2]
    model, below = panel.get_title(loc="left").split("\n")
    assert model == cell.model
    assert re.fullmatch(r"bf16, batch 8, 224x224: ours 1.8\d \(.*\) x transformers eager", below)
    assert any("AMD EPYC" in text.get_text() for text in figures[0].texts)


@pytest.mark.parametrize("n_cells", [1, 4, 7, 16])
def test_nothing_overlaps(n_cells: int, figures: list[Any], tmp_path: Path) -> None:
    model = "timm/convnextv2_base.fcmae_ft_in22k_in1k_384.with_a_very_long_tag_of_its_own"
    cells = [made_host() if i == 2 else made_cell(model, seed=i) for i in range(n_cells)]
    for cell in cells:
        cell.ways[0].name = "a way with a name that is far too long for a picture"
    plot(made_results(*cells), tmp_path / "a.png")
    figure = figures[0]
    panels = [panel for panel in figure.axes if panel.axison]
    assert len(panels) == n_cells
    boxes = [panel.get_tightbbox() for panel in panels] + [
        text.get_window_extent() for text in figure.texts
    ]
    for number, box in enumerate(boxes):
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_cell_without_any_time_is_drawn(figures: list[Any], tmp_path: Path) -> None:
    cell = made_cell()
    for way in cell.ways:
        way.rounds_s = []
    plot(made_results(cell), tmp_path / "a.png")
    assert texts_of(figures[0].axes[0]) == ["does not run: was not measured"] * 4


def test_problems_are_found_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plot(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"--plot .*a.txt: wanted one of .*\.png, .*got '.txt'"):
        check_plot(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="no cell was measured"):
        plot(Results("fastbb bench", {}), tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'fastbb\[plot\]'"):
        check_plot(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["traffic", "end-to-end"])
def test_long_names_stay_inside_other_pictures(
    kind: str, figures: list[Any], tmp_path: Path
) -> None:
    name = "timm convnextv2_base.fcmae_ft_in22k_in1k_384.with_a_very_long_tag_of_its_own" * 3
    if kind == "traffic":
        counts: Any = {name: [Launch("mm", GEMM, 90_000)], "fastbb": [Launch("mm", GEMM, 9)]}
        plot_traffic([Traffic(name, 1, (9, 9), counts)], tmp_path / "a.png")
    else:
        stages = [Stage(one, 100.0, 1.0, 10, 4, [90.0, 110.0]) for one in (*FEED, *MAIN)]
        how: Any = ("fp32", "eager", "cpu", 32, ["embedding"], 10, 10, 10, True)
        result = EndToEnd(name, "photos", *how, stages=stages, together=stages[0])
        plot_waterfall([result], tmp_path / "a.png")
    (figure,) = figures
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [panel.get_tightbbox() for panel in figure.axes]
    assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
