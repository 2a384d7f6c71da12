"""y = activation(layer_norm(x) @ weight.T + bias): a GEMM that normalizes the rows that it loads.

A program takes a block of rows and some column tiles. It reads its rows once for their statistics,
and again, from a cache, to normalize them. It normalizes narrow rows once for all its tiles and
keeps them on the chip; it normalizes wide rows step by step for each tile. A row may also be 2x2
pixels of a map, gathered by address (patch merging).
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters, and pyright takes tl.range for no iterator

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .activation import activate
from .config import GemmConfig, cdiv
from .kernel import Kernel
from .normalized_gemm import load_weight, merge_statistics, normalize, streamed_tiles

# up to this number of features, 64 normalized rows stay on the chip
_MAX_RESIDENT_FEATURES = 512
# up to these, 128 rows stay there; on NVIDIA two such programs fit a multiprocessor
_MAX_FEATURES_OF_128_ROWS: dict[Architecture | None, int] = {
    80: 256,
    86: 128,
    89: 128,
    90: 384,
    100: 384,
    120: 128,
    "gfx90a": 512,
    "gfx942": 512,
    None: 384,
}
# up to this number, rows stay there even if a program computes only one tile from them
_SHORT_ROW = 256
# about two programs per multiprocessor of a GPU, times two: the others wait for the last ones
_ENOUGH_PROGRAMS = 512


class LayerNormLinearConfig(NamedTuple):
    """Partition of a call into programs and steps.

    Attributes:
        gemm: tile of the output and depth of one step.
        tiles_per_program: column tiles that a program computes from one set of rows.
        resident: whether the rows are normalized once for all these tiles and kept on the chip.
    """

    gemm: GemmConfig
    tiles_per_program: int
    resident: bool


def launch_config(
    n_rows: int,
    features: int,
    out_features: int,
    dtype: torch.dtype,
    merge: bool,
    arch: Architecture | None,
) -> LayerNormLinearConfig:
    """Chooses tiles and warps for [n_rows, features] by [features, out_features].

    Rows stay on the chip if a program computes several tiles from them. If rows are too wide, too
    few, or fp32 (multiplied exactly, in registers), each tile is a program. Short rows, and merged
    rows, which have few tiles, always stay on the chip: no other tiles read fewer bytes from L2,
    and one binary serves all batches.
    """
    if (
        dtype != torch.float32
        and features <= _MAX_RESIDENT_FEATURES
        and arch in _MAX_FEATURES_OF_128_ROWS
    ):
        block_k = 64 if features % 64 == 0 else 32
        # otherwise each element of a load needs its own mask, which takes registers
        whole_steps = features % block_k == 0
        many = whole_steps and features <= _MAX_FEATURES_OF_128_ROWS[arch] and not merge
        gemm = GemmConfig(128 if many else 64, 64, block_k, num_warps=8, num_stages=1)
        n_ranges = 1
        if arch is not None:
            n_ranges = cdiv(_ENOUGH_PROGRAMS, cdiv(n_rows, gemm.block_m))
        tiles_per_program = cdiv(cdiv(out_features, gemm.block_n), n_ranges)
        if merge or features <= _SHORT_ROW or tiles_per_program > 1:
            return LayerNormLinearConfig(gemm, tiles_per_program, True)
    gemm = streamed_tiles(n_rows, features, out_features, dtype, arch)
    return LayerNormLinearConfig(gemm, 1, False)


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Runs the kernel; arguments and result as `layer_norm_linear`."""
    out_features, features = weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    # a view if the rows have a constant stride
    rows = x.reshape(-1, features)
    pixels = rows[:, None, None, :]
    return launch_rows(pixels, norm_weight, norm_bias, weight, bias, y, eps, activation)


def launch_rows(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    eps: float,
    activation: Activation = None,
) -> Tensor:
    """Fills `y`, contiguous and not empty, with one row for each window of a map.

    Args:
        x: [B, H, W, C], any strides. If `weight` has C columns, a window is one pixel. If it has
            4C, a window is 2x2 pixels in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column),
            with zeros beyond the map.
        norm_weight: [features].
        norm_bias: [features].
        weight: [C_out, features].
        bias: [C_out] or None.
        y: [..., C_out].
        eps: added to the variance.
        activation: name of the activation, or None.

    Returns:
        `y`.
    """
    out_features, features = weight.shape
    _, height, width, channels = x.shape
    merge = features == 4 * channels
    side = 2 if merge else 1
    n_rows = y.numel() // out_features
    sizes = n_rows, features, out_features, x.dtype, merge
    gemm, tiles_per_program, resident = chosen_config(
        "layer_norm_linear", launch_config, x.device, *sizes
    )
    n_ranges = cdiv(cdiv(out_features, gemm.block_n), tiles_per_program)
    _layer_norm_linear_fwd_kernel[(cdiv(n_rows, gemm.block_m) * n_ranges,)](
        x,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        y,
        n_rows,
        features,
        out_features,
        channels,
        tiles_per_program,
        height,
        width,
        eps,
        *x.stride(),
        *weight.stride(),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        MERGE=merge,
        PADDED=height % side > 0 or width % side > 0,
        EVEN_K=features % gemm.block_k == 0,
        N_STEPS=cdiv(features, gemm.block_k) if resident else None,
        PRECISION=input_precision(x.dtype),
        **gemm.options(),
    )
    return y


