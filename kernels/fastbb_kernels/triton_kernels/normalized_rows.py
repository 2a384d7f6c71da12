"""Layer-normalized rows on the chip: read for more than one use, or products before a store."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# inside a kernel values are tensors and the compiler runs loops, which tl's types do not express

import triton
import triton.language as tl


@triton.jit
def normalized_rows(
    x_ptr,
    rows,
    inside,
    norm,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loads rows once and normalizes them.

    Args:
        x_ptr: [..., CHANNELS], contiguous.
        rows: [M] i64, numbers of the rows.
        inside: [M] i1, whether a row may be loaded.
        norm: as of `normalized`.
        CHANNELS: a multiple of BLOCK_C.
        BLOCK_C: channels of a piece.

    Returns:
        tuple of CHANNELS // BLOCK_C pieces [M, BLOCK_C], as of `normalized`.
    """
    pieces = loaded_rows(x_ptr, rows, inside, CHANNELS, BLOCK_C)
    return normalized(pieces, inside, norm, CHANNELS, BLOCK_C)


@triton.jit
def loaded_rows(x_ptr, rows, inside, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads rows, zeros where not `inside`; arguments and pieces as of `normalized_rows`."""
    pieces = ()
    for i in tl.static_range(CHANNELS // BLOCK_C):
        channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
        piece = tl.load(
            x_ptr + rows[:, None] * CHANNELS + channels[None, :],
            mask=inside[:, None],
            other=0.0,
            # the kernel reads it again for the residual. Without this hint the compiler merges the
            # two loads and keeps the first piece in registers all the time between them
            eviction_policy="evict_last",
        )
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def normalized(pieces, inside, norm, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Normalizes rows that are on the chip.

    The statistics are fp32 and take two passes over the values, so that a large mean loses no
    digits. Rows are in pieces because CHANNELS need not be a power of two.

    Args:
        pieces: tuple of CHANNELS // BLOCK_C pieces [M, BLOCK_C].
        inside: [M] i1, whether there is such a row.
        norm: weight and bias, [CHANNELS] and contiguous, and eps, which is added to the variance.
        CHANNELS: a multiple of BLOCK_C.
        BLOCK_C: channels of a piece.

    Returns:
        tuple of pieces [M, BLOCK_C], rounded to the dtype of the rows like a layer norm; zeros
        where not `inside`.
    """
    norm_weight_ptr, norm_bias_ptr, eps = norm
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(CHANNELS // BLOCK_C):
        total += tl.sum(pieces[i].to(tl.float32), 1)
    mean = total / CHANNELS

    squares = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(CHANNELS // BLOCK_C):
        centered = pieces[i].to(tl.float32) - mean[:, None]
        squares += tl.sum(centered * centered, 1)
    rstd = tl.rsqrt(squares / CHANNELS + eps)

    normalized = ()
    for i in tl.static_range(CHANNELS // BLOCK_C):
        channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = tl.load(norm_weight_ptr + channels).to(tl.float32)
        bias = tl.load(norm_bias_ptr + channels).to(tl.float32)
        centered = pieces[i].to(tl.float32) - mean[:, None]
        piece = centered * rstd[:, None] * weight[None, :] + bias[None, :]
        # zeros are exact in every dtype, so the order of mask and cast does not matter
        normalized = normalized + (tl.where(inside[:, None], piece, 0.0).to(pieces[i].dtype),)
    return normalized


@triton.jit
def store_normalized(
    sums,
    bias_ptr,
    norm,
    residual_ptr,
    y_ptr,
    rows,
    inside,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stores `residual + layer_norm(sums + bias)`; all memory is contiguous.

    Args:
        sums: tuple of CHANNELS // BLOCK_C pieces [M, BLOCK_C] in fp32, products of a linear layer.
        bias_ptr: [CHANNELS] or None.
        norm: as of `normalized`.
        residual_ptr: [..., CHANNELS].
        y_ptr: [..., CHANNELS].
        rows: [M] i64, numbers of the rows of residual and y.
        inside: [M] i1, whether there is such a row.
        CHANNELS: a multiple of BLOCK_C.
        BLOCK_C: channels of a piece.
    """
    pieces = ()
    for i in tl.static_range(CHANNELS // BLOCK_C):
        piece = sums[i]
        if bias_ptr is not None:
            channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
            piece += tl.load(bias_ptr + channels).to(tl.float32)[None, :]
        pieces = pieces + (piece,)
    pieces = normalized(pieces, inside, norm, CHANNELS, BLOCK_C)
    for i in tl.static_range(CHANNELS // BLOCK_C):
        channels = i * BLOCK_C + tl.arange(0, BLOCK_C)
        offsets = rows[:, None] * CHANNELS + channels[None, :]
        residual = tl.load(residual_ptr + offsets, mask=inside[:, None], other=0.0)
        y = pieces[i] + residual.to(tl.float32)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside[:, None])
