"""timm's model with the weights of a native ViT, which `fastbb bench` measures.

Names of timm's weights depend on its class: VisionTransformer, Eva (DINOv3) or Beit.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.checkpoint import StateDict
from ..backbone.registry import Upstream
from .vit_names import part
from .vit_parts import ViTBlockParts, ViTBlockWeights, ViTEmbeddingParts
from .vit_positions import embedding_terms, patch_grid, relative_position_rows

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


def timm_upstream(backbone: Any, size: tuple[int, int]) -> Upstream:
    """Builds timm's model with the weights of a backbone, for images of one size.

    Absolute and relative position embeddings are those of transformers for this size. Class token
    and registers have theirs added beforehand. Biases that only timm has are zero.

    Raises:
        ValueError: timm has no such ViT.
        ImportError: timm is not installed.
    """
    import timm

    config, names = backbone.config, backbone.names
    indices = [index % len(backbone.stage_names) - 1 for index in backbone.out_indices]
    if min(indices) < 0:
        raise ValueError("timm's ViT has no map of the stem")
    if not config.reshape_hidden_states:
        raise ValueError("timm's ViT returns maps, and the backbone returns tokens")
    if config.patch[0] != config.patch[1]:
        raise ValueError(f"timm's ViT has square patches, and these are {config.patch}")
    blocks: list[ViTBlockParts] = [layer.parts() for layer in part(backbone, names.layers)]
    first = blocks[0].weights()
    if first.gate_weight is not None and blocks[0].spec().activation != "silu":
        raise ValueError("timm's ViT has no MLP that this activation gates")
    n_hidden, channels = first.fc1_weight.shape
    if names.rope is not None:
        name, own = "vit_small_patch16_dinov3", _eva_options(backbone, blocks[0])
    elif names.root:
        name, own = "beit_base_patch16_224", _beit_options(backbone, blocks[0])
    else:
        name, own = "vit_base_patch16_224", _vision_transformer_options(backbone, blocks[0])
    options = {
        "num_classes": 0,
        "global_pool": "",
        "img_size": size,
        "patch_size": config.patch[0],
        "in_chans": config.num_channels,
        "embed_dim": channels,
        "depth": len(blocks),
        "num_heads": blocks[0].spec().num_heads,
        "mlp_ratio": (n_hidden + 0.5) / channels,  # timm rounds the product down
        "qkv_bias": first.qkv_bias is not None,
        "init_values": float(first.scale1 is not None),  # None would be the default of the name
        "norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps),
    }
    model: Any = timm.create_model(name, **{**options, **own})
    if not config.apply_layernorm:
        model.norm = nn.Identity()  # a BEiT has none, and no map depends on it
    state = _state(model, backbone, blocks, patch_grid(config.patch, size))
    model.load_state_dict(state)

    def maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
        return model.forward_intermediates(
            pixel_values,
            indices=indices,
            norm=config.apply_layernorm,
            intermediates_only=True,
            stop_early=True,
        )

    return Upstream(f"timm {timm.__version__}, {type(model).__name__}", model.eval(), maps)


def _vision_transformer_options(backbone: Any, block: ViTBlockParts) -> dict[str, Any]:
    from timm.layers.create_act import get_act_layer
    from timm.layers.mlp import Mlp, SwiGLUPacked

    names, activation = backbone.names, block.spec().activation
    options = {
        "mlp_layer": Mlp,
        "class_token": names.cls_token is not None,
        "reg_tokens": backbone.n_prefix_tokens - (names.cls_token is not None),
        "no_embed_class": True,
        "pre_norm": names.pre_norm is not None,
        "act_layer": get_act_layer(_ACTIVATIONS.get(activation, activation)),
    }
    if block.gate is not None:
        packed = 2 * block.fc1.out_features + 0.5
        options |= {"mlp_layer": SwiGLUPacked, "mlp_ratio": packed / block.fc1.in_features}
    return options


def _eva_options(backbone: Any, block: ViTBlockParts) -> dict[str, Any]:
    _check_as_beit(backbone, block)
    return {
        "dynamic_img_size": False,  # computes the rotation once
        "num_reg_tokens": backbone.n_prefix_tokens - 1,
        "rope_temperature": backbone.config.rope_theta,
        "swiglu_mlp": block.gate is not None,
        "swiglu_align_to": 1,  # the gate is a layer of its own, as in timm's DINOv3
    }


def _beit_options(backbone: Any, block: ViTBlockParts) -> dict[str, Any]:
    _check_as_beit(backbone, block)
    config = backbone.config
    if backbone.fpn is not None:
        raise ValueError("timm's Beit has no feature pyramid (add_fpn)")
    return {
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.use_relative_position_bias,
        "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
    }


def _check_as_beit(backbone: Any, block: ViTBlockParts) -> None:
    """Checks what timm's Beit cannot be given, nor its Eva, which was made of it."""
    activation, model_type = block.spec().activation, backbone.config.model_type
    if block.gate is None and activation != "gelu":
        raise ValueError(f"timm's {model_type} has no MLP with the activation {activation}")
    if block.projections[1].bias is not None:
        raise ValueError(f"keys of timm's {model_type} have no bias")


