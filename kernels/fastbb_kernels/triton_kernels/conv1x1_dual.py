"""y = activation(x @ weight.T + shortcut @ shortcut_weight.T + bias): two GEMMs in one tile.

The kernel computes the addresses of the rows of the shortcut, and never stores its product.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import math

import triton
import triton.language as tl
from torch import Tensor, channels_last

from .._dispatch import input_precision
from ..launching import chosen_config
from .activation import activate
from .config import cdiv
from .kernel import Kernel
from .pixel_rows import add_product, launch_config, strided_pixels


def launch(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: str | None,
    y: Tensor,
) -> Tensor:
    """Fills `y`, channels-last, and returns it; otherwise as `conv1x1_dual`."""
    if y.numel() == 0:
        return y
    batch, out_channels, y_height, y_width = y.shape
    channels = x.shape[1]
    shortcut_channels, height, width = shortcut.shape[1:]
    n_rows = batch * y_height * y_width
    # a step takes channels of one of the two maps
    common = math.gcd(channels, shortcut_channels)
    sizes = n_rows, common, out_channels, False, x.dtype, False
    config = chosen_config("conv1x1_dual", launch_config, x.device, *sizes)
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_channels, config.block_n),)
    _conv1x1_dual_fwd_kernel[grid](
        x.contiguous(memory_format=channels_last),
        weight.contiguous(),
        shortcut.contiguous(memory_format=channels_last),
        shortcut_weight.contiguous(),
        bias.contiguous(),
        y,
        n_rows,
        height,
        width,
        channels,
        shortcut_channels,
        out_channels,
        STRIDE=stride,
        ACTIVATION=activation,
        EVEN_K=common % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


# one binary serves all batches and image sizes
@Kernel
@triton.jit(do_not_specialize=["n_rows", "height", "width"])
def _conv1x1_dual_fwd_kernel(
    x_ptr,  # [n_rows, channels], contiguous
    weight_ptr,  # [out_channels, channels], contiguous
    shortcut_ptr,  # [B, height, width, shortcut_channels], contiguous
    shortcut_weight_ptr,  # [out_channels, shortcut_channels], contiguous
    bias_ptr,  # [out_channels]
    y_ptr,  # [n_rows, out_channels], contiguous
    n_rows,
    height,
    width,
    channels,
    shortcut_channels,
    out_channels,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one set of rows run at the same time: both maps stay in L2
    n_tiles = tl.cdiv(out_channels, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, cols < out_channels

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_product(
        acc, x_ptr, first_row + rows, row_mask, weight_ptr, cols, col_mask, channels,
        EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    pixels = strided_pixels(first_row, rows, height, width, STRIDE)
    acc = add_product(
        acc, shortcut_ptr, pixels, row_mask, shortcut_weight_ptr, cols, col_mask, shortcut_channels,
        EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip

    acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, y_ptr.dtype.element_ty)
    offsets = rows[:, None] * out_channels + cols[None, :]
    tl.store(
        y_ptr + first_row * out_channels + offsets,
        acc.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )
