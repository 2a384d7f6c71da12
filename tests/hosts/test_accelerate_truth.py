"""Comparison with float64: folding, memory, modules that cannot be copied, growing calls."""

import copy
import gc
import threading
import warnings
from typing import Any

import pytest
import torch
from reference_models import images, randomize_
from tiny_hosts import assert_close, assert_ours_ran, infer, swin_classifier, timm_resnet
from torch import nn

import fastbb
from fastbb.hosts import replacement
from fastbb.hosts.replacement import replacement_of


def timm_maps() -> Any:
    timm = pytest.importorskip("timm")
    return randomize_(timm.create_model("resnet18", features_only=True, channels=(8, 8, 16, 16)))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["auto", "eager"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_bf16_and_fp16_backbones_run_ours_without_a_warning(mode: str, precision: str) -> None:
    """The first call of the blocks happens inside a folded backbone."""
    model, twin = timm_resnet(), timm_resnet()
    report = fastbb.accelerate(model, mode=mode, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastbb.AccelerateWarning)
        for got, want in zip(infer(model), infer(twin)):
            torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert all(r.off is None for r in report.replaced)


@torch.no_grad()
def test_no_copy_in_float64_stays_alive() -> None:
    def alive() -> set[int]:
        objects = gc.get_objects()
        return {id(x) for x in objects if type(x) is nn.Parameter and x.dtype == torch.float64}

    model = timm_resnet()
    fastbb.accelerate(model, mode="eager")
    gc.collect()
    gc.disable()
    try:
        before = alive()  # of other tests
        infer(model)
        assert alive() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [swin_classifier, timm_resnet])
def test_a_module_that_cannot_be_copied_runs_ours(make: Any) -> None:
    model, twin = make(), make()
    report = fastbb.accelerate(model, mode="eager")
    for module in model.modules():
        module.lock = threading.Lock()
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


@torch.no_grad()
def test_out_of_memory_in_the_check_turns_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = timm_resnet(), timm_resnet()
    report = fastbb.accelerate(model, mode="eager")

    def full(*args: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(replacement.Replacement, "_upstream_twin", full)
        assert_close(infer(model), infer(twin))
    assert all(r.off is None for r in report.replaced)
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


@torch.no_grad()
def test_much_larger_call_is_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = swin_classifier(), swin_classifier()
    fastbb.accelerate(model, mode="eager")
    (first, *_) = [r for m in model.modules() if (r := replacement_of(m)) is not None]
    decided: list[int] = []
    own = first._decide

    def decide(form: Any, size: int, *args: Any) -> Any:
        decided.append(size)
        return own(form, size, *args)

    monkeypatch.setattr(first, "_decide", decide)
    for size in (32, 64, 48, 96, 200):
        pixels = images(size, size, batch=1)
        assert_close(infer(model, pixels), infer(twin, pixels))
    assert len(decided) == 3 and decided[1] > replacement.MUCH_LARGER * decided[0]


@torch.no_grad()
def test_memory_layout_equals_upstream_after_one_pixel_maps() -> None:
    """A map of one pixel is contiguous and channels-last."""
    model, twin = timm_maps(), timm_maps()
    for either in (model, twin):
        either.to(memory_format=torch.channels_last)
    fastbb.accelerate(model, mode="eager")
    for size in (32, 128):
        pixels = images(size, size).to(memory_format=torch.channels_last)
        for got, want in zip(model(pixels), twin(pixels)):
            assert got.stride() == want.stride()


def test_upstream_twin_has_none_of_our_forwards() -> None:
    model = timm_resnet()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    own = next(r for m in model.modules() if (r := replacement_of(m)) is not None)
    twin = own._upstream_twin()
    assert not any("forward" in vars(part) for part in twin.modules())
    assert copy.deepcopy(model) is not None
