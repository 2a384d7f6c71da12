"""A 7x7 convolution of stride 2 as an implicit GEMM, fused with its 3x3 max pool.

A row of the GEMM is a pixel of the pooled map. The kernel computes nine products, one for each
position of the pool's window, and takes their maximum. This computes the convolution 2.25 times,
but threads exchange no values.

Along K, a channel has 8 rows of 8 pixels. The last row and the first column are not taps: they make
the pixels of a row one aligned load. The weight is padded likewise and stays in registers.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# a launch passes plain values for constexpr parameters, and static_range has no iterable type

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .activation import activate
from .config import GemmConfig, cdiv, next_power_of_2
from .kernel import Kernel
from .pixel_rows import interpreter_config

_MONOTONIC = (None, "relu")

# architectures whose MMA reads operands, such as the weight, from registers
_OPERANDS_IN_REGISTERS = (80, 86, 89, 120)


def launch_config(
    in_channels: int,
    out_features: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    activation: Activation,
    arch: Architecture | None,
) -> GemmConfig:
    """Chooses tiles and warps such that registers hold them beside the weight of all channels."""
    if arch is None:
        return interpreter_config(256, out_features, 64)
    block_n = max(16, min(64, next_power_of_2(out_features)))
    if dtype == torch.float32:
        # no MMA, so that the operands are in registers too
        return GemmConfig(32, min(block_n, 32), 16, num_warps=4, num_stages=1)
    usual = in_channels <= 3 and x_dtype == dtype and activation in _MONOTONIC
    block_m = 64 if usual or arch not in _OPERANDS_IN_REGISTERS else 32
    # two stages if shared memory has room for the two stages of two programs
    num_stages = 2 if arch in (80, 90, 100) else 1
    return GemmConfig(block_m, block_n, 64, num_warps=4, num_stages=num_stages)


def launch(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: Activation,
    pool: bool,
    y: Tensor,
) -> Tensor:
    """Fills `y` [B, C, h, w], channels-last, and returns it; otherwise as the public function."""
    if y.numel() == 0:
        return y
    batch, out_features, y_height, y_width = y.shape
    in_channels, height, width = pixel_values.shape[1:]
    sizes = in_channels, out_features, pixel_values.dtype, weight.dtype, activation
    config = chosen_config("stem_conv_bn_relu_pool", launch_config, weight.device, *sizes)
    n_rows = batch * y_height * y_width
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_features, config.block_n),)
    scale, shift = (), ()
    if mean is not None and std is not None:
        # (x / 255 - mean) / std as one multiplication and addition
        scale = tuple(1 / (255 * s) for s in std)
        shift = tuple(-m / s for m, s in zip(mean, std))
    _stem_conv_bn_relu_pool_fwd_kernel[grid](
        pixel_values,
        weight,
        bias.contiguous(),
        y,
        n_rows,
        height,
        width,
        y_height * y_width,
        y_width,
        out_features,
        scale,
        shift,
        *pixel_values.stride(),
        *weight.stride(),
        IN_CHANNELS=in_channels,
        NORMALIZES=mean is not None,
        ACTIVATION=activation,
        # a monotonic activation may come after the maximum, where it is computed once
        MONOTONIC=activation in _MONOTONIC,
        WINDOW=3 if pool else 1,
        PRECISION=input_precision(weight.dtype),
        **config.options(),
    )
    return y


# one binary serves all heights and batches, and all widths with the same alignment
@Kernel
@triton.jit(do_not_specialize=["n_rows", "height", "n_pixels", "y_width"])
def _stem_conv_bn_relu_pool_fwd_kernel(
    x_ptr,  # [B, IN_CHANNELS, height, width]
    weight_ptr,  # [out_features, IN_CHANNELS, 7, 7]
    bias_ptr,  # [out_features]
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    height,
    width,
    n_pixels,  # of an image of y
    y_width,
    out_features,
    scale,  # IN_CHANNELS floats, or none if x is normalized already
    shift,  # likewise
    stride_x_image,
    stride_x_channel,
    stride_x_row,
    stride_x_col,
    stride_weight_out,
    stride_weight_in,
    stride_weight_row,
    stride_weight_col,
    IN_CHANNELS: tl.constexpr,
    NORMALIZES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MONOTONIC: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEPS: tl.constexpr = 64 // BLOCK_K  # of a channel
    STRIDE: tl.constexpr = (WINDOW + 1) // 2  # of the pool

    # the tiles of one set of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, cols < out_features

    # rows beyond the last repeat it and are not stored; count from the first pixel of the first
    # row's image: 32-bit divisions are enough
    pixels = tl.minimum(rows, n_rows - 1 - first_row).to(tl.int32)
    pixels += (first_row % n_pixels).to(tl.int32)
    images = first_row // n_pixels + pixels // n_pixels
    pixels = pixels % n_pixels
    x_images = x_ptr + images * stride_x_image
    # the first position of the window, in the map of the convolution
    top = pixels // y_width * STRIDE - WINDOW // 2
    left = pixels % y_width * STRIDE - WINDOW // 2

    k = tl.arange(0, BLOCK_K).to(tl.int64)
    weight_cols = weight_ptr + cols.to(tl.int64) * stride_weight_out
    weights = ()
    for step in tl.static_range(IN_CHANNELS * STEPS):
        tap = k + step * BLOCK_K
        channel, ky, kx = tap // 64, tap // 8 % 8, tap % 8 - 1
        offsets = channel * stride_weight_in + ky * stride_weight_row + kx * stride_weight_col
        mask = ((ky < 7) & (kx >= 0))[:, None] & col_mask[None, :]
        weights += (tl.load(weight_cols[None, :] + offsets[:, None], mask=mask, other=0.0),)
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for position in range(WINDOW * WINDOW):
        # a window that crosses the border takes the position at the border twice
        row = tl.minimum(tl.maximum(top + position // WINDOW, 0), (height - 1) // 2)
        col = tl.minimum(tl.maximum(left + position % WINDOW, 0), (width - 1) // 2)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.static_range(IN_CHANNELS * STEPS):
            x = _load_pixels(
                x_images,
                row * 2 - 3,
                col * 2 - 4,
                height,
                width,
                stride_x_channel,
                stride_x_row,
                stride_x_col,
                scale[step // STEPS] if NORMALIZES else None,
                shift[step // STEPS] if NORMALIZES else None,
                step * BLOCK_K,
                BLOCK_K,
            )
            x = x.to(weight_ptr.dtype.element_ty)
            acc = tl.dot(x, weights[step], acc, input_precision=PRECISION)
        if not MONOTONIC:
            acc = activate(acc + bias, ACTIVATION, y_ptr.dtype.element_ty)
        best = tl.maximum(best, acc, propagate_nan=tl.PropagateNan.ALL)

    if MONOTONIC:
        best = activate(best + bias, ACTIVATION, y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + first_row * out_features + rows[:, None] * out_features + cols[None, :],
        best.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def _load_pixels(
    x_images,
    top,
    left,
    height,
    width,
    stride_channel,
    stride_row,
    stride_col,
    scale,
    shift,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loads taps FIRST to FIRST + BLOCK_K of the windows at `top` and `left`, zeros in the padding.

    Args:
        x_images: [M] pointers to the first pixel of each window's image.
        top: [M] i32, of the first row of taps.
        left: [M] i32, of the column before the first column of taps.
        height: of an image.
        width: likewise.
        stride_channel: of an image.
        stride_row: likewise.
        stride_col: likewise.
        scale: of the normalization, or None.
        shift: likewise.
        FIRST: tap of the first column of the result; a channel has 64 taps.
        BLOCK_K: number of taps.

    Returns:
        [M, BLOCK_K], in fp32 if normalized, else the dtype of the pixels.
    """
    k = FIRST + tl.arange(0, BLOCK_K)
    channel, ky, kx = k // 64, k // 8 % 8, k % 8
    x_rows = x_images + top.to(tl.int64) * stride_row + left.to(tl.int64) * stride_col
    offsets = (
        channel.to(tl.int64) * stride_channel
        + ky.to(tl.int64) * stride_row
        + kx.to(tl.int64) * stride_col
    )
    rows, cols = top[:, None] + ky[None, :], left[:, None] + kx[None, :]
    mask = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width) & (ky < 7)[None, :]
    x = tl.load(x_rows[:, None] + offsets[None, :], mask=mask, other=0)
    if scale is not None:
        # the padding with zeros applies to the normalized image
        x = tl.where(mask, x.to(tl.float32) * scale + shift, 0.0)
    # the column before the taps has the weight 0: an infinite pixel there would give NaN
    return tl.where((kx > 0)[None, :], x, 0.0)
