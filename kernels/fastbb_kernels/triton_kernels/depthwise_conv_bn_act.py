"""Depthwise convolution of a channels-last map; it is not a GEMM and uses no matrix instructions.

A program computes vertical strips of ROWS pixels, see `strip_sums`.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters, and static_range has no iterable type

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture
from ..launching import chosen_config
from .activation import activate
from .config import cdiv
from .depthwise_strips import strip_sums
from .kernel import Kernel


class StripsConfig(NamedTuple):
    """Tile of a program (strips of `rows` pixels, and channels), and its warps."""

    block_n: int
    block_c: int
    rows: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "ROWS": self.rows,
            "num_warps": self.num_warps,
        }


def launch_config(channels: int, dtype: torch.dtype, arch: Architecture | None) -> StripsConfig:
    """Chooses tiles in which each of 128 threads holds 128 bits of the channels of one strip."""
    # the block with the least padding, the wider one if equal: narrow blocks scatter accesses
    blocks = (64, 32) if channels > 16 else (16,)
    block_c = min(blocks, key=lambda block: cdiv(channels, block) * block)
    block_n = 128 * (16 // dtype.itemsize) // block_c
    # a warp has 64 threads on AMD
    return StripsConfig(block_n, block_c, rows=4, num_warps=2 if isinstance(arch, str) else 4)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
    y: Tensor,
) -> Tensor:
    """Fills `y`, channels-last, and returns it; otherwise as `depthwise_conv_bn_act`."""
    if y.numel() == 0:
        return y
    batch, channels, height, width = x.shape
    config = chosen_config("depthwise_conv_bn_act", launch_config, x.device, channels, x.dtype)
    n_strips = batch * cdiv(y.shape[2], config.rows) * y.shape[3]
    grid = (cdiv(n_strips, config.block_n) * cdiv(channels, config.block_c),)
    _depthwise_conv_bn_act_fwd_kernel[grid](
        # views if C is the fastest axis
        x.permute(0, 2, 3, 1).contiguous(),
        weight.permute(2, 3, 1, 0).contiguous(),
        bias.contiguous(),
        y,
        batch,
        height,
        width,
        channels,
        STRIDE=stride,
        DILATION=dilation,
        K=weight.shape[2],
        ACTIVATION=activation,
        VECTOR=math.gcd(channels, 16 // x.element_size()),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["batch", "height", "width", "channels"])
def _depthwise_conv_bn_act_fwd_kernel(
    x_ptr,  # [batch, height, width, channels], contiguous
    weight_ptr,  # [K, K, channels], contiguous
    bias_ptr,  # [channels]
    y_ptr,  # [batch, y_height, y_width, channels], contiguous
    batch,
    height,
    width,
    channels,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    # tell the compiler, so that one load takes VECTOR channels
    channels = channels // VECTOR * VECTOR
    y_height, y_width = (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1
    n_strips = tl.cdiv(y_height, ROWS) * y_width  # of an image

    # the channels of one set of strips run at the same time: they are adjacent in memory
    n_tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    first_strip = (pid // n_tiles).to(tl.int64) * BLOCK_N
    # count from the first strip of its image: 32-bit divisions are enough
    strips = (first_strip % n_strips).to(tl.int32) + tl.arange(0, BLOCK_N)
    images = (first_strip // n_strips + strips // n_strips)[:, None]
    strips = (strips % n_strips)[:, None]
    y_rows, y_cols = strips // y_width * ROWS, strips % y_width
    x_rows, x_cols = y_rows * STRIDE, y_cols * STRIDE
    cols = ((pid % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (images < batch) & (cols < channels)

    wide_channels = channels.to(tl.int64)
    x_pointers = x_ptr + ((images * height + x_rows) * width + x_cols) * wide_channels + cols
    # as wide as x, so that each thread loads its own factors
    weight_pointers = weight_ptr + tl.zeros_like(strips) + cols
    bias = tl.load(bias_ptr + tl.zeros_like(strips) + cols, mask=mask, other=0.0).to(tl.float32)
    acc = strip_sums(
        (bias,) * ROWS,
        x_pointers,
        weight_pointers,
        mask,
        (x_rows, x_cols),
        (height, width, channels),
        STRIDE,
        DILATION,
        K,
        ROWS,
    )

    y_pointers = y_ptr + ((images * y_height + y_rows) * y_width + y_cols) * wide_channels + cols
    for i in tl.static_range(ROWS):
        tl.store(
            y_pointers + i * y_width * wide_channels,
            activate(acc[i], ACTIVATION, y_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty),
            mask=mask & (y_rows + i < y_height),
        )
