"""Patches of an image as rows of a GEMM, each normalized in registers.

The kernel computes the address of each pixel: pixel (c, dy, dx) of patch (i, j) is at channel c,
row i * P + dy, column j * Q + dx. Mean and variance, about the mean, are those of the fp32
accumulator.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .config import GemmConfig, cdiv, next_power_of_2
from .kernel import Kernel


def launch_config(
    features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """Chooses tiles of whole rows, and warps for 64 accumulators per thread (32 in fp32).

    Without a norm a program computes some columns, and `out_features` is their number.
    """
    block_n = max(16, next_power_of_2(out_features))
    block_k = 16 if features % 32 or dtype == torch.float32 else 32
    if block_n > 256:
        return GemmConfig(32, block_n, block_k, num_warps=16, num_stages=2)
    columns = 16 if dtype == torch.float32 else 32
    return GemmConfig(64, block_n, block_k, num_warps=max(4, block_n // columns), num_stages=3)


def launch(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> Tensor:
    """Fills `y` [B, h, w, C], contiguous, and returns it; otherwise as `patch_embed`."""
    if y.numel() == 0:
        return y
    if _has_runs_of_channels(pixel_values):
        pixel_values, weight = _as_runs(pixel_values, weight)
    batch, y_height, y_width, out_features = y.shape
    _, in_channels, p, q = weight.shape
    height, width = pixel_values.shape[2:]
    features, n_rows = in_channels * p * q, batch * y_height * y_width
    n_columns = out_features
    if norm_weight is None:
        n_columns = min(out_features, 64 if out_features % 128 else 128)
    sizes = features, n_columns, y.dtype
    config = chosen_config("patch_embed", launch_config, y.device, *sizes)
    # copied only if they have gaps, or if the convolution's weight is channels-last
    weight = weight.reshape(out_features, features).contiguous()
    bias, norm_weight, norm_bias = (
        None if vector is None else vector.contiguous() for vector in (bias, norm_weight, norm_bias)
    )
    n_tiles = cdiv(out_features, config.block_n)
    _patch_embed_fwd_kernel[(cdiv(n_rows, config.block_m) * n_tiles,)](
        pixel_values,
        weight,
        bias,
        norm_weight,
        norm_bias,
        y,
        n_rows,
        height,
        width,
        y_height * y_width,
        y_width,
        eps,
        *pixel_values.stride(),
        OUT_FEATURES=out_features,
        N_TILES=n_tiles,
        IN_CHANNELS=in_channels,
        P=p,
        Q=q,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None,
        PADDED_ROWS=y_height * p > height,
        PADDED_COLS=y_width * q > width,
        ALIGNED=all(stride % q == 0 for stride in pixel_values.stride()[:3]),
        PRECISION=input_precision(y.dtype),
        **config.options(),
    )
    return y


def _has_runs_of_channels(x: Tensor) -> bool:
    """Whether the pixels of a row of a map [B, C, H, W] are one run of memory, channels fastest."""
    channels = x.shape[1]
    return channels >= _MAP_CHANNELS and x.stride(1) == 1 and x.stride(3) == channels


# fewer are those of an image
_MAP_CHANNELS = 16


def _as_runs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Makes patches of one channel, whose rows are runs of q pixels with all channels.

    So the columns of a step are next to each other in memory.

    Args:
        x: [B, C, H, W], see `_has_runs_of_channels`.
        weight: [C_out, C, p, q].

    Returns:
        [B, 1, H, W * C], a view, and [C_out, 1, p, q * C], a view if the weight is channels-last.
    """
    rows = x.permute(0, 2, 3, 1).flatten(2)[:, None]
    return rows, weight.permute(0, 2, 3, 1).flatten(2)[:, None]


# one binary serves all image sizes with equally aligned rows
@Kernel
@triton.jit(do_not_specialize=["n_rows", "height", "width", "n_patches", "y_width"])
def _patch_embed_fwd_kernel(
    x_ptr,  # [B, IN_CHANNELS, height, width]
    weight_ptr,  # [OUT_FEATURES, IN_CHANNELS * P * Q], contiguous
    bias_ptr,  # [OUT_FEATURES] or None
    norm_weight_ptr,  # [OUT_FEATURES] or None
    norm_bias_ptr,  # [OUT_FEATURES] or None
    y_ptr,  # [n_rows, OUT_FEATURES], contiguous
    n_rows,
    height,
    width,
    n_patches,  # of an image
    y_width,
    eps,
    stride_x_image,
    stride_x_channel,
    stride_x_row,
    stride_x_col,
    OUT_FEATURES: tl.constexpr,
    N_TILES: tl.constexpr,  # of the columns; 1 with a norm
    IN_CHANNELS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if ALIGNED:
        # tell the compiler, so that one load takes the Q pixels of a row of a patch
        stride_x_image = stride_x_image // Q * Q
        stride_x_channel = stride_x_channel // Q * Q
        stride_x_row = stride_x_row // Q * Q
    FEATURES: tl.constexpr = IN_CHANNELS * P * Q
    # the tiles of one set of rows run at the same time: x stays in L2
    pid = tl.program_id(0)
    first_row = (pid // N_TILES).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows - first_row
    cols = pid % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < OUT_FEATURES

    # count from the first patch of the first row's image: 32-bit divisions are enough
    patches = (first_row % n_patches).to(tl.int32) + rows
    images = first_row // n_patches + patches // n_patches
    patches = patches % n_patches
    top, left = (patches // y_width) * P, (patches % y_width) * Q
    x_rows = x_ptr + (
        images * stride_x_image + top.to(tl.int64) * stride_x_row + left.to(tl.int64) * stride_x_col
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, FEATURES, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel, dy, dx = k // (P * Q), k // Q % P, k % Q
        x_offsets = (
            channel.to(tl.int64) * stride_x_channel
            + dy.to(tl.int64) * stride_x_row
            + dx.to(tl.int64) * stride_x_col
        )
        x_mask, weight_mask = row_mask[:, None], col_mask[None, :]
        if FEATURES % BLOCK_K != 0:
            x_mask &= (k < FEATURES)[None, :]
            weight_mask &= (k < FEATURES)[:, None]
        if PADDED_ROWS:
            x_mask &= top[:, None] + dy[None, :] < height
        if PADDED_COLS:
            x_mask &= left[:, None] + dx[None, :] < width
        x = tl.load(x_rows[:, None] + x_offsets[None, :], mask=x_mask, other=0.0)
        weight_offsets = cols[None, :] * FEATURES + k[:, None]
        weight = tl.load(weight_ptr + weight_offsets, mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM:
        mean = tl.sum(acc, axis=1) / OUT_FEATURES
        centered = tl.where(col_mask[None, :], acc - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / OUT_FEATURES + eps)
        norm_weight = tl.load(norm_weight_ptr + cols, mask=col_mask, other=0.0)
        acc = centered * rstd[:, None] * norm_weight.to(tl.float32)[None, :]
        if HAS_NORM_BIAS:
            norm_bias = tl.load(norm_bias_ptr + cols, mask=col_mask, other=0.0)
            acc += norm_bias.to(tl.float32)[None, :]
    offsets = first_row * OUT_FEATURES + rows[:, None] * OUT_FEATURES + cols[None, :]
    tl.store(
        y_ptr + offsets,
        acc.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )
