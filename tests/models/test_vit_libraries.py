"""ViTs of timm in TimmBackbone, which runs our ops on them."""

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from host_models_vit import TIMM
from reference_models import from_timm, images, timm_features, timm_maps
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fastbb.models import vit_libraries

SHAPE: dict[str, Any] = {**TIMM, "depth": 3, "dynamic_img_size": True}
# timm's models by what is special about them
MODELS: dict[str, dict[str, Any]] = {
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 3.0},  # registers, layer scale, packed SwiGLU
    "vit_base_patch16_clip_quickgelu_224": {},  # a norm before the layers
    "vit_base_patch16_siglip_224": {},  # no class token
    "deit_base_distilled_patch16_224": {},  # two class tokens
    "vit_small_plus_patch16_dinov3": {},  # rotation, SwiGLU
    "eva_giant_patch14_224": {"mlp_ratio": 2.0},  # biases of queries and values
}
DINOV3 = "vit_small_plus_patch16_dinov3"


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """Returns our backbone and timm's module with the same weights."""
    kwargs = {**SHAPE, **MODELS.get(name, {}), **options}
    upstream = timm_features(name, out_indices=[0, 2], **kwargs)
    return from_timm(name, upstream, out_indices=[0, 2], **kwargs), upstream


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_maps_of_every_size_equal_timm(name: str) -> None:
    ours, upstream = pair(name)
    for size in ((28, 28), (35, 56), (14, 21)):
        pixels = images(*size)
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))
    assert ours.native_forward() is not None
    with pytest.raises(ValueError, match="should be divisible by patch size"):
        ours(images(30, 28))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_giant_patch14_reg4_dinov2", DINOV3])
def test_bf16_is_as_accurate_as_timm(name: str) -> None:
    ours, upstream = pair(name)
    pixels = images(28, 28)
    exact = timm_maps(upstream.double(), pixels.double())
    eager = timm_maps(upstream.bfloat16(), pixels.bfloat16())
    got = ours.bfloat16()(pixels.bfloat16()).feature_maps
    assert ours.native_forward() is not None
    for index, maps in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(f"map {index}", *maps)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"dynamic_img_pad": True}),
        ("eva02_tiny_patch14_224", {}),  # rotates pairs of neighbours
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
    ids=str,
)
def test_other_models_run_timms_forward(name: str, options: dict[str, Any]) -> None:
    ours, upstream = pair(name, **options)
    assert ours.native_forward() is None
    pixels = images(28, 28)
    assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


@torch.no_grad()
def test_changed_blocks_equal_timm() -> None:
    ours, upstream = pair("vit_giant_patch14_reg4_dinov2")
    pixels = images(28, 28)

    def adapter(block: Any) -> None:
        block.mlp.fc2 = nn.Sequential(block.mlp.fc2, nn.Tanh())

    changes = (
        (lambda block: block.ls1.gamma.mul_(-3.0), True),
        (lambda block: setattr(block.norm2, "eps", 0.5), True),
        (lambda block: block.attn.qkv.weight.mul_(0.5), True),
        (lambda block: weight_norm(block.attn.proj), False),
        (adapter, False),
    )
    for change, is_native in changes:
        for model in (ours._backbone, upstream):
            change(model.model.blocks[0])
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))
        assert (ours.native_forward() is not None) is is_native


@torch.no_grad()
def test_a_class_token_in_the_map_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, upstream = pair(DINOV3)
    pixels = images(28, 28)
    states = vit_libraries.vit_states

    def rolled(*args: Any, **options: Any) -> list[torch.Tensor]:
        return [tokens.roll(1, dims=1) for tokens in states(*args, **options)]

    monkeypatch.setattr(vit_libraries, "vit_states", rolled)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))
