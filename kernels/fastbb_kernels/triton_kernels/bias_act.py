"""y = activation(x + bias + residual) over rows of a channels-last map, one tile per program."""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor, channels_last

from .._activation import Activation
from .._dispatch import Architecture
from ..launching import chosen_config
from .activation import activate
from .config import RowsConfig, cdiv, next_power_of_2
from .kernel import Kernel


def launch_config(channels: int, arch: Architecture | None) -> RowsConfig:
    """Chooses tiles of 4096 elements, 32 per thread, with whole rows up to 128 channels."""
    block_n = max(16, min(128, next_power_of_2(channels)))
    return RowsConfig(4096 // block_n, block_n, num_warps=4)


def launch(
    x: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation, y: Tensor
) -> Tensor:
    """Fills `y` [B, C, H, W], channels-last, and returns it; otherwise as `bias_act`."""
    if y.numel() == 0:
        return y
    channels = y.shape[1]
    n_rows = y.numel() // channels
    config = chosen_config("bias_act", launch_config, x.device, channels)
    grid = (cdiv(n_rows, config.block_m) * cdiv(channels, config.block_n),)
    _bias_act_fwd_kernel[grid](
        x.contiguous(memory_format=channels_last),
        bias.contiguous(),
        None if residual is None else residual.contiguous(memory_format=channels_last),
        y,
        n_rows,
        channels,
        ACTIVATION=activation,
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _bias_act_fwd_kernel(
    x_ptr,  # [n_rows, channels]; this and all below are contiguous
    bias_ptr,  # [channels]
    residual_ptr,  # [n_rows, channels] or None
    y_ptr,  # [n_rows, channels]
    n_rows,
    channels,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_tiles = tl.cdiv(channels, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < channels
    mask = (rows < n_rows - first_row)[:, None] & col_mask[None, :]
    offsets = first_row * channels + rows[:, None] * channels + cols[None, :]

    y = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
