"""A whole ConvNeXt block: y = x + scale * fc2(activation(fc1(layer_norm(depthwise_conv(x))))).

A program convolves vertical strips of pixels, piece by piece of the channels, and normalizes the
results, which stay on the chip. The rest is the loop over hidden columns of `mlp_block`.
Bound: instructions, of the convolution and of the activation; x is read from DRAM about once.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from ..ops.convnext_block import STRIP_ROWS
from .config import cdiv
from .depthwise_strips import strip_sums
from .kernel import Kernel
from .mlp_of_rows import mlp_of_rows
from .normalized_rows import normalized


class ConvNextBlockConfig(NamedTuple):
    """Tiles of a program, warps, pipeline stages and compiler options.

    Attributes:
        block_n: strips of pixels.
        block_h: hidden columns of a step.
        block_c: channels of a piece.
        compiler: options that only the compiler of one vendor knows.
    """

    block_n: int
    block_h: int
    block_c: int
    num_warps: int
    num_stages: int
    compiler: dict[str, int]

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_H": self.block_h,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **self.compiler,
        }


def launch_config(n_pixels: int, channels: int, arch: Architecture | None) -> ConvNextBlockConfig:
    """Chooses tiles and warps for maps of [n_pixels, channels]."""
    on_amd = isinstance(arch, str)
    compiler = {"matrix_instr_nonkdim": 16} if on_amd else {}
    # as in mlp_block: many pixels per program, unless there are too few programs
    if n_pixels < 128 * 256:
        return ConvNextBlockConfig(16, 32, 32, 4, 1, compiler)
    # prefetching weights takes registers
    num_stages = 1 if on_amd or channels > 192 else 2
    if channels <= 96 and arch != 100:  # wide loads, of 8 channels per thread
        return ConvNextBlockConfig(32, 32, 32, 4, num_stages, compiler)
    block_c = 64 if channels > 96 and channels % 64 == 0 else 32
    return ConvNextBlockConfig(32, 32, block_c, 8, num_stages, compiler)


def launch(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    activation: Activation,
    y: Tensor,
) -> Tensor:
    """Fills `y`, channels-last, and returns it; otherwise as `convnext_block`."""
    if y.numel() == 0:
        return y
    batch, channels, height, width = x.shape
    n_pixels = batch * height * width
    config = chosen_config("convnext_block", launch_config, x.device, n_pixels, channels)
    n_strips = batch * cdiv(height, STRIP_ROWS) * width
    _convnext_block_fwd_kernel[(cdiv(n_strips, config.block_n),)](
        # views if C is the fastest axis
        x.permute(0, 2, 3, 1).contiguous(),
        conv_weight.permute(2, 3, 1, 0).contiguous(),
        conv_bias.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        fc1_weight.contiguous(),
        None if fc1_bias is None else fc1_bias.contiguous(),
        fc2_weight.contiguous(),
        None if fc2_bias is None else fc2_bias.contiguous(),
        None if scale is None else scale.contiguous(),
        y,
        batch,
        height,
        width,
        eps,
        CHANNELS=channels,
        HIDDEN=fc1_weight.shape[0],
        K=conv_weight.shape[2],
        ACTIVATION=activation,
        PRECISION=input_precision(x.dtype),
        ROWS=STRIP_ROWS,
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["batch", "height", "width"])
def _convnext_block_fwd_kernel(
    x_ptr,  # [batch, height, width, CHANNELS]; this and all below are contiguous
    conv_weight_ptr,  # [K, K, CHANNELS]
    conv_bias_ptr,  # [CHANNELS]
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    fc1_weight_ptr,  # [HIDDEN, CHANNELS]
    fc1_bias_ptr,  # [HIDDEN] or None
    fc2_weight_ptr,  # [CHANNELS, HIDDEN]
    fc2_bias_ptr,  # [CHANNELS] or None
    scale_ptr,  # [CHANNELS] or None
    y_ptr,  # [batch, height, width, CHANNELS]
    batch,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    first_strip = tl.program_id(0).to(tl.int64) * BLOCK_N
    shape = batch, height, width
    tops, rows, cols, mask = tops_of_strips(
        first_strip, tl.arange(0, BLOCK_N)[:, None], shape, ROWS
    )
    convolved = ()
    for i in tl.static_range(CHANNELS // BLOCK_C):
        channels = tl.zeros((BLOCK_N, 1), tl.int32) + i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        bias = tl.load(conv_bias_ptr + channels).to(tl.float32)
        sums = strip_sums(
            (bias,) * ROWS,
            x_ptr + tops * CHANNELS + channels,
            conv_weight_ptr + channels,
            mask,
            (rows, cols),
            (height, width, CHANNELS),
            1,
            1,
            K,
            ROWS,
        )
        convolved += (pixels_of_strips(sums, dtype),)

    pixels = tl.arange(0, BLOCK_N * ROWS)
    tops, rows, _, mask = tops_of_strips(first_strip, pixels // ROWS, shape, ROWS)
    inside = mask & (rows + pixels % ROWS < height)
    norm = norm_weight_ptr, norm_bias_ptr, eps
    mlp_of_rows(
        normalized(convolved, inside, norm, CHANNELS, BLOCK_C),
        (fc1_weight_ptr, fc1_bias_ptr),
        (fc2_weight_ptr, fc2_bias_ptr),
        scale_ptr,
        None,
        x_ptr,
        y_ptr,
        tops + pixels % ROWS * width,
        inside,
        CHANNELS,
        HIDDEN,
        ACTIVATION,
        PRECISION,
        BLOCK_H,
        BLOCK_C,
    )


@triton.jit
def tops_of_strips(first_strip, strips, shape, ROWS: tl.constexpr):
    """Finds the uppermost pixels of the strips `first_strip + strips` of ROWS pixels.

    Args:
        first_strip: i64 scalar.
        strips: i32, any shape.
        shape: number of maps, their height and width.
        ROWS: pixels of a strip; those of the last strips of a column may be below the map.

    Returns:
        numbers of the pixels in all maps, i64; their rows and columns, i32; whether there is such a
        strip, i1.
    """
    batch, height, width = shape
    n_strips = tl.cdiv(height, ROWS) * width  # of a map
    # count from the first strip of its map: 32-bit divisions are enough
    strips += (first_strip % n_strips).to(tl.int32)
    maps = first_strip // n_strips + strips // n_strips
    strips = strips % n_strips
    rows, cols = strips // width * ROWS, strips % width
    return (maps * height + rows) * width + cols, rows, cols, maps < batch


@triton.jit
def pixels_of_strips(strips, dtype: tl.constexpr):
    """Rounds and joins the 4 pixels of N strips, each [N, C], to [4 * N, C], strip by strip."""
    first, second, third, fourth = strips
    even = tl.join(first.to(dtype), third.to(dtype))
    odd = tl.join(second.to(dtype), fourth.to(dtype))
    pixels = tl.join(even, odd).permute(0, 2, 3, 1)  # [N, 2, 2, C]
    return pixels.reshape(4 * pixels.shape[0], pixels.shape[3])