@torch.no_grad()
def _state(
    model: Any, backbone: Any, blocks: list[ViTBlockParts], grid: tuple[int, int]
) -> StateDict:
    """The weights of a backbone by the names of timm's model."""
    is_plain = type(model).__name__ == "VisionTransformer"
    config, names = backbone.config, backbone.names
    embedding: ViTEmbeddingParts = part(backbone, names.embeddings).parts()
    tokens = embedding.cls_token(), embedding.extra_tokens(), embedding.positions()
    prefix, positions = embedding_terms(embedding.owner, embedding.rules, grid, *tokens)
    found: dict[str, Tensor | None] = {"pos_embed": positions}
    if prefix is not None:
        found |= {"cls_token": prefix[:, :1], "reg_token": prefix[:, 1:]}
        found = {name: None if x is None or not x.numel() else x for name, x in found.items()}
        if positions is not None and not is_plain:  # one for the class token too
            found["pos_embed"] = torch.cat([torch.zeros_like(prefix), positions], dim=1)
    layers: dict[str, Any] = {"patch_embed.proj": embedding.projection}
    if config.apply_layernorm:
        layers["norm"] = backbone.final_norm
    if names.pre_norm is not None:
        layers["norm_pre"] = part(backbone, names.pre_norm)
    biases = {}
    if config.field("use_shared_relative_position_bias", default=False):
        biases["rel_pos_bias"] = part(backbone, f"{names.root}shared_position_bias")
    for index, block in enumerate(blocks):
        weights, inside = block.weights(), f"blocks.{index}."
        own = _plain_weights(weights) if is_plain else _beit_weights(weights)
        found |= {f"{inside}{name}": tensor for name, tensor in own.items()}
        layers |= {f"{inside}norm{n}": norm for n, norm in enumerate(block.norms, start=1)}
        layers |= {f"{inside}attn.proj": block.proj, f"{inside}mlp.fc2": block.fc2}
        if block.position_bias is not None:
            biases[f"{inside}attn"] = block.position_bias
    for name, bias in biases.items():
        table = bias.relative_position_bias_table
        found[f"{name}.relative_position_bias_table"] = relative_position_rows(
            table, bias.grid, grid
        )
    for name, layer in layers.items():
        found |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.endswith(".bias")}
    return zeros | {name: tensor for name, tensor in found.items() if tensor is not None}


def _plain_weights(weights: ViTBlockWeights) -> dict[str, Tensor | None]:
    """Weights of a layer by the names of timm's VisionTransformer."""
    return {
        "attn.qkv.weight": weights.qkv_weight,
        "attn.qkv.bias": weights.qkv_bias,
        "mlp.fc1.weight": _gated(weights.gate_weight, weights.fc1_weight),
        "mlp.fc1.bias": _gated(weights.gate_bias, weights.fc1_bias),
        "ls1.gamma": weights.scale1,
        "ls2.gamma": weights.scale2,
    }


def _beit_weights(weights: ViTBlockWeights) -> dict[str, Tensor | None]:
    """Weights of a layer by the names of timm's Beit and Eva."""
    bias = weights.qkv_bias
    q_bias, _, v_bias = (None,) * 3 if bias is None else bias.chunk(3)
    fc1 = "mlp.fc1" if weights.gate_weight is None else "mlp.fc1_x"
    return {
        "attn.qkv.weight": weights.qkv_weight,
        "attn.q_bias": q_bias,
        "attn.v_bias": v_bias,
        "mlp.fc1_g.weight": weights.gate_weight,
        "mlp.fc1_g.bias": weights.gate_bias,
        f"{fc1}.weight": weights.fc1_weight,
        f"{fc1}.bias": weights.fc1_bias,
        "gamma_1": weights.scale1,
        "gamma_2": weights.scale2,
    }


def _gated(gate: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The first layer of the MLP, after its gate if it has one."""
    return other if gate is None or other is None else torch.cat([gate, other])
