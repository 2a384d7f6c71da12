"""The forward of Swin, computed from the parts of any owner."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import (
    WindowGeometry,
    layer_norm_linear,
    layer_norm_nchw,
    linear_residual,
    mlp_block,
    patch_embed,
    patch_merging,
    swin_attention_block,
    window_attention,
    window_attention_weights,
)

from ..backbone.checkpointing import BlockRunner
from .layers import cuts_patches, drop_path, norm_linear
from .swin_cpu import runs_on_cpu, swin_block_on_cpu
from .swin_parts import (
    MergingParts,
    Ragged,
    SwinBlockParts,
    SwinBlockSpec,
    SwinBlockWeights,
    SwinEmbeddingParts,
    SwinParts,
)


def swin_maps(
    parts: SwinParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    *,
    attentions: list[Tensor] | None = None,
    interpolate_positions: bool = False,
    run_block: BlockRunner | None = None,
    compute_block: Callable[..., Tensor] | None = None,
    merge: Callable[[Tensor, MergingParts], Tensor] | None = None,
) -> list[Tensor]:
    """Runs the stages up to the last wanted map.

    Args:
        parts: parts of the Swin.
        pixel_values: [B, C, H, W].
        wanted: indices of maps, at least one.
        attentions: list to append the attention weights of each stage's last block to, or None.
        interpolate_positions: interpolates absolute positions to the size of the image.
        run_block: runs a block with gradient checkpointing, or None.
        compute_block: computes a block from its parts; default: `swin_block`.
        merge: merges patches by the parts of a merging; default: `merge_patches`.

    Returns:
        [B, C', h, w] of each wanted map.

    Raises:
        ValueError: the image does not fit.
    """
    compute_block, merge = compute_block or swin_block, merge or merge_patches
    if isinstance(parts.embedding, SwinEmbeddingParts):
        x = _embed(parts.embedding, pixel_values, interpolate_positions)
    else:
        x = call_embeddings(parts.embedding, pixel_values, interpolate_positions)
    maps = {}
    first, last = 0, max(wanted)
    if parts.has_stem:
        first = 1
        if 0 in wanted:
            maps[0] = _map(parts, 0, x)
    for index, (downsample, blocks) in enumerate(parts.stages, start=first):
        if index > last:
            break
        if isinstance(downsample, MergingParts):
            x = merge(x, downsample)
        elif downsample is not None:
            x = downsample(x)
        for block in blocks:
            collected = attentions if block is blocks[-1] else None
            run: Any
            if isinstance(block, SwinBlockParts):
                run = partial(compute_block, parts=block, attentions=collected)
            else:
                run = block if collected is None else partial(block, attentions=collected)
            x = run(x) if run_block is None else run_block(run, x)
        if index in wanted:
            maps[index] = _map(parts, index, x)
    return [maps[index] for index in wanted]


def _embed(parts: SwinEmbeddingParts, pixel_values: Tensor, interpolate: bool) -> Tensor:
    """Embeds patches as tokens [B, h, w, C]."""
    projection, norm = parts.projection, parts.norm
    if not cuts_patches(projection) or norm.weight is None:  # it was changed
        return call_embeddings(parts.owner, pixel_values, interpolate)
    check_patches(projection.kernel_size, pixel_values, parts.ragged)
    x = patch_embed(
        pixel_values,
        projection.weight,
        projection.bias,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        ceil_mode=parts.ragged == "pad",
    )
    positions = getattr(parts.owner, "position_embeddings", None)
    if positions is not None:
        x = x + absolute_positions(positions, x, interpolate)
    dropout = parts.dropout
    return x if dropout is None or not dropout.training else dropout(x)


def call_embeddings(module: nn.Module, pixel_values: Tensor, interpolate: bool) -> Tensor:
    """Calls the embeddings of a native Swin; a module in their place gets the pixels alone."""
    options = {"interpolate_positions": True} if interpolate else {}
    return module(pixel_values, **options)


def check_patches(patch: Sequence[int], pixel_values: Tensor, ragged: Ragged) -> None:
    """Raises a ValueError if an image [B, C, H, W] has no patch, or a part of one that is refused.

    Args:
        patch: height and width of a patch.
        pixel_values: the image.
        ragged: rule for pixels beyond the last whole patch.
    """
    height, width = pixel_values.shape[2:]
    h, w = patch
    if ragged == "drop" and (height < h or width < w):
        raise ValueError(
            f"the image must be at least one patch of {h}x{w} pixels, got {height}x{width}"
        )
    if ragged == "refuse" and (height % h or width % w):
        raise ValueError(
            f"timm's Swin needs a height and width divisible by its patch of {h}x{w} pixels, "
            f"got {height}x{width}"
        )


def absolute_positions(positions: Tensor, x: Tensor, interpolate: bool) -> Tensor:
    """Absolute embeddings [1, P, C] for the tokens of x [B, H, W, C]."""
    height, width = x.shape[1:3]
    grid = positions.shape[1]
    if grid != height * width or (interpolate and height != width):
        if not interpolate:
            raise ValueError(
                f"the absolute embeddings are for {grid} patches, the image has "
                f"{height}x{width}; pass interpolate_pos_encoding=True"
            )
        side = int(grid**0.5)
        positions = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(
            positions, size=(height, width), mode="bicubic", align_corners=False
        )
        return positions.permute(0, 2, 3, 1)
    return positions.view(1, height, width, -1)


def _map(parts: SwinParts, index: int, x: Tensor) -> Tensor:
    """The returned map [B, C, h, w] of tokens [B, h, w, C]."""
    return normed_map(x, parts.norms[index]) if parts.norms else x.permute(0, 3, 1, 2)


def normed_map(x: Tensor, norm: Any) -> Tensor:
    """Normalizes tokens [B, h, w, C] and returns them as a map [B, C, h, w]."""
    return layer_norm_nchw(x, norm.weight, norm.bias, eps=norm.eps)


def merge_patches(x: Tensor, merging: Any) -> Tensor:
    """Merges patches, [B, H, W, C] to [B, h, w, 2C], by a module with `norm` and `reduction`."""
    norm, reduction = merging.norm, merging.reduction
    x = patch_merging(x, norm.weight, norm.bias, reduction.weight, eps=norm.eps)
    bias = reduction.bias  # no published Swin has one
    return x if bias is None else x + bias


def swin_block(
    x: Tensor,
    parts: SwinBlockParts,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Runs a block: window attention and MLP, each with a norm and a residual.

    Args:
        x: [B, H, W, C].
        parts: of the block.
        attentions: list to append the attention weights to, or None.

    Returns:
        [B, H, W, C].
    """
    spec, weights = parts.spec(), parts.weights()
    geometry = spec.geometry_for(x.shape[1], x.shape[2])
    # the block ops have no dropout and do not return attention weights
    random_attention = any((spec.attention_dropout, spec.dropout, spec.drop_path))
    random_mlp = any((spec.dropout, spec.mlp_drop_path))
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
            norm_linear=norm_linear(parts.owner, "qkv"),
        )
    else:
        x = _attention_half(x, spec, weights, geometry, attentions)
    if not random_mlp:
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
            norm_linear=norm_linear(parts.owner, "fc1"),
        )
    y = layer_norm_linear(
        x,
        weights.norm2_weight,
        weights.norm2_bias,
        weights.fc1_weight,
        weights.fc1_bias,
        eps=weights.norm2_eps,
        activation=spec.activation,
    )
    return _add_branch(x, y, weights.fc2_weight, weights.fc2_bias, spec.dropout, spec.mlp_drop_path)


def _attention_half(
    x: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    geometry: WindowGeometry,
    attentions: list[Tensor] | None,
) -> Tensor:
    """Runs the attention half op by op, with dropout inside, or to return its weights."""
    qkv = layer_norm_linear(
        x,
        weights.norm1_weight,
        weights.norm1_bias,
        weights.qkv_weight,
        weights.qkv_bias,
        eps=weights.norm1_eps,
    )
    attend = {
        "num_heads": spec.num_heads,
        "geometry": geometry,
        "dropout_p": spec.attention_dropout,
    }
    if attentions is None:
        y = window_attention(qkv, weights.relative_position_bias, weights.qkv_bias, **attend)
    else:
        y, attention = window_attention_weights(
            qkv, weights.relative_position_bias, weights.qkv_bias, **attend
        )
        attentions.append(attention)
    return _add_branch(x, y, weights.proj_weight, weights.proj_bias, spec.dropout, spec.drop_path)


def _add_branch(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout: float,
    path_rate: float,
) -> Tensor:
    if dropout == 0.0 and path_rate == 0.0:
        return linear_residual(x, weight, bias, residual)
    branch = F.dropout(F.linear(x, weight, bias), dropout)
    return residual + drop_path(branch, path_rate)
