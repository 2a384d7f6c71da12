"""ViTs of timm: parts of blocks and of features-only models, and timm's model of a backbone.

Builders find and check layers once, and raise `Refused` for what the forward does not cover.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.registry import Upstream
from ..weights.derived import derive
from .parts import Refused
from .vit_forward import vit_states
from .vit_libraries import block_spec, check_block
from .vit_names import part
from .vit_parts import ViTBlockParts, ViTBlockWeights, ViTParts
from .vit_positions import Grid, Rotation, embedding_terms, patch_grid


@dataclass(frozen=True)
class TimmBlockParts(ViTBlockParts):
    """A block of timm.

    Attributes:
        gate_last: whether the gate is the second half of `fc1`; None if it is not in there.
    """

    gate_last: bool | None = None

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        attention: Any = self.owner.attn
        projections = self.projections
        if len(projections) > 1 or getattr(attention, "q_bias", None) is None:
            return super().qkv()
        # EVA has a bias of keys too, which is 0
        biases = attention.q_bias, attention.k_bias, attention.v_bias
        (bias,) = derive(self.owner, "qkv_bias", lambda *b: (torch.cat(b),), *biases)
        return projections[0].weight, bias

    def hidden(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        if self.gate_last is None:
            return super().hidden()
        halves = list(self.fc1.weight.chunk(2))
        biases = [None, None] if self.fc1.bias is None else list(self.fc1.bias.chunk(2))
        up, gate = (0, 1) if self.gate_last else (1, 0)
        return halves[gate], biases[gate], halves[up], biases[up]


def timm_block(block: Any) -> TimmBlockParts:
    """Reads a Block of timm's VisionTransformer."""
    from timm.layers.attention import Attention

    if type(block.attn) is not Attention:
        raise Refused(f"its attention is a {type(block.attn).__name__}")
    scales = [ls for ls in (block.ls1, block.ls2) if type(ls).__name__ == "LayerScale"]
    return _timm_block(
        block,
        (block.attn.qkv,),
        scales,
        lambda: (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)),
    )


def timm_eva_block(block: Any) -> TimmBlockParts:
    """Reads an EvaBlock of timm."""
    from timm.models.eva import EvaAttention

    attention = block.attn
    if type(attention) is not EvaAttention:
        raise Refused(f"its attention is a {type(attention).__name__}")
    one, three = attention.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)
    projections = three if one is None else (one,)
    return _timm_block(block, projections, [], lambda: (block.gamma_1, block.gamma_2))


