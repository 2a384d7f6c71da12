"""softmax(scores + bias + mask) @ v, with one window and head per program.

The scores are products of queries and keys over the root of the head dimension, or their cosines
times a scale of the head.

A program reads its tokens from the map and writes the result to the same places. The scores of its
queries with all keys of the window stay in registers, in one tile or two. A window of more than 64
tokens is divided among several programs, each with some of the queries.
Bound: memory (qkv and bias read, y written), and for windows of 12x12 the rate of instructions.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# a launch passes plain values for constexpr parameters, pyright believes that tl.sum returns a
# tuple, and branches on constexprs are static

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Architecture, input_precision
from .._window_geometry import WindowGeometry
from ..launching import chosen_config
from .config import cdiv, next_power_of_2
from .kernel import Kernel
from .unit_vectors import inverse_lengths
from .window_addressing import has_regions, window_tokens

LOG2_E = tl.constexpr(1.4426950408889634)

# architectures whose matrix instructions read both operands from registers
_OPERANDS_IN_REGISTERS = (80, 86, 89, 120)


class WindowAttentionConfig(NamedTuple):
    """Queries of a program, its keys in one tile or two, and its warps."""

    block_m: int
    block_n: int
    block_tail: int  # 0: the first tile holds all keys
    num_warps: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_TAIL": self.block_tail,
            "num_warps": self.num_warps,
        }


def launch_config(
    n_tokens: int,
    head_dim: int,
    cosines: bool,
    dtype: torch.dtype,
    arch: Architecture | None,
) -> WindowAttentionConfig:
    """Chooses tiles and warps: 49 keys are one tile of 64, 144 keys are two of 128 and 16."""
    if n_tokens <= 64:
        block_n, block_tail = max(16, next_power_of_2(n_tokens)), 0
    else:
        block_n = 64 if n_tokens <= 128 else 128
        block_tail = max(16, next_power_of_2(n_tokens - block_n))
    block_m = min(block_n, 64)
    num_warps = block_m // 16
    if dtype == torch.float32:
        # NVIDIA has no matrix instructions for it, and the operands of a product fill registers
        block_m, num_warps = min(block_m, 32 if block_tail == 0 else 16), 2 * num_warps
    elif n_tokens > 144:
        block_m, num_warps = 32 if arch in _OPERANDS_IN_REGISTERS else 64, 8
        if cosines and arch not in (90, 100):  # the lengths of all keys take registers
            block_m, num_warps = 16, 4
    elif arch == 100 and head_dim > 32:
        num_warps *= 2  # tensor memory limits the number of programs, so each may have more warps
    return WindowAttentionConfig(block_m, block_n, block_tail, num_warps)


def launch(
    qkv: Tensor,
    bias: Tensor,
    qkv_pad: Tensor | None,
    logit_scale: Tensor | None,
    geometry: WindowGeometry,
    mask_value: float,
) -> Tensor:
    """Runs the kernel; arguments and result as `window_attention`."""
    window, shift, roll_first = geometry
    B, H, W, qkv_channels = qkv.shape
    num_heads, n_tokens, n_bias_cols = bias.shape
    y = qkv.new_empty(B, H, W, qkv_channels // 3)
    if y.numel() == 0:
        return y
    head_dim = qkv_channels // (3 * num_heads)
    sizes = n_tokens, head_dim, logit_scale is not None, qkv.dtype
    config = chosen_config("window_attention", launch_config, qkv.device, *sizes)
    n_windows = B * cdiv(H, window[0]) * cdiv(W, window[1])
    grid = (n_windows * cdiv(n_tokens, config.block_m) * num_heads,)
    padded = H % window[0] != 0 or W % window[1] != 0
    _window_attention_fwd_kernel[grid](
        qkv,
        bias,
        qkv_pad.contiguous() if qkv_pad is not None and padded else None,
        None if logit_scale is None else logit_scale.contiguous(),
        y,
        num_heads,
        H,
        W,
        *shift,
        *qkv.stride(),
        *bias.stride(),
        WINDOW_H=window[0],
        WINDOW_W=window[1],
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        # rows of a multiple of 16 columns allow wide loads
        BIAS_COLS=min(n_bias_cols, 16 * cdiv(n_tokens, 16)),
        SHIFTED=any(shift),
        PADDED=padded,
        ROLL_FIRST=roll_first,
        MASK_VALUE=mask_value,
        PRECISION=input_precision(qkv.dtype),
        **config.options(),
    )
    return y


# one binary serves all image sizes and numbers of heads
@Kernel
@triton.jit(do_not_specialize=["num_heads", "height", "width", "shift_h", "shift_w"])
def _window_attention_fwd_kernel(
    qkv_ptr,  # [B, height, width, 3 * num_heads * HEAD_DIM]
    bias_ptr,  # [num_heads, N, at least BIAS_COLS]
    qkv_pad_ptr,  # [3 * num_heads * HEAD_DIM], value of padded tokens, or None: zeros
    logit_scale_ptr,  # [num_heads], factors of cosines; None: the scores are scaled products
    y_ptr,  # [B, height, width, num_heads * HEAD_DIM], contiguous
    num_heads,
    height,
    width,
    shift_h,
    shift_w,
    stride_qkv_image,
    stride_qkv_y,
    stride_qkv_x,
    stride_qkv_channel,
    stride_bias_head,
    stride_bias_query,
    stride_bias_key,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS_COLS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    MASK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    N: tl.constexpr = WINDOW_H * WINDOW_W
    N_TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    # the heads of a window run at the same time: their channels share cache lines
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    window = pid // num_heads // N_TILES
    queries = pid // num_heads % N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)

    geometry = (height, width, shift_h, shift_w, WINDOW_H, WINDOW_W, SHIFTED, PADDED, ROLL_FIRST)
    strides = (stride_qkv_image, stride_qkv_y, stride_qkv_x)
    image, y, x, inside, region = window_tokens(window, queries, *geometry)
    channels = num_heads.to(tl.int64) * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    head_channels = head * HEAD_DIM + d
    q_ptrs = qkv_ptr + head_channels * stride_qkv_channel
    k_ptrs = q_ptrs + channels * stride_qkv_channel
    v_ptrs = k_ptrs + channels * stride_qkv_channel
    bias_ptrs = bias_ptr + head * stride_bias_head + queries * stride_bias_query
    k_pad, v_pad = None, None
    if qkv_pad_ptr is not None:
        k_pad = tl.load(qkv_pad_ptr + channels + head_channels, mask=d < HEAD_DIM, other=0.0)
        v_pad = tl.load(qkv_pad_ptr + 2 * channels + head_channels, mask=d < HEAD_DIM, other=0.0)

    # load everything before the first product, so that all loads are in flight together
    offsets = _offsets(image, y, x, *strides)
    q_mask = inside[:, None]
    if BLOCK_D > HEAD_DIM:
        q_mask = q_mask & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptrs[None, :] + offsets[:, None], mask=q_mask, other=0.0)
    source = (window, geometry, k_ptrs, v_ptrs, strides, k_pad, v_pad)
    k, v, k_region = _load_keys(keys, *source, N, HEAD_DIM)
    bias = _load_bias(queries, keys, bias_ptrs, stride_bias_key, N, BIAS_COLS)
    if BLOCK_TAIL:
        tail_keys = BLOCK_N + tl.arange(0, BLOCK_TAIL)
        tail_k, tail_v, tail_region = _load_keys(tail_keys, *source, N, HEAD_DIM)
        tail_bias = _load_bias(queries, tail_keys, bias_ptrs, stride_bias_key, N, BIAS_COLS)

    masked = False
    if SHIFTED:
        masked = has_regions(window, height, width, WINDOW_H, WINDOW_W)
    q_factor = None
    if logit_scale_ptr is not None:
        q_factor = tl.load(logit_scale_ptr + head).to(tl.float32) * inverse_lengths(q, 1)
    scores = _scores(
        q, k, q_factor, bias, region, k_region, masked, keys < N, HEAD_DIM, MASK_VALUE, PRECISION
    )
    row_max = tl.max(scores, 1)
    if BLOCK_TAIL:
        tail_scores = _scores(
            q, tail_k, q_factor, tail_bias, region, tail_region, masked, tail_keys < N, HEAD_DIM,
            MASK_VALUE, PRECISION,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(tail_scores, 1))
    p = _exp(scores, row_max)
    row_sum = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if BLOCK_TAIL:
        tail_p = _exp(tail_scores, row_max)
        row_sum += tl.sum(tail_p, 1)
        acc = tl.dot(tail_p.to(v.dtype), tail_v, acc, input_precision=PRECISION)
    acc *= (1.0 / row_sum)[:, None]

    rows = (image * height + y) * width + x
    tl.store(
        y_ptr + rows[:, None] * channels + head_channels[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=q_mask,
    )


@triton.jit
def _offsets(image, y, x, stride_image, stride_y, stride_x):
    """Returns the offsets of pixels in a map of any strides, in elements; i64."""
    return image * stride_image + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def _load_keys(
    keys,
    window,
    geometry,
    k_ptrs,
    v_ptrs,
    strides,
    k_pad,
    v_pad,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Loads transposed keys [BLOCK_D, T], values [T, BLOCK_D] and regions [T] of tokens `keys`.

    Channels beyond HEAD_DIM are zeros.
    """
    image, y, x, inside, region = window_tokens(window, keys, *geometry)
    offsets = _offsets(image, y, x, *strides)
    k_mask, v_mask = inside[None, :], inside[:, None]
    BLOCK_D: tl.constexpr = k_ptrs.shape[0]
    if BLOCK_D > HEAD_DIM:
        is_channel = tl.arange(0, BLOCK_D) < HEAD_DIM
        k_mask, v_mask = k_mask & is_channel[:, None], v_mask & is_channel[None, :]
    k = tl.load(k_ptrs[:, None] + offsets[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptrs[None, :] + offsets[:, None], mask=v_mask, other=0.0)
    if k_pad is not None:
        is_padding = (keys < N) & ~inside
        k = tl.where(is_padding[None, :], k_pad[:, None], k)
        v = tl.where(is_padding[:, None], v_pad[None, :], v)
    return k, v, region


@triton.jit
def _load_bias(queries, keys, ptrs, stride_key, N: tl.constexpr, COLS: tl.constexpr):
    mask = (queries < N)[:, None] & (keys < COLS)[None, :]
    return tl.load(ptrs[:, None] + keys[None, :] * stride_key, mask=mask, other=0.0)


@triton.jit
def _scores(
    q,
    k,
    q_factor,
    bias,
    q_region,
    k_region,
    masked,
    is_key,
    HEAD_DIM: tl.constexpr,
    MASK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the scores before the softmax; -inf where there is no key, and only there."""
    scores = tl.dot(q, k, input_precision=PRECISION)
    if q_factor is None:
        scale: tl.constexpr = HEAD_DIM**-0.5
        scores *= scale
    else:  # cosines, of products that are exact
        scores *= q_factor[:, None]
        scores *= inverse_lengths(k, 0)[None, :]
    scores += bias.to(tl.float32)
    if masked:
        scores = tl.where(q_region[:, None] == k_region[None, :], scores, scores + MASK_VALUE)
    return tl.where(is_key[None, :], scores, float("-inf"))


@triton.jit
def _exp(scores, row_max):
    """Computes exp(scores - row_max), for scores of at most row_max.

    It computes a power of 2, which is one instruction and, unlike exp, may flush denormals to 0.
    """
    return tl.exp2(scores * LOG2_E - (row_max * LOG2_E)[:, None])
