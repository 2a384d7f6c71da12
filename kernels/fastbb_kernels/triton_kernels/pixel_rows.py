"""Pixels of channels-last maps as rows of a GEMM, for 1x1 convolutions."""
# pyright: reportArgumentType=false
# inside a kernel values are tensors, which tl's types do not express

import torch
import triton
import triton.language as tl

from .._dispatch import Architecture
from .config import GemmConfig, cdiv, next_power_of_2
from .tile_choice import has_work_for_large_tiles, largest_tiles

# about one program per multiprocessor of a GPU
_ENOUGH_PROGRAMS = 128

# whose multiprocessor holds two programs with tiles of 128x128; a residual takes more registers
_HOLD_LARGE_TILES = (90, 100)
_AMD = ("gfx90a", "gfx942")


def interpreter_config(n_rows: int, out_channels: int, channels: int) -> GemmConfig:
    """Chooses large tiles for the interpreter, whose time hardly depends on the size of a tile."""
    sizes = (n_rows, 1024), (out_channels, 256), (channels, 64)
    blocks = (min(most, max(16, next_power_of_2(size))) for size, most in sizes)
    return GemmConfig(*blocks, num_warps=4, num_stages=1)


def launch_config(
    n_rows: int,
    channels: int,
    out_channels: int,
    residual: bool,
    dtype: torch.dtype,
    plain: bool,
    arch: Architecture | None,
) -> GemmConfig:
    """Chooses tiles and warps for a GEMM of [n_rows, channels] by [channels, out_channels].

    Large tiles read fewer bytes from L2, and so do narrow tiles if there are few output channels.
    Small tiles have more loads in flight and fill the GPU if there are few rows. On AMD, where the
    tail of a bottleneck is another kernel, GEMMs with a residual or two products never use narrow
    tiles: so models that run with several batch sizes need fewer binaries.

    Args:
        n_rows: of the GEMM.
        channels: of a row.
        out_channels: of a row of the result.
        residual: whether one is added.
        dtype: of the operands.
        plain: neither a residual nor a second product.
        arch: target of the compiler; None: the interpreter.
    """
    if arch is None:
        return interpreter_config(n_rows, out_channels, channels)
    if largest := largest_tiles(n_rows, channels, out_channels, dtype, arch):
        return largest
    block_k = 64 if channels % 64 == 0 and arch not in _AMD else 32
    if dtype == torch.float32:
        # no MMA, so that the operands are in registers too; a third stage would need too many
        block_k = 16
        large = GemmConfig(64, 64, block_k, num_warps=4, num_stages=2)
    elif arch in _AMD or (arch in _HOLD_LARGE_TILES and not residual):
        large = GemmConfig(128, 128, block_k, num_warps=8, num_stages=3)
    else:
        large = GemmConfig(64, 128, 32, num_warps=4, num_stages=3)
    narrow = GemmConfig(128, 64, block_k, num_warps=8, num_stages=3)
    fitting = [config for config in (large, narrow) if config.block_n < 2 * out_channels]
    if arch in _AMD and not plain:
        fitting = fitting[:1]
    for config in fitting:
        tiles = cdiv(n_rows, config.block_m) * cdiv(out_channels, config.block_n)
        if tiles >= _ENOUGH_PROGRAMS:
            return config
    if fitting and has_work_for_large_tiles(n_rows, out_channels, arch):
        return fitting[0]
    return GemmConfig(64, 32, block_k, num_warps=4, num_stages=5)


@triton.jit
def strided_pixels(first_row, rows, height, width, STRIDE: tl.constexpr):
    """Finds the pixels that a strided 1x1 convolution reads for its pixels `first_row + rows`.

    Args:
        first_row: i64 scalar.
        rows: [M] i32.
        height: of the input map.
        width: of the input map.
        STRIDE: in both directions.

    Returns:
        [M] i64, numbers of pixels in [B, height, width].
    """
    if STRIDE == 1:
        pixels = first_row + rows
    else:
        # count from the first pixel of the first row's image: 32-bit divisions are enough
        y_width = tl.cdiv(width, STRIDE)
        n_pixels = tl.cdiv(height, STRIDE) * y_width
        rows += (first_row % n_pixels).to(tl.int32)
        images = first_row // n_pixels + rows // n_pixels
        rows = rows % n_pixels
        top, left = rows // y_width * STRIDE, rows % y_width * STRIDE
        pixels = (images * height + top) * width + left
    return pixels


@triton.jit
def add_product(
    acc,
    map_ptr,
    pixels,
    pixel_mask,
    weight_ptr,
    cols,
    col_mask,
    channels,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the product of a map's pixels and a weight to `acc`.

    Args:
        acc: [M, N] fp32.
        map_ptr: [n_pixels, channels], contiguous.
        pixels: [M] i64, numbers of pixels.
        pixel_mask: [M] i1, whether a pixel may be loaded.
        weight_ptr: [n_cols, channels], contiguous.
        cols: [N] i32, rows of the weight.
        col_mask: [N] i1, whether a row of the weight may be loaded.
        channels: of the map.
        EVEN_K: `channels` is a multiple of BLOCK_K.
        PRECISION: of products in fp32.
        BLOCK_K: channels of a step.

    Returns:
        [M, N] fp32.
    """
    map_rows = map_ptr + pixels[:, None] * channels
    weight_rows = weight_ptr + cols[None, :] * channels
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask, weight_mask = pixel_mask[:, None], col_mask[None, :]
        if not EVEN_K:
            x_mask &= (k < channels)[None, :]
            weight_mask &= (k < channels)[:, None]
        x = tl.load(map_rows + k[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_rows + k[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc
