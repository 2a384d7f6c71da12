"""y = residual + layer_norm(x @ weight.T + bias): a GEMM whose programs compute whole rows.

The columns of a row are in pieces, because their number need not be a power of two. They stay in
registers as fp32 sums until they are normalized.
Bound: memory (x and the residual read, y written); the weight is read from L2 by every program.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters; inside a kernel values are tensors

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .config import cdiv
from .kernel import Kernel
from .normalized_rows import store_normalized


class LinearNormResidualConfig(NamedTuple):
    """Tiles of a program, warps and pipeline stages.

    Attributes:
        block_m: rows.
        block_c: columns of a piece.
        block_k: depth of a step.
    """

    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_C": self.block_c,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def launch_config(
    n_rows: int, features: int, channels: int, arch: Architecture | None
) -> LinearNormResidualConfig:
    """Chooses tiles and warps for [n_rows, features] by [features, channels]."""
    # every program reads the whole weight: many rows per program, unless there are too few programs
    many = n_rows >= 128 * 256 and channels <= 192
    block_m = 128 if many else 64
    num_warps = 8 if block_m * channels > 64 * 192 else 4
    # the largest power of two that divides the columns
    block_c = min(math.gcd(channels, 128), 128)
    block_k = 64 if features % 64 == 0 and channels <= 128 else 32
    num_stages = 2 if isinstance(arch, str) else 3
    return LinearNormResidualConfig(block_m, block_c, block_k, num_warps, num_stages)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    eps: float,
) -> Tensor:
    """Runs the kernel; arguments and result as `linear_norm_residual`."""
    channels, features = weight.shape
    y = x.new_empty(residual.shape)
    if y.numel() == 0:
        return y
    n_rows = y.numel() // channels
    sizes = n_rows, features, channels
    config = chosen_config("linear_norm_residual", launch_config, x.device, *sizes)
    # a view with gaps, which no model passes, is copied: strides would cost registers
    _linear_norm_residual_fwd_kernel[(cdiv(n_rows, config.block_m),)](
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        residual.contiguous(),
        y,
        n_rows,
        eps,
        FEATURES=features,
        CHANNELS=channels,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _linear_norm_residual_fwd_kernel(
    x_ptr,  # [n_rows, FEATURES]; this and all below are contiguous
    weight_ptr,  # [CHANNELS, FEATURES]
    bias_ptr,  # [CHANNELS] or None
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    residual_ptr,  # [n_rows, CHANNELS]
    y_ptr,  # [n_rows, CHANNELS]
    n_rows,
    eps,
    FEATURES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N_PIECES: tl.constexpr = CHANNELS // BLOCK_C
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    acc = ()
    for _ in tl.static_range(N_PIECES):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_C), tl.float32),)
    for start in range(0, FEATURES, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * FEATURES + k[None, :], mask=inside[:, None], other=0.0)
        sums = ()
        for i in tl.static_range(N_PIECES):
            columns = i * BLOCK_C + tl.arange(0, BLOCK_C)
            weight = tl.load(weight_ptr + columns[None, :] * FEATURES + k[:, None])
            sums = sums + (tl.dot(x, weight, acc[i], input_precision=PRECISION),)
        acc = sums
    norm = norm_weight_ptr, norm_bias_ptr, eps
    stored = residual_ptr, y_ptr, rows, inside
    store_normalized(acc, bias_ptr, norm, *stored, CHANNELS, BLOCK_C)
