"""What runs for which images: how many are expected, other sizes, shapes that come often."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
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
from fastbb.engine import choose, compile_cost, engine
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import EngineWarning
from fastbb.engine.trial import Run
from fastbb_kernels import _dispatch

PIXELS, WIDE = images(64, 64), images(64, 96)
ONE = PIXELS[:1]
COMPILE_S, COMPILE_GAIN = 90.0, 0.15
CALL_S = 0.2  # of eager
ENOUGH = round(COMPILE_S / COMPILE_GAIN / CALL_S) + 1  # images like ONE that make compiling pay


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Its weights are not to be changed."""
    return hf_pair(hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]))


@pytest.fixture
def device() -> Device:
    return Device(own_s=CALL_S)


@pytest.fixture(autouse=True)
def own_cache_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No user's cache is read; and what is set for the process, threads may leave changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_dispatch, "_default", _dispatch._default)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cost, "USUAL_COMPILE_S", COMPILE_S)
    monkeypatch.setattr(compile_cost, "USUAL_GAIN", COMPILE_GAIN)


@pytest.fixture(autouse=True)
def compiler(device: Device, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """What it compiles runs a tenth faster than eager."""
    return install(Compiler(device, 0.9 * CALL_S), monkeypatch)


@torch.no_grad()
def assert_right(backbone: Backbone, pair: Pair, pixels: Tensor = PIXELS) -> None:
    assert_equals_upstream(backbone(pixels).feature_maps, pair.maps(pixels))


# how many images are expected, on a CPU


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        (None, "compiling takes a minute or more: say expected_images=, or mode='compile'"),
        (0, "compiling takes about 90 s and would save about 0 us on 0 images"),
        (100, "compiling takes about 90 s and would save about 3 s on 100 images"),
        (ENOUGH - 2, "compiling takes about 90 s and would save about 90 s on"),
    ],
    ids=["unknown", "none", "few", "almost_enough"],
)
def test_auto_does_not_compile_for_few_images(
    expected: int | None,
    why: str,
    pair: Pair,
    device: Device,
    compiler: Compiler,
    tmp_path: Path,
    capsys: Any,
) -> None:
    backbone = prepare(pair.ours, expected_images=expected, tools=device.tools(tmp_path))
    with no_warning():
        assert_right(backbone, pair, ONE)
    row = only_row(backbone, capsys)
    assert row.runs == "eager" and why in row.why
    assert not compiler.compiled and (device.n_timed == 0) == (expected is None)


def test_auto_compiles_for_many_images(
    pair: Pair, device: Device, compiler: Compiler, tmp_path: Path, capsys: Any
) -> None:
    backbone = prepare(pair.ours, expected_images=ENOUGH, tools=device.tools(tmp_path))
    with no_warning():
        assert_right(backbone, pair, ONE)
        assert_right(backbone, pair, ONE)
    row = only_row(backbone, capsys)
    assert row.runs == "compile, 1 images at once" and row.others == "eager: 200 ms"
    assert compiler.compiled == [(1, 3, 64, 64)] and compiler.impls == ["eager"]


def test_auto_keeps_eager_where_what_was_compiled_is_no_faster(
    pair: Pair, device: Device, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Compiler(device, 0.99 * CALL_S), monkeypatch)
    backbone = prepare(pair.ours, expected_images=ENOUGH, tools=device.tools(tmp_path))
    assert_right(backbone, pair, ONE)
    row = only_row(backbone, capsys)
    assert row.runs == "eager" and row.others == "compile: 198 ms"


@pytest.mark.parametrize("expected", [None, 100, ENOUGH])
def test_who_asks_for_compiling_gets_it_and_hears_where_it_is_wasted(
    expected: int | None, pair: Pair, device: Device, tmp_path: Path, capsys: Any
) -> None:
    tools = device.tools(tmp_path)
    backbone = prepare(pair.ours, "compile", expected_images=expected, tools=tools)
    if expected == 100:
        wasted = "about 90 s and would save about 3 s on 100 images; mode='auto' would not compile"
        with pytest.warns(EngineWarning, match=wasted):
            assert_right(backbone, pair, ONE)
    with no_warning():
        assert_right(backbone, pair, ONE)
    assert only_row(backbone, capsys).runs == "compile, 1 images at once"


# other batches and other sizes than what was compiled for


def test_any_number_of_images_runs_by_the_artefact_of_their_size(
    pair: Pair, compiler: Compiler, capsys: Any
) -> None:
    backbone = pair.ours.prepare("compile", example=(4, 64, 64))
    for batch in (1, 2, 3, 5, 9):
        assert_right(backbone, pair, images(64, 64, batch))
    rows = explained(backbone, capsys).rows
    assert {row.runs for row in rows} == {"compile, 4 images at once"} and len(rows) == 6
    assert compiler.compiled == [(4, 3, 64, 64)]


@pytest.mark.parametrize("expected", [None, MANY])
@pytest.mark.parametrize("mode", ["auto", "compile"])
def test_other_sizes_run_eager(
    mode: str,
    expected: int | None,
    pair: Pair,
    device: Device,
    compiler: Compiler,
    tmp_path: Path,
    capsys: Any,
) -> None:
    tools = device.tools(tmp_path)
    backbone = prepare(pair.ours, mode, example=PIXELS, expected_images=expected, tools=tools)
    with no_warning():
        for pixels in (WIDE, images(96, 96), images(33, 47, batch=1), PIXELS):
            assert_right(backbone, pair, pixels)
    _, *rows = explained(backbone, capsys).rows
    assert {row.runs for row in rows} == {"eager"} and len(rows) == 3
    compiled = mode == "compile" or expected is not None
    if compiled:
        assert all("compile was compiled for 64x64 images, other sizes" in row.why for row in rows)
    assert compiler.compiled == [(2, 3, 64, 64)] * compiled


