"""Builders of the parts of ViTs in the models of transformers and timm.

Builders find and check layers once, and raise `Refused` for what the forward does not cover.
Tensors and eps may change while a model runs, so they are read at every call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.derived import derive
from .parts import Refused, activation_of
from .vit_forward import vit_states
from .vit_names import GATE, GATED, ViTNames, part
from .vit_parts import ViTBlockParts, ViTBlockSpec, ViTEmbeddingParts, ViTParts
from .vit_positions import Grid, PositionRules, Rotation, patch_grid, relative_position_bias


def _check_block(
    block: nn.Module, read: Sequence[Any], norms: Sequence[Any], linears: Sequence[Any]
) -> None:
    """Checks the layers of a block.

    Args:
        block: of any library.
        read: other modules that the forward computes, or that a builder has checked.
        norms: layer norms.
        linears: linear layers.

    Raises:
        Refused: a layer is of another class, or a layer is inside that is not computed.
    """
    for norm in norms:
        is_plain = type(norm).forward is nn.LayerNorm.forward or (
            type(norm).__module__ == "timm.layers.norm"
            and type(norm).__name__ == "LayerNorm"
            and not norm._fast_norm
        )
        if not is_plain:
            raise Refused(f"its norm is a {type(norm).__name__}")
        if norm.weight is None or norm.bias is None:
            raise Refused("its norm has no weight or no bias")
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise Refused(f"a {type(linear).__name__} is where a linear layer was expected")
    known = {id(block), *map(id, (*read, *norms, *linears))}
    for module in block.modules():
        computes_nothing = isinstance(module, (nn.Identity, nn.Dropout)) or (
            type(module).__name__.endswith("DropPath")
        )
        if id(module) not in known and not computes_nothing:
            raise Refused(f"a {type(module).__name__} is inside it")


def _block_spec(
    num_heads: int, head_dim: int, scale: Any, proj: nn.Linear, activation: nn.Module
) -> ViTBlockSpec:
    """The semantics of a block in inference.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head.
        scale: factor of the scores.
        proj: after the attention.
        activation: of the MLP.
    """
    if not proj.in_features == proj.out_features == num_heads * head_dim:
        raise Refused("its heads have a size of their own")
    usual = head_dim**-0.5
    if not (isinstance(scale, (int, float)) and scale == usual):
        raise Refused(f"its attention scale is {scale!r:.40}, the usual one {usual:.4g}")
    return ViTBlockSpec(num_heads, activation_of(activation))


# --- transformers


def transformers_block(block: Any, names: ViTNames) -> ViTBlockParts:
    """Reads a layer of transformers.

    Args:
        block: Dinov2Layer, ViTLayer, CLIPEncoderLayer ...
        names: of its attributes.
    """
    attention, mlp = getattr(block, names.attention), block.mlp
    if getattr(attention, "is_causal", False):
        raise Refused("its attention is causal")
    is_gated = hasattr(mlp, GATE)
    gate = getattr(mlp, GATE) if is_gated else None
    layers = GATED if is_gated else (*names.fc, names.activation)
    fc1, fc2, activation = (getattr(mlp, name) for name in layers)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    proj = getattr(attention, names.proj)
    norms = tuple(getattr(block, name) for name in names.norms)
    position_bias = getattr(block, "relative_position_bias", None)
    read = [attention, mlp, activation, position_bias]
    read += [getattr(block, path.partition(".")[0]) for path in names.scales or ()]
    linears = [*projections, proj, fc1, fc2, *([gate] if is_gated else [])]
    _check_block(block, read, norms, linears)
    num_heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
    scale = getattr(attention, "scaling", None) or attention.scale
    spec = _block_spec(num_heads, attention.head_dim, scale, proj, activation)
    factors = [part(block, path) for path in names.scales or ()]
    if any(not isinstance(factor, Tensor) and factor != 1.0 for factor in factors):
        raise Refused("its layer scale is a number")

    def scales() -> tuple[Tensor | None, Tensor | None]:
        found = [part(block, path) for path in names.scales or ()]
        first, second = [x if isinstance(x, Tensor) else None for x in found] or (None, None)
        return first, second

    return ViTBlockParts(
        owner=block,
        norms=norms,
        projections=projections,
        proj=proj,
        scales=scales,
        fc1=fc1,
        fc2=fc2,
        gate=gate,
        spec=lambda: spec,
        position_bias=None if position_bias is None else _position_bias(position_bias),
    )


def _position_bias(bias: Any) -> Callable[[Grid], Tensor]:
    """The bias that a BeitRelativePositionBias computes for a grid of patches, cached."""
    return partial(relative_position_bias, bias, tuple(bias.window_size))


def transformers_parts(backbone: Any, names: ViTNames) -> ViTParts:
    """Reads a whole backbone of transformers.

    Args:
        backbone: Dinov2Backbone, DINOv3ViTBackbone, BeitBackbone ...
        names: of its attributes.
    """
    embeddings = part(backbone, names.embeddings)
    projection = part(embeddings, names.patches)
    is_cut = type(projection) is nn.Conv2d and projection.kernel_size == projection.stride
    if not is_cut or projection.padding != (0, 0) or projection.dilation != (1, 1):
        raise Refused("its patch embedding is no convolution that cuts patches")
    root = part(backbone, names.root[:-1]) if names.root else backbone
    shared_bias = getattr(root, "shared_position_bias", None)
    blocks = [transformers_block(block, names) for block in part(backbone, names.layers)]
    rope = None if names.rope is None else _rope(part(backbone, names.rope), projection)
    return ViTParts(
        embedding=ViTEmbeddingParts(
            owner=embeddings,
            projection=projection,
            cls_token=_reader(embeddings, names.cls_token),
            extra_tokens=_reader(embeddings, names.extra_tokens),
            positions=_reader(embeddings, names.positions),
            rules=_rules(embeddings, names),
        ),
        pre_norm=None,
        blocks=tuple(blocks),
        rope=rope,
        shared_bias=None if shared_bias is None else _position_bias(shared_bias),
        takes_resolution=any(block.position_bias is not None for block in blocks),
    )


def _reader(embeddings: Any, path: str | None) -> Callable[[], Tensor | None]:
    return lambda: None if path is None else part(embeddings, path)


def _rules(embeddings: Any, names: ViTNames) -> PositionRules:
    """How transformers interpolates position embeddings, which it takes for those of a square."""
    positions = _reader(embeddings, names.positions)()
    side = 1
    if positions is not None:
        n_patches = positions.shape[-2] - 1
        side = math.isqrt(n_patches)
        if side * side != n_patches:
            raise Refused("its position embeddings are not those of a square image")
    return PositionRules((side, side), 1, names.antialias, names.in_fp32)


def _rope(rope: nn.Module, projection: nn.Conv2d) -> Callable[[Grid], Rotation]:
    """The rotation that a DINOv3ViTRopePositionEmbedding computes for a grid of patches, cached."""

    def rotation(grid: Grid) -> Rotation:
        def compute(like: Tensor, *buffers: Tensor) -> Rotation:
            size = [n * pixels for n, pixels in zip(grid, projection.kernel_size)]
            return rope(like.new_empty(1, 1, *size))

        return derive(rope, "rotation", compute, projection.weight, *rope.buffers(), constants=grid)

    return rotation


# --- timm


@dataclass(frozen=True)
class TimmBlockParts(ViTBlockParts):
    """A block of timm.

    Attributes:
        gate_last: whether the gate is the second half of `fc1`; None if it is not in there.
    """

    gate_last: bool | None = None

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        attention: Any = self.owner.attn
        first, *others = self.projections
        if others or getattr(attention, "q_bias", None) is None:
            return super().qkv()
        # EVA has a bias of keys too, which is 0
        biases = attention.q_bias, attention.k_bias, attention.v_bias
        (bias,) = derive(self.owner, "qkv_bias", lambda *b: (torch.cat(b),), *biases)
        return first.weight, bias

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
    _check_block(block, [attention, mlp, mlp.act, *read], norms, linears)
    num_heads, proj = attention.num_heads, attention.proj
    spec = _block_spec(num_heads, proj.in_features // num_heads, attention.scale, proj, mlp.act)
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
    embedding = model.patch_embed
    if type(embedding) is not PatchEmbed:
        raise Refused(f"its patch embedding is a {type(embedding).__name__}")
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
