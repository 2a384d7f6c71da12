"""Faults on a GPU: the maps stay equal to upstream's, and a warning names the fault."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import broken_kernels as broken
import pytest
import torch
from broken_kernels import self_check
from engine_rig import EngineRig, swin_pair
from pretended_device import (
    MIN_RUNS,
    baked,
    explained,
    gpu,
    no_warning,
    only_row,
)
from reference_models import Pair, images
from torch import Tensor

from fastbb.engine.settings import EngineWarning
from fastbb.engine.trial import Run
from fastbb.engine.truth import Truth
from fastbb_kernels import KernelWarning
from fastbb_kernels._dispatch import use_check

Maps = tuple[Tensor, ...]
Change = Callable[[Maps], Any]

PIXELS = images(64, 96, batch=8)
CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered")
CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
LOST = "RuntimeError: CUDA error"


@pytest.fixture
def rig(rig: EngineRig) -> EngineRig:
    return replace(rig, pixels=PIXELS)


# faults that a candidate adds to right maps


def put(image: int, value: Callable[[Tensor], Tensor]) -> Change:
    """Replaces a value in one image of the last map."""

    def change(maps: Maps) -> Maps:
        last = maps[-1].clone()
        last[image, -1, -1, -1] = value(last)
        return (*maps[:-1], last)

    return change


def off(last: Tensor) -> Tensor:
    return last.abs().max() * 1.1


def not_a_number(last: Tensor) -> Tensor:
    return last.new_tensor(torch.nan)


def infinite(last: Tensor) -> Tensor:
    return last.new_tensor(-torch.inf)


def the_last(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda maps: (*maps[:-1], change(maps[-1]))


def fails(error: Exception) -> Change:
    def change(maps: Maps) -> Maps:
        raise error

    return change


def faulty(change: Change, first: int = 1) -> Callable[[Run], Run]:
    """A run that is right until its `first` faulty call."""

    def build(right: Run) -> Run:
        calls = iter(range(1, 10**6))
        return lambda pixels: (
            change(right(pixels)) if next(calls) >= first else tuple(right(pixels))
        )

    return build


def cannot_be_built(error: Exception) -> Callable[[Run], Run]:
    def build(right: Run) -> Run:
        raise error

    return build


# how each fault is made from a right run, and the text of `explain`
FAULTS: dict[str, tuple[Callable[[Run], Run], str]] = {
    "wrong": (faulty(put(0, off)), "map 2 is wrong: error .*, allowed"),
    "wrong-last_image": (faulty(put(-1, off)), "map 2 is wrong: error"),
    "wrong-a_little": (faulty(the_last(lambda x: x * 1.0001)), "map 2 is wrong: error"),
    "wrong-one_map": (faulty(lambda maps: (-maps[0], *maps[1:])), "map 0 is wrong: error"),
    "nan": (faulty(put(0, not_a_number)), "map 2 is wrong: error nan"),
    "nan-middle_image": (faulty(put(4, not_a_number)), "map 2 is wrong: a value is NaN"),
    "infinite-middle_image": (faulty(put(3, infinite)), "map 2 is wrong: a value is .* infinite"),
    "crash-build": (cannot_be_built(ZeroDivisionError("at\n line 3")), "ZeroDivisionError: at"),
    "crash": (faulty(fails(CUDA_ERROR)), LOST),
    "crash-second_run": (faulty(fails(CUDA_ERROR), 2), f"not the same every time: {LOST}"),
    "crash-last_round": (faulty(fails(CUDA_ERROR), MIN_RUNS), f"not the same every time: {LOST}"),
    "memory": (faulty(fails(CUDA_FULL)), "out of memory: CUDA out of memory. Tried"),
    "memory-build": (cannot_be_built(MemoryError()), "out of memory"),
    "memory-second_run": (faulty(fails(CUDA_FULL), 2), "not the same every time: out of memory"),
    "flaky": (faulty(put(0, off), 2), "not the same every time: map 2 is wrong: error"),
    "flaky-nan": (faulty(put(4, not_a_number), 3), "not the same every time: map 2 is wrong: a"),
    "map-missing": (faulty(lambda maps: maps[1:]), "2 maps, eager 3"),
    "map-twice": (faulty(lambda maps: (*maps, maps[-1])), "4 maps, eager 3"),
    "maps-swapped": (faulty(lambda maps: maps[::-1]), "map 0 is wrong: shape"),
    "map-cut": (faulty(the_last(lambda x: x[..., 1:])), "map 2 is wrong: shape"),
    "map-transposed": (faulty(the_last(lambda x: x.mT)), "map 2 is wrong: shape"),
    "map-flat": (faulty(the_last(lambda x: x.flatten(1))), r"map 2 is \[8, "),
    "map-half": (faulty(the_last(Tensor.half)), "map 2 is wrong: torch.float16, eager torch.fl"),
    "map-elsewhere": (faulty(the_last(lambda x: x.to("meta"))), r"map 2 is \[8, .*\] on meta"),
    "images-missing": (faulty(the_last(lambda x: x[:-1])), "map 2 is of 7 images"),
    "images-too_many": (faulty(the_last(lambda x: torch.cat([x, x[:1]]))), "map 2 is of 9 images"),
    "nothing": (faulty(lambda maps: None), "TypeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_candidate_is_off_and_the_fastest_right_one_runs(
    fault: str, rig: EngineRig
) -> None:
    make, problem = FAULTS[fault]
    candidates = (
        rig.candidate("slow", 2.0),
        rig.candidate("faulty", 0.001, lambda: make(baked(rig.pair.ours))),
        rig.candidate("good", 0.5),
    )
    with gpu():
        backbone = rig.prepare(*candidates)
        with pytest.warns(EngineWarning, match=f"faulty is off: {problem}") as warned:
            rig.assert_right(backbone)
        assert len(warned) == 1
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert (row.what, row.runs) == ("8x64x96", "good")
    assert "the fastest that passed its check" in row.why
    assert re.search(f"slow: 2 s; faulty: {problem}", row.others), row.others
    assert "triton: 1 s; eager: 1 s" in row.others


@pytest.mark.parametrize("fault", FAULTS)
def test_eager_runs_if_all_others_are_faulty(fault: str, rig: EngineRig) -> None:
    make, problem = FAULTS[fault]
    one = rig.candidate("faulty", 0.001, lambda: make(baked(rig.pair.ours)))
    with gpu(stem_conv_bn_relu_pool=broken.crashing("")):
        backbone = rig.prepare(one)
        with pytest.warns(EngineWarning) as warned:
            rig.assert_right(backbone)
        texts = [str(warning.message) for warning in warned]
        assert "triton is off: ZeroDivisionError: at" in texts[0]
        assert len(texts) == 2 and re.search(f"faulty is off: {problem}", texts[1])
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert row.runs == "eager"
    assert re.search(f"triton: ZeroDivisionError: at; faulty: {problem}", row.others), row.others


@pytest.mark.parametrize("kernel", ["wrong", "nan", "crashing", "out_of_memory", "other_shape"])
def test_a_faulty_kernel_turns_mode_triton_off(kernel: str, rig: EngineRig) -> None:
    op = "conv3x3_bn_act"
    with gpu(**{op: getattr(broken, kernel)(op)}):
        backbone = rig.prepare()
        with pytest.warns(EngineWarning, match="triton is off: "):
            rig.assert_right(backbone)
        assert only_row(backbone).runs == "eager"


@pytest.mark.parametrize(
    ("error", "problem"),
    [(CUDA_ERROR, LOST), (CUDA_FULL, "out of memory: CUDA")],
    ids=["crash", "memory"],
)
def test_a_winner_that_fails_later_is_replaced_by_eager(
    error: Exception, problem: str, rig: EngineRig
) -> None:
    is_broken: list[bool] = []

    def build() -> Run:
        run, fail = baked(rig.pair.ours), fails(error)
        return lambda pixels: fail(run(pixels)) if is_broken else run(pixels)

    with gpu():
        backbone = rig.prepare(rig.candidate(build=build))
        with no_warning():
            rig.assert_right(backbone)
        assert only_row(backbone).runs == "fast"
        is_broken.append(True)
        with pytest.warns(EngineWarning, match=f"fast failed, eager runs: {problem}") as warned:
            rig.assert_right(backbone)
        assert len(warned) == 1
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert (row.runs, row.why) == ("eager", "fast failed") and f"fast: {problem}" in row.others


def test_out_of_memory_while_choosing_runs_eager(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is computed in float64, which may not fit in memory."""

    def full(*args: Any) -> Truth:
        raise CUDA_FULL

    monkeypatch.setattr(Truth, "of", full)
    problem = "choosing what runs failed: out of memory: CUDA out of memory"
    with gpu():
        backbone = rig.prepare()
        with pytest.warns(EngineWarning, match=f"eager runs, {problem}"):
            rig.assert_right(backbone)
        with no_warning():
            rig.assert_right(backbone)
        row = only_row(backbone)
    assert row.runs == "eager" and problem in row.why


