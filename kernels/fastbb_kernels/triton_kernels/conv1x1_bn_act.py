"""y = activation(x @ weight.T + bias + residual) over pixels: a tiled GEMM with its epilogue.

With a stride, the kernel computes the addresses of the rows of x; it stores no gathered map.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

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
    bias: Tensor,
    stride: int,
    residual: Tensor | None,
    activation: str | None,
    y: Tensor,
) -> Tensor:
    """Fills `y`, channels-last, and returns it; otherwise as `conv1x1_bn_act`."""
    if y.numel() == 0:
        return y
    batch, out_channels, y_height, y_width = y.shape
    channels, height, width = x.shape[1:]
    n_rows = batch * y_height * y_width
    sizes = n_rows, channels, out_channels, residual is not None, x.dtype, residual is None
    config = chosen_config("conv1x1_bn_act", launch_config, x.device, *sizes)
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_channels, config.block_n),)
    _conv1x1_bn_act_fwd_kernel[grid](
        x.contiguous(memory_format=channels_last),
        weight.contiguous(),
        bias.contiguous(),
        None if residual is None else residual.contiguous(memory_format=channels_last),
        y,
        n_rows,
        height,
        width,
        channels,
        out_channels,
        STRIDE=stride,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        EVEN_K=channels % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


# one binary serves all batches and image sizes
@Kernel
@triton.jit(do_not_specialize=["n_rows", "height", "width"])
def _conv1x1_bn_act_fwd_kernel(
    x_ptr,  # [B, height, width, channels], contiguous
    weight_ptr,  # [out_channels, channels], contiguous
    bias_ptr,  # [out_channels]
    residual_ptr,  # [n_rows, out_channels], contiguous, or None
    y_ptr,  # [n_rows, out_channels], contiguous
    n_rows,
    height,
    width,
    channels,
    out_channels,
    STRIDE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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

    pixels = strided_pixels(first_row, rows, height, width, STRIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_product(
        acc, x_ptr, pixels, row_mask, weight_ptr, cols, col_mask, channels,
        EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip

    # residual, then bias: this order takes the fewest registers
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = rows[:, None] * out_channels + cols[None, :]
    if HAS_RESIDUAL:
        residual_ptr += first_row * out_channels
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, y_ptr.dtype.element_ty)
    y_ptr += first_row * out_channels
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
