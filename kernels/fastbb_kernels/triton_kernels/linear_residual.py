"""y = residual + x @ weight.T + bias: a tiled GEMM with both additions in its epilogue."""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, architecture, input_precision
from .config import GemmConfig


def launch_config(
    n_rows: int, features: int, out_features: int, arch: Architecture | None
) -> GemmConfig:
    """Tiles and warps for one GEMM of [n_rows, features] by [features, out_features]."""
    block_n = 64 if out_features % 128 else 128
    block_k = 64 if features % 64 == 0 else 32
    return GemmConfig(block_m=128, block_n=block_n, block_k=block_k, num_warps=8, num_stages=3)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Runs the kernel; arguments and result as `linear_residual`."""
    out_features, features = weight.shape
    y = x.new_empty(residual.shape)
    # reshape is a view unless the rows do not lie at one stride
    rows, residual_rows = x.reshape(-1, features), residual.reshape(-1, out_features)
    n_rows = rows.shape[0]
    if y.numel() == 0:
        return y
    config = launch_config(n_rows, features, out_features, architecture(x.device))
    grid = (triton.cdiv(n_rows, config.block_m) * triton.cdiv(out_features, config.block_n),)
    _linear_residual_fwd_kernel[grid](
        rows,
        weight,
        bias,
        residual_rows,
        y,
        n_rows,
        features,
        out_features,
        *rows.stride(),
        *weight.stride(),
        *residual_rows.stride(),
        HAS_BIAS=bias is not None,
        EVEN_K=features % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


@triton.jit(do_not_specialize=["n_rows"])
def _linear_residual_fwd_kernel(
    x_ptr,  # [n_rows, features]
    weight_ptr,  # [out_features, features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [n_rows, out_features]
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    features,
    out_features,
    stride_x_row,
    stride_x_col,
    stride_weight_row,
    stride_weight_col,
    stride_residual_row,
    stride_residual_col,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one set of rows run side by side: x stays in L2
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows, cols < out_features

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask, weight_mask = row_mask[:, None], col_mask[None, :]
        if not EVEN_K:
            x_mask &= (k < features)[None, :]
            weight_mask &= (k < features)[:, None]
        x = tl.load(
            x_ptr + rows[:, None] * stride_x_row + k[None, :] * stride_x_col,
            mask=x_mask,
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + cols[None, :] * stride_weight_row + k[:, None] * stride_weight_col,
            mask=weight_mask,
            other=0.0,
        )
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    residual_offsets = rows[:, None] * stride_residual_row + cols[None, :] * stride_residual_col
    acc += tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + rows[:, None] * out_features + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask,
    )
