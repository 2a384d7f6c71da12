"""y = (x - mean) / sqrt(variance + eps) * weight + bias over the rows of a channels-last map.

A program holds several whole rows in registers, so both statistics come from one read of x: the
mean first, then the variance about it.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture
from ..launching import chosen_config
from .config import RowsConfig, cdiv, next_power_of_2
from .kernel import Kernel


def launch_config(n_rows: int, channels: int, arch: Architecture | None) -> RowsConfig:
    """Chooses tiles of whole rows with 32 elements per thread, also if there are few rows."""
    block_n = next_power_of_2(channels)
    block_m = max(1, 4096 // block_n)
    return RowsConfig(block_m, block_n, num_warps=min(max(block_m * block_n // 1024, 1), 8))


def launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Runs the kernel; arguments and result as `layer_norm_nchw`."""
    channels = x.shape[-1]
    y = x.new_empty(x.shape)
    if y.numel() > 0:
        # a view if the rows have a constant stride
        rows = x.reshape(-1, channels)
        n_rows = rows.shape[0]
        config = chosen_config("layer_norm_nchw", launch_config, x.device, n_rows, channels)
        _layer_norm_nchw_fwd_kernel[(cdiv(n_rows, config.block_m),)](
            rows,
            weight.contiguous(),
            bias.contiguous(),
            y,
            n_rows,
            eps,
            *rows.stride(),
            CHANNELS=channels,
            **config.options(),
        )
    return y.permute(0, 3, 1, 2)


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_nchw_fwd_kernel(
    x_ptr,  # [n_rows, CHANNELS]
    weight_ptr,  # [CHANNELS]
    bias_ptr,  # [CHANNELS]
    y_ptr,  # [n_rows, CHANNELS], contiguous
    n_rows,
    eps,
    # constants, because their common divisors decide the width of loads
    stride_x_row: tl.constexpr,
    stride_x_col: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    col_mask = cols < CHANNELS
    mask = (rows < n_rows)[:, None] & col_mask[None, :]

    x_offsets = rows[:, None] * stride_x_row + cols[None, :] * stride_x_col
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / CHANNELS
    centered = tl.where(col_mask[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / CHANNELS + eps)

    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(
        y_ptr + rows[:, None] * CHANNELS + cols[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=mask,
    )
