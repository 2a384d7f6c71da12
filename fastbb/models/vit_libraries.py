"""Builders of the parts of ViTs in the models of transformers; what builders for timm share.

Builders find and check layers once, and raise `Refused` for what the forward does not cover.
Tensors and eps may change while a model runs, so they are read at every call.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..weights.derived import derive
from .parts import Refused, activation_of
from .vit_names import ViTNames, part
from .vit_parts import (
    ViTBlockParts,
    ViTBlockSpec,
    ViTEmbeddingParts,
    ViTParts,
)
from .vit_positions import (
    Grid,
    PositionRules,
    Rotation,
    relative_position_bias,
)


def check_block(
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


def block_spec(
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


def transformers_block(block: Any, names: ViTNames) -> ViTBlockParts:
    """Reads a layer of transformers.

    Args:
        block: Dinov2Layer, ViTLayer, CLIPEncoderLayer ...
        names: of its attributes.
    """
    attention, mlp = getattr(block, names.attention), block.mlp
    if getattr(attention, "is_causal", False):
        raise Refused("its attention is causal")
    is_gated = hasattr(mlp, names.gate)
    fc1, fc2 = (getattr(mlp, name) for name in (names.gated_fc if is_gated else names.fc))
    gate = getattr(mlp, names.gate) if is_gated else None
    activation = getattr(mlp, names.gated_activation if is_gated else names.activation)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    proj = getattr(attention, names.proj)
    norms = tuple(getattr(block, name) for name in names.norms)
    position_bias = getattr(block, "relative_position_bias", None)
    read = [attention, mlp, activation, position_bias]
    read += [getattr(block, path.partition(".")[0]) for path in names.scales or ()]
    linears = [*projections, proj, fc1, fc2, *([gate] if is_gated else [])]
    check_block(block, read, norms, linears)
    num_heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
    scale = getattr(attention, "scaling", None) or attention.scale
    spec = block_spec(num_heads, attention.head_dim, scale, proj, activation)
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
