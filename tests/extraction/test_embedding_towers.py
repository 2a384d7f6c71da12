"""Vision towers through timm, held to transformers' models with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from feature_models import PICTURES, gap, pixels_of, save_timm
from reference_models import randomize_
from torch import Tensor

from fastbb.extraction import FeatureExtractor

transformers: Any = pytest.importorskip("transformers")
LIMIT = 1e-4
WIDTH, HEADS, DEPTH, SIZE, PATCH = 48, 3, 2, 64, 16
TIMM: dict[str, Any] = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "img_size": SIZE}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
}


def linear(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A module's weight and bias by timm's name."""
    parts = ("weight", "bias")
    return {f"{ours}.{p}": state[f"{theirs}.{p}"] for p in parts if f"{theirs}.{p}" in state}


def blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of CLIP and SigLIP by timm's names."""
    renamed: dict[str, Tensor] = {}
    for i in range(DEPTH):
        theirs, ours = f"encoder.layers.{i}", f"blocks.{i}"
        for n in (1, 2):
            renamed |= linear(state, f"{theirs}.layer_norm{n}", f"{ours}.norm{n}")
            renamed |= linear(state, f"{theirs}.mlp.fc{n}", f"{ours}.mlp.fc{n}")
        renamed |= linear(state, f"{theirs}.self_attn.out_proj", f"{ours}.attn.proj")
        for part in ("weight", "bias"):
            qkv = [state[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            renamed[f"{ours}.attn.qkv.{part}"] = torch.cat(qkv)
    return renamed


def vision_state(model: Any) -> dict[str, Tensor]:
    """The weights of the vision tower, without the prefix."""
    state = model.state_dict()
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in state) else ""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


@torch.no_grad()
def test_clip_equals_transformers(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=512)
    upstream = randomize_(transformers.CLIPVisionModelWithProjection(config))
    state = vision_state(upstream)
    full = {**state, **upstream.state_dict()}  # with and without the prefix
    renamed = {
        **blocks(state),
        **linear(state, "pre_layrnorm", "norm_pre"),
        **linear(state, "post_layernorm", "norm"),
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "head.weight": upstream.visual_projection.weight,
        "head.bias": torch.zeros(512),
    }
    options = {**TIMM, "num_classes": 512}
    save_timm(tmp_path, "vit_base_patch16_clip_224", SIZE, "openai", renamed, **options)
    output = upstream(pixels_of(tmp_path))
    ex = FeatureExtractor(tmp_path, ("projection", "embedding", "tokens"), norm="none")
    got = ex(PICTURES)
    assert gap(got["projection"], output.image_embeds) < LIMIT
    assert gap(got["tokens"], output.last_hidden_state) < LIMIT  # transformers norms the class only
    vision = transformers.CLIPVisionModel(config).eval()
    vision.load_state_dict({name: full[name] for name in vision.state_dict()})
    assert gap(got["embedding"], vision(pixels_of(tmp_path)).pooler_output) < LIMIT


@torch.no_grad()
def test_siglip_equals_transformers(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**VISION, layer_norm_eps=1e-6)
    upstream = randomize_(transformers.SiglipVisionModel(config))
    state = vision_state(upstream)
    query, key, value = state["head.attention.in_proj_weight"].chunk(3)
    q_bias, k_bias, v_bias = state["head.attention.in_proj_bias"].chunk(3)
    renamed = {
        **blocks(state),
        **linear(state, "post_layernorm", "norm"),
        **linear(state, "embeddings.patch_embedding", "patch_embed.proj"),
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "attn_pool.latent": state["head.probe"],
        "attn_pool.q.weight": query,
        "attn_pool.q.bias": q_bias,
        "attn_pool.kv.weight": torch.cat([key, value]),
        "attn_pool.kv.bias": torch.cat([k_bias, v_bias]),
        **linear(state, "head.attention.out_proj", "attn_pool.proj"),
        **linear(state, "head.layernorm", "attn_pool.norm"),
        **linear(state, "head.mlp.fc1", "attn_pool.mlp.fc1"),
        **linear(state, "head.mlp.fc2", "attn_pool.mlp.fc2"),
    }
    save_timm(tmp_path, "vit_base_patch16_siglip_224", SIZE, "webli", renamed, **TIMM)
    output = upstream(pixels_of(tmp_path))
    got = FeatureExtractor(tmp_path, ("projection", "embedding", "tokens"))(PICTURES)
    assert gap(got["embedding"], output.pooler_output) < LIMIT
    assert gap(got["projection"], output.pooler_output) < LIMIT  # what get_image_features gives
    assert gap(got["tokens"], output.last_hidden_state) < LIMIT


@torch.no_grad()
def test_dinov2_equals_transformers(tmp_path: Path) -> None:
    fields = {n: value for n, value in VISION.items() if n != "intermediate_size"}
    config = transformers.Dinov2Config(**{**fields, "patch_size": 14, "image_size": 56})
    upstream = randomize_(transformers.Dinov2Model(config))
    save_timm(
        tmp_path,
        "vit_small_patch14_dinov2",
        56,
        None,
        dinov2_state(upstream),
        **{**TIMM, "img_size": 56},
    )
    output = upstream(pixels_of(tmp_path))
    got = FeatureExtractor(tmp_path, ("embedding", "cls", "tokens"))(PICTURES)
    assert gap(got["embedding"], output.pooler_output) < LIMIT
    assert gap(got["cls"], output.last_hidden_state[:, 0]) < LIMIT
    assert gap(got["tokens"], output.last_hidden_state) < LIMIT


def dinov2_state(model: Any) -> dict[str, Tensor]:
    """The weights of transformers' DINOv2 by timm's names."""
    state = model.state_dict()
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        **linear(state, "embeddings.patch_embeddings.projection", "patch_embed.proj"),
        **linear(state, "layernorm", "norm"),
    }
    for i in range(DEPTH):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for n in (1, 2):
            renamed |= linear(state, f"{theirs}.norm{n}", f"{ours}.norm{n}")
            renamed |= linear(state, f"{theirs}.mlp.fc{n}", f"{ours}.mlp.fc{n}")
            renamed[f"{ours}.ls{n}.gamma"] = state[f"{theirs}.layer_scale{n}.lambda1"]
        renamed |= linear(state, f"{theirs}.attention.o_proj", f"{ours}.attn.proj")
        for part in ("weight", "bias"):
            qkv = [state[f"{theirs}.attention.{x}_proj.{part}"] for x in "qkv"]
            renamed[f"{ours}.attn.qkv.{part}"] = torch.cat(qkv)
    return renamed
