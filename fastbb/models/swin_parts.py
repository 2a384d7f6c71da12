"""The parts that the forward of Swin takes, and builders of them for the models of libraries.

Builders find and check layers once. Tensors, eps and the windows of transformers' blocks may change
while a model runs, so they are read at every call.

Windows and shifts come from:

* native backbones: `SwinConfig.window_size`, once (`swin._block_specs`);
* timm: its modules, which timm builds for `img_size`; read once, and again if they change;
* torchvision: its modules; at run time an axis that one window covers is not shifted;
* transformers: `window_size` and `shift_size` of each block, read at every call. Upstream's forward
  of a single block sets them by the size of the map; a whole SwinBackbone takes them as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import WindowGeometry, relative_position_index
from fastbb_kernels._window_geometry import MASK_VALUE

from ..weights.derived import derive
from .layers import cuts_patches
from .parts import Refused, activation_of


@dataclass(frozen=True)
class SwinBlockSpec:
    """Semantics of a block; rates of dropout are 0 in inference.

    Attributes:
        num_heads: attention heads.
        geometry: windows, shift, and whether the roll comes before the padding (timm).
        clamp_shift: whether an axis that one window covers is not shifted (torchvision).
        activation: of the MLP.
        drop_path: stochastic depth of the attention branch.
        mlp_drop_path: stochastic depth of the MLP branch (0 in transformers).
        dropout: of both branches.
        attention_dropout: of the attention weights.
        clamp_both: whether no axis is shifted where a window covers one (transformers' SwinModel).
        mask_value: added to the score of tokens that were not neighbours before the shift.
        post_norm: whether the norms come after attention and MLP (Swin V2).
    """

    num_heads: int
    geometry: WindowGeometry
    clamp_shift: bool = False
    activation: str = "gelu"
    drop_path: float = 0.0
    mlp_drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    clamp_both: bool = False
    mask_value: float = MASK_VALUE
    post_norm: bool = False

    def geometry_for(self, height: int, width: int) -> WindowGeometry:
        """Windows and shift for a map of height x width tokens."""
        if not (self.clamp_shift or self.clamp_both):
            return self.geometry
        (h, w), (shift_h, shift_w), roll_first = self.geometry
        if self.clamp_both and (height <= h or width <= w):
            return WindowGeometry((h, w), (0, 0), roll_first)
        if not self.clamp_shift:
            return self.geometry
        return WindowGeometry(
            (h, w), (0 if height <= h else shift_h, 0 if width <= w else shift_w), roll_first
        )


class SwinBlockWeights(NamedTuple):
    """Tensors of a block and eps of its norms, read for one call.

    C channels, N tokens per window, P >= N, F hidden channels.
    """

    norm1_weight: Tensor  # [C]
    norm1_bias: Tensor  # [C]
    norm1_eps: float
    qkv_weight: Tensor  # [3C, C]
    qkv_bias: Tensor | None  # [3C]
    relative_position_bias: Tensor  # [num_heads, N, P]
    proj_weight: Tensor  # [C, C]
    proj_bias: Tensor | None  # [C]
    norm2_weight: Tensor  # [C]
    norm2_bias: Tensor  # [C]
    norm2_eps: float
    fc1_weight: Tensor  # [F, C]
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [C, F]
    fc2_bias: Tensor  # [C]
    owner: nn.Module | None = None  # derived tensors are cached for it
    logit_scale: Tensor | None = None  # [num_heads] of cosines (Swin V2)

    def tensors(self) -> list[Tensor]:
        """All tensors that are not None."""
        return [value for value in self if isinstance(value, Tensor)]


@dataclass(frozen=True)
class SwinBlockParts:
    """The layers of a block.

    Attributes:
        owner: the block; fused weights are cached for it.
        norms: of the attention and the MLP.
        projections: to queries, keys and values, in three layers or in one.
        proj: after the attention.
        fc1: first layer of the MLP.
        fc2: second layer of the MLP.
        bias: module with `relative_position_bias_table` [(2h - 1) * (2w - 1), num_heads].
        semantics: semantics of the block when it was built.
        has_index: whether `bias` has its own `relative_position_index`, which gives the row of the
            table for each pair of tokens.
    """

    owner: nn.Module
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    projections: tuple[nn.Linear, ...]
    proj: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    bias: Any
    semantics: SwinBlockSpec
    has_index: bool = True

    def spec(self) -> SwinBlockSpec:
        """Reads the semantics for a call."""
        return self.semantics

    def weights(self) -> SwinBlockWeights:
        """Reads the tensors for a call; fused ones are cached."""
        window = self.spec().geometry.window
        table = self.bias.relative_position_bias_table
        index = (self.bias.relative_position_index,) if self.has_index else ()
        if len(self.projections) == 1:
            (qkv,) = self.projections
            qkv_weight, qkv_bias = qkv.weight, qkv.bias
            (bias,) = derive(
                self.owner,
                "relative_position_bias",
                lambda table, *index: (relative_position_bias(table, window, *index),),
                table,
                *index,
                constants=window,
            )
        else:
            biases = [linear.bias for linear in self.projections]
            qkv_weight, qkv_bias, bias = derive(
                self.owner,
                "attention",
                partial(_attention_tensors, window, len(index)),
                table,
                *index,
                *(linear.weight for linear in self.projections),
                *(bias for bias in biases if bias is not None),
                constants=window,
            )
        return self.weights_with(qkv_weight, qkv_bias, bias)

    def weights_with(
        self,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        relative_position_bias: Tensor,
        logit_scale: Tensor | None = None,
    ) -> SwinBlockWeights:
        """Reads the other tensors for a call; those of the attention are derived."""
        first, second = self.norms
        return SwinBlockWeights(
            norm1_weight=first.weight,
            norm1_bias=first.bias,
            norm1_eps=first.eps,
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            relative_position_bias=relative_position_bias,
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            norm2_weight=second.weight,
            norm2_bias=second.bias,
            norm2_eps=second.eps,
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            owner=self.owner,
            logit_scale=logit_scale,
        )

    def misfit(self) -> str | None:
        """The reason why table or index of the bias do not fit the window, or None."""
        height, width = self.spec().geometry.window
        if self.bias.relative_position_bias_table.shape[0] != (2 * height - 1) * (2 * width - 1):
            return f"its bias table is not for windows of {height}x{width}"
        if self.bias.relative_position_index.numel() != (height * width) ** 2:
            return f"its index of the bias table is not for windows of {height}x{width}"
        return None


class MergingParts(NamedTuple):
    """The layers of a patch merging."""

    norm: nn.LayerNorm
    reduction: nn.Linear


class SwinStageParts(NamedTuple):
    """A stage.

    Attributes:
        downsample: the patch merging before the blocks, or None; a module is called.
        blocks: in order of depth; a module is called, and may stand for several blocks.
    """

    downsample: MergingParts | nn.Module | None
    blocks: tuple[SwinBlockParts | nn.Module, ...]


Ragged = Literal["pad", "drop", "refuse"]  # pixels beyond the last whole patch; "pad" with zeros


class SwinEmbeddingParts(NamedTuple):
    """The patch embedding.

    Attributes:
        projection: convolution of patches.
        norm: after it.
        ragged: rule for pixels beyond the last whole patch.
        owner: module with absolute `position_embeddings` [1, P, C] or None, which is called
            where the convolution or the norm were changed; None if there is no such module.
        dropout: after it, or None.
    """

    projection: nn.Conv2d
    norm: nn.LayerNorm
    ragged: Ragged
    owner: Any = None
    dropout: nn.Dropout | None = None


@dataclass(frozen=True)
class SwinParts:
    """A Swin.

    Attributes:
        embedding: of patches; a module is called.
        stages: in order of depth.
        norms: of returned maps, by index; empty if maps are returned without a norm.
        has_stem: whether map 0 is the embedding; otherwise it is the first stage.
    """

    embedding: SwinEmbeddingParts | nn.Module
    stages: tuple[SwinStageParts, ...]
    norms: Mapping[int, nn.LayerNorm] = field(default_factory=dict)
    has_stem: bool = True


def relative_position_bias(
    table: Tensor, window: tuple[int, int], index: Tensor | None = None
) -> Tensor:
    """Computes the bias of the attention scores of a window from the table of relative positions.

    Args:
        table: [(2h - 1) * (2w - 1), num_heads].
        window: (h, w), N = h * w tokens.
        index: int64 of N * N rows of the table, in any shape; default: `relative_position_index`.

    Returns:
        [num_heads, N, P] with P the next multiple of 16, so that kernels load whole aligned rows;
        zero beyond column N. Dtype of `table`.
    """
    tokens = window[0] * window[1]
    if index is None:
        index = relative_position_index(window, table.device)
    bias = table[index.flatten()]
    bias = bias.view(tokens, tokens, -1).permute(2, 0, 1)
    return F.pad(bias, (0, -tokens % 16)).contiguous()


def _attention_tensors(
    window: tuple[int, int], n_index: int, table: Tensor, *tensors: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fuses weights and biases of q, k and v, and computes the relative position bias.

    Args:
        window: (h, w).
        n_index: 1 if the index of the bias comes first in `tensors`, else 0.
        table: of the relative position bias.
        tensors: that index, weights of q, k and v, and their biases if they have any.
    """
    index = tensors[0] if n_index else None
    weights, biases = tensors[n_index : n_index + 3], tensors[n_index + 3 :]
    qkv_bias = torch.cat(biases) if biases else None
    return torch.cat(weights), qkv_bias, relative_position_bias(table, window, index)


# --- the layers of other libraries


class _TransformersBlock(SwinBlockParts):
    """A block of transformers, whose own forward may change its window and shift."""

    def spec(self) -> SwinBlockSpec:
        geometry, spec = _transformers_geometry(self.owner), self.semantics
        return spec if geometry == spec.geometry else replace(spec, geometry=geometry)


def _transformers_geometry(block: Any) -> WindowGeometry:
    window, shift = int(block.window_size), int(block.shift_size)
    return WindowGeometry((window, window), (shift, shift))


def transformers_block(block: Any) -> SwinBlockParts:
    """Reads a SwinLayer.

    Raises:
        Refused: the ops do not cover the module. The other builders raise it too.
    """
    attention = block.attention
    return checked_block(
        block,
        norms=(block.layernorm_before, block.layernorm_after),
        projections=(attention.q_proj, attention.k_proj, attention.v_proj),
        linears=(attention.o_proj, block.mlp.fc1, block.mlp.fc2),
        bias=attention.relative_position_bias,
        activation=block.mlp.activation_fn,
        num_heads=attention.num_attention_heads,
        geometry=_transformers_geometry(block),
        scale=attention.scaling,
        make=_TransformersBlock,
    )


def maskformer_block(block: Any) -> SwinBlockParts:
    """Reads a MaskFormerSwinLayer."""
    own = getattr(block.attention, "self")  # noqa: B009 -- a name that reads as a variable
    return checked_block(
        block,
        norms=(block.layernorm_before, block.layernorm_after),
        projections=(own.query, own.key, own.value),
        linears=(block.attention.output.dense, block.intermediate.dense, block.output.dense),
        bias=own,
        activation=block.intermediate.intermediate_act_fn,
        num_heads=own.num_attention_heads,
        geometry=_transformers_geometry(block),
        make=_TransformersBlock,
    )


def timm_block(block: Any) -> SwinBlockParts:
    """Reads timm's SwinTransformerBlock, which rolls before it pads."""
    attention, mlp = block.attn, block.mlp
    return checked_block(
        block,
        norms=(block.norm1, block.norm2),
        projections=(attention.qkv,),
        linears=(attention.proj, mlp.fc1, mlp.fc2),
        bias=attention,
        activation=mlp.act,
        num_heads=attention.num_heads,
        geometry=WindowGeometry(tuple(block.window_size), tuple(block.shift_size), True),
        scale=attention.scale,
    )


def torchvision_block(block: Any) -> SwinBlockParts:
    """Reads torchvision's SwinTransformerBlock, which does not shift an axis of one window."""
    attention, mlp = block.attn, block.mlp
    return checked_block(
        block,
        norms=(block.norm1, block.norm2),
        projections=(attention.qkv,),
        linears=(attention.proj, mlp[0], mlp[3]),
        bias=attention,
        activation=mlp[1],
        num_heads=attention.num_heads,
        geometry=WindowGeometry(tuple(attention.window_size), tuple(attention.shift_size)),
        clamp_shift=True,
    )


def checked_block(
    block: Any,
    norms: tuple[Any, Any],
    projections: tuple[Any, ...],
    linears: tuple[Any, Any, Any],
    bias: Any,
    activation: nn.Module,
    num_heads: int,
    geometry: WindowGeometry,
    scale: Any = None,
    clamp_shift: bool = False,
    make: Callable[..., SwinBlockParts] = SwinBlockParts,
    **semantics: Any,
) -> SwinBlockParts:
    """Builds the parts of a block after a check that the ops cover its layers.

    Args:
        block: their owner.
        norms: see `SwinBlockParts`.
        projections: one or three.
        linears: `proj`, `fc1` and `fc2`.
        bias: owner of table and index.
        activation: of the MLP.
        num_heads: attention heads.
        geometry: windows and shift.
        scale: factor of the scores, or None if it follows from the size of the heads.
        clamp_shift: see `SwinBlockSpec`.
        make: class of the parts.
        semantics: further fields of `SwinBlockSpec`.
    """
    if any(type(norm) is not nn.LayerNorm for norm in norms):
        raise Refused("its norms are not layer norms")
    if any(type(linear) is not nn.Linear for linear in (*projections, *linears)):
        raise Refused("its linear layers are not torch's own")
    proj, fc1, fc2 = linears
    if proj.in_features != proj.out_features:
        raise Refused("its heads have a size of their own")
    usual = (proj.out_features // num_heads) ** -0.5
    if scale is not None and not (isinstance(scale, (int, float)) and scale == usual):
        raise Refused(f"its attention scale is {scale!r:.40}, the usual one {usual:.4g}")
    name = activation_of(activation)
    if fc1.bias is None:
        raise Refused("its MLP has no bias")
    spec = SwinBlockSpec(num_heads, geometry, clamp_shift, name, **semantics)
    return make(block, norms, projections, proj, fc1, fc2, bias, spec)


def merging_parts(merging: Any) -> MergingParts:
    """Reads a patch merging, which has `norm` and `reduction` in all libraries."""
    if type(merging.norm) is not nn.LayerNorm:
        raise Refused(f"its norm is a {type(merging.norm).__name__}")
    if type(merging.reduction) is not nn.Linear:
        raise Refused(f"its reduction is a {type(merging.reduction).__name__}")
    return MergingParts(merging.norm, merging.reduction)


def transformers_parts(backbone: Any) -> SwinParts:
    """Reads transformers' SwinBackbone or MaskFormerSwinBackbone."""
    swin = backbone.swin if hasattr(backbone, "swin") else backbone.model
    norms: Any = backbone.hidden_states_norms
    if isinstance(norms, nn.ModuleDict):
        names = list(backbone.stage_names)
        read, norms = transformers_block, {names.index(name): norms[name] for name in norms}
    else:  # MaskFormer's list has no norm of the stem
        read, norms = maskformer_block, dict(enumerate(norms, start=1))
    embeddings, stages = swin.embeddings, list(swin.encoder.layers)
    projection = embeddings.patch_embeddings.projection
    if type(projection) is not nn.Conv2d or not cuts_patches(projection):
        raise Refused("its patch embedding is no convolution that cuts patches")
    if any(type(norm) is not nn.LayerNorm for norm in [embeddings.norm, *norms.values()]):
        raise Refused("its norms are not layer norms")
    mergings = [stage.downsample for stage in stages[:-1]]
    return SwinParts(
        SwinEmbeddingParts(projection, embeddings.norm, "pad", embeddings),
        tuple(
            SwinStageParts(merging, tuple(map(read, stage.blocks)))
            for merging, stage in zip([None, *map(merging_parts, mergings)], stages)
        ),
        norms,
    )


def timm_parts(features: nn.Module) -> SwinParts:
    """Reads timm's features-only Swin."""
    from timm.layers.mlp import Mlp
    from timm.models.swin_transformer import (
        PatchMerging,
        SwinTransformerBlock,
        SwinTransformerStage,
        WindowAttention,
    )

    layers = SwinTransformerBlock, WindowAttention, Mlp
    return read_timm(features, SwinTransformerStage, PatchMerging, layers, timm_block)


def read_timm(
    features: nn.Module,
    stage_class: type[nn.Module],
    merging_class: type[nn.Module],
    layer_classes: tuple[type[nn.Module], ...],
    read_block: Callable[[Any], SwinBlockParts],
) -> SwinParts:
    """Reads a features-only model of timm, of Swin or Swin V2.

    Windows and shifts are those for the image size that the model was built with.

    Args:
        features: the model.
        stage_class: class of its stages.
        merging_class: class of the merging that a stage may begin with.
        layer_classes: classes of a block, its attention and its MLP.
        read_block: reads a block.
    """
    children: list[Any] = list(features.children())
    embed, stages = children[0], children[1:]
    if not stages or any(type(stage) is not stage_class for stage in stages):
        raise Refused("it is no model of this family")
    projection, norm = getattr(embed, "proj", None), getattr(embed, "norm", None)
    if type(projection) is not nn.Conv2d or not cuts_patches(projection):
        raise Refused("its patch embedding is no convolution that cuts patches")
    if type(norm) is not nn.LayerNorm:
        raise Refused("its norms are not layer norms")
    read = []
    for stage in stages:
        merging = stage.downsample
        if type(merging) not in (merging_class, nn.Identity):
            raise Refused(f"a {type(merging).__name__} is before a stage")
        blocks = []
        for block in stage.blocks:
            if (type(block), type(block.attn), type(block.mlp)) != layer_classes:
                raise Refused(f"a {type(block).__name__} is inside it")
            parts = read_block(block)
            misfit = parts.misfit()
            if misfit is not None:
                raise Refused(misfit)
            blocks.append(parts)
        before = merging_parts(merging) if type(merging) is merging_class else None
        read.append(SwinStageParts(before, tuple(blocks)))
    return SwinParts(SwinEmbeddingParts(projection, norm, "refuse"), tuple(read), has_stem=False)