# choice among right candidates


@pytest.mark.parametrize("order", [(0.9, 0.3, 0.6), (0.3, 0.6, 0.9), (0.9, 0.6, 0.3)], ids=str)
def test_the_fastest_right_candidate_wins(order: tuple[float, ...], rig: EngineRig) -> None:
    made = [rig.candidate(f"{s} s", s) for s in order]
    with gpu(), no_warning():
        backbone = rig.prepare(*made)
        rig.assert_right(backbone)
        row = only_row(backbone)
    assert row.runs == "0.3 s"
    assert "triton: 1 s" in row.others and "0.9 s: 900 ms" in row.others


@pytest.mark.parametrize(
    ("seconds", "runs"), [(1.0, "triton"), (0.975, "triton"), (0.96, "faster")], ids=str
)
def test_tied_candidates_run_the_simpler_one(seconds: float, runs: str, rig: EngineRig) -> None:
    one = rig.candidate("faster", seconds)
    with gpu(), no_warning():
        backbone = rig.prepare(one)
        rig.assert_right(backbone)
        assert only_row(backbone).runs == runs


def test_a_winner_is_verified_for_another_shape(rig: EngineRig) -> None:
    def build() -> Run:
        run, spoil = baked(rig.pair.ours), put(0, off)
        return lambda pixels: run(pixels) if len(pixels) == 8 else spoil(run(pixels))

    with gpu():
        backbone = rig.prepare(rig.candidate(build=build))
        with no_warning():
            rig.assert_right(backbone)
        with pytest.warns(EngineWarning, match="fast is off, eager runs: map 2 is wrong: error"):
            rig.assert_right(backbone, PIXELS[:3])
        first, second = explained(backbone).rows
    assert (first.runs, second.runs) == ("fast", "eager")
    assert second.what == "3x64x96" and "fast: map 2 is wrong" in second.others


