"""The MLP half of a block: y = residual + scale * fc2(activation(fc1(layer_norm(x)))).

With the norm after the layers: y = residual + layer_norm(fc2(activation(fc1(x)))).

A program normalizes its rows once and keeps them on the chip. Piece by piece it computes hidden
columns, activates them and adds their part of fc2 to accumulators; the hidden map is never stored.
Bound: weights are read from L2 by every block of rows, the map from DRAM once.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._activation import Activation
from .._dispatch import Architecture, input_precision
from ..launching import chosen_config
from .config import cdiv
from .kernel import Kernel
from .mlp_of_rows import mlp_of_rows
from .normalized_rows import loaded_rows, normalized_rows


class MlpBlockConfig(NamedTuple):
    """Tiles of a program, warps, pipeline stages and compiler options.

    Attributes:
        block_m: rows.
        block_h: hidden columns of a step.
        block_c: channels of a piece.
        compiler: options that only the compiler of one vendor knows.
    """

    block_m: int
    block_h: int
    block_c: int
    num_warps: int
    num_stages: int
    compiler: dict[str, int]

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_H": self.block_h,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **self.compiler,
        }


def launch_config(n_rows: int, channels: int, arch: Architecture | None) -> MlpBlockConfig:
    """Chooses tiles and warps for [n_rows, channels]."""
    if channels > 256:  # accumulators of more rows would spill
        return MlpBlockConfig(64, 64, 64, 8, 1, {})
    # every program reads all weights: many rows per program, unless there are too few programs
    block_m, num_warps = (128, 8) if n_rows >= 128 * 256 else (64, 4)
    if isinstance(arch, str):
        return MlpBlockConfig(block_m, 32, 32, num_warps, 1, {"matrix_instr_nonkdim": 16})
    num_stages = 1 if channels > 192 else 2  # prefetching takes registers
    return MlpBlockConfig(block_m, 32, 32, num_warps, num_stages, {})


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
    activation: Activation,
    post_norm: bool,
) -> Tensor:
    """Runs the kernel; arguments and result as `mlp_block`."""
    hidden, channels = fc1_weight.shape
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    n_rows = y.numel() // channels
    config = chosen_config("mlp_block", launch_config, x.device, n_rows, channels)
    # a view with gaps, which no model passes, is copied: strides would cost registers
    _mlp_block_fwd_kernel[(cdiv(n_rows, config.block_m),)](
        x.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        fc1_weight.contiguous(),
        None if fc1_bias is None else fc1_bias.contiguous(),
        fc2_weight.contiguous(),
        None if fc2_bias is None else fc2_bias.contiguous(),
        None if residual is None else residual.contiguous(),
        None if scale is None else scale.contiguous(),
        y,
        n_rows,
        eps,
        CHANNELS=channels,
        HIDDEN=hidden,
        ACTIVATION=activation,
        POST_NORM=post_norm,
        PRECISION=input_precision(x.dtype),
        **config.options(),
    )
    return y


@Kernel
@triton.jit(do_not_specialize=["n_rows"])
def _mlp_block_fwd_kernel(
    x_ptr,  # [n_rows, CHANNELS]; this and all below are contiguous
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    fc1_weight_ptr,  # [HIDDEN, CHANNELS]
    fc1_bias_ptr,  # [HIDDEN] or None
    fc2_weight_ptr,  # [CHANNELS, HIDDEN]
    fc2_bias_ptr,  # [CHANNELS] or None
    residual_ptr,  # [n_rows, CHANNELS]; None: x
    scale_ptr,  # [CHANNELS] or None
    y_ptr,  # [n_rows, CHANNELS]
    n_rows,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POST_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    norm = norm_weight_ptr, norm_bias_ptr, eps
    post_norm = None
    if POST_NORM:
        x, post_norm = loaded_rows(x_ptr, rows, inside, CHANNELS, BLOCK_C), norm
    else:
        x = normalized_rows(x_ptr, rows, inside, norm, CHANNELS, BLOCK_C)
    mlp_of_rows(
        x,
        (fc1_weight_ptr, fc1_bias_ptr),
        (fc2_weight_ptr, fc2_bias_ptr),
        scale_ptr,
        post_norm,
        x_ptr if residual_ptr is None else residual_ptr,
        y_ptr,
        rows,
        inside,
        CHANNELS,
        HIDDEN,
        ACTIVATION,
        PRECISION,
        BLOCK_H,
        BLOCK_C,
    )
