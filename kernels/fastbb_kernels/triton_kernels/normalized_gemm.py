"""GEMMs that normalize the rows that they load, step by step, for rows too wide for the chip."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# inside a kernel values are tensors, and pyright takes tl.range for no iterator

import math

import torch
import triton
import triton.language as tl

from .._dispatch import Architecture
from .config import GemmConfig, cdiv

# about one program per multiprocessor
_FEW_PROGRAMS = 128


def streamed_tiles(
    n_rows: int, features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """Chooses tiles for [n_rows, features] by [features, out_features]; each is a program."""
    if dtype == torch.float32:  # multiplied exactly, in registers
        return GemmConfig(64, 64, 16, num_warps=4, num_stages=3)
    block_k = 64 if features % 64 == 0 else 32
    if isinstance(arch, str):
        gemm = GemmConfig(128, 128, block_k, num_warps=8, num_stages=2)
    else:
        if arch not in (80, 90, 100, None):  # 100 KB of shared memory, or unknown
            block_k = 32
        gemm = GemmConfig(64, 128, block_k, num_warps=8, num_stages=3)
    n_tiles = cdiv(n_rows, gemm.block_m), cdiv(out_features, gemm.block_n)
    few = arch is not None and math.prod(n_tiles) < _FEW_PROGRAMS
    # without whole steps each element of a load needs its own mask, which takes registers
    if few or features % block_k > 0:
        gemm = GemmConfig(64, 32, block_k, num_warps=4, num_stages=3)
    return gemm


def paired_tiles(
    n_rows: int, features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """Chooses tiles for `paired_products`: block_n is the number of columns of each product.

    Args:
        n_rows: of x.
        features: of a row.
        out_features: columns of both products together.
        dtype: of the tensors.
        arch: the architecture.
    """
    gemm = streamed_tiles(n_rows, features, out_features, dtype, arch)
    if dtype == torch.float32:  # a third stage spills
        gemm = gemm._replace(num_stages=2)
    return gemm._replace(block_n=gemm.block_n // 2)


@triton.jit
def paired_products(
    x,
    norm,
    weights,
    row_mask,
    col_mask,
    features,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiplies normalized rows by two weights.

    Two products of a tile's columns, not one of twice as many: the results meet in the same
    threads, and a store of either writes neighbours.

    Args:
        x: addresses of the rows [BLOCK_M], and the stride of their columns.
        norm: weight and bias [features], contiguous, and eps, which is added to the variance.
        weights: for each weight: addresses of its rows [BLOCK_N], and the stride of its columns.
        row_mask: [BLOCK_M] i1, whether a row exists.
        col_mask: [BLOCK_N] i1, whether the weights have such a row.
        features: columns of a row.
        EVEN_K: whether BLOCK_K divides features.
        PRECISION: of the products of fp32 tensors.
        BLOCK_K: depth of a step.

    Returns:
        two products [BLOCK_M, BLOCK_N] in fp32.
    """
    x_rows, stride_x_col = x
    norm_weight_ptr, norm_bias_ptr, eps = norm
    first_rows, stride_first_col, second_rows, stride_second_col = weights
    mean = tl.zeros(row_mask.shape, tl.float32)
    squares = tl.zeros(row_mask.shape, tl.float32)
    for start in tl.range(0, features, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        piece = _load_columns(x_rows, stride_x_col, row_mask, k, features, EVEN_K)
        mean, squares = merge_statistics(
            mean, squares, piece.to(tl.float32), start, k, features, EVEN_K
        )
    statistics = mean, tl.rsqrt(squares / features + eps)

    first = tl.zeros((row_mask.shape[0], col_mask.shape[0]), tl.float32)
    second = tl.zeros((row_mask.shape[0], col_mask.shape[0]), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        piece = _load_columns(x_rows, stride_x_col, row_mask, k, features, EVEN_K)
        piece = normalize(piece, statistics, (norm_weight_ptr, norm_bias_ptr), k, features)
        weight = load_weight(first_rows, stride_first_col, col_mask, k, features, EVEN_K)
        first = tl.dot(piece, weight, first, input_precision=PRECISION)
        weight = load_weight(second_rows, stride_second_col, col_mask, k, features, EVEN_K)
        second = tl.dot(piece, weight, second, input_precision=PRECISION)
    return first, second


@triton.jit
def _load_columns(rows, stride_col, row_mask, k, features, EVEN_K: tl.constexpr):
    """Loads columns `k` of a block of rows, [BLOCK_M, BLOCK_K]."""
    mask = row_mask[:, None]
    if not EVEN_K:
        mask = mask & (k < features)[None, :]
    offsets = k.to(tl.int64) * stride_col
    return tl.load(rows[:, None] + offsets[None, :], mask=mask, other=0.0)


@triton.jit
def merge_statistics(mean, squares, x, n_before, k, features, EVEN_K: tl.constexpr):
    """Adds the columns of `x` to the mean and the sum of squared deviations of `n_before` columns.

    Chan, Golub and LeVeque 1979: without a difference of large sums, a large mean loses no digits.
    """
    n = tl.minimum(features - n_before, x.shape[1])
    x_mean = tl.sum(x, axis=1) / n
    centered = x - x_mean[:, None]
    if not EVEN_K:
        centered = tl.where((k < features)[None, :], centered, 0.0)
    share = n / (n_before + n)
    delta = x_mean - mean
    squares += tl.sum(centered * centered, axis=1) + delta * delta * (n_before * share)
    return mean + delta * share, squares


@triton.jit
def normalize(x, statistics, norm, k, features):
    """Returns columns `k` of the normalized rows, rounded to the dtype of `x` as by layer norm."""
    mean, rstd = statistics
    norm_weight_ptr, norm_bias_ptr = norm
    weight = tl.load(norm_weight_ptr + k, mask=k < features, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + k, mask=k < features, other=0.0).to(tl.float32)
    y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    return y.to(x.dtype)


@triton.jit
def load_weight(weight_rows, stride_col, col_mask, k, features, EVEN_K: tl.constexpr):
    """Loads columns `k` of a tile of weight rows, transposed: [BLOCK_K, BLOCK_N]."""
    mask = col_mask[None, :]
    if not EVEN_K:
        mask = mask & (k < features)[:, None]
    offsets = k.to(tl.int64) * stride_col
    return tl.load(weight_rows[None, :] + offsets[:, None], mask=mask, other=0.0)
