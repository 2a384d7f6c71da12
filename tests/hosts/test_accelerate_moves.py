"""Accelerated models that other libraries wrap, move, copy or put into their own."""

from types import MethodType
from typing import Any

import pytest
import torch
from reference_models import hf_resnet, hf_swin, images
from tiny_hosts import accelerated, infer, resnet_backbone, swin_classifier, timm_resnet
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastbb
from fastbb.engine.measuring import Comparison
from fastbb.hosts.accelerate import replacement_of
from fastbb.hosts.replacement import MOVES, Timings
from fastbb.weights import folded_weights
from fastbb.weights.folded_model import is_folded

PIXELS = images(64, 64)


def test_forward_rebound_by_a_wrapper_equals_upstream() -> None:
    """Rebinds the forward as accelerate's Accelerator does for mixed precision."""
    model, twin, _ = accelerated(timm_resnet)
    infer(model)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    model.forward = MethodType(autocast(model.forward.__func__), model)
    twin.forward = MethodType(autocast(twin.forward.__func__), twin)
    for ours, theirs in zip(infer(model), infer(twin)):
        assert torch.equal(ours, theirs)


def test_accelerator_with_mixed_precision_equals_upstream() -> None:
    library = pytest.importorskip("accelerate")
    model, twin, _ = accelerated(timm_resnet)
    prepare = library.Accelerator(cpu=True, mixed_precision="bf16").prepare_model
    for ours, theirs in zip(infer(prepare(model)), infer(prepare(twin))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [timm_resnet, swin_classifier])
def test_replicas_of_data_parallel_run_upstreams_forward(make: Any) -> None:
    model, _, _ = accelerated(make)
    infer(model)
    for module in model.modules():
        replica = module._replicate_for_data_parallel()
        assert not {"forward", *MOVES} & vars(replica).keys()
    assert any(is_folded(m) or replacement_of(m) for m in model.modules())
    fastbb.restore(model)
    assert not any({"forward", *MOVES} & vars(module).keys() for module in model.modules())


def test_patched_train_method_is_kept() -> None:
    model = hf_resnet()

    def frozen(self: nn.Module, mode: bool = True) -> nn.Module:
        return self

    model.train = MethodType(frozen, model)
    report = fastbb.accelerate(model, mode="eager")
    assert "" not in report.accelerated
    assert any("train" in left.why for left in report.left_alone)
    model.train()
    assert not model.training
    fastbb.restore(model)
    assert model.train.__func__ is frozen


def test_every_dtype_is_timed_separately() -> None:
    timings = Timings()
    timings.of(("block", "fp32"), "form", lambda: Comparison(1.0, 2.0, 0.5))
    other = Comparison(3.0, 4.0, 0.75)
    assert timings.of(("block", "bf16"), "form", lambda: other) == other


def test_a_backbone_in_a_new_parent_keeps_its_engine() -> None:
    model = hf_resnet()
    fastbb.accelerate(model, mode="eager", precision="bf16")
    infer(model)
    replacement = replacement_of(model)
    assert replacement is not None
    fast: Any = replacement.ours
    before = fast.engine()
    nn.Sequential(model, nn.Identity())
    infer(model)
    assert fast.engine() is before


def test_each_form_of_call_keeps_its_own_engine() -> None:
    model, _, _ = accelerated(timm_resnet, precision="bf16")
    replacement = replacement_of(model)
    assert replacement is not None
    fast: Any = replacement.ours
    infer(model)
    copies = [fast.engine(), fast.engine(some_option=False), fast.engine()]
    assert copies[0] is copies[2] is not copies[1]


def test_packed_weights_are_kept_for_two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, _ = accelerated(resnet_backbone)
    shapes = [images(64, 64), images(48, 80)]
    for pixels in shapes:
        infer(model, pixels)
    packs: list[Tensor] = []
    own = folded_weights.pack_conv

    def recorded(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        packs.append(weight)
        return own(weight, *args, **kwargs)

    monkeypatch.setattr(folded_weights, "pack_conv", recorded)
    for pixels in (*shapes, *shapes):
        assert_equals_upstream(infer(model, pixels), infer(twin, pixels))
    assert not packs
    third = images(32, 96)
    assert_equals_upstream(infer(model, third), infer(twin, third))
    assert packs


@pytest.mark.parametrize("make", [hf_swin, hf_resnet])
@torch.no_grad()
def test_forward_mode_derivatives_equal_upstream(make: Any) -> None:
    model = make()
    model.set_attn_implementation("eager")  # PyTorch's own attention has no such derivative
    for parameter in model.parameters():
        parameter.requires_grad = False
    tangent = images(64, 64, seed=3)

    def derivative() -> list[Any]:
        with forward_ad.dual_level(), torch.enable_grad():
            maps = model(forward_ad.make_dual(PIXELS, tangent)).feature_maps
            return [forward_ad.unpack_dual(x).tangent for x in maps]

    want = derivative()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    assert_equals_upstream(derivative(), want)


def test_changed_default_dtype_and_device_equal_upstream() -> None:
    model, twin, _ = accelerated(timm_resnet)
    fastbb.restore(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            report = fastbb.accelerate(model, mode="eager")
            assert_equals_upstream(infer(model), infer(twin))
    finally:
        torch.set_default_dtype(torch.float32)
    assert "" in report.accelerated


def test_keyword_arguments_equal_upstream() -> None:
    model, twin, _ = accelerated(swin_classifier)
    layers = [m.swin.encoder.layers[0].blocks[1] for m in (model, twin)]
    channels = layers[0].layernorm_before.normalized_shape[0]
    tokens = images(8, 8, channels=channels).flatten(2).transpose(1, 2)
    with torch.no_grad():
        ours, theirs = (layer(hidden_states=tokens, input_dimensions=(8, 8))[0] for layer in layers)
    assert_equals_upstream(ours, theirs)
