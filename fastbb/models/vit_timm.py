"""timm's VisionTransformer with the weights of a native ViT, which `fastbb bench` measures."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.checkpoint import StateDict
from ..backbone.registry import Upstream
from .vit_names import part
from .vit_parts import ViTBlockParts, ViTEmbeddingParts
from .vit_positions import embedding_terms, patch_grid

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


def timm_upstream(backbone: Any, size: tuple[int, int]) -> Upstream:
    """Builds timm's VisionTransformer with the weights of a backbone, for images of one size.

    Position embeddings are those of transformers for this size. Class token and registers have
    theirs added beforehand.

    Raises:
        ValueError: timm has no such ViT.
        ImportError: timm is not installed.
    """
    import timm
    from timm.layers.create_act import get_act_layer
    from timm.layers.mlp import Mlp, SwiGLUPacked

    config, names = backbone.config, backbone.names
    indices = [index % len(backbone.stage_names) - 1 for index in backbone.out_indices]
    if min(indices) < 0:
        raise ValueError("timm's ViT has no map of the stem")
    if not config.reshape_hidden_states:
        raise ValueError("timm's ViT returns maps, and the backbone returns tokens")
    if names.rope is not None or names.root or config.patch[0] != config.patch[1]:
        raise ValueError(f"timm has no VisionTransformer that computes as {config.model_type}")
    blocks: list[ViTBlockParts] = [layer.parts() for layer in part(backbone, names.layers)]
    first, spec = blocks[0].weights(), blocks[0].spec()
    is_gated = first.gate_weight is not None
    if is_gated and spec.activation != "silu":
        raise ValueError("timm's ViT has no MLP that this activation gates")
    n_hidden, channels = first.fc1_weight.shape
    activation = _ACTIVATIONS.get(spec.activation, spec.activation)
    model = timm.create_model(
        "vit_base_patch16_224",
        num_classes=0,
        global_pool="",
        img_size=size,
        patch_size=config.patch[0],
        in_chans=config.num_channels,
        embed_dim=channels,
        depth=len(blocks),
        num_heads=spec.num_heads,
        # timm rounds the product down
        mlp_ratio=((2 if is_gated else 1) * n_hidden + 0.5) / channels,
        mlp_layer=SwiGLUPacked if is_gated else Mlp,
        qkv_bias=first.qkv_bias is not None,
        init_values=None if first.scale1 is None else 1.0,
        class_token=names.cls_token is not None,
        reg_tokens=backbone.n_prefix_tokens - (names.cls_token is not None),
        no_embed_class=True,
        pre_norm=names.pre_norm is not None,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=get_act_layer(activation),
    )
    model.load_state_dict(_state(backbone, blocks, size))

    def maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
        return model.forward_intermediates(
            pixel_values,
            indices=indices,
            norm=config.apply_layernorm,
            intermediates_only=True,
            stop_early=True,
        )

    return Upstream(f"timm {timm.__version__}, VisionTransformer", model.eval(), maps)


@torch.no_grad()
def _state(backbone: Any, blocks: list[ViTBlockParts], size: tuple[int, int]) -> StateDict:
    """The weights of a backbone by timm's names."""
    names = backbone.names
    embedding: ViTEmbeddingParts = part(backbone, names.embeddings).parts()
    tokens = embedding.cls_token(), embedding.extra_tokens(), embedding.positions()
    grid = patch_grid(backbone.config.patch, size)
    prefix, positions = embedding_terms(embedding.owner, embedding.rules, grid, *tokens)
    found: dict[str, Tensor | None] = {"pos_embed": positions}
    if prefix is not None:
        found |= {"cls_token": prefix[:, :1], "reg_token": prefix[:, 1:]}
        found = {name: None if x is None or not x.numel() else x for name, x in found.items()}
    layers = {"patch_embed.proj": embedding.projection, "norm": backbone.final_norm}
    if names.pre_norm is not None:
        layers["norm_pre"] = part(backbone, names.pre_norm)
    for index, block in enumerate(blocks):
        weights, inside = block.weights(), f"blocks.{index}."
        found |= {
            f"{inside}attn.qkv.weight": weights.qkv_weight,
            f"{inside}attn.qkv.bias": weights.qkv_bias,
            f"{inside}mlp.fc1.weight": _gated(weights.gate_weight, weights.fc1_weight),
            f"{inside}mlp.fc1.bias": _gated(weights.gate_bias, weights.fc1_bias),
            f"{inside}ls1.gamma": weights.scale1,
            f"{inside}ls2.gamma": weights.scale2,
        }
        layers |= {f"{inside}norm{n}": norm for n, norm in enumerate(block.norms, start=1)}
        layers |= {f"{inside}attn.proj": block.proj, f"{inside}mlp.fc2": block.fc2}
    for name, layer in layers.items():
        found |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _gated(gate: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The first layer of the MLP, after its gate if it has one."""
    return other if gate is None or other is None else torch.cat([gate, other])
