"""What mode "auto" measured is remembered, and whatever is in its file, the maps are upstream's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_kernels import MACHINE
from pretended_device import (
    MANY,
    Compiler,
    Device,
    baked,
    explained,
    gpu,
    install,
    no_warning,
    only_row,
)
from reference_models import Pair, hf_pair, hf_resnet, images
from tolerance import assert_equals_upstream
from torch import Tensor

from fastbb.backbone.base import Backbone
from fastbb.engine.compile_cost import CompileCost
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import EngineWarning
from fastbb.engine.trial import Candidate, Run
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

PIXELS = images(64, 64)
REMEMBERED = "measured before on this machine"


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Its weights are not to be changed."""
    return hf_pair(hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]))


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return install(Compiler(), monkeypatch)


def fast(device: Device, pair: Pair, build: Callable[[], Run] | None = None) -> Candidate:
    return device.candidate("fast", 0.1, build or (lambda: baked(pair.ours)))


def process(pair: Pair, device: Device, folder: Path, *candidates: Candidate, **more: Any) -> Any:
    """A backbone as another process would prepare it: only the folder is the same."""
    tools = device.tools(folder, *candidates, machine=more.pop("machine", MACHINE))
    return prepare(pair.ours, tools=tools, **{"expected_images": MANY, **more})


def assert_right(backbone: Backbone, pair: Pair, pixels: Tensor = PIXELS) -> None:
    with torch.no_grad():
        assert_equals_upstream(backbone(pixels).feature_maps, pair.maps(pixels))


def measure(pair: Pair, folder: Path, machine: Machine = MACHINE) -> Path:
    """Lets a first process measure; returns the file that remembers it."""
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, folder, fast(device, pair), machine=machine)
        assert_right(backbone, pair)
    assert device.n_timed
    return ResultCache(machine, folder).path


@pytest.mark.parametrize("n_shapes", [1, 2])
def test_what_is_remembered_is_not_measured_again(
    n_shapes: int, pair: Pair, compiler: Compiler, tmp_path: Path, capsys: Any
) -> None:
    measure(pair, tmp_path)
    assert compiler.compiled == [(2, 3, 64, 64)] * 2  # both modes that compile were tried
    assert compiler.impls == ["auto", "eager"]
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, tmp_path, fast(device, pair))
        for batch in (2, 3)[:n_shapes]:
            for _ in range(2):
                assert_right(backbone, pair, images(64, 64, batch))
        first, *others = explained(backbone, capsys).rows
    assert device.n_timed == 0 and len(compiler.compiled) == 2
    assert (first.runs, first.why) == ("fast", REMEMBERED)
    assert first.others == "triton: 1 s; eager: 1 s; triton+compile: 1 s; compile: 1 s"
    assert all(row.runs == "fast" and row.why == "what won for 2x64x64" for row in others)


def test_a_winner_that_compiles_is_compiled_again_where_that_pays(
    pair: Pair,
    compiler: Compiler,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # this compiler takes no time, which would be remembered
    monkeypatch.setattr(CompileCost, "record", lambda self, seconds: None)
    first, second, third = Device(), Device(), Device()
    compiled: list[int] = []

    def build() -> Run:
        compiled.append(len(compiled))
        return baked(pair.ours)

    def candidate(device: Device) -> Candidate:
        return device.candidate("compiled elsewhere", 0.1, build, compiles=True)

    with gpu(), no_warning():
        assert_right(process(pair, first, tmp_path, candidate(first)), pair)
        assert first.n_timed and len(compiled) == 1
        backbone = process(pair, second, tmp_path, candidate(second))
        assert_right(backbone, pair)
        assert len(compiled) == 2 and only_row(backbone, capsys).runs == "compiled elsewhere"
        for expected, why in ((100, "save about 45 s on 100 images"), (None, "say expected_im")):
            backbone = process(pair, third, tmp_path, candidate(third), expected_images=expected)
            assert_right(backbone, pair)
            row = only_row(backbone, capsys)
            assert row.runs == "triton" and REMEMBERED in row.why and why in row.why
    assert len(compiled) == 2 and second.n_timed == third.n_timed == 0


def test_other_maps_precisions_and_shapes_are_measured_by_themselves(
    pair: Pair, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"batch": 3}, {"out_indices": [1]}]
    for change in changes:
        for is_known in (False, True):
            device = Device()
            with gpu(), torch.no_grad():
                backbone = process(pair, device, tmp_path, precision=change.get("precision"))
                backbone.out_indices = change.get("out_indices", [0, 1, 2])
                backbone(images(64, 64, change.get("batch", 2)))
            assert (device.n_timed == 0) == is_known
    models, precisions, shapes = zip(
        *(key.split("/") for key in ResultCache(MACHINE, tmp_path).items("tuned"))
    )
    assert len(models) == len(changes) and len(set(models)) == 2
    assert set(precisions) == {"fp32", "bf16"} and set(shapes) == {"2x64x64", "3x64x64"}


# files that are of no use


def machine_of_another_version(pair: Pair, folder: Path) -> None:
    measure(pair, folder, replace(MACHINE, fastbb="0.0.1", torch="2.8"))


