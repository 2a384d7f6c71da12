"""Changes of weights in an accelerated host: the next inference uses the current weights."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from timm.utils.model_ema import ModelEmaV3
from tiny_hosts import (
    HOSTS,
    NO_ACCELERATE_WARNING,
    PIXELS,
    accelerated,
    assert_bit_equal,
    assert_close,
    assert_ours_ran,
    has_run_ours,
    infer,
    reasons_of,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
    tensors,
    timm_resnet,
    twin_of,
)
from tolerance import assert_as_accurate_as_eager
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from weight_changes import WEIGHT_CHANGES, scale_

import fastbb

pytestmark = [
    NO_ACCELERATE_WARNING,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


# changes that are followed without `refresh`


def trained_a_step(model: Any) -> None:
    model.train()
    torch.stack([out.square().mean() for out in tensors(model(PIXELS))]).sum().backward()
    AdamW(model.parameters(), lr=0.05, fused=True).step()
    model.eval()


def step_by_hand(model: Any) -> None:
    torch.stack([out.square().mean() for out in tensors(model(PIXELS))]).sum().backward()
    for p in model.parameters():
        if p.grad is not None:
            p.data.sub_(p.grad.clamp(-1, 1), alpha=0.1)


@torch.no_grad()
def statistics_of_training(model: Any) -> None:
    model.train()
    model(3 * PIXELS)
    model.eval()
    scale_(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    **WEIGHT_CHANGES,
    "trained_a_step": trained_a_step,
    "step_by_hand": step_by_hand,
    "half_and_back": lambda model: model.half().float(),
    "bfloat16_and_back-inside": lambda model: [c.bfloat16().float() for c in model.children()],
    "statistics": statistics_of_training,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_next_inference_uses_the_new_weights(
    make: Callable[[], Any], change: Callable[[Any], Any]
) -> None:
    model = make()
    report = fastbb.accelerate(model, mode="eager")
    before = infer(model)
    change(model)
    want = infer(twin_of(make, model))
    for _ in range(2):
        assert_close(infer(model), want)
    assert not torch.equal(before[-1], want[-1])
    assert_ours_ran(report)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_changes_through_data_are_used_after_refresh(
    make: Callable[[], Any], precision: str | None
) -> None:
    model = make()
    if precision and make not in (swin_backbone, resnet_backbone):
        pytest.skip("one of each family has converted copies")
    report = fastbb.accelerate(model, mode="eager", precision=precision)
    infer(model)
    for p in model.parameters():
        p.data.mul_(0.7)
    report.refresh()
    other = twin_of(make, model)
    if precision:
        fastbb.accelerate(other, mode="eager", precision=precision)
        assert_bit_equal(infer(model), infer(other))
    else:
        assert_close(infer(model), infer(other))
    assert_ours_ran(report)


@pytest.mark.parametrize("name", ["adamw-fused", "trained_a_step", "data_replaced", "load"])
@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone])
def test_a_copy_in_another_precision_follows_changes(make: Callable[[], Any], name: str) -> None:
    model = make()
    report = fastbb.accelerate(model, mode="eager", precision="bf16")
    before = infer(model)
    CHANGES[name](model)
    other = twin_of(make, model)
    fastbb.accelerate(other, mode="eager", precision="bf16")
    got = infer(model)
    assert_bit_equal(got, infer(other))
    assert not torch.equal(got[-1], before[-1])
    assert_ours_ran(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_model_moved_to_another_dtype_is_as_accurate_as_upstream(
    make: Callable[[], Any], dtype: torch.dtype
) -> None:
    model = make()
    report = fastbb.accelerate(model, mode="eager")
    infer(model)
    model.to(dtype)
    got, eager = infer(model), infer(twin_of(make, model))
    exact = infer(twin_of(make, model).double())
    for ours, theirs, truth in zip(got, eager, exact):
        assert ours.dtype == dtype
        assert_as_accurate_as_eager("result", ours, theirs, truth)
    assert_ours_ran(report)


# moving averages


def averaged(model: Any) -> tuple[Any, Callable[[], None]]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average.module, lambda: average.update_parameters(model)


def ema(foreach: bool) -> Callable[[Any], tuple[Any, Callable[[], None]]]:
    def start(model: Any) -> tuple[Any, Callable[[], None]]:
        average = ModelEmaV3(model, decay=0.5, foreach=foreach)
        return average.module, lambda: average.update(model)

    return start


AVERAGES = {"swa_utils": averaged, "timm": ema(False), "timm-foreach": ema(True)}


@pytest.mark.parametrize("start", AVERAGES.values(), ids=AVERAGES)
def test_moving_average_model_uses_its_own_current_weights(
    make: Callable[[], Any], start: Any
) -> None:
    model = make()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    average, update = start(model)
    update()
    for _ in range(2):
        before = infer(average)
        CHANGES["adamw-fused"](model)
        update()
        got = infer(average)
        assert_close(got, infer(twin_of(make, average)))
        assert not torch.equal(got[-1], before[-1])
        assert_close(infer(model), infer(twin_of(make, model)))
    assert has_run_ours(average) and has_run_ours(model)


# LoRA

ADAPTED: dict[Callable[[], Any], list[str]] = {
    swin_classifier: ["q_proj", "v_proj"],
    swin_backbone: ["q_proj", "fc1", "reduction"],
    HOSTS["maskformer_swin"]: ["query", "value"],
    resnet_backbone: ["convolution"],
    timm_resnet: ["conv1"],
    HOSTS["torchvision_swin"]: ["mlp.0"],
    HOSTS["dinov2_backbone"]: ["q_proj", "fc2"],
    HOSTS["timm_vit"]: ["qkv"],
}


def adapt(make: Callable[[], Any], model: Any, starts_at_zero: bool = False) -> Any:
    torch.manual_seed(3)
    adapters = LoraConfig(
        r=2, lora_alpha=4, target_modules=ADAPTED[make], init_lora_weights=starts_at_zero
    )
    return get_peft_model(model, adapters)


HISTORIES = {
    "": (False, False, False),
    "ran_before": (True, False, False),
    "ran_before-frozen": (True, False, True),
    "ran_adapted": (False, True, True),
    "ran_before-ran_adapted": (True, True, False),
}


@pytest.mark.parametrize("ran_before, runs_adapted, frozen", HISTORIES.values(), ids=HISTORIES)
def test_lora_around_an_accelerated_model_equals_upstream(
    make: Callable[[], Any], ran_before: bool, runs_adapted: bool, frozen: bool
) -> None:
    """Merging writes through `.data` and may put the original modules back."""
    model, upstream = (make().requires_grad_(not frozen) for _ in range(2))
    report = fastbb.accelerate(model, mode="eager")
    before = infer(upstream)
    if ran_before:
        assert_close(infer(model), before)
    adapted, theirs = (adapt(make, either) for either in (model, upstream))
    if runs_adapted:
        assert_close(infer(adapted.eval()), infer(theirs.eval()))
        assert any("layers inside it were replaced" in why for why in reasons_of(report))
    merged, theirs = adapted.merge_and_unload(), theirs.merge_and_unload()
    want = infer(theirs)  # no eval() since then, which would make ours look again
    assert merged is model and not torch.allclose(want[-1], before[-1], rtol=1e-2)
    assert_close(infer(model), want)
    assert_ours_ran(report)


def test_lora_that_starts_at_zero_takes_effect_when_it_changes(make: Callable[[], Any]) -> None:
    """An adapter of zeros changes nothing at first; ours must stop once it is trained."""
    model, upstream, _ = accelerated(make)
    both = (model, upstream)
    adapted, theirs = (adapt(make, either, starts_at_zero=True).eval() for either in both)
    before = infer(adapted)
    assert_close(before, infer(theirs))
    for either in (adapted, theirs):
        for name, p in either.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.3)
    assert_close(infer(adapted), infer(theirs))
    assert not torch.allclose(infer(adapted)[-1], before[-1], rtol=1e-2)


def test_adapted_model_is_accelerated_where_it_has_no_adapter(make: Callable[[], Any]) -> None:
    adapted, theirs = (adapt(make, make()).eval() for _ in range(2))
    with warnings.catch_warnings():  # some hosts have an adapter in each part
        warnings.filterwarnings("ignore", "nothing in PeftModel is accelerated")
        report = fastbb.accelerate(adapted, mode="eager")
    assert report.left_alone, str(report)
    assert_close(infer(adapted), infer(theirs))
    merged, theirs = adapted.merge_and_unload(), theirs.merge_and_unload()
    assert_close(infer(merged), infer(theirs))
    report = fastbb.accelerate(merged, mode="eager")
    assert_close(infer(merged), infer(theirs))
    assert_ours_ran(report)
    assert not report.left_alone


def test_adapter_on_a_copy_that_has_not_run_equals_upstream(make: Callable[[], Any]) -> None:
    model = make()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    adapted, theirs = (adapt(make, m).eval() for m in (copy.deepcopy(model), make()))
    for _ in range(2):
        assert_close(infer(adapted), infer(theirs))
    fastbb.restore(adapted)
    assert_bit_equal(infer(adapted), infer(theirs))
