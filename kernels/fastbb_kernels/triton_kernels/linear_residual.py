"""y = residual + scale * (x @ weight.T + bias): a tiled GEMM with all of it in its epilogue."""
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
# a launch passes plain values for constexpr parameters, and these decide what a kernel defines

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .config import GemmConfig, cdiv
from .kernel import Kernel
from .tile_choice import has_work_for_large_tiles, largest_tiles

# architectures whose multiprocessor holds two programs with tiles of 128x128; others hold one
_HOLD_LARGE_TILES = (90, 120, "gfx90a", "gfx942")


def launch_config(
    n_rows: int, features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """Chooses tiles and warps for a GEMM of [n_rows, features] by [features, out_features].

    Large tiles read fewer bytes from L2. Small tiles have more loads in flight and fill the GPU if
    there are few rows.
    """
    sizes = n_rows, features, out_features, dtype, arch
    return largest_tiles(*sizes) or launch_config_of_scaled_rows(*sizes)


def launch_config_of_scaled_rows(
    n_rows: int, features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig:
    """As `launch_config`, with registers left for factors of rows."""
    block_k = 64 if features % 64 == 0 else 32
    if dtype == torch.float32:
        # no MMA, so that the operands are in registers too
        block_k = 16
        large = GemmConfig(64, 64, block_k, num_warps=4, num_stages=3)
    elif arch in _HOLD_LARGE_TILES:
        large = GemmConfig(128, 128, block_k if arch == 90 else 32, num_warps=8, num_stages=3)
    else:
        large = GemmConfig(64, 128, 32, num_warps=4, num_stages=3)
    if has_work_for_large_tiles(n_rows, out_features, arch):
        for config in (large, GemmConfig(64, 64, block_k, num_warps=4, num_stages=3)):
            if config.block_n < 2 * out_features:
                return config
    return GemmConfig(64, 32, block_k, num_warps=4, num_stages=5)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None
) -> Tensor:
    """Runs the kernel; arguments and result as `linear_residual`."""
    out_features, features = weight.shape
    y = x.new_empty(residual.shape)
    if y.numel() == 0:
        return y
    # a view if the rows have a constant stride
    rows = x.reshape(-1, features)
    n_rows = rows.shape[0]
    config = chosen_config(
        "linear_residual", launch_config, x.device, n_rows, features, out_features, x.dtype
    )
    return launch_rows(rows, weight, bias, residual, scale, y, config)


def launch_rows(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    y: Tensor,
    config: GemmConfig,
    norm: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Fills `y`, contiguous and not empty; otherwise as `linear_residual`.

    Args:
        rows: [n_rows, C], any strides.
        weight: [C_out, C].
        bias: [C_out] or None.
        residual: [..., C_out].
        scale: [C_out] or None.
        y: [..., C_out].
        config: tiles and warps.
        norm: fp32 factors [B, C] of rows, shift [C] that is added to them, and rows of an image; or
            None.

    Returns:
        `y`.
    """
    out_features, features = weight.shape
    n_rows = rows.shape[0]
    factors, shift, rows_per_image = (None, None, 1) if norm is None else norm
    grid = (cdiv(n_rows, config.block_m) * cdiv(out_features, config.block_n),)
    _linear_residual_fwd_kernel[grid](
        rows,
        weight,
        None if bias is None else bias.contiguous(),
        residual.contiguous(),
        None if scale is None else scale.contiguous(),
        factors,
        shift,
        y,
        n_rows,
        features,
        out_features,
        rows_per_image,
        *rows.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        EVEN_K=features % config.block_k == 0,
        PRECISION=input_precision(rows.dtype),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows", "rows_per_image"])
def _linear_residual_fwd_kernel(
    x_ptr,  # [n_rows, features]
    weight_ptr,  # [out_features, features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [n_rows, out_features], contiguous
    scale_ptr,  # [out_features] or None
    factors_ptr,  # [images, features], contiguous, multiplied with x; or None
    shift_ptr,  # [features], added to the product; or None
    y_ptr,  # [n_rows, out_features], contiguous
    n_rows,
    features,
    out_features,
    rows_per_image,
    stride_x_row,
    stride_x_col,
    stride_weight_row,
    stride_weight_col,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
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

    x_rows = x_ptr + (first_row + rows)[:, None] * stride_x_row
    weight_rows = weight_ptr + cols[None, :] * stride_weight_row
    if factors_ptr is not None:
        # count from the first row of its image: 32-bit divisions are enough
        images = (first_row % rows_per_image).to(tl.int32) + rows
        images = first_row // rows_per_image + images // rows_per_image
        factor_rows = factors_ptr + images[:, None] * features
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_mask, weight_mask = row_mask[:, None], col_mask[None, :]
        if not EVEN_K:
            x_mask &= (k < features)[None, :]
            weight_mask &= (k < features)[:, None]
        x = tl.load(x_rows + k[None, :] * stride_x_col, mask=x_mask, other=0.0)
        if factors_ptr is not None:
            factors = tl.load(factor_rows + k[None, :], mask=x_mask, other=0.0)
            shift = tl.load(shift_ptr + k, mask=k < features, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * factors + shift[None, :]).to(x.dtype)
        weight = tl.load(weight_rows + k[:, None] * stride_weight_col, mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    # residual, then bias: this order takes the fewest registers
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = first_row * out_features + rows[:, None] * out_features + cols[None, :]
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        # said as one instruction, it takes fewer registers
        acc = tl.fma(acc, tl.broadcast_to(scale[None, :], acc.shape), residual)
    else:
        acc += residual
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            bias *= scale
        acc += bias[None, :]
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
