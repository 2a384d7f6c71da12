"""y = residual + grn(x) @ weight.T + bias, in three launches.

1. Sums of squares of each channel over parts of the pixels of an image, without atomics.
2. From them, for each image and channel, the factor `1 + grn_weight * norm / (mean norm + eps)`.
3. The GEMM of linear_residual, which multiplies x by the factor of its image and channel, and adds
   `grn_bias`, when it loads it.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import chosen_config
from ..ops.grn_linear_residual import n_parts
from .config import cdiv
from .kernel import Kernel
from .linear_residual import launch_config_of_scaled_rows, launch_rows


def launch(
    x: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    eps: float,
) -> Tensor:
    """Runs the kernels; arguments and result as `grn_linear_residual`."""
    y = x.new_empty(residual.shape)
    if y.numel() == 0:
        return y
    batch, height, width, features = x.shape
    n_pixels, x = height * width, x.contiguous()
    parts = n_parts(n_pixels)
    sums, factors = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((batch, parts, features), (batch, features))
    )
    n_tiles = cdiv(features, _BLOCK_C)
    _grn_sums_fwd_kernel[(batch * parts * n_tiles,)](
        x,
        sums,
        n_pixels,
        features,
        parts,
        BLOCK_P=_BLOCK_P,
        BLOCK_C=_BLOCK_C,
        num_warps=4,
    )
    _grn_factors_fwd_kernel[(batch,)](
        sums,
        grn_weight.contiguous(),
        factors,
        features,
        parts,
        eps,
        BLOCK_C=_FACTORS_BLOCK,
        num_warps=4,
    )
    rows = x.view(-1, features)
    sizes = rows.shape[0], features, weight.shape[0], x.dtype
    config = chosen_config("grn_linear_residual", launch_config_of_scaled_rows, x.device, *sizes)
    norm = factors, grn_bias.contiguous(), n_pixels
    return launch_rows(rows, weight, bias, residual, None, y, config, norm)


# 16 pixels of 64 channels: 8 elements for each of 128 threads
_BLOCK_P, _BLOCK_C = 16, 64
_FACTORS_BLOCK = 512


@Kernel
@triton.jit(do_not_specialize=["n_pixels", "parts"])
def _grn_sums_fwd_kernel(
    x_ptr,  # [B, n_pixels, features], contiguous
    sums_ptr,  # [B, parts, features], fp32
    n_pixels,
    features,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_tiles = tl.cdiv(features, BLOCK_C)
    pid = tl.program_id(0)
    part = (pid // n_tiles) % parts
    image = (pid // (n_tiles * parts)).to(tl.int64)
    cols = (pid % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < features
    # whole tiles of pixels; the last part may have fewer
    n_rows = tl.cdiv(tl.cdiv(n_pixels, parts), BLOCK_P) * BLOCK_P
    last = tl.minimum((part + 1) * n_rows, n_pixels)
    x_ptr += image * n_pixels * features
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(part * n_rows, last, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * features + cols[None, :],
            mask=(rows < last)[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        total += x * x
    offsets = (image * parts + part) * features + cols
    tl.store(sums_ptr + offsets, tl.sum(total, axis=0), mask=col_mask)


@Kernel
@triton.jit(do_not_specialize=["parts"])
def _grn_factors_fwd_kernel(
    sums_ptr,  # [B, parts, features], fp32
    grn_weight_ptr,  # [features]
    factors_ptr,  # [B, features], fp32
    features,
    parts,
    eps,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sums_ptr += image * parts * features
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, features, BLOCK_C):
        total += _norms(sums_ptr, start, features, parts, BLOCK_C)
    mean = tl.sum(total, axis=0) / features
    for start in range(0, features, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        norms = _norms(sums_ptr, start, features, parts, BLOCK_C)
        weight = tl.load(grn_weight_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)
        factors = 1.0 + weight * (norms / (mean + eps))
        tl.store(factors_ptr + image * features + cols, factors, mask=cols < features)


@triton.jit
def _norms(sums_ptr, start, features, parts, BLOCK_C: tl.constexpr):
    """Norms [BLOCK_C] of the channels of an image from `start` on; zeros beyond the last one."""
    cols = start + tl.arange(0, BLOCK_C)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(parts):
        squares += tl.load(sums_ptr + part * features + cols, mask=cols < features, other=0.0)
    return tl.sqrt_rn(squares)
