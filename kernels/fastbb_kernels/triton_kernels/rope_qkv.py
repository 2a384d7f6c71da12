"""q, k and v of layer_norm(x), with q and k of the patch tokens rotated where they are written.

The rotation pairs the channels d and d + head_dim / 2 of a head. A program computes both as two
products of the same normalized rows, so that they meet in registers.
"""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import input_precision
from ..launching import chosen_config
from .config import cdiv
from .kernel import Kernel
from .normalized_gemm import paired_products, paired_tiles

launch_config = paired_tiles


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    n_prefix: int,
    eps: float,
) -> Tensor:
    """Runs the kernel; arguments and result as `rope_qkv`."""
    batch, n_tokens, _ = x.shape
    out_features, features = weight.shape
    head_dim = out_features // (3 * num_heads)
    y = x.new_empty(batch, n_tokens, 3, num_heads, head_dim)
    if y.numel() == 0:
        return y
    # a view if the rows have a constant stride
    rows = x.reshape(-1, features)
    n_rows = rows.shape[0]
    config = chosen_config(
        "rope_qkv", launch_config, x.device, n_rows, features, out_features, x.dtype
    )
    n_pairs = out_features // 2
    grid = (cdiv(n_rows, config.block_m) * cdiv(n_pairs, config.block_n),)
    _rope_qkv_fwd_kernel[grid](
        rows,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        y,
        n_rows,
        features,
        n_pairs,
        n_pairs // 3 * 2,
        n_tokens,
        n_prefix,
        eps,
        *rows.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        HALF=head_dim // 2,
        EVEN_K=features % config.block_k == 0,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows", "n_tokens", "n_prefix"])
def _rope_qkv_fwd_kernel(
    x_ptr,  # [n_rows, features]; the rows are the tokens of all images
    norm_weight_ptr,  # [features]
    norm_bias_ptr,  # [features]
    weight_ptr,  # [2 * n_pairs, features]
    bias_ptr,  # [2 * n_pairs] or None
    cos_ptr,  # [n_tokens - n_prefix, 2 * HALF]
    sin_ptr,  # as cos
    y_ptr,  # [n_rows, 2 * n_pairs], contiguous
    n_rows,
    features,
    n_pairs,  # of q, then of k, then of v
    n_rotated,  # pairs of q and of k
    n_tokens,  # of an image
    n_prefix,
    eps,
    stride_x_row,
    stride_x_col,
    stride_weight_row,
    stride_weight_col,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one block of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(n_pairs, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    pairs = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, pairs < n_pairs
    channels = pairs % HALF
    cols = pairs // HALF * (2 * HALF) + channels  # of `first`; `second` is HALF further

    weight_rows = weight_ptr + cols.to(tl.int64) * stride_weight_row
    first, second = paired_products(
        (x_ptr + (first_row + rows) * stride_x_row, stride_x_col),
        (norm_weight_ptr, norm_bias_ptr, eps),
        (
            weight_rows,
            stride_weight_col,
            weight_rows + HALF * stride_weight_row,
            stride_weight_col,
        ),
        row_mask,
        col_mask,
        features,
        EVEN_K,
        PRECISION,
        BLOCK_K,
    )
    if HAS_BIAS:
        first += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias_ptr + cols + HALF, mask=col_mask, other=0.0).to(tl.float32)[None, :]

    # count from the first token of the first row's image: 32-bit divisions are enough
    positions = ((first_row % n_tokens).to(tl.int32) + rows) % n_tokens - n_prefix
    mask = row_mask[:, None] & col_mask[None, :]
    # patch tokens of q and k
    rotated = mask & (positions >= 0)[:, None] & (pairs < n_rotated)[None, :]
    table = positions[:, None] * (2 * HALF) + channels[None, :]
    cos = tl.load(cos_ptr + table, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=rotated, other=0.0).to(tl.float32)
    offsets = first_row * (2 * n_pairs) + rows[:, None] * (2 * n_pairs) + cols[None, :]
    # selected, not multiplied by 1 and 0, which would turn infinities into NaN
    y = tl.where(rotated, first * cos - second * sin, first)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)

    cos = tl.load(cos_ptr + table + HALF, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table + HALF, mask=rotated, other=0.0).to(tl.float32)
    y = tl.where(rotated, second * cos + first * sin, second)
    tl.store(y_ptr + offsets + HALF, y.to(y_ptr.dtype.element_ty), mask=mask)
