"""The attention half of a Swin or Swin V2 block for one window per program.

A program normalizes the tokens of its window once and keeps them on the chip. Head by head it
projects them to queries, keys and values, attends, and adds the head's part of the output
projection to accumulators; it writes the sum and the residual once, at the places of the tokens.
Swin V2 has the norm before the residual, and cosines in place of products.
Bound: weights are read from L2 by every window (4 C^2 elements), the map from DRAM once.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# a launch passes plain values for constexpr parameters; inside a kernel values are tensors, which
# the annotations of tl do not allow everywhere

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, input_precision
from .._window_geometry import WindowGeometry
from ..launching import chosen_config
from .config import cdiv
from .kernel import Kernel
from .normalized_rows import loaded_rows, normalized_rows, store_normalized
from .unit_vectors import inverse_lengths
from .window_addressing import has_regions, window_tokens

BLOCK_N = 64  # tokens of a window, padded to a tile


class SwinAttentionBlockConfig(NamedTuple):
    """Channels of one step of the projections, warps, pipeline stages and compiler options.

    Attributes:
        compiler: options that only the compiler of one vendor knows.
    """

    block_c: int
    num_warps: int
    num_stages: int
    compiler: dict[str, int]

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **self.compiler,
        }


def launch_config(channels: int, arch: Architecture | None) -> SwinAttentionBlockConfig:
    """Chooses steps and warps for windows of at most 64 tokens of `channels`."""
    num_stages, compiler = 1, {}
    if isinstance(arch, str):
        # each of four wavefronts has 16 rows of a window; products of 32 rows would be redundant
        compiler = {"matrix_instr_nonkdim": 16}
    elif channels <= 128 and arch in (80, 90):
        # shared memory holds the next head's weights for two programs of a multiprocessor
        num_stages = 2
    if channels <= 96 and arch in (80, 86, 89):
        # without a limit, the assembler aims at 168 registers and spills
        compiler = {"maxnreg": 192}
    return SwinAttentionBlockConfig(32, 4, num_stages, compiler)


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    logit_scale: Tensor | None,
    geometry: WindowGeometry,
    eps: float,
    mask_value: float,
    post_norm: bool,
) -> Tensor:
    """Runs the kernel; arguments and result as `swin_attention_block`."""
    window, shift, roll_first = geometry
    B, H, W, C = x.shape
    num_heads, n_tokens, n_bias_cols = bias.shape
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    config = chosen_config("swin_attention_block", launch_config, x.device, C)
    # a view with gaps, which no model passes, is copied: strides would cost registers
    _swin_attention_block_fwd_kernel[(B * cdiv(H, window[0]) * cdiv(W, window[1]),)](
        x.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        qkv_weight.contiguous(),
        None if qkv_bias is None else qkv_bias.contiguous(),
        bias.contiguous(),
        proj_weight.contiguous(),
        None if proj_bias is None else proj_bias.contiguous(),
        None if logit_scale is None else logit_scale.contiguous(),
        y,
        H,
        W,
        *shift,
        n_bias_cols,
        eps,
        CHANNELS=C,
        HEAD_DIM=C // num_heads,
        WINDOW_H=window[0],
        WINDOW_W=window[1],
        # rows of a multiple of 16 columns allow wide loads
        BIAS_COLS=min(n_bias_cols, 16 * cdiv(n_tokens, 16)),
        ROLL_FIRST=roll_first,
        MASK_VALUE=mask_value,
        COSINES=logit_scale is not None,
        POST_NORM=post_norm,
        PRECISION=input_precision(x.dtype),
        BLOCK_N=BLOCK_N,
        **config.options(),
    )
    return y


# one binary serves all image sizes, padded or not, and blocks with and without a shift
@Kernel
@triton.jit(do_not_specialize=["height", "width", "shift_h", "shift_w"])
def _swin_attention_block_fwd_kernel(
    x_ptr,  # [B, height, width, CHANNELS]; this and all below are contiguous
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    qkv_weight_ptr,  # [3 * CHANNELS, CHANNELS]
    qkv_bias_ptr,  # [3 * CHANNELS] or None
    bias_ptr,  # [CHANNELS // HEAD_DIM, N, n_bias_cols]
    proj_weight_ptr,  # [CHANNELS, CHANNELS]
    proj_bias_ptr,  # [CHANNELS] or None
    logit_scale_ptr,  # [CHANNELS // HEAD_DIM], factors of cosines; None: products are scaled
    y_ptr,  # [B, height, width, CHANNELS]
    height,
    width,
    shift_h,
    shift_w,
    n_bias_cols,
    eps,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BIAS_COLS: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    MASK_VALUE: tl.constexpr,
    COSINES: tl.constexpr,
    POST_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N: tl.constexpr = WINDOW_H * WINDOW_W
    N_PIECES: tl.constexpr = CHANNELS // BLOCK_C
    dtype = x_ptr.dtype.element_ty
    window = tl.program_id(0)
    tokens = tl.arange(0, BLOCK_N)
    exists = tokens < N
    image, token_y, token_x, inside, region = window_tokens(
        window, tokens, height, width, shift_h, shift_w,
        WINDOW_H, WINDOW_W, SHIFTED=True, PADDED=True, ROLL_FIRST=ROLL_FIRST,
    )  # fmt: skip
    masked = (shift_h + shift_w > 0) & has_regions(window, height, width, WINDOW_H, WINDOW_W)
    # 64 bits only for values that are not per row, to save registers
    first = image * height * width * CHANNELS
    x_ptr += first
    y_ptr += first
    pixels = token_y * width + token_x
    # padded tokens are 0 here: their queries, keys and values are the projection's bias
    norm = norm_weight_ptr, norm_bias_ptr, eps
    if POST_NORM:
        x = loaded_rows(x_ptr, pixels, inside, CHANNELS, BLOCK_C)
    else:
        x = normalized_rows(x_ptr, pixels, inside, norm, CHANNELS, BLOCK_C)
    acc = ()
    for _ in tl.static_range(N_PIECES):
        acc = acc + (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),)

    # no code is hoisted out of the loop: the values would occupy registers throughout
    for head in tl.range(CHANNELS // HEAD_DIM, disable_licm=True):
        rows = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
        q, k, v = _project(
            x, qkv_weight_ptr, qkv_bias_ptr, rows, CHANNELS, BLOCK_C, COSINES, PRECISION
        )
        scores = tl.dot(q, k, input_precision=PRECISION)
        if COSINES:
            scores *= tl.load(logit_scale_ptr + head).to(tl.float32)
        else:
            scores *= HEAD_DIM**-0.5
        bias = tl.load(
            bias_ptr + (head * N + tokens)[:, None] * n_bias_cols + tokens[None, :],
            mask=exists[:, None] & (tokens < BIAS_COLS)[None, :],
            other=0.0,
        )
        scores += bias.to(tl.float32)
        if masked:
            scores = tl.where(region[:, None] == region[None, :], scores, scores + MASK_VALUE)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        row_sum = tl.sum(p, 1)
        out = tl.dot(p.to(dtype), v, input_precision=PRECISION) / row_sum[:, None]
        out = out.to(dtype)
        sums = ()
        for i in tl.static_range(N_PIECES):
            columns = i * BLOCK_C + tl.arange(0, BLOCK_C)
            weight = tl.load(proj_weight_ptr + columns[None, :] * CHANNELS + rows[:, None])
            sums = sums + (tl.dot(out, weight, acc[i], input_precision=PRECISION),)
        acc = sums

    if POST_NORM:
        stored = x_ptr, y_ptr, pixels, inside
        store_normalized(acc, proj_bias_ptr, norm, *stored, CHANNELS, BLOCK_C)
    else:
        for i in tl.static_range(N_PIECES):
            columns = i * BLOCK_C + tl.arange(0, BLOCK_C)
            offsets = pixels[:, None] * CHANNELS + columns[None, :]
            y = acc[i]
            if proj_bias_ptr is not None:
                y += tl.load(proj_bias_ptr + columns).to(tl.float32)[None, :]
            y += tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(y_ptr + offsets, y.to(dtype), mask=inside[:, None])


@triton.jit
def _project(
    x,
    weight_ptr,
    bias_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COSINES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes a head's queries [N, HEAD_DIM], transposed keys [HEAD_DIM, N], values [N, HEAD_DIM].

    With COSINES, queries and keys are unit vectors. The product gives transposed keys: transposing
    the result of a product was wrong on Hopper.

    Args:
        x: tuple of pieces [N, BLOCK_C] of the normalized tokens.
        weight_ptr: [3 * CHANNELS, CHANNELS].
        bias_ptr: [3 * CHANNELS] or None.
        rows: [HEAD_DIM], numbers of the head's channels.
    """
    dtype = x[0].dtype
    k = tl.zeros((rows.shape[0], x[0].shape[0]), tl.float32)
    for i in tl.static_range(CHANNELS // BLOCK_C):
        columns = i * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = tl.load(weight_ptr + (CHANNELS + rows)[:, None] * CHANNELS + columns[None, :])
        k = tl.dot(weight, tl.trans(x[i]), k, input_precision=PRECISION)
    if bias_ptr is not None:
        k += tl.load(bias_ptr + CHANNELS + rows).to(tl.float32)[:, None]
    if COSINES:  # before they are rounded, so that they are rounded once
        k *= inverse_lengths(k, 0)[None, :]
    # round each before the next begins: registers cannot hold three fp32 sums at a time
    k = k.to(dtype)

    q = tl.zeros((x[0].shape[0], rows.shape[0]), tl.float32)
    v = tl.zeros((x[0].shape[0], rows.shape[0]), tl.float32)
    for i in tl.static_range(CHANNELS // BLOCK_C):
        columns = i * BLOCK_C + tl.arange(0, BLOCK_C)
        weight_ptrs = weight_ptr + rows[None, :] * CHANNELS + columns[:, None]
        q = tl.dot(x[i], tl.load(weight_ptrs), q, input_precision=PRECISION)
        v_weight = tl.load(weight_ptrs + 2 * CHANNELS * CHANNELS)
        v = tl.dot(x[i], v_weight, v, input_precision=PRECISION)
    if bias_ptr is not None:
        q += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
        v += tl.load(bias_ptr + 2 * CHANNELS + rows).to(tl.float32)[None, :]
    if COSINES:
        q *= inverse_lengths(q, 1)[:, None]
    return q.to(dtype), k, v.to(dtype)