def _timm_block(
    block: Any,
    projections: tuple[Any, ...],
    read: list[Any],
    scales: Callable[[], tuple[Tensor | None, Tensor | None]],
) -> TimmBlockParts:
    """Reads a block of timm.

    Args:
        block: with norms, `attn` and `mlp`.
        projections: to queries, keys and values.
        read: its layer scales.
        scales: reads their tensors.
    """
    from timm.layers.mlp import GluMlp, Mlp, SwiGLU

    attention, mlp = block.attn, block.mlp
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise Refused(f"its MLP is a {type(mlp).__name__}")
    gate, fc1 = (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (None, mlp.fc1)
    norms = block.norm1, block.norm2
    linears = [*projections, attention.proj, fc1, mlp.fc2, *([] if gate is None else [gate])]
    check_block(block, [attention, mlp, mlp.act, *read], norms, linears)
    num_heads, proj = attention.num_heads, attention.proj
    spec = block_spec(num_heads, proj.in_features // num_heads, attention.scale, proj, mlp.act)
    return TimmBlockParts(
        owner=block,
        norms=norms,
        projections=projections,
        proj=proj,
        scales=scales,
        fc1=fc1,
        fc2=mlp.fc2,
        gate=gate,
        spec=lambda: spec,
        gate_last=mlp.gate_last if type(mlp) is GluMlp else None,
    )


def eva_rotation(rope: Tensor) -> Rotation:
    """The rotation that timm has in one tensor: sines and cosines [h * w, 2 * head_dim]."""
    sin, cos = rope.chunk(2, dim=-1)
    return cos, sin


@dataclass(frozen=True)
class TimmViT:
    """timm's features-only VisionTransformer or Eva.

    Attributes:
        parts: its layers; timm's own modules embed the patches.
        patch: height and width of a patch.
        n_prefix: tokens before the patches.
    """

    parts: ViTParts
    patch: Grid
    n_prefix: int


def timm_parts(features: Any) -> TimmViT:
    """Reads timm's features-only VisionTransformer, or an Eva that rotates as DINOv3 does."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models._features import FeatureGetterNet
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    model: Any = getattr(features, "model", None)
    is_eva = isinstance(model, Eva)
    run = getattr(type(model), "forward_intermediates", None)
    plain = Eva.forward_intermediates, VisionTransformer.forward_intermediates
    if type(features) is not FeatureGetterNet or run not in plain:
        raise Refused("it is no ViT")
    if type(model.patch_embed) is not PatchEmbed:
        raise Refused(f"its patch embedding is a {type(model.patch_embed).__name__}")
    if features.output_fmt.value != "NCHW" or features.norm or model.patch_embed.dynamic_img_pad:
        raise Refused("its maps are normalized, or have another layout or size")
    kind, read = (EvaBlock, timm_eva_block) if is_eva else (Block, timm_block)
    for block in model.blocks:
        if type(block) is not kind:
            raise Refused(f"a {type(block).__name__} is inside it")
    return TimmViT(
        ViTParts(
            embedding=partial(_timm_embedding, model),
            pre_norm=None,
            blocks=tuple(map(read, model.blocks)),
            rope=_timm_rope(model) if is_eva else None,
        ),
        patch=model.patch_embed.patch_size,
        n_prefix=model.num_prefix_tokens,
    )


def _timm_embedding(model: Any, pixel_values: Tensor) -> Tensor:
    """Embeds pixels [B, C, H, W] as tokens [B, N, C], by timm's own modules."""
    x = model._pos_embed(model.patch_embed(pixel_values))
    # Eva's returns the rotation too, and drops patches before
    return model.norm_pre(x[0] if isinstance(x, tuple) else model.patch_drop(x))


def _timm_rope(model: Any) -> Callable[[Grid], Rotation] | None:
    """The rotation of the patches of an Eva, cached; None if it rotates nothing."""
    rope = model.rope
    if rope is None:
        return None
    if getattr(model, "rope_mixed", False) or not all(b.attn.rotate_half for b in model.blocks):
        raise Refused("it does not rotate as DINOv3 does")
    projection, is_dynamic = model.patch_embed.proj, model.dynamic_img_size

    def rotation(grid: Grid) -> Rotation:
        def compute(like: Tensor, *buffers: Tensor) -> Rotation:
            found = rope.get_embed(shape=list(grid)) if is_dynamic else rope.get_embed()
            cos, sin = eva_rotation(found.to(like.dtype))
            return cos.contiguous(), sin.contiguous()

        return derive(rope, "rotation", compute, projection.weight, *rope.buffers(), constants=grid)

    return rotation


def timm_maps(vit: TimmViT, pixel_values: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Computes maps [B, C, h, w] of the layers of these indices; 0 is the first layer.

    Args:
        vit: of timm.
        pixel_values: [B, C_in, H, W].
        indices: of maps, at least one.
    """
    height, width = pixel_values.shape[2:]
    grid = patch_grid(vit.patch, (height, width))
    states = vit_states(vit.parts, pixel_values, [i + 1 for i in indices], patch=vit.patch)
    patches = [state[:, vit.n_prefix :].unflatten(1, grid) for state in states]
    return [x.permute(0, 3, 1, 2).contiguous() for x in patches]


_TIMM_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def timm_upstream(backbone: Any, size: tuple[int, int]) -> Upstream:
    """Builds timm's features-only ViT with the weights of a backbone, for images of one size.

    Its position embeddings are those of the backbone at this size. timm leaves out the norm of the
    maps; it is computed after its forward.

    Raises:
        ValueError: timm has no such ViT.
    """
    import timm

    config, names = backbone.config, backbone.names
    stages = [backbone.stage_names.index(name) for name in backbone.out_features]
    if min(stages) < 1:
        raise ValueError("timm's ViT has no map of the stem")
    if not config.reshape_hidden_states:
        raise ValueError("timm's ViT returns maps, not tokens")
    try:
        blocks: list[ViTBlockParts] = [layer.parts() for layer in part(backbone, names.layers)]
    except Refused as refused:
        raise ValueError(f"timm's ViT has plain layers, and here are {refused}") from refused
    if blocks[0].position_bias is not None or config.field(
        "use_shared_relative_position_bias", default=False
    ):
        raise ValueError("timm's ViT has no relative position bias")
    is_gated = blocks[0].gate is not None
    act = _TIMM_ACTIVATIONS.get(blocks[0].spec().activation)
    if (act is None) is not is_gated or (is_gated and blocks[0].spec().activation != "silu"):
        raise ValueError("timm's ViT has no such activation")
    module: Any = timm.create_model(
        "vit_tiny_patch16_224" if names.rope is None else "vit_small_patch16_dinov3",
        features_only=True,
        out_indices=[stage - 1 for stage in stages],
        img_size=size,
        dynamic_img_size=False,
        **_timm_arguments(backbone, blocks[0], act),
    )
    with torch.no_grad():
        _copy_embedding(backbone, module.model, patch_grid(config.patch, size))
        for block, parts in zip(module.model.blocks, blocks):
            _copy_block(block, parts.weights())
    norm = copy.deepcopy(backbone.final_norm) if config.apply_layernorm else nn.Identity()
    model = nn.ModuleDict({"timm": module, "norm": norm})

    def maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
        found = (x.permute(0, 2, 3, 1) for x in model["timm"](pixel_values))
        return [model["norm"](x).permute(0, 3, 1, 2) for x in found]

    kind = type(module.model).__name__
    return Upstream(f"timm {timm.__version__}, {kind}", model.eval(), maps)


def _timm_arguments(backbone: Any, block: ViTBlockParts, act: str | None) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer or Eva, of the shape of a backbone.

    Args:
        backbone: of ours.
        block: its first layer.
        act: activation of the MLP, or None if it is gated.
    """
    from timm.layers.mlp import Mlp, SwiGLUPacked
    from timm.layers.norm import LayerNorm

    config, names = backbone.config, backbone.names
    channels, hidden = config.hidden_size, block.fc1.out_features
    has_scale = block.scales()[0] is not None
    n_extra = backbone.n_prefix_tokens - (names.cls_token is not None)
    common = {
        "patch_size": config.patch,
        "in_chans": config.num_channels,
        "embed_dim": channels,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "qkv_bias": any(linear.bias is not None for linear in block.projections),
        "init_values": 1.0 if has_scale else None,
        "norm_layer": partial(LayerNorm, eps=config.layer_norm_eps),
    }
    if names.rope is not None:
        if act not in (None, "gelu") or block.proj.bias is None or block.fc1.bias is None:
            raise ValueError("timm's ViT of DINOv3 has no such activation, or no such biases")
        return {
            **common,
            "mlp_ratio": (hidden + 0.5) / channels,
            "swiglu_mlp": act is None,
            "num_reg_tokens": n_extra,
            "rope_temperature": config.rope_theta,
        }
    if (block.proj.bias is None) is not (block.fc1.bias is None):
        raise ValueError("timm's ViT has a bias in all projections or in none")
    return {
        **common,
        "mlp_ratio": (hidden * (2 if act is None else 1) + 0.5) / channels,
        "mlp_layer": SwiGLUPacked if act is None else Mlp,
        "act_layer": act or "silu",
        "proj_bias": block.proj.bias is not None,
        "class_token": names.cls_token is not None,
        "global_pool": "",
        "reg_tokens": n_extra,
        "no_embed_class": True,
        "pre_norm": names.pre_norm is not None,
    }


def _copy_embedding(backbone: Any, model: Any, grid: Grid) -> None:
    """Copies patch embedding, tokens and positions of a grid into timm's model."""
    names, parts = backbone.names, part(backbone, backbone.names.embeddings).parts()
    tokens = parts.cls_token(), parts.extra_tokens(), parts.positions()
    prefix, positions = embedding_terms(parts.owner, parts.rules, grid, *tokens)
    model.patch_embed.proj.load_state_dict(parts.projection.state_dict())
    if prefix is not None:
        model.cls_token.copy_(prefix[:, :1])
    if prefix is not None and model.reg_token is not None:
        model.reg_token.copy_(prefix[:, 1:])
    if positions is not None:
        model.pos_embed.copy_(positions)
    if names.pre_norm is not None:
        model.norm_pre.load_state_dict(part(backbone, names.pre_norm).state_dict())


def _copy_block(block: Any, weights: ViTBlockWeights) -> None:
    """Copies the tensors of a layer into timm's block."""
    attention, mlp = block.attn, block.mlp
    has_layer_scales = hasattr(block, "ls1")
    scales = (block.ls1, block.ls2) if has_layer_scales else (block.gamma_1, block.gamma_2)
    scales = [getattr(scale, "gamma", scale) for scale in scales]
    fc1_weight, fc1_bias = weights.fc1_weight, weights.fc1_bias
    if weights.gate_weight is not None:
        fc1_weight = torch.cat([weights.gate_weight, fc1_weight])
    if weights.gate_bias is not None and fc1_bias is not None:
        fc1_bias = torch.cat([weights.gate_bias, fc1_bias])
    pairs: list[tuple[Any, Any]] = [
        (block.norm1.weight, weights.norm1_weight),
        (block.norm1.bias, weights.norm1_bias),
        (attention.qkv.weight, weights.qkv_weight),
        (attention.proj.weight, weights.proj_weight),
        (attention.proj.bias, weights.proj_bias),
        (block.norm2.weight, weights.norm2_weight),
        (block.norm2.bias, weights.norm2_bias),
        (mlp.fc1.weight, fc1_weight),
        (mlp.fc1.bias, fc1_bias),
        (mlp.fc2.weight, weights.fc2_weight),
        (mlp.fc2.bias, weights.fc2_bias),
        (scales[0], weights.scale1),
        (scales[1], weights.scale2),
    ]
    if attention.qkv.bias is not None:
        pairs.append((attention.qkv.bias, weights.qkv_bias))
    elif weights.qkv_bias is not None:
        own = attention.q_bias, attention.k_bias, attention.v_bias
        pairs += zip(own, weights.qkv_bias.chunk(3))
    for to, source in pairs:
        if source is not None:
            to.copy_(source)
