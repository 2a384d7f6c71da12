"""Choice of what runs: by expected images, image size, and how often a shape comes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_rig import PIXELS, WIDE, EngineRig
from pretended_device import (
    MANY,
    baked,
    compiling_takes,
    explained,
    gpu,
    no_warning,
    only_row,
)
from reference_models import images

from fastbb.engine import choose, engine
from fastbb.engine.settings import EngineWarning
from fastbb.engine.trial import Run

ONE = PIXELS[:1]
COMPILE_S, COMPILE_GAIN = 90.0, 0.15
CALL_S = 0.2  # of eager
ENOUGH = round(COMPILE_S / COMPILE_GAIN / CALL_S) + 1  # images like ONE that make compiling pay


@pytest.fixture
def rig(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> EngineRig:
    """A rig: compiled calls are a tenth faster than eager, compiling takes about 90 s."""
    compiling_takes(monkeypatch, COMPILE_S, COMPILE_GAIN)
    rig.device.own_s = CALL_S
    rig.compiler.device, rig.compiler.seconds = rig.device, 0.9 * CALL_S
    return rig


# expected images, on a CPU


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
    expected: int | None, why: str, rig: EngineRig
) -> None:
    backbone = rig.prepare(expected_images=expected)
    with no_warning():
        rig.assert_right(backbone, ONE)
    row = only_row(backbone)
    assert row.runs == "eager" and why in row.why
    assert not rig.compiler.compiled and (rig.device.n_timed == 0) == (expected is None)


def test_auto_compiles_for_many_images(rig: EngineRig) -> None:
    backbone = rig.prepare(expected_images=ENOUGH)
    with no_warning():
        rig.assert_right(backbone, ONE)
        rig.assert_right(backbone, ONE)
    row = only_row(backbone)
    assert row.runs == "compile, 1 images at once" and row.others == "eager: 200 ms"
    assert rig.compiler.compiled == [(1, 3, 64, 64)] and rig.compiler.impls == ["eager"]


def test_auto_keeps_eager_if_compiling_is_no_faster(rig: EngineRig) -> None:
    rig.compiler.seconds = 0.99 * CALL_S
    backbone = rig.prepare(expected_images=ENOUGH)
    rig.assert_right(backbone, ONE)
    row = only_row(backbone)
    assert row.runs == "eager" and row.others == "compile: 198 ms"


@pytest.mark.parametrize("expected", [None, 100, ENOUGH])
def test_compile_mode_warns_when_it_does_not_pay(expected: int | None, rig: EngineRig) -> None:
    backbone = rig.prepare(mode="compile", expected_images=expected)
    if expected == 100:
        wasted = "about 90 s and would save about 3 s on 100 images; mode='auto' would not"
        with pytest.warns(EngineWarning, match=wasted):
            rig.assert_right(backbone, ONE)
    with no_warning():
        rig.assert_right(backbone, ONE)
    assert only_row(backbone).runs == "compile, 1 images at once"
    assert rig.device.n_timed == (expected is not None)  # one image says enough


# other batches and sizes than the compiled one


def test_one_compilation_serves_every_batch_size(rig: EngineRig) -> None:
    backbone = rig.pair.ours.prepare("compile", example=(4, 64, 64))
    for batch in (1, 2, 3, 5, 9):
        rig.assert_right(backbone, images(64, 64, batch))
    rows = explained(backbone).rows
    assert {row.runs for row in rows} == {"compile, 4 images at once"} and len(rows) == 6
    assert rig.compiler.compiled == [(4, 3, 64, 64)]


@pytest.mark.parametrize("expected", [None, MANY])
@pytest.mark.parametrize("mode", ["auto", "compile"])
def test_image_sizes_that_were_not_compiled_run_eager(
    mode: str, expected: int | None, rig: EngineRig
) -> None:
    backbone = rig.prepare(mode=mode, example=PIXELS, expected_images=expected)
    with no_warning():
        for pixels in (WIDE, images(96, 96), images(33, 47, batch=1), PIXELS):
            rig.assert_right(backbone, pixels)
    _, *rows = explained(backbone).rows
    assert {row.runs for row in rows} == {"eager"} and len(rows) == 3
    compiled = mode == "compile" or expected is not None
    if compiled:
        assert all("compile was compiled for 64x64 images, other sizes" in row.why for row in rows)
    assert rig.compiler.compiled == [(2, 3, 64, 64)] * compiled


def test_measured_compile_time_decides_later_choices(rig: EngineRig) -> None:
    """Compiling was measured to take no time, so it pays for few images too."""
    rig.prepare(mode="compile", example=ONE)
    backbone = rig.prepare(expected_images=2)
    rig.assert_right(backbone, ONE)
    assert only_row(backbone).runs == "compile, 1 images at once"
    assert len(rig.compiler.compiled) == 2


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
def test_a_compilation_that_fails_or_is_wrong_does_not_run(
    mode: str, fault: str, problem: str, rig: EngineRig
) -> None:
    if fault == "raises":
        rig.compiler.error = RuntimeError("no C compiler\nin any folder")
    else:
        rig.compiler.spoil = lambda x: x * (1.001 if fault == "wrong" else torch.nan)
    with gpu():
        backbone = rig.pair.ours.prepare(mode)
        warning = f"{mode} is off, eager runs: {problem}"
        with pytest.warns(EngineWarning, match=warning.replace("+", r"\+")) as warned:
            rig.assert_right(backbone)
        assert len(warned) == 1
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert (row.runs, row.why) == ("eager", f"{mode} failed")
    assert f"{mode}: {problem}" in row.others


# shapes on a GPU


def test_a_second_shape_is_measured_after_several_calls(rig: EngineRig) -> None:
    one = rig.candidate()
    with gpu(), no_warning():
        backbone = rig.prepare(one)
        rig.assert_right(backbone)
        n_timed = rig.device.n_timed
        for _ in range(choose.SEEN_BEFORE_TUNED):
            assert rig.device.n_timed == n_timed
            rig.assert_right(backbone, WIDE)
            assert explained(backbone).rows[-1].why == "what won for 2x64x64"
        rig.assert_right(backbone, WIDE)
        assert rig.device.n_timed > n_timed
        n_timed = rig.device.n_timed
        assert "the fastest that passed" in explained(backbone).rows[-1].why
        rig.assert_right(backbone, WIDE)
        assert rig.device.n_timed == n_timed


def test_a_shape_runs_the_winner_of_the_most_similar_shape(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SEEN_BEFORE_TUNED", 1)
    one = rig.candidate()
    with gpu(), no_warning():
        backbone = rig.prepare(one)
        for pixels in (PIXELS, WIDE, WIDE, images(64, 96, 7), images(32, 32)):
            rig.assert_right(backbone, pixels)
        whys = {row.what: row.why for row in explained(backbone).rows}
    assert whys["7x64x96"] == "what won for 2x64x96"
    assert whys["2x32x32"] == "what won for 2x64x64"


def test_the_number_of_measured_and_remembered_shapes_is_limited(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SEEN_BEFORE_TUNED", 1)
    monkeypatch.setattr(choose, "MAX_TUNED", 2)
    monkeypatch.setattr(engine, "MAX_PLANS", 3)
    one, two, three, *more = (images(32, width) for width in (32, 64, 96, 128, 160))
    with gpu(), no_warning():
        backbone = rig.prepare()
        for pixels in (one, two, three, two, three):
            rig.assert_right(backbone, pixels)
        whys = [row.why.split(" (")[0] for row in explained(backbone).rows]
        assert whys == ["the fastest that passed its check"] * 2 + ["what won for 2x32x64"]
        for pixels in more * 2:
            rig.assert_right(backbone, pixels)
        rows = explained(backbone).rows
    assert [row.what for row in rows] == ["2x32x96", "2x32x128", "2x32x160"]
    assert all(row.why == "what won for 2x32x64" for row in rows)


def test_threads_wait_while_one_measures(rig: EngineRig) -> None:
    built: list[int] = []

    def build() -> Run:
        built.append(threading.get_ident())
        time.sleep(0.05)
        return baked(rig.pair.ours)

    with gpu():
        one = rig.candidate(build=build)
        backbone = rig.prepare(one)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: rig.assert_right(backbone), range(3)))
    assert len(built) == 1
