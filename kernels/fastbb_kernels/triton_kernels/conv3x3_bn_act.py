"""3x3 convolution as an implicit GEMM of [pixels, 9 * C_in] by [9 * C_in, C].

A row is an output pixel. A step takes some channels of one tap: the channels of the pixel at that
tap, or zeros if it is outside of the image. The weight is stored as [C, 3, 3, C_in], so both
operands of a step are contiguous along K. A single loop over taps and channels is pipelined from
end to end; such loops have been miscompiled with 8 warps, so the kernel uses 4.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import torch
import triton
import triton.language as tl
from torch import Tensor, channels_last

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .activation import activate
from .config import GemmConfig, cdiv
from .kernel import Kernel
from .pixel_rows import interpreter_config
from .tile_choice import has_work_for_large_tiles

# about one program per multiprocessor of a GPU
_ENOUGH_PROGRAMS = 128

# rows and columns of the largest tile that fits a multiprocessor twice without spills
_LARGEST_TILE: dict[Architecture, tuple[int, int]] = {
    90: (128, 128),
    100: (128, 64),
    "gfx90a": (128, 128),
    "gfx942": (128, 128),
}


def launch_config(
    n_rows: int, channels: int, out_channels: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """Chooses tiles and stages for [n_rows, 9 * channels] by [9 * channels, out_channels]."""
    if arch is None:
        return interpreter_config(n_rows, out_channels, channels)
    if dtype == torch.float32:
        # no MMA, so that the operands are in registers too
        tiles, smallest, block_k, num_stages = [(64, 64)], (32, 32), 16, 2
    else:
        tiles, smallest = [_LARGEST_TILE.get(arch, (64, 128)), (128, 64)], (64, 32)
        block_k, num_stages = 64 if channels % 64 == 0 and arch in (90, 100) else 32, 3
    if channels % block_k:
        # masks along K take registers, and so do the addresses of loads of single elements
        tiles = [] if channels % 16 else [(64, 64)]
    fitting = [
        GemmConfig(block_m, block_n, block_k, num_warps=4, num_stages=num_stages)
        for block_m, block_n in tiles
        if block_n < 2 * out_channels
    ]
    for config in fitting:
        n_tiles = cdiv(n_rows, config.block_m) * cdiv(out_channels, config.block_n)
        if n_tiles >= _ENOUGH_PROGRAMS:
            return config
    if fitting and has_work_for_large_tiles(n_rows, out_channels, arch):
        return fitting[0]
    return GemmConfig(*smallest, block_k, num_warps=4, num_stages=4)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: Activation,
    y: Tensor,
) -> Tensor:
    """Fills `y` [B, C, h, w], channels-last, and returns it; otherwise as `conv3x3_bn_act`."""
    if y.numel() == 0:
        return y
    _, channels, height, width = x.shape
    batch, out_channels, y_height, y_width = y.shape
    n_rows = batch * y_height * y_width
    config = chosen_config(
        "conv3x3_bn_act", launch_config, x.device, n_rows, channels, out_channels, x.dtype
    )
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_channels, config.block_n),)
    _conv3x3_bn_act_fwd_kernel[grid](
        x.contiguous(memory_format=channels_last),
        weight.contiguous(memory_format=channels_last),
        bias.contiguous(),
        None if residual is None else residual.contiguous(memory_format=channels_last),
        y,
        n_rows,
        channels,
        out_channels,
        height,
        width,
        y_height * y_width,
        y_width,
        stride,
        dilation,
        ACTIVATION=activation,
        EVEN_K=channels % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


# one binary serves all maps, strides and dilations
@Kernel
@triton.jit(
    do_not_specialize=["n_rows", "height", "width", "n_pixels", "y_width", "stride", "dilation"]
)
def _conv3x3_bn_act_fwd_kernel(
    x_ptr,  # [B, height, width, channels]; this and all below are contiguous
    weight_ptr,  # [out_channels, 3, 3, channels]
    bias_ptr,  # [out_channels]
    residual_ptr,  # [n_rows, out_channels] or None
    y_ptr,  # [n_rows, out_channels]
    n_rows,
    channels,
    out_channels,
    height,
    width,
    n_pixels,  # of an image of y
    y_width,
    stride,
    dilation,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one set of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(out_channels, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, cols < out_channels

    acc = conv3x3_rows(
        x_ptr,
        weight_ptr,
        first_row,
        rows,
        row_mask,
        cols,
        col_mask,
        channels,
        height,
        width,
        n_pixels,
        y_width,
        stride,
        dilation,
        EVEN_K,
        PRECISION,
        BLOCK_K,
    )
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = first_row * out_channels + rows[:, None] * out_channels + cols[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv3x3_rows(
    x_ptr,
    weight_ptr,
    first_row,
    rows,
    row_mask,
    cols,
    col_mask,
    channels,
    height,
    width,
    n_pixels,
    y_width,
    stride,
    dilation,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the convolution for some output pixels and channels.

    Args:
        x_ptr: [B, height, width, channels], contiguous.
        weight_ptr: [n_cols, 3, 3, channels], contiguous.
        first_row: i64 scalar; the output pixels are `first_row + rows`.
        rows: [M] i32, from 0.
        row_mask: [M] i1, whether there is such a pixel.
        cols: [N] i32, the output channels.
        col_mask: [N] i1, whether there is such a channel.
        channels: of x.
        height: of x.
        width: of x.
        n_pixels: of an output image.
        y_width: of an output image.
        stride: both ways.
        dilation: both ways, and the padding.
        EVEN_K: `channels` is a multiple of BLOCK_K.
        PRECISION: of products in fp32.
        BLOCK_K: channels of a step.

    Returns:
        [M, N] fp32, without the bias.
    """
    # count from the first pixel of the first row's image: 32-bit divisions are enough
    rows += (first_row % n_pixels).to(tl.int32)
    images = first_row // n_pixels + rows // n_pixels
    rows = rows % n_pixels
    # position of the first tap; in the padding it is outside of the image, and nothing is loaded
    top = rows // y_width * stride - dilation
    left = rows % y_width * stride - dilation
    x_rows = x_ptr + ((images * height + top) * width + left)[:, None] * channels
    weight_rows = weight_ptr + cols.to(tl.int64)[None, :] * 9 * channels

    n_chunks = tl.cdiv(channels, BLOCK_K)
    acc = tl.zeros((top.shape[0], cols.shape[0]), tl.float32)
    for step in range(9 * n_chunks):
        tap = step // n_chunks
        k = step % n_chunks * BLOCK_K + tl.arange(0, BLOCK_K)
        down, right = tap // 3 * dilation, tap % 3 * dilation
        row, col = top + down, left + right
        inside = row_mask & (row >= 0) & (row < height) & (col >= 0) & (col < width)
        x_mask, weight_mask = inside[:, None], col_mask[None, :]
        if not EVEN_K:
            x_mask &= (k < channels)[None, :]
            weight_mask &= (k < channels)[:, None]
        x_offsets = (down.to(tl.int64) * width + right) * channels + k
        x = tl.load(x_rows + x_offsets[None, :], mask=x_mask, other=0.0)
        weight_offsets = tap * channels + k
        weight = tl.load(weight_rows + weight_offsets[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc
