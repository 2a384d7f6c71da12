"""y = residual + (x - mean) / sqrt(variance + eps) * weight + bias, row by row.

A program holds several whole rows in registers, so both statistics come from one read of x: the
mean first, then the variance about it.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor

from ..launching import chosen_config
from .config import cdiv
from .kernel import Kernel
from .layer_norm_nchw import launch_config


def launch(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, residual: Tensor, eps: float
) -> Tensor:
    """Runs the kernel; arguments and result as `layer_norm_residual`."""
    channels = x.shape[-1]
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    n_rows = y.numel() // channels
    config = chosen_config("layer_norm_residual", launch_config, x.device, n_rows, channels)
    # a view with gaps, which no model passes, is copied
    _layer_norm_residual_fwd_kernel[(cdiv(n_rows, config.block_m),)](
        x.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        residual.contiguous(),
        y,
        n_rows,
        eps,
        CHANNELS=channels,
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_residual_fwd_kernel(
    x_ptr,  # [n_rows, CHANNELS]; this and all below are contiguous
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    residual_ptr,  # [n_rows, CHANNELS]
    y_ptr,  # [n_rows, CHANNELS]
    n_rows,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < CHANNELS
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    offsets = rows[:, None] * CHANNELS + cols[None, :]

    # both loads are in flight together
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / CHANNELS
    centered = tl.where(col_mask[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / CHANNELS + eps)
    weight = tl.load(norm_weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    y = residual + (centered * rstd[:, None] * weight[None, :] + bias[None, :])
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
