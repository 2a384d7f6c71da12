"""y = activation(scale * rstd * (x @ weight.T - mean * sums) + bias): a GEMM of rows as they are.

Tiles of rows and columns are programs. While a step is multiplied, its columns are added to the
statistics of the rows, so that x is read once for each tile of columns, and never written.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters, and pyright takes tl.range for no iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._activation import Activation
from .._dispatch import Architecture
from ..launching import chosen_config
from .activation import activate
from .config import GemmConfig, cdiv
from .kernel import Kernel
from .normalized_gemm import merge_statistics

# about one program per multiprocessor; medium tiles pay with one for every other
_ENOUGH_LARGE, _ENOUGH_MEDIUM = 128, 64
# whose exact division takes two registers more than sm_90 has for the largest tiles
_SPILLING = ("gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish")
_MOST_STRIDE = 2**23  # of rows; offsets in tiles of up to 256 rows are 32-bit numbers


def launch_config(
    n_rows: int,
    features: int,
    out_features: int,
    dtype: torch.dtype,
    activation: Activation,
    arch: Architecture | None,
) -> GemmConfig:
    """Chooses tiles and warps for [n_rows, features] by [features, out_features].

    The larger the tiles, the fewer bytes come from L2, which bounds these products: each tile reads
    its rows and its columns of the weight anew.
    """
    block_k = 64 if features % 64 == 0 else 32
    medium = GemmConfig(128, 128, block_k if arch in (90, 100) else 32, num_warps=8, num_stages=3)
    if arch is None:
        return medium
    if arch == 120:  # a third stage spills
        medium = medium._replace(num_stages=2)
    large = medium
    # on sm_100 it spills, others have too little shared memory
    if arch in (80, 90) and activation not in _SPILLING:
        large = medium._replace(block_n=256)
    elif isinstance(arch, str):
        large = medium = GemmConfig(128, 256, 32, num_warps=8, num_stages=2)
    for config, enough in ((large, _ENOUGH_LARGE), (medium, _ENOUGH_MEDIUM)):
        if cdiv(n_rows, config.block_m) * cdiv(out_features, config.block_n) >= enough:
            return config
    return GemmConfig(64, 32, block_k, num_warps=4, num_stages=3)


def launch(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Runs the kernel; arguments and result as `folded_norm_linear`."""
    out_features, features = weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, features)
    if rows.stride(1) != 1 or rows.stride(0) >= _MOST_STRIDE:
        rows = rows.contiguous()
    n_rows = rows.shape[0]
    sizes = n_rows, features, out_features, x.dtype, activation
    config = chosen_config("folded_norm_linear", launch_config, x.device, *sizes)
    if features % config.block_k:  # the kernel has no masks for it
        raise ValueError(f"folded_norm_linear: {features} features have no steps of {config}")
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_features, config.block_n),)
    _folded_norm_linear_fwd_kernel[grid](
        rows,
        weight.contiguous(),
        sums.contiguous(),
        scale,
        bias.contiguous(),
        y,
        n_rows,
        features,
        out_features,
        rows.stride(0),
        eps,
        ACTIVATION=activation,
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _folded_norm_linear_fwd_kernel(
    x_ptr,  # [n_rows, features], neighbouring columns are neighbours in memory
    weight_ptr,  # [out_features, features], contiguous
    sums_ptr,  # [out_features]
    scale_ptr,  # [1]
    bias_ptr,  # [out_features]
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    features,  # a multiple of BLOCK_K
    out_features,
    stride_x_row,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the tiles of one set of rows run at the same time: x stays in L2
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0)
    first_row = (pid // n_tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n_rows - first_row, cols < out_features

    # offsets of 32 bits from one address take fewer registers
    x_ptr += first_row * stride_x_row
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_offsets = rows[:, None] * stride_x_row + k[None, :]
        weight_offsets = cols[None, :] * features + k[:, None]
        x = tl.load(x_ptr + x_offsets, mask=row_mask[:, None], other=0.0)
        weight = tl.load(weight_ptr + weight_offsets, mask=col_mask[None, :], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        mean, squares = merge_statistics(
            mean, squares, x.to(tl.float32), start, k, features, EVEN_K=True
        )
    rstd = tl.rsqrt(squares / features + eps) * tl.load(scale_ptr)  # a vector of scales would spill

    sums = tl.load(sums_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    mean *= rstd
    # in this order it takes the fewest registers
    y = acc * rstd[:, None] + (bias[None, :] - mean[:, None] * sums[None, :])
    y = activate(y, ACTIVATION, y_ptr.dtype.element_ty)
    offsets = first_row * out_features + rows[:, None] * out_features + cols[None, :]
    tl.store(
        y_ptr + offsets,
        y.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )
