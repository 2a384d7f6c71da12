"""The forward of Swin V2, computed from the parts of any owner."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastbb_kernels import mlp_block, swin_attention_block, window_attention_weights
from fastbb_kernels.ops.linear_norm_residual import linear_norm_residual

from .swin_cpu import runs_on_cpu, swin_block_on_cpu
from .swin_forward import swin_maps
from .swin_v2_parts import Swinv2BlockParts


def merge_patches(x: Tensor, merging: Any) -> Tensor:
    """Merges patches, [B, H, W, C] to [B, h, w, 2C], by a module with `reduction` and `norm`."""
    return merging.norm(merging.reduction(neighbours(x)))


def neighbours(x: Tensor) -> Tensor:
    """Concatenates 2x2 neighbours, column by column, [B, H, W, C] to [B, h, w, 4C]."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, C]
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


def swinv2_block(
    x: Tensor, parts: Swinv2BlockParts, attentions: list[Tensor] | None = None
) -> Tensor:
    """Runs a block: window attention and MLP, each followed by a norm and added to a residual.

    Args:
        x: [B, H, W, C].
        parts: of the block.
        attentions: list to append the attention weights to, or None.

    Returns:
        [B, H, W, C].
    """
    if parts.trains():
        return parts.owner(x) if attentions is None else parts.owner(x, attentions=attentions)
    spec, weights = parts.spec(), parts.weights()
    if attentions is None and runs_on_cpu(x, weights):
        return swin_block_on_cpu(x, spec, weights, spec.geometry)
    qkv = weights.qkv_weight, weights.qkv_bias
    proj = weights.proj_weight, weights.proj_bias
    norm = weights.norm1_weight, weights.norm1_bias
    options: dict[str, Any] = {
        "num_heads": spec.num_heads,
        "geometry": spec.geometry,
        "logit_scale": weights.logit_scale,
        "mask_value": spec.mask_value,
    }
    bias, eps = weights.relative_position_bias, weights.norm1_eps
    if attentions is None:
        x = swin_attention_block(x, *norm, *qkv, bias, *proj, **options, eps=eps, post_norm=True)
    else:  # which the block op does not return
        arguments = F.linear(x, *qkv), bias, weights.qkv_bias
        y, attention = window_attention_weights(*arguments, **options)
        attentions.append(attention)
        x = linear_norm_residual(y, *proj, *norm, x, eps=eps)
    return mlp_block(
        x,
        weights.norm2_weight,
        weights.norm2_bias,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        eps=weights.norm2_eps,
        activation=spec.activation,
        post_norm=True,
    )


swinv2_maps = partial(swin_maps, compute_block=swinv2_block, merge=merge_patches)
