"""Measurements of mode "auto" on disk: read again, replaced if unusable, verified before use."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_kernels import MACHINE
from engine_rig import EngineRig
from pretended_device import (
    MANY,
    Device,
    baked,
    explained,
    gpu,
    no_warning,
    only_row,
)
from reference_models import Pair, images

from fastbb.engine.compile_cost import CompileCost
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import EngineWarning
from fastbb.engine.trial import Candidate, Run
from fastbb_kernels.result_cache import ResultCache

REMEMBERED = "measured before on this machine"


def later_process(rig: EngineRig) -> EngineRig:
    """Returns a rig of a new process, which shares only the cache folder."""
    return replace(rig, device=Device())


def prepared(rig: EngineRig, *candidates: Candidate, **options: Any) -> Any:
    """Prepares for so many images that compiling pays."""
    return rig.prepare(*candidates, **{"expected_images": MANY, **options})


def measure(rig: EngineRig) -> Path:
    """Measures in a first process; returns the file with the results."""
    with gpu(), no_warning():
        rig.assert_right(prepared(rig, rig.candidate()))
    assert rig.device.n_timed
    return cache_of(rig).path


def cache_of(rig: EngineRig) -> ResultCache:
    return ResultCache(rig.machine, rig.folder)


@pytest.mark.parametrize("n_shapes", [1, 2])
def test_a_remembered_choice_is_not_measured_again(n_shapes: int, rig: EngineRig) -> None:
    measure(rig)
    assert rig.compiler.compiled == [(2, 3, 64, 64)] * 2  # both modes that compile were tried
    assert rig.compiler.impls == ["auto", "eager"]
    rig = later_process(rig)
    with gpu(), no_warning():
        backbone = prepared(rig, rig.candidate())
        for batch in (2, 3)[:n_shapes]:
            for _ in range(2):
                rig.assert_right(backbone, images(64, 64, batch))
        first, *others = explained(backbone).rows
    assert rig.device.n_timed == 0 and len(rig.compiler.compiled) == 2
    assert (first.runs, first.why) == ("fast", REMEMBERED)
    assert first.others == "triton: 1 s; eager: 1 s; triton+compile: 1 s; compile: 1 s"
    assert all(row.runs == "fast" and row.why == "what won for 2x64x64" for row in others)


def test_a_remembered_winner_is_compiled_only_if_that_pays(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the compile time is zero here and must not be remembered
    monkeypatch.setattr(CompileCost, "record", lambda self, name, seconds: None)
    first, second, third = rig, later_process(rig), later_process(rig)
    compiled: list[int] = []

    def build() -> Run:
        compiled.append(len(compiled))
        return baked(rig.pair.ours)

    def backbone_of(process: EngineRig, **options: Any) -> Any:
        one = process.candidate("compiled elsewhere", build=build, compiles=True)
        return prepared(process, one, **options)

    with gpu(), no_warning():
        rig.assert_right(backbone_of(first))
        assert first.device.n_timed and len(compiled) == 1
        backbone = backbone_of(second)
        rig.assert_right(backbone)
        assert len(compiled) == 2 and only_row(backbone).runs == "compiled elsewhere"
        for expected, why in ((100, "save about 45 s on 100 images"), (None, "say expected_im")):
            backbone = backbone_of(third, expected_images=expected)
            rig.assert_right(backbone)
            row = only_row(backbone)
            assert row.runs == "triton" and REMEMBERED in row.why and why in row.why
    assert len(compiled) == 2 and second.device.n_timed == third.device.n_timed == 0


def test_other_maps_precisions_and_shapes_are_measured_separately(rig: EngineRig) -> None:
    changes: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"batch": 3}, {"out_indices": [1]}]
    for change in changes:
        for is_known in (False, True):
            rig = later_process(rig)
            with gpu(), torch.no_grad():
                backbone = prepared(rig, precision=change.get("precision"))
                backbone.out_indices = change.get("out_indices", [0, 1, 2])
                backbone(images(64, 64, change.get("batch", 2)))
            assert (rig.device.n_timed == 0) == is_known
    models, precisions, shapes = zip(*(key.split("/") for key in cache_of(rig).items("tuned")))
    assert len(models) == len(changes) and len(set(models)) == 2
    assert set(precisions) == {"fp32", "bf16"} and set(shapes) == {"2x64x64", "3x64x64"}


# unusable files


def machine_of_another_version(rig: EngineRig) -> None:
    measure(replace(rig, machine=replace(MACHINE, fastbb="0.0.1", torch="2.8")))


def another_machines_file_by_this_name(rig: EngineRig) -> None:
    other = measure(replace(rig, machine=replace(MACHINE, kernels="def")))
    other.rename(cache_of(rig).path)


def written(content: str | bytes) -> Callable[[EngineRig], None]:
    def write(rig: EngineRig) -> None:
        path = cache_of(rig).path
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def cut(rig: EngineRig) -> None:
    path = measure(rig)
    path.write_text(path.read_text()[:-20])


def a_folder(rig: EngineRig) -> None:
    cache_of(rig).path.mkdir()


FILES: dict[str, tuple[Callable[[EngineRig], None], str]] = {
    "other_version": (machine_of_another_version, ""),
    "other_machine": (another_machines_file_by_this_name, "results of another machine or version"),
    "empty": (written(""), "Expecting value"),
    "binary": (written(b"\xff\xfe\xfd" * 9), "codec can't decode"),
    "list": (written("[]"), "not a cache of format"),
    "cut": (cut, "Expecting"),
    "folder": (a_folder, "it is not a file"),
}


@pytest.mark.parametrize("file", FILES)
def test_an_unusable_file_is_ignored_and_replaced(file: str, rig: EngineRig) -> None:
    make, note = FILES[file]
    make(rig)
    rig = later_process(rig)
    with gpu(), no_warning():
        backbone = prepared(rig, rig.candidate())
        rig.assert_right(backbone)
        row, *others = explained(backbone).rows
    assert rig.device.n_timed and row.runs == "fast" and "the fastest that passed" in row.why
    said = [other.why for other in others if other.what == "cache"]
    assert any(note in text for text in said) if note else not said
    if file != "folder":  # unusable files were replaced where possible
        again = later_process(rig)
        with gpu():
            again.assert_right(prepared(again, again.candidate()))
        assert not again.device.n_timed


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
def test_an_unusable_value_is_measured_again(value: str, rig: EngineRig) -> None:
    path = measure(rig)
    content = json.loads(path.read_text())
    (key,) = content["results"]["tuned"]
    content["results"]["tuned"][key] = VALUES[value]
    path.write_text(json.dumps(content))
    rig = later_process(rig)
    with gpu(), no_warning():
        backbone = prepared(rig, rig.candidate())
        rig.assert_right(backbone)
        row = only_row(backbone)
    assert rig.device.n_timed and row.runs == "fast" and "the fastest that passed" in row.why


def test_an_unwritable_cache_keeps_results_in_memory(rig: EngineRig) -> None:
    is_file = rig.folder / "file"
    is_file.touch()
    rig = replace(rig, folder=is_file / "folder")
    with gpu(), no_warning():
        backbone = prepared(rig, rig.candidate())
        for _ in range(2):
            rig.assert_right(backbone)
        row, *notes = explained(backbone).rows
        assert row.runs == "fast" and all(note.what == "cache" for note in notes)
        assert sum("results are not kept" in note.why for note in notes) == 1
        n_timed = rig.device.n_timed
        tools = backbone._engine.tools
        rig.assert_right(prepare(rig.pair.ours, tools=tools, expected_images=MANY))
    assert rig.device.n_timed == n_timed


# winners that are no longer right or no longer exist


def test_remembered_winner_that_no_longer_exists_is_measured_again(rig: EngineRig) -> None:
    measure(rig)
    rig = later_process(rig)
    with gpu(), no_warning():
        backbone = prepared(rig)
        rig.assert_right(backbone)
        assert only_row(backbone).runs == "triton"
    assert rig.device.n_timed


def wrong(pair: Pair) -> Run:
    run = baked(pair.ours)
    return lambda pixels: tuple(x * 1.01 for x in run(pixels))


def crashing(pair: Pair) -> Run:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("build", "problem"), [(wrong, "map 0 is wrong: error"), (crashing, "RuntimeError: no kernel")]
)
def test_a_remembered_winner_is_verified(
    build: Callable[[Pair], Run], problem: str, rig: EngineRig
) -> None:
    measure(rig)
    rig = later_process(rig)
    with gpu():
        one = rig.candidate(build=lambda: build(rig.pair))
        backbone = prepared(rig, one)
        with pytest.warns(EngineWarning, match=f"fast is off, eager runs: {problem}"):
            rig.assert_right(backbone)
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert (row.runs, row.why) == ("eager", "fast failed") and f"fast: {problem}" in row.others
    assert not rig.device.n_timed