# one binary serves all map sizes with equally aligned rows
@Kernel
@triton.jit(do_not_specialize=["n_rows", "tiles_per_program", "height", "width"])
def _layer_norm_linear_fwd_kernel(
    x_ptr,  # [B, height, width, C]; without MERGE a row is one pixel, and height and width are 1
    norm_weight_ptr,  # [features]
    norm_bias_ptr,  # [features]
    weight_ptr,  # [out_features, features]
    bias_ptr,  # [out_features] or None
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    features,
    out_features,
    channels,
    tiles_per_program,
    height,
    width,
    eps,
    stride_x_image,
    stride_x_row,
    stride_x_col,
    stride_x_channel,
    stride_weight_row,
    stride_weight_col,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MERGE: tl.constexpr,  # a row is 2x2 pixels
    PADDED: tl.constexpr,  # some of these pixels are beyond the map
    EVEN_K: tl.constexpr,
    N_STEPS: tl.constexpr,  # of a row that stays on the chip; None: rows do not stay there
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the programs of one block of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    n_ranges = tl.cdiv(n_tiles, tiles_per_program)
    pid = tl.program_id(0)
    first_row = (pid // n_ranges).to(tl.int64) * BLOCK_M
    first_tile = (pid % n_ranges) * tiles_per_program
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows - first_row

    if MERGE:
        # count from the first window of the first row's image: 32-bit divisions are enough
        y_width = (width + 1) // 2
        n_windows = (height + 1) // 2 * y_width
        windows = (first_row % n_windows).to(tl.int32) + rows
        images = first_row // n_windows + windows // n_windows
        windows = windows % n_windows
        top, left = windows // y_width * 2, windows % y_width * 2
        x_offsets = images * stride_x_image
        x_offsets += top.to(tl.int64) * stride_x_row + left.to(tl.int64) * stride_x_col
        has_below, has_right = top + 1 < height, left + 1 < width
    else:
        x_offsets = (first_row + rows) * stride_x_image
        has_below, has_right = row_mask, row_mask
    pixels = x_ptr + x_offsets, row_mask, has_below, has_right
    layout = channels, stride_x_row, stride_x_col, stride_x_channel
    norm = norm_weight_ptr, norm_bias_ptr

    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, features, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_columns(pixels, layout, k, features, MERGE, PADDED, EVEN_K)
        mean, squares = merge_statistics(
            mean, squares, x.to(tl.float32), start, k, features, EVEN_K
        )
    statistics = mean, tl.rsqrt(squares / features + eps)

    steps = ()
    if N_STEPS is not None:
        for i in tl.static_range(N_STEPS):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            x = _load_columns(pixels, layout, k, features, MERGE, PADDED, EVEN_K)
            steps = steps + (normalize(x, statistics, norm, k, features),)

    last_tile = first_tile + 1
    if N_STEPS is not None:
        last_tile = tl.minimum(first_tile + tiles_per_program, n_tiles)
    for tile in range(first_tile, last_tile):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        col_mask = cols < out_features
        weight_rows = weight_ptr + cols.to(tl.int64) * stride_weight_row
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if N_STEPS is not None:
            for i in tl.static_range(N_STEPS):
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                weight = load_weight(weight_rows, stride_weight_col, col_mask, k, features, EVEN_K)
                acc = tl.dot(steps[i], weight, acc, input_precision=PRECISION)
        else:
            for start in range(0, features, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = _load_columns(pixels, layout, k, features, MERGE, PADDED, EVEN_K)
                x = normalize(x, statistics, norm, k, features)
                weight = load_weight(weight_rows, stride_weight_col, col_mask, k, features, EVEN_K)
                acc = tl.dot(x, weight, acc, input_precision=PRECISION)

        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, y_ptr.dtype.element_ty)
        offsets = first_row * out_features + rows[:, None] * out_features + cols[None, :]
        tl.store(
            y_ptr + offsets,
            acc.to(y_ptr.dtype.element_ty),
            mask=row_mask[:, None] & col_mask[None, :],
        )


@triton.jit
def _load_columns(
    pixels, layout, k, features, MERGE: tl.constexpr, PADDED: tl.constexpr, EVEN_K: tl.constexpr
):
    """Loads columns `k` of a block of rows, [BLOCK_M, BLOCK_K]; zeros beyond the rows and the map.

    Args:
        pixels: for each row, [BLOCK_M]: the address of its first pixel, whether the row exists, and
            whether the map has a pixel below that one, and one to its right.
        layout: channels of a pixel; strides of x between rows, columns and channels.
        k: [BLOCK_K] numbers of the columns.
        features: columns of a row.
    """
    pointers, row_mask, has_below, has_right = pixels
    channels, stride_row, stride_col, stride_channel = layout
    mask = row_mask[:, None]
    if MERGE:
        pixel = k // channels
        channel = k % channels
        below, right = pixel % 2, pixel // 2
        offsets = channel.to(tl.int64) * stride_channel
        offsets += below.to(tl.int64) * stride_row + right.to(tl.int64) * stride_col
        if PADDED:
            mask = mask & (has_below[:, None] | (below == 0)[None, :])
            mask = mask & (has_right[:, None] | (right == 0)[None, :])
    else:
        offsets = k.to(tl.int64) * stride_channel
    if not EVEN_K:
        mask = mask & (k < features)[None, :]
    return tl.load(pointers[:, None] + offsets[None, :], mask=mask, other=0.0)
