"""y = silu(gate) * up, both linear in layer_norm(x).

A program computes a tile of gate and the same tile of up, so that they meet in registers.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import input_precision
from ..launching import chosen_config
from .activation import activate
from .config import cdiv
from .kernel import Kernel
from .normalized_gemm import paired_products, paired_tiles

launch_config = paired_tiles


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Runs the kernel; arguments and result as `layer_norm_swiglu`."""
    out_features, features = gate_weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    # a view if the rows have a constant stride
    rows = x.reshape(-1, features)
    n_rows = rows.shape[0]
    config = chosen_config(
        "layer_norm_swiglu", launch_config, x.device, n_rows, features, 2 * out_features, x.dtype
    )
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_features, config.block_n),)
    _layer_norm_swiglu_fwd_kernel[grid](
        rows,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        gate_weight,
        None if gate_bias is None else gate_bias.contiguous(),
        up_weight,
        None if up_bias is None else up_bias.contiguous(),
        y,
        n_rows,
        features,
        out_features,
        eps,
        *rows.stride(),
        *gate_weight.stride(),
        *up_weight.stride(),
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_UP_BIAS=up_bias is not None,
        EVEN_K=features % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_swiglu_fwd_kernel(
    x_ptr,  # [n_rows, features]
    norm_weight_ptr,  # [features]
    norm_bias_ptr,  # [features]
    gate_weight_ptr,  # [out_features, features]
    gate_bias_ptr,  # [out_features] or None
    up_weight_ptr,  # [out_features, features]
    up_bias_ptr,  # [out_features] or None
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    features,
    out_features,
    eps,
    stride_x_row,
    stride_x_col,
    stride_gate_row,
    stride_gate_col,
    stride_up_row,
    stride_up_col,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one block of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, cols < out_features

    weight_rows = cols.to(tl.int64)
    gate, up = paired_products(
        (x_ptr + (first_row + rows) * stride_x_row, stride_x_col),
        (norm_weight_ptr, norm_bias_ptr, eps),
        (
            gate_weight_ptr + weight_rows * stride_gate_row,
            stride_gate_col,
            up_weight_ptr + weight_rows * stride_up_row,
            stride_up_col,
        ),
        row_mask,
        col_mask,
        features,
        EVEN_K,
        PRECISION,
        BLOCK_K,
    )
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_UP_BIAS:
        up += tl.load(up_bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    y = activate(gate, "silu", y_ptr.dtype.element_ty) * up
    offsets = first_row * out_features + rows[:, None] * out_features + cols[None, :]
    tl.store(
        y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :]
    )
