"""The MLP of a block on rows that are on the chip; the hidden rows are never stored."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# inside a kernel values are tensors and the compiler runs loops, which tl's types do not express

import triton
import triton.language as tl

from .activation import activate
from .normalized_rows import store_normalized


@triton.jit
def mlp_of_rows(
    x,
    fc1,
    fc2,
    scale_ptr,
    norm,
    residual_ptr,
    y_ptr,
    rows,
    inside,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stores `residual + scale * fc2(activation(fc1(x)))`, or with a norm in place of the scale.

    All memory is contiguous.

    Args:
        x: tuple of CHANNELS // BLOCK_C pieces [M, BLOCK_C].
        fc1: weight [HIDDEN, CHANNELS], and bias [HIDDEN] or None.
        fc2: weight [CHANNELS, HIDDEN], and bias [CHANNELS] or None.
        scale_ptr: [CHANNELS] or None.
        norm: of the result of fc2, as of `normalized`, without a scale; or None.
        residual_ptr: [..., CHANNELS].
        y_ptr: [..., CHANNELS].
        rows: [M] i64, numbers of the rows of residual and y.
        inside: [M] i1, whether there is such a row.
        CHANNELS: a multiple of BLOCK_C.
        HIDDEN: a multiple of BLOCK_H.
        ACTIVATION: its name, or None.
        PRECISION: of products in fp32.
        BLOCK_H: hidden columns of a step.
        BLOCK_C: channels of a piece.
    """
    N_PIECES: tl.constexpr = CHANNELS // BLOCK_C
    dtype = y_ptr.dtype.element_ty
    fc1_weight_ptr, fc1_bias_ptr = fc1
    fc2_weight_ptr, fc2_bias_ptr = fc2
    acc = ()
    for _ in tl.static_range(N_PIECES):
        acc = acc + (tl.zeros((inside.shape[0], BLOCK_C), tl.float32),)

    # no code is hoisted out of the loop: the values would occupy registers throughout
    for start in tl.range(0, HIDDEN, BLOCK_H, disable_licm=True):
        columns = start + tl.arange(0, BLOCK_H)
        hidden = tl.zeros((inside.shape[0], BLOCK_H), tl.float32)
        for i in tl.static_range(N_PIECES):
            channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
            weight = tl.load(fc1_weight_ptr + columns[None, :] * CHANNELS + channels[:, None])
            hidden = tl.dot(x[i], weight, hidden, input_precision=PRECISION)
        if fc1_bias_ptr is not None:
            hidden += tl.load(fc1_bias_ptr + columns).to(tl.float32)[None, :]
        hidden = activate(hidden, ACTIVATION, dtype).to(dtype)
        sums = ()
        for i in tl.static_range(N_PIECES):
            channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
            weight = tl.load(fc2_weight_ptr + channels[None, :] * HIDDEN + columns[:, None])
            sums = sums + (tl.dot(hidden, weight, acc[i], input_precision=PRECISION),)
        acc = sums

    if norm is not None:
        stored = residual_ptr, y_ptr, rows, inside
        store_normalized(acc, fc2_bias_ptr, norm, *stored, CHANNELS, BLOCK_C)
    else:
        for i in tl.static_range(N_PIECES):
            channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
            offsets = rows[:, None] * CHANNELS + channels[None, :]
            y = acc[i]
            if fc2_bias_ptr is not None:
                y += tl.load(fc2_bias_ptr + channels).to(tl.float32)[None, :]
            if scale_ptr is not None:
                y *= tl.load(scale_ptr + channels).to(tl.float32)[None, :]
            y += tl.load(residual_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(y_ptr + offsets, y.to(dtype), mask=inside[:, None])
