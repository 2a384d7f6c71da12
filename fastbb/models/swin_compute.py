"""The computation of Swin over a typed view of its weights, whoever owns the parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import (
    WindowGeometry,
    layer_norm_linear,
    linear_residual,
    patch_merging,
    relative_position_index,
    swin_attention_block,
    swin_mlp_block,
    window_attention,
    window_attention_weights,
)

from ..weights.derived import derive
from .layers import drop_path
from .swin_cpu import runs_on_cpu, swin_block_on_cpu
from .swin_weights import PatchMergingWeights, SwinBlockSpec, SwinBlockWeights


def cuts_patches(projection: nn.Conv2d) -> bool:
    """Whether a convolution sees every patch once and nothing else, as `patch_embed` does."""
    settings = (
        projection.stride,
        projection.padding,
        projection.dilation,
        projection.groups,
        projection.padding_mode,
    )
    return settings == (projection.kernel_size, (0, 0), (1, 1), 1, "zeros")


def swin_block(
    x: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    training: bool = False,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """One block: window attention and MLP, each with its norm and residual.

    Args:
        x: [B, H, W, C].
        spec: semantics of the block.
        weights: its tensors.
        training: applies dropout and stochastic depth.
        attentions: gets the attention weights appended, if it is a list.

    Returns:
        [B, H, W, C].
    """
    geometry = spec.geometry_for(x.shape[1], x.shape[2])
    # what a block op cannot do inside: drop at random, hand out the attention weights
    random_attention = training and any((spec.attention_dropout, spec.dropout, spec.drop_path))
    random_mlp = training and any((spec.dropout, spec.mlp_drop_path))
    if attentions is None and not (random_attention or random_mlp) and runs_on_cpu(x, weights):
        return swin_block_on_cpu(x, spec, weights, geometry)
    if attentions is None and not random_attention:
        x = swin_attention_block(
            x,
            weights.norm1_weight,
            weights.norm1_bias,
            weights.qkv_weight,
            weights.qkv_bias,
            weights.relative_position_bias,
            weights.proj_weight,
            weights.proj_bias,
            num_heads=spec.num_heads,
            geometry=geometry,
            eps=weights.norm1_eps,
        )
    else:
        x = _attention_half(x, spec, weights, geometry, training, attentions)
    if not random_mlp:
        return mlp_half(x, spec, weights)
    y = layer_norm_linear(
        x,
        weights.norm2_weight,
        weights.norm2_bias,
        weights.fc1_weight,
        weights.fc1_bias,
        eps=weights.norm2_eps,
        activation=spec.activation,
    )
    return _add_branch(
        x, y, weights.fc2_weight, weights.fc2_bias, spec.dropout, spec.mlp_drop_path, training
    )


def project_qkv(x: Tensor, weights: SwinBlockWeights) -> Tensor:
    """Queries, keys and values [..., 3C] of tokens [..., C], with the norm before them."""
    return layer_norm_linear(
        x,
        weights.norm1_weight,
        weights.norm1_bias,
        weights.qkv_weight,
        weights.qkv_bias,
        eps=weights.norm1_eps,
    )


def mlp_half(x: Tensor, spec: SwinBlockSpec, weights: SwinBlockWeights) -> Tensor:
    """The second half of a block in inference, its norm and residual included: [..., C]."""
    return swin_mlp_block(
        x,
        weights.norm2_weight,
        weights.norm2_bias,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        eps=weights.norm2_eps,
        activation=spec.activation,
    )


def _attention_half(
    x: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    geometry: WindowGeometry,
    training: bool,
    attentions: list[Tensor] | None,
) -> Tensor:
    """The attention half where something happens inside it, or its weights are wanted."""
    qkv = project_qkv(x, weights)
    attend = {
        "num_heads": spec.num_heads,
        "geometry": geometry,
        "dropout_p": spec.attention_dropout if training else 0.0,
    }
    if attentions is None:
        y = window_attention(qkv, weights.relative_position_bias, weights.qkv_bias, **attend)
    else:
        y, attention = window_attention_weights(
            qkv, weights.relative_position_bias, weights.qkv_bias, **attend
        )
        attentions.append(attention)
    return _add_branch(
        x, y, weights.proj_weight, weights.proj_bias, spec.dropout, spec.drop_path, training
    )


def _add_branch(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout: float,
    path_rate: float,
    training: bool,
) -> Tensor:
    if not training or (dropout == 0.0 and path_rate == 0.0):
        return linear_residual(x, weight, bias, residual)
    branch = F.dropout(F.linear(x, weight, bias), dropout)
    return residual + drop_path(branch, path_rate, training)


def relative_position_bias(
    table: Tensor, window: tuple[int, int], index: Tensor | None = None
) -> Tensor:
    """What the scores of a window get added, from the table of its relative positions.

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
    """Weight and bias of q, k and v in one, and the relative position bias.

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


def block_weights(
    owner: nn.Module,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    projections: Sequence[nn.Linear],
    linears: tuple[nn.Linear, nn.Linear, nn.Linear],
    table: Tensor,
    window: tuple[int, int],
    index: Tensor | None = None,
) -> SwinBlockWeights:
    """The weights of a block, whoever names its layers how.

    Args:
        owner: the block, with which fused weights are remembered.
        norms: before the attention and the MLP.
        projections: to queries, keys and values, in three layers or in one.
        linears: projection after the attention, and the two of the MLP.
        table: [(2h - 1) * (2w - 1), num_heads], of the relative position bias.
        window: (h, w).
        index: the block's own rows of the table, see `relative_position_bias`.
    """
    proj, fc1, fc2 = linears
    positions = () if index is None else (index,)
    if len(projections) == 1:
        qkv_weight, qkv_bias = projections[0].weight, projections[0].bias
        (expanded,) = derive(
            owner,
            "relative_position_bias",
            lambda table, *index: (relative_position_bias(table, window, *index),),
            table,
            *positions,
            constants=window,
        )
    else:
        qkv_weight, qkv_bias, expanded = derive(
            owner,
            "attention",
            partial(_attention_tensors, window, len(positions)),
            table,
            *positions,
            *(projection.weight for projection in projections),
            *(projection.bias for projection in projections if projection.bias is not None),
            constants=window,
        )
    return SwinBlockWeights(
        norm1_weight=norms[0].weight,
        norm1_bias=norms[0].bias,
        norm1_eps=norms[0].eps,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        relative_position_bias=expanded,
        proj_weight=proj.weight,
        proj_bias=proj.bias,
        norm2_weight=norms[1].weight,
        norm2_bias=norms[1].bias,
        norm2_eps=norms[1].eps,
        fc1_weight=fc1.weight,
        fc1_bias=fc1.bias,
        fc2_weight=fc2.weight,
        fc2_bias=fc2.bias,
        owner=owner,
    )


@dataclass(frozen=True)
class SwinStage:
    """A stage as the computation sees it, whoever owns its parameters.

    Attributes:
        downsample: applied on entry, or None.
        blocks: semantics of each block and a function that reads its weights.
    """

    downsample: PatchMergingWeights | None
    blocks: Sequence[tuple[SwinBlockSpec, Callable[[], SwinBlockWeights]]]


def merge_patches(x: Tensor, weights: PatchMergingWeights) -> Tensor:
    """[B, H, W, C] -> [B, h, w, 2C]."""
    norm_weight, norm_bias, eps, reduction, bias = weights
    x = patch_merging(x, norm_weight, norm_bias, reduction, eps=eps)
    return x if bias is None else x + bias


def swin_stage(
    x: Tensor,
    stage: SwinStage,
    training: bool = False,
    attentions: list[Tensor] | None = None,
    run_block: Callable[..., Tensor] = lambda block, x: block(x),
) -> Tensor:
    """Downsamples and runs the blocks of a stage.

    Args:
        x: [B, H, W, C], the output of the stage before.
        stage: its semantics and weights.
        training: applies dropout and stochastic depth.
        attentions: gets the attention weights of the last block appended, if it is a list.
        run_block: calls a block; a place for gradient checkpointing.

    Returns:
        [B, h, w, C'].
    """
    if stage.downsample is not None:
        x = merge_patches(x, stage.downsample)
    for index, (spec, weights) in enumerate(stage.blocks):
        collect = attentions if index == len(stage.blocks) - 1 else None

        def block(x: Tensor, spec=spec, weights=weights, collect=collect) -> Tensor:
            return swin_block(x, spec, weights(), training, collect)

        x = run_block(block, x)
    return x
