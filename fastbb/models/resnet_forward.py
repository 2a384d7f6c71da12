"""The forward of ResNets, computed from the parts of any owner."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, bottleneck_tail, conv1x1_dual, stem_conv_bn_relu_pool
from fastbb_kernels.ops.conv_bn_act import as_pair

from ..backbone.checkpointing import BlockRunner
from ..weights.folded_weights import folded, folded_with_shortcut, runs_folded, runs_packed
from .layers import ConvNorm
from .resnet_parts import ResNetBlockParts, ResNetParts, StemLayer


def resnet_maps(
    parts: ResNetParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    *,
    run_block: BlockRunner | None = None,
) -> list[Tensor]:
    """Runs the stages up to the last wanted map.

    Args:
        parts: parts of the ResNet.
        pixel_values: [B, C, H, W].
        wanted: indices of maps, at least one; 0 is the stem.
        run_block: runs a block with gradient checkpointing, or None.

    Returns:
        [B, C', h, w] of each wanted map.
    """
    last = max(wanted)
    pools_at_once = parts.pools_stem_map or 0 not in wanted
    x = _stem(parts, pixel_values, pools_at_once)
    maps = {0: x}
    if last and not pools_at_once:
        x = _pool(parts, x)
    for index, stage in enumerate(parts.stages[:last], start=1):
        for block in stage:
            run: Any = block
            if isinstance(block, ResNetBlockParts):
                run = partial(residual_block, parts=block)
            x = run(x) if run_block is None else run_block(run, x)
        maps[index] = x
    return [maps[index] for index in wanted]


def _stem(parts: ResNetParts, x: Tensor, pools: bool) -> Tensor:
    *layers, last = parts.stem
    for layer in layers:
        x = layer(x)
    if parts.pool is None and isinstance(last, StemLayer):
        return _stem_layer(x, *last, pools)
    x = last(x)
    return _pool(parts, x) if pools else x


def _pool(parts: ResNetParts, x: Tensor) -> Tensor:
    return _max_pool(x) if parts.pool is None else parts.pool(x)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def _stem_layer(x: Tensor, pair: ConvNorm, activation: str | None, pools: bool) -> Tensor:
    """Runs the last layer of a stem, and the pool after it."""
    conv = pair.conv
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    fuses = shape == _STEM and not runs_packed(conv, x) and runs_folded(conv, pair.norm, x)
    if fuses:
        weight, bias = folded(*pair)
        return stem_conv_bn_relu_pool(x, weight, bias, activation=activation, pool=pools)
    x = pair(x, activation)
    return _max_pool(x) if pools else x


_STEM = ((7, 7), (2, 2), (3, 3), (1, 1), 1)


def residual_block(x: Tensor, parts: ResNetBlockParts) -> Tensor:
    """Runs a basic or bottleneck block: convolutions with ReLU between them, then the residual.

    Args:
        x: [B, C, H, W].
        parts: of the block.

    Returns:
        [B, C', h, w].
    """
    pairs, shortcut, activation = parts.pairs, parts.shortcut, parts.activation
    residual = x
    for module in parts.before:
        residual = module(residual)
    is_usual = parts.blur is None and parts.attention is None
    if is_usual and shortcut is None and len(pairs) == 3:
        first, second, last = pairs
        return _bottleneck_tail(first(x, "relu", hidden=True), second, last, residual, activation)
    *inner, last = pairs
    for pair in inner:
        x = pair(x, "relu", hidden=True)
    if parts.blur is not None:
        x = parts.blur(x)
    if parts.attention is None:
        return _block_end(x, last, residual, shortcut, activation)
    x = parts.attention(last(x))
    x += residual if shortcut is None else shortcut(residual)
    return F.relu_(x) if activation == "relu" else ACTIVATIONS[activation](x)


def _block_end(
    x: Tensor, last: ConvNorm, residual: Tensor, shortcut: ConvNorm | None, activation: str | None
) -> Tensor:
    """Computes `activation(last(x) + shortcut(residual))`, the end of a residual block.

    Args:
        x: [B, C_in, h, w].
        last: convolution of x.
        residual: [B, C_s, H, W]; without a shortcut, [B, C, h, w].
        shortcut: convolution of the residual, or None.
        activation: name of the activation, or None.

    Returns:
        [B, C, h, w].
    """
    if shortcut is None:
        return last(x, activation, residual)
    stride = as_pair(shortcut.conv.stride)[0]
    fuses = (
        _is_1x1(last.conv, 1)
        and _is_1x1(shortcut.conv, stride)
        and not runs_packed(last.conv, x)
        and runs_folded(last.conv, last.norm, x)
        and runs_folded(shortcut.conv, shortcut.norm, residual)
    )
    if not fuses:
        return last(x, activation, shortcut(residual))
    weight, shortcut_weight, bias = folded_with_shortcut(*last, *shortcut)
    return conv1x1_dual(
        x, weight, residual, shortcut_weight, bias, stride=stride, activation=activation
    )


def _bottleneck_tail(
    x: Tensor, middle: ConvNorm, last: ConvNorm, residual: Tensor, activation: str | None
) -> Tensor:
    """Computes `activation(last(relu(middle(x))) + residual)`, the end of a bottleneck block.

    Args:
        x: [B, C_in, H, W].
        middle: convolution of x.
        last: convolution of the result of `middle`.
        residual: [B, C, h, w].
        activation: name of the last activation, or None.

    Returns:
        [B, C, h, w].
    """
    conv = middle.conv
    fuses = (
        _is_square_3x3(conv)
        and _is_1x1(last.conv, 1)
        and not runs_packed(conv, x)
        and runs_folded(conv, middle.norm, x)
        and runs_folded(last.conv, last.norm, x)
    )
    if not fuses:
        return last(middle(x, "relu", hidden=True), activation, residual)
    tensors = (*folded(*middle), *folded(*last), residual)
    stride, dilation = conv.stride[0], conv.dilation[0]
    return bottleneck_tail(x, *tensors, stride=stride, dilation=dilation, activation=activation)


def _is_1x1(conv: nn.Conv2d, stride: int) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return shape == ((1, 1), (stride, stride), (0, 0), 1)


def _is_square_3x3(conv: nn.Conv2d) -> bool:
    """Whether `bottleneck_tail` can compute a convolution."""
    stride, dilation = as_pair(conv.stride)[0], as_pair(conv.dilation)[0]
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    wanted = ((3, 3), (stride, stride), (dilation, dilation), (dilation, dilation), 1)
    return shape == wanted and conv.in_channels == conv.out_channels
