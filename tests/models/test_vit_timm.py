"""ViTs of timm: TimmBackbone runs our ops on them, and timm's model takes a backbone's weights."""

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from host_models_vit import TIMM
from reference_models import from_timm, images, randomize_, timm_features, timm_maps
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from vit_models import TYPES, vit_config

from fastbb import AutoBackbone
from fastbb.backbone.registry import family_of
from fastbb.inspect.upstream import run_upstream
from fastbb.models import vit_timm

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
    states = vit_timm.vit_states

    def rolled(*args: Any, **options: Any) -> list[torch.Tensor]:
        return [tokens.roll(1, dims=1) for tokens in states(*args, **options)]

    monkeypatch.setattr(vit_timm, "vit_states", rolled)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


# timm's model of a backbone

WITH_TIMM = [
    *((kind, {}) for kind in TYPES if kind != "beit"),
    ("dinov2", {"use_swiglu_ffn": True, "qkv_bias": False, "apply_layernorm": False}),
    ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "silu"}),
]


def backbone_of(kind: str, **config: Any) -> Any:
    config = {"out_indices": [1, 2], **config}
    return randomize_(AutoBackbone.from_config(vit_config(kind, **config))).eval()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "config"), WITH_TIMM, ids=str)
def test_timm_has_the_same_weights(kind: str, config: dict[str, Any]) -> None:
    backbone, size = backbone_of(kind, **config), (35, 28)
    find = family_of(kind)[0].timm_upstream
    assert find is not None
    pixels = images(*size)
    maps = run_upstream(find(backbone, size), pixels.double())
    assert_equals_upstream(maps, list(backbone.double()(pixels.double()).feature_maps), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("beit", {}, "relative position bias"),
        ("dinov2", {"out_indices": [0, 1]}, "stem"),
        ("dinov2", {"reshape_hidden_states": False}, "not tokens"),
        ("dinov2", {"hidden_act": "relu"}, "activation"),
        ("dinov3_vit", {"proj_bias": False}, "biases"),
    ],
    ids=str,
)
def test_timm_that_has_no_such_model_says_so(kind: str, config: Any, reason: str) -> None:
    find = family_of(kind)[0].timm_upstream
    assert find is not None
    with pytest.raises(ValueError, match=reason):
        find(backbone_of(kind, **config), (28, 28))
