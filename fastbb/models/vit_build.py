"""Builds the modules of a native ViT of a configuration, under transformers' names."""

from dataclasses import replace
from typing import Any

from torch import nn

from .vit_config import DINOv3ViTConfig, ViTFamilyConfig, activation_name, pair
from .vit_ends import ViTAttentionPool, ViTMeanPooler, ViTPooler, ViTPyramid
from .vit_modules import LayerShape, ViTContainer, ViTEmbeddings, ViTLayer
from .vit_names import NAMES, put
from .vit_parts import ViTBlockSpec
from .vit_positions import PositionRules, RopeAugmentation, ViTRelativePositionBias, ViTRope


def build_layers(backbone: Any, config: ViTFamilyConfig) -> None:
    """Builds embeddings, layers and final norm in a backbone with `n_prefix_tokens`."""
    names, channels = NAMES[config.model_type], config.hidden_size
    projection = nn.Conv2d(
        config.num_channels, channels, config.patch, config.patch, bias=names.patches_bias
    )
    n_positions = backbone.n_prefix_tokens if names.extras_have_positions else 1
    # upstream's backbones interpolate for any image that is no square, also of the trained size
    is_kept = not names.has_backbone or len({*pair(config.image_size)}) == 1
    rules = PositionRules(
        config.grid if is_kept else None,
        n_positions if names.cls_token is not None else 0,
        names.antialias,
        names.in_fp32,
    )
    has_positions = config.field("use_absolute_position_embeddings", default=True)
    n_patches = config.grid[0] * config.grid[1]
    has_mask_token = config.field("use_mask_token", default=names.has_mask_token)
    if names.root:
        put(backbone, names.root[:-1], ViTContainer())
    embeddings = ViTEmbeddings(
        projection,
        names,
        rules,
        n_extra(config),
        n_patches if names.positions is not None and has_positions else None,
        (1, 1, channels)[-names.mask_token_ndim :] if has_mask_token else None,
        config.field("hidden_dropout_prob", default=None),
    )
    put(backbone, names.embeddings, embeddings)
    shape, specs = _layer_shape(config), _block_specs(config)
    layers = nn.ModuleList(ViTLayer(shape, spec, names) for spec in specs)
    if encoder := names.encoder:
        put(backbone, encoder, ViTContainer())
    put(backbone, names.layers, layers)
    if config.field("use_shared_relative_position_bias", default=False):
        bias = ViTRelativePositionBias(config.grid, config.num_attention_heads)
        put(backbone, f"{names.root}shared_position_bias", bias)
    if isinstance(config, DINOv3ViTConfig) and names.rope is not None:
        changes = config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
        rope = ViTRope(config.head_size, config.rope_theta, RopeAugmentation(*changes))
        put(backbone, names.rope, rope)
    if names.pre_norm is not None:
        put(backbone, names.pre_norm, nn.LayerNorm(channels, eps=config.layer_norm_eps))
    is_mean = config.field("use_mean_pooling", default=False)
    norm = nn.Identity() if is_mean else nn.LayerNorm(channels, eps=config.layer_norm_eps)
    put(backbone, names.norm, norm)


def build_ends(backbone: Any, config: ViTFamilyConfig) -> None:
    """Builds what the image embedding, its projection and a pyramid are computed with."""
    names, channels = NAMES[config.model_type], config.hidden_size
    pooler = backbone.visual_projection = backbone.head = backbone.fpn = None
    if size := config.field("pooler_output_size", default=None):
        pooler = ViTPooler(channels, size, activation_name(config.pooler_act))
    if config.field("use_mean_pooling", default=False):
        pooler = ViTMeanPooler(channels, config.layer_norm_eps)
    put(backbone, f"{names.root}pooler", pooler)
    if size := config.field("projection_dim", default=None):
        backbone.visual_projection = nn.Linear(channels, size, bias=False)
    if config.field("add_fpn", default=False):
        backbone.fpn = ViTPyramid(channels)
    if config.field("vision_use_head", default=False):
        backbone.head = ViTAttentionPool(_layer_shape(config), _block_specs(config)[0], names)


def n_extra(config: ViTFamilyConfig) -> int:
    """Number of tokens between the class token and the patches."""
    if NAMES[config.model_type].extra_tokens is None:
        return 0
    return config.field("num_register_tokens", default=1)


def _branch_dropout(config: ViTFamilyConfig) -> float:
    """Dropout of the branches of a layer, which only some types have."""
    has_it = NAMES[config.model_type].drops_branches
    return config.field("hidden_dropout_prob", default=0.0) if has_it else 0.0


def has_own_bias(config: ViTFamilyConfig) -> bool:
    """Whether each layer has a relative position bias of its own."""
    return config.field("use_relative_position_bias", default=False)


def _layer_shape(config: ViTFamilyConfig) -> LayerShape:
    names, every = NAMES[config.model_type], config.field("qkv_bias", default=True)
    # the factor of a branch is 1 without a layer scale
    initial = config.field("layer_scale_init_value", default=0.0)
    return LayerShape(
        channels=config.hidden_size,
        hidden=config.mlp_size,
        eps=config.layer_norm_eps,
        qkv_bias=(
            config.field("query_bias", every),
            config.field("key_bias", every and names.key_bias),
            config.field("value_bias", every),
        ),
        proj_bias=config.field("proj_bias", default=True),
        mlp_bias=config.field("mlp_bias", default=True),
        is_gated=config.field("use_swiglu_ffn", config.field("use_gated_mlp", default=False)),
        layer_scale=config.field("layerscale_value", initial if initial > 0 else None),
        patch=config.patch,
        bias_grid=config.grid if has_own_bias(config) else None,
    )


def _block_specs(config: ViTFamilyConfig) -> list[ViTBlockSpec]:
    is_swiglu = config.field("use_swiglu_ffn", default=False)
    spec = ViTBlockSpec(
        num_heads=config.num_attention_heads,
        activation="silu" if is_swiglu else activation_name(config.hidden_act),
        dropout=_branch_dropout(config),
        attention_dropout=config.field(
            "attention_probs_dropout_prob", config.field("attention_dropout", default=0.0)
        ),
    )
    n_layers = config.num_hidden_layers
    rates = [config.field("drop_path_rate", default=0.0)] * n_layers
    if NAMES[config.model_type].drop_path_grows:
        rates = [rate * index / max(n_layers - 1, 1) for index, rate in enumerate(rates)]
    return [replace(spec, drop_path=rate) for rate in rates]