# faults inside a backbone: one wrong op

SWIN_OPS = (
    "patch_embed",
    "layer_norm_nchw",
    "layer_norm_linear",
    "linear_residual",
    "mlp_block",
    "window_attention",
    "patch_merging",
)
KERNEL_FAULTS = {
    "wrong": ": error",
    "nan": ": NaN where eager",
    "flaky": ": two runs with the same inputs differ",
    "other_shape": ": shape",
    "other_dtype": ": torch.float16, eager",
    "crashing": ": ZeroDivisionError",
    "out_of_resources": ": OutOfResources",
    "out_of_memory": ": asks for more memory",
    "driver_out_of_memory": ": asks for more memory",
}


@pytest.fixture(scope="module")
def swin() -> Pair:
    """A pair whose weights tests must not change."""
    return swin_pair()


@pytest.fixture
def swin_rig(rig: EngineRig, swin: Pair) -> EngineRig:
    return replace(rig, pair=swin, pixels=PIXELS[:2])


def assert_ops_are_off(rig: EngineRig, fault: str, *ops: str) -> None:
    """The maps equal upstream's, and each broken op is named with its fault, once."""
    check = self_check(rig.folder)
    with gpu(**{op: getattr(broken, fault)(op) for op in ops}), use_check(check):
        backbone = rig.pair.ours.prepare("triton")
        with pytest.warns(KernelWarning) as warned:
            rig.assert_right(backbone)
        with no_warning():
            rig.assert_right(backbone)
        assert only_row(backbone).runs == "triton"
        found = {op: problem for (op, _), problem in check.results(broken.CPU).items() if problem}
    assert len(warned) == len(ops)
    for op in ops:
        assert sum(f"kernel of {op} is off" in str(one.message) for one in warned) == 1
        assert re.search(f"^{op}, .*{KERNEL_FAULTS[fault]}", found.pop(op))
    assert not found


@pytest.mark.parametrize("op", SWIN_OPS)
def test_a_wrong_kernel_is_off_and_the_other_kernels_run(op: str, swin_rig: EngineRig) -> None:
    assert_ops_are_off(swin_rig, "wrong", op)


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_the_maps_are_right_with_every_kernel_broken(fault: str, swin_rig: EngineRig) -> None:
    assert_ops_are_off(swin_rig, fault, *SWIN_OPS)


def test_a_wrong_kernel_without_the_check_changes_the_maps(swin_rig: EngineRig) -> None:
    """Control for the tests above: each of these ops, if wrong, changes the maps."""
    for op in SWIN_OPS:
        with gpu(**{op: broken.wrong(op)}), pytest.raises(AssertionError, match="differs by"):
            swin_rig.assert_right(swin_rig.pair.ours.prepare("triton"))
