"""The forward of ConvNeXt, computed from the parts of any owner.

Between the ops, maps are [B, C, H, W] in channels-last memory, so that rows of channels are views.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import (
    depthwise_conv_bn_act,
    layer_norm_nchw,
    mlp_block,
    patch_embed,
)
from fastbb_kernels._dispatch import launches_on
from fastbb_kernels.ops.convnext_block import convnext_block as whole_block
from fastbb_kernels.ops.grn_linear_residual import global_response_norm, grn_linear_residual

from ..backbone.checkpointing import BlockRunner
from ..weights.derived import derive
from .convnext_cpu import mlp_on_cpu, runs_on_cpu
from .convnext_parts import (
    Before,
    ConvNextBlockParts,
    ConvNextParts,
    PatchParts,
    matrix,
)
from .layers import cuts_patches, drop_path, norm_linear


def convnext_maps(
    parts: ConvNextParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    *,
    run_block: BlockRunner | None = None,
) -> list[Tensor]:
    """Runs the stages up to the last wanted map.

    Args:
        parts: parts of the ConvNeXt.
        pixel_values: [B, C, H, W].
        wanted: indices of maps, at least one.
        run_block: runs a block with gradient checkpointing, or None.

    Returns:
        [B, C', h, w] of each wanted map.

    Raises:
        ValueError: the image is too small.
    """
    x = run_before(parts.stem, pixel_values)
    maps = {}
    first, last = 0, max(wanted)
    if parts.has_stem:
        first, maps[0] = 1, x
    for index, (before, blocks) in enumerate(parts.stages, start=first):
        if index > last:
            break
        x = run_before(before, x)
        for block in blocks:
            run: Any = block
            if isinstance(block, ConvNextBlockParts):
                run = partial(convnext_block, parts=block)
            x = run(x) if run_block is None else run_block(run, x)
        maps[index] = x
    return [maps[index] for index in wanted]


def run_before(before: Before, x: Tensor) -> Tensor:
    """Runs a stem or a downsampling, [B, C, H, W] to [B, C', h, w]."""
    if isinstance(before, PatchParts):
        return _patches(x, before)
    for layer in before:
        if isinstance(layer, nn.Conv2d):
            check_size(x, layer)
        x = layer(x)
    return x


def check_size(x: Tensor, conv: nn.Conv2d) -> None:
    """Raises a ValueError if a map [B, C, H, W] has no patch."""
    if any(side < patch for side, patch in zip(x.shape[2:], conv.kernel_size)):
        raise ValueError(
            f"the image is too small: a convolution over patches of {conv.kernel_size[0]}x"
            f"{conv.kernel_size[1]} gets a map of {x.shape[2]}x{x.shape[3]}"
        )


def _patches(x: Tensor, parts: PatchParts) -> Tensor:
    conv, norm, norm_first = parts
    if not cuts_patches(conv):  # it was changed
        return run_before(parts.layers(), x)
    check_size(x, conv)
    if not norm_first:
        weights = conv.weight, conv.bias, norm.weight, norm.bias
        return patch_embed(x, *weights, eps=norm.eps).permute(0, 3, 1, 2)
    x = layer_norm_nchw(x.permute(0, 2, 3, 1), norm.weight, norm.bias, eps=norm.eps)
    weight = conv.weight
    if launches_on(x.device):
        (weight,) = derive(conv, "channels last", _channels_last, weight)
    return patch_embed(x, weight, conv.bias, None, None).permute(0, 3, 1, 2)


def convnext_block(x: Tensor, parts: ConvNextBlockParts) -> Tensor:
    """Runs a block: depthwise convolution, norm, MLP, layer scale, residual.

    Args:
        x: [B, C, H, W].
        parts: of the block.

    Returns:
        [B, C, H, W].
    """
    conv, norm, fc1, fc2 = parts.conv, parts.norm, parts.fc1, parts.fc2
    rate, scale = parts.drop_rate(), parts.scale()
    first = norm.weight, norm.bias, matrix(fc1), fc1.bias
    last = matrix(fc2), fc2.bias
    options: dict[str, Any] = {"eps": norm.eps, "activation": parts.activation}
    linear = norm_linear(parts.owner, "fc1")
    is_plain, bias = parts.grn is None and rate == 0.0, conv.bias
    is_one_kernel = is_plain and conv.dilation == (1, 1) and _is_usual(conv)
    if is_one_kernel and bias is not None and launches_on(x.device):
        weight = _depthwise_weight(x, parts)
        return whole_block(x, weight, bias, *first, *last, scale, norm_linear=linear, **options)
    residual = x.permute(0, 2, 3, 1)
    y = _depthwise(x, parts).permute(0, 2, 3, 1)
    if rate == 0.0 and runs_on_cpu(y, parts):
        return mlp_on_cpu(y, residual, parts).permute(0, 3, 1, 2)
    if is_plain:
        y = mlp_block(
            y, *first, *last, residual=residual, scale=scale, norm_linear=linear, **options
        )
        return y.permute(0, 3, 1, 2)
    hidden = linear(y, *first, **options)
    if parts.grn is not None:
        grn = parts.grn.weight.flatten(), parts.grn.bias.flatten()
        if rate == 0.0 and scale is None:
            y = grn_linear_residual(hidden, *grn, *last, residual, eps=parts.grn_eps)
            return y.permute(0, 3, 1, 2)
        hidden = global_response_norm(hidden, *grn, parts.grn_eps)
    y = F.linear(hidden, *last)
    y = y if scale is None else scale * y
    return (residual + drop_path(y, rate)).permute(0, 3, 1, 2)


def _depthwise(x: Tensor, parts: ConvNextBlockParts) -> Tensor:
    """Convolves [B, C, H, W] to the same shape."""
    conv = parts.conv
    if conv.bias is None or not _is_usual(conv):
        return conv(x)  # it was changed
    weight = _depthwise_weight(x, parts)
    return depthwise_conv_bn_act(x, weight, conv.bias, dilation=conv.dilation[0])


def _is_usual(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise and keeps the size of the map, as blocks have it."""
    k, dilation = conv.kernel_size[0], conv.dilation[0]
    padding = dilation * (k // 2)
    settings = (conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.padding_mode)
    usual = ((k, k), (1, 1), (dilation, dilation), (padding, padding), "zeros")
    return settings == usual and k % 2 == 1 and conv.groups == conv.in_channels


def _depthwise_weight(x: Tensor, parts: ConvNextBlockParts) -> Tensor:
    weight = parts.conv.weight
    if launches_on(x.device):
        (weight,) = derive(parts.owner, "depthwise", _channels_fastest, weight)
    return weight


def _channels_last(weight: Tensor) -> tuple[Tensor]:
    """A weight [C_out, C, h, w] in the order in which the kernel reads it."""
    return (weight.contiguous(memory_format=torch.channels_last),)


def _channels_fastest(weight: Tensor) -> tuple[Tensor]:
    """A depthwise weight [C, 1, k, k] whose fastest axis is C, as the kernel reads it."""
    return (weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),)
