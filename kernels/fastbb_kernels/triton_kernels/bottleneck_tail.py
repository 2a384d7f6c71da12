"""The last two convolutions of a bottleneck: a 3x3 convolution, and a 1x1 that expands its result.

A program computes all channels of some pixels of the 3x3 convolution and keeps them on the chip.
It multiplies them by the columns of the expansion chunk by chunk, and writes the products.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor, channels_last

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .activation import activate
from .config import GemmConfig, cdiv
from .conv3x3_bn_act import conv3x3_rows
from .kernel import Kernel
from .pixel_rows import interpreter_config

# about one program per multiprocessor of a GPU
_ENOUGH_PROGRAMS = 128


def launch_config(n_rows: int, channels: int, arch: Architecture | None) -> GemmConfig:
    """Chooses pixels and columns of a step, and its schedule."""
    if arch is None:
        return interpreter_config(n_rows, 64, channels)
    if arch in (90, 100):
        config = GemmConfig(128, 64, 64, num_warps=4, num_stages=3 if arch == 90 else 2)
    elif isinstance(arch, str) or channels == 64:
        config = GemmConfig(128, 64, 32, num_warps=4, num_stages=2 if isinstance(arch, str) else 3)
    else:
        return GemmConfig(64, 64, 32, num_warps=4, num_stages=2)
    # every program reads all weights: many pixels per program, unless there are few programs then
    many = cdiv(n_rows, config.block_m) >= _ENOUGH_PROGRAMS
    return config if many else config._replace(block_m=64)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    stride: int,
    dilation: int,
    activation: Activation,
    y: Tensor,
) -> Tensor:
    """Fills `y` [B, C_out, h, w], channels-last, and returns it; else as `bottleneck_tail`."""
    if y.numel() == 0:
        return y
    _, channels, height, width = x.shape
    batch, out_channels, y_height, y_width = y.shape
    n_rows = batch * y_height * y_width
    config = chosen_config("bottleneck_tail", launch_config, x.device, n_rows, channels)
    _bottleneck_tail_fwd_kernel[(cdiv(n_rows, config.block_m),)](
        x.contiguous(memory_format=channels_last),
        weight.contiguous(memory_format=channels_last),
        bias.contiguous(),
        expand_weight.contiguous(),
        expand_bias.contiguous(),
        residual.contiguous(memory_format=channels_last),
        y,
        n_rows,
        out_channels,
        height,
        width,
        y_height * y_width,
        y_width,
        stride,
        dilation,
        CHANNELS=channels,
        ACTIVATION=activation,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


# one binary serves all maps, strides and dilations
@Kernel
@triton.jit(
    do_not_specialize=["n_rows", "height", "width", "n_pixels", "y_width", "stride", "dilation"]
)
def _bottleneck_tail_fwd_kernel(
    x_ptr,  # [B, height, width, CHANNELS]; this and all below are contiguous
    weight_ptr,  # [CHANNELS, 3, 3, CHANNELS]
    bias_ptr,  # [CHANNELS]
    expand_weight_ptr,  # [out_channels, CHANNELS]
    expand_bias_ptr,  # [out_channels]
    residual_ptr,  # [n_rows, out_channels]
    y_ptr,  # [n_rows, out_channels]
    n_rows,
    out_channels,  # a multiple of BLOCK_N
    height,
    width,
    n_pixels,  # of an image of y
    y_width,
    stride,
    dilation,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows - first_row
    channels = tl.arange(0, CHANNELS)
    mid = conv3x3_rows(
        x_ptr,
        weight_ptr,
        first_row,
        rows,
        row_mask,
        channels,
        tl.full((CHANNELS,), True, tl.int1),
        CHANNELS,
        height,
        width,
        n_pixels,
        y_width,
        stride,
        dilation,
        True,
        PRECISION,
        BLOCK_K,
    )
    mid += tl.load(bias_ptr + channels).to(tl.float32)[None, :]
    mid = activate(mid, "relu", x_ptr.dtype.element_ty).to(x_ptr.dtype.element_ty)

    y_rows = first_row * out_channels + rows[:, None] * out_channels
    for start in range(0, out_channels, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        weight = tl.load(expand_weight_ptr + cols[None, :] * CHANNELS + channels[:, None])
        acc = tl.dot(mid, weight, input_precision=PRECISION)
        offsets = y_rows + cols[None, :]
        acc += tl.load(residual_ptr + offsets, mask=row_mask[:, None], other=0.0).to(tl.float32)
        acc += tl.load(expand_bias_ptr + cols).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None])