def another_machines_file_by_this_name(pair: Pair, folder: Path) -> None:
    other = measure(pair, folder, replace(MACHINE, kernels="def"))
    other.rename(ResultCache(MACHINE, folder).path)


def written(content: str | bytes) -> Callable[[Pair, Path], None]:
    def write(pair: Pair, folder: Path) -> None:
        path = ResultCache(MACHINE, folder).path
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def cut(pair: Pair, folder: Path) -> None:
    path = measure(pair, folder)
    path.write_text(path.read_text()[:-20])


def a_folder(pair: Pair, folder: Path) -> None:
    ResultCache(MACHINE, folder).path.mkdir()


FILES: dict[str, tuple[Callable[[Pair, Path], None], str]] = {
    "other_version": (machine_of_another_version, ""),
    "other_machine": (another_machines_file_by_this_name, "results of another machine or version"),
    "empty": (written(""), "Expecting value"),
    "binary": (written(b"\xff\xfe\xfd" * 9), "codec can't decode"),
    "list": (written("[]"), "not a cache of format"),
    "cut": (cut, "Expecting"),
    "folder": (a_folder, "it is not a file"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_no_use_is_measured_anew(
    file: str, pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    make, note = FILES[file]
    make(pair, tmp_path)
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, tmp_path, fast(device, pair))
        assert_right(backbone, pair)
        row, *others = explained(backbone, capsys).rows
    assert device.n_timed and row.runs == "fast" and "the fastest that passed" in row.why
    said = [other.why for other in others if other.what == "cache"]
    assert any(note in text for text in said) if note else not said
    if file != "folder":  # what could be replaced was
        again = Device()
        with gpu():
            assert_right(process(pair, again, tmp_path, fast(again, pair)), pair)
        assert not again.n_timed


RIGHT = {"name": "triton", "seconds": 1.0, "problem": None}
VALUES: dict[str, Any] = {
    "null": None,
    "text": "fast",
    "no_trials": {"winner": "fast"},
    "empty": {"trials": []},
    "number": {"trials": 3},
    "texts": {"trials": ["fast"]},
    "no_name": {"trials": [{"seconds": 1.0, "problem": None}]},
    "seconds_text": {"trials": [{**RIGHT, "seconds": "1.0"}]},
    "seconds_nan": {"trials": [{**RIGHT, "seconds": float("nan")}]},
    "seconds_negative": {"trials": [RIGHT, {**RIGHT, "name": "fast", "seconds": -1.0}]},
    "problem_number": {"trials": [{**RIGHT, "problem": 1}]},
    "none_may_run": {"trials": [{**RIGHT, "seconds": None, "problem": "crash"}]},
    "unknown_name": {"trials": [RIGHT, {**RIGHT, "name": "flash", "seconds": 0.01}]},
}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_of_no_use_is_measured_anew(
    value: str, pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    path = measure(pair, tmp_path)
    content = json.loads(path.read_text())
    (key,) = content["results"]["tuned"]
    content["results"]["tuned"][key] = VALUES[value]
    path.write_text(json.dumps(content))
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, tmp_path, fast(device, pair))
        assert_right(backbone, pair)
        row = only_row(backbone, capsys)
    assert device.n_timed and row.runs == "fast" and "the fastest that passed" in row.why


def test_what_cannot_be_written_is_known_in_this_process(
    pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    is_file = tmp_path / "file"
    is_file.touch()
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, is_file / "folder", fast(device, pair))
        for _ in range(2):
            assert_right(backbone, pair)
        row, *notes = explained(backbone, capsys).rows
        assert row.runs == "fast" and all(note.what == "cache" for note in notes)
        assert sum("results are not kept" in note.why for note in notes) == 1
        n_timed = device.n_timed
        tools = backbone._engine.tools
        assert_right(prepare(pair.ours, tools=tools, expected_images=MANY), pair)
    assert device.n_timed == n_timed


# winners that do not win any more


def test_a_winner_that_does_not_exist_any_more_is_measured_anew(
    pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    measure(pair, tmp_path)
    device = Device()
    with gpu(), no_warning():
        backbone = process(pair, device, tmp_path)
        assert_right(backbone, pair)
        assert only_row(backbone, capsys).runs == "triton"
    assert device.n_timed


def wrong(pair: Pair) -> Run:
    run = baked(pair.ours)
    return lambda pixels: tuple(x * 1.01 for x in run(pixels))


def crashing(pair: Pair) -> Run:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("build", "problem"), [(wrong, "map 0 is wrong: error"), (crashing, "RuntimeError: no kernel")]
)
def test_a_remembered_winner_is_held_to_the_truth(
    build: Callable[[Pair], Run], problem: str, pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    measure(pair, tmp_path)
    device = Device()
    with gpu():
        one = fast(device, pair, lambda: build(pair))
        backbone = process(pair, device, tmp_path, one)
        with pytest.warns(EngineWarning, match=f"fast is off, eager runs: {problem}"):
            assert_right(backbone, pair)
        with no_warning():
            assert_right(backbone, pair)
        row = only_row(backbone, capsys)
    assert (row.runs, row.why) == ("eager", "fast failed") and f"fast: {problem}" in row.others
    assert not device.n_timed