def test_the_time_of_a_compilation_is_remembered(
    pair: Pair, device: Device, compiler: Compiler, tmp_path: Path, capsys: Any
) -> None:
    """Once compiling is known to take no time, it pays for few images too."""
    prepare(pair.ours, "compile", example=ONE, tools=device.tools(tmp_path))
    backbone = prepare(pair.ours, expected_images=2, tools=device.tools(tmp_path))
    assert_right(backbone, pair, ONE)
    assert only_row(backbone, capsys).runs == "compile, 1 images at once"
    assert len(compiler.compiled) == 2


# compilers that fail


@pytest.mark.parametrize("mode", ["compile", "triton+compile"])
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("raises", "RuntimeError: no C compiler"),
        ("wrong", "map 0 is wrong: error"),
        ("nan", "map 0 is wrong: error nan"),
    ],
)
def test_what_a_compiler_gets_wrong_does_not_run(
    mode: str, fault: str, problem: str, pair: Pair, compiler: Compiler, capsys: Any
) -> None:
    if fault == "raises":
        compiler.error = RuntimeError("no C compiler\nin any folder")
    else:
        compiler.spoil = lambda x: x * (1.001 if fault == "wrong" else torch.nan)
    with gpu():
        backbone = prepare(pair.ours, mode)
        warning = f"{mode} is off, eager runs: {problem}"
        with pytest.warns(EngineWarning, match=warning.replace("+", r"\+")) as warned:
            assert_right(backbone, pair)
        assert len(warned) == 1
        with no_warning():
            assert_right(backbone, pair)
        row = only_row(backbone, capsys)
    assert (row.runs, row.why) == ("eager", f"{mode} failed")
    assert f"{mode}: {problem}" in row.others


# shapes on a GPU


def test_a_second_shape_is_measured_when_it_came_often(
    pair: Pair, device: Device, tmp_path: Path, capsys: Any
) -> None:
    one = device.candidate("fast", 0.1, lambda: baked(pair.ours))
    with gpu(), no_warning():
        backbone = prepare(pair.ours, tools=device.tools(tmp_path, one))
        assert_right(backbone, pair)
        n_timed = device.n_timed
        for _ in range(choose.SEEN_BEFORE_TUNED):
            assert device.n_timed == n_timed
            assert_right(backbone, pair, WIDE)
            assert explained(backbone, capsys).rows[-1].why == "what won for 2x64x64"
        assert_right(backbone, pair, WIDE)
        assert device.n_timed > n_timed
        n_timed = device.n_timed
        assert "the fastest that passed" in explained(backbone, capsys).rows[-1].why
        assert_right(backbone, pair, WIDE)
        assert device.n_timed == n_timed


def test_a_shape_runs_what_won_for_the_one_most_like_it(
    pair: Pair, device: Device, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SEEN_BEFORE_TUNED", 1)
    one = device.candidate("fast", 0.1, lambda: baked(pair.ours))
    with gpu(), no_warning():
        backbone = prepare(pair.ours, tools=device.tools(tmp_path, one))
        for pixels in (PIXELS, WIDE, WIDE, images(64, 96, 7), images(32, 32)):
            assert_right(backbone, pair, pixels)
        whys = {row.what: row.why for row in explained(backbone, capsys).rows}
    assert whys["7x64x96"] == "what won for 2x64x96"
    assert whys["2x32x32"] == "what won for 2x64x64"


def test_only_so_many_shapes_are_measured_and_remembered(
    pair: Pair, device: Device, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SEEN_BEFORE_TUNED", 1)
    monkeypatch.setattr(choose, "MAX_TUNED", 2)
    monkeypatch.setattr(engine, "MAX_PLANS", 3)
    one, two, three, *more = (images(32, width) for width in (32, 64, 96, 128, 160))
    with gpu(), no_warning():
        backbone = prepare(pair.ours, tools=device.tools(tmp_path))
        for pixels in (one, two, three, two, three):
            assert_right(backbone, pair, pixels)
        whys = [row.why.split(" (")[0] for row in explained(backbone, capsys).rows]
        assert whys == ["the fastest that passed its check"] * 2 + ["what won for 2x32x64"]
        for pixels in more * 2:
            assert_right(backbone, pair, pixels)
        rows = explained(backbone, capsys).rows
    assert [row.what for row in rows] == ["2x32x96", "2x32x128", "2x32x160"]
    assert all(row.why == "what won for 2x32x64" for row in rows)


def test_threads_wait_while_one_measures(pair: Pair, device: Device, tmp_path: Path) -> None:
    built: list[int] = []

    def build() -> Run:
        built.append(threading.get_ident())
        time.sleep(0.05)
        return baked(pair.ours)

    with gpu():
        one = device.candidate("fast", 0.1, build)
        backbone = prepare(pair.ours, tools=device.tools(tmp_path, one))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: assert_right(backbone, pair), range(3)))
    assert len(built) == 1
