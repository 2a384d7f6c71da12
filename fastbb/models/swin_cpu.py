"""A Swin block on a CPU, computed a few windows at a time, so that intermediates stay in the cache.

For each part of the windows: gather the tokens, compute norm, qkv, attention, projection and MLP,
and scatter the result to the places of the tokens. Shift, padding and windows are in the indices;
the matrix products take packed weights. So large maps are read and written once per block instead
of about fifteen times.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbb_kernels import WindowGeometry
from fastbb_kernels.onednn import pack_linear, packed_linear
from fastbb_kernels.ops.window_attention import cosine_operands

from ..weights.derived import derive
from .layers import runs_packed_linears
from .swin_parts import SwinBlockSpec, SwinBlockWeights

# size of the MLP's hidden layer, the largest tensor of a part; about the size of a cache
PART_BYTES = 8 * 2**20


class Part(NamedTuple):
    """Some windows of a batch, n of N tokens each.

    Attributes:
        tokens: [n * N], rows of the tokens in the batch; any row for padding.
        padding: [n * N, 1], whether a token is padding; None if no token is.
        kept: [k], positions in `tokens` that are not padding; None if no token is padding.
        rows: [k], `tokens` without padding.
        apart: [n, 1, N, N], 1 where two tokens are in different regions, else 0; None if all
            tokens of each window are in one region.
    """

    tokens: Tensor
    padding: Tensor | None
    kept: Tensor | None
    rows: Tensor
    apart: Tensor | None


def runs_on_cpu(x: Tensor, weights: SwinBlockWeights) -> bool:
    """Whether `swin_block_on_cpu` may compute a block in this call; in inference only."""
    return weights.owner is not None and runs_packed_linears(
        x, weights.fc1_weight, weights.tensors()
    )


def swin_block_on_cpu(
    x: Tensor, spec: SwinBlockSpec, weights: SwinBlockWeights, geometry: WindowGeometry
) -> Tensor:
    """Computes `swin_block` or `swinv2_block` in inference; see `runs_on_cpu`.

    Args:
        x: [B, H, W, C].
        spec: semantics of the block.
        weights: tensors of the block.
        geometry: windows for this size of map.

    Returns:
        [B, H, W, C].
    """
    B, H, W, C = x.shape
    tokens = x.reshape(B * H * W, C)
    result = torch.empty_like(tokens)
    hidden_bytes = weights.fc1_weight.shape[0] * x.element_size()
    n_windows = max(1, PART_BYTES // (hidden_bytes * geometry.window[0] * geometry.window[1]))
    packed = _packed(weights)
    n_tokens = geometry.window[0] * geometry.window[1]
    bias = weights.relative_position_bias[..., :n_tokens]
    block = _post_norm_block if spec.post_norm else _block
    for part in _parts(B, H, W, geometry, n_windows):
        y = block(tokens.index_select(0, part.tokens), part, bias, spec, weights, packed)
        result.index_copy_(0, part.rows, y)
    return result.view(x.shape)


class _Packed(NamedTuple):
    qkv: Tensor
    proj: Tensor
    fc1: Tensor
    fc2: Tensor


def _packed(weights: SwinBlockWeights) -> _Packed:
    assert weights.owner is not None
    matrices = weights.qkv_weight, weights.proj_weight, weights.fc1_weight, weights.fc2_weight
    return derive(weights.owner, "packed", _pack, *matrices)


def _pack(*matrices: Tensor) -> _Packed:
    return _Packed(*map(pack_linear, matrices))


def _block(
    x: Tensor,
    part: Part,
    bias: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    packed: _Packed,
) -> Tensor:
    """Computes the block for tokens [n * N, C] of some windows; returns [k, C], no padding."""
    C = x.shape[1:]
    y = F.layer_norm(x, C, weights.norm1_weight, weights.norm1_bias, weights.norm1_eps)
    if part.padding is not None:
        y.masked_fill_(part.padding, 0.0)
    qkv = packed_linear(y, packed.qkv, weights.qkv_bias)
    y = _attend(qkv, bias, part.apart, spec, weights.logit_scale)
    x = packed_linear(y, packed.proj, weights.proj_bias, residual=x)
    if part.kept is not None:
        x = x.index_select(0, part.kept)
    y = F.layer_norm(x, C, weights.norm2_weight, weights.norm2_bias, weights.norm2_eps)
    y = packed_linear(y, packed.fc1, weights.fc1_bias, activation=spec.activation)
    return packed_linear(y, packed.fc2, weights.fc2_bias, residual=x)


def _post_norm_block(
    x: Tensor,
    part: Part,
    bias: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    packed: _Packed,
) -> Tensor:
    """Does the same as `_block` with the norms after attention and MLP."""
    C = x.shape[1:]
    if part.padding is not None:
        x.masked_fill_(part.padding, 0.0)
    qkv = packed_linear(x, packed.qkv, weights.qkv_bias)
    y = _attend(qkv, bias, part.apart, spec, weights.logit_scale)
    y = packed_linear(y, packed.proj, weights.proj_bias)
    if part.kept is not None:
        x, y = x.index_select(0, part.kept), y.index_select(0, part.kept)
    x += F.layer_norm(y, C, weights.norm1_weight, weights.norm1_bias, weights.norm1_eps)
    y = packed_linear(x, packed.fc1, weights.fc1_bias, activation=spec.activation)
    y = packed_linear(y, packed.fc2, weights.fc2_bias)
    return x.add_(F.layer_norm(y, C, weights.norm2_weight, weights.norm2_bias, weights.norm2_eps))


def _attend(
    qkv: Tensor,
    bias: Tensor,
    apart: Tensor | None,
    spec: SwinBlockSpec,
    logit_scale: Tensor | None,
) -> Tensor:
    """Computes attention within windows, [n * N, 3C] to [n * N, C].

    It uses two batched products, because PyTorch's attention for CPUs is for long sequences.
    """
    n_tokens, num_heads = bias.shape[1], spec.num_heads
    head_dim = qkv.shape[1] // (3 * num_heads)
    qkv = qkv.view(-1, n_tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        q, k, v = qkv.flatten(1, 2)  # each [n * heads, N, head_dim]
        q = q * head_dim**-0.5
    else:
        q, k, v = qkv  # each [n, heads, N, head_dim]
        q, k = cosine_operands(q, k, logit_scale)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(q, k.transpose(1, 2))
    by_window = scores.view(-1, num_heads, n_tokens, n_tokens)
    by_window += bias
    if apart is not None:
        by_window.add_(apart.to(scores.dtype), alpha=spec.mask_value)
    y = torch.bmm(F.softmax(scores, dim=-1), v)
    y = y.view(-1, num_heads, n_tokens, head_dim).transpose(1, 2)
    return y.reshape(-1, num_heads * head_dim)


@lru_cache(maxsize=64)
def _parts(B: int, H: int, W: int, geometry: WindowGeometry, n_windows: int) -> list[Part]:
    """Divides the windows of a batch into parts of at most `n_windows`, of about equal size.

    Windows with more than one region come last, so that few parts need `apart`.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        (h, w), (shift_h, shift_w), roll_first = geometry
        rows, row_regions = _axis(H, h, shift_h, roll_first)
        columns, column_regions = _axis(W, w, shift_w, roll_first)

        def windows(of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
            grid = torch.broadcast_tensors(of_rows[:, None], of_columns[None, :])
            blocks = (x.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2) for x in grid)
            first, second = (x.flatten(2).flatten(0, 1) for x in blocks)
            return first, second  # [windows of an image, N]

        row, column = windows(rows, columns)
        first, second = windows(row_regions, column_regions)
        regions = first * 3 + second
        padding = (row < 0) | (column < 0)
        tokens = torch.where(padding, 0, row * W + column)
        is_mixed = (regions != regions[:, :1]).any(1)
        order = torch.argsort(is_mixed.repeat(B).int(), stable=True)
        images = torch.arange(B).repeat_interleave(len(tokens))[order]
        window = order % len(tokens)
        n_parts = -(-len(order) // n_windows)
        return [
            _part(tokens[own] + (image * H * W)[:, None], padding[own], regions[own])
            for own, image in zip(window.chunk(n_parts), images.chunk(n_parts))
        ]


def _part(tokens: Tensor, padding: Tensor, regions: Tensor) -> Part:
    apart = None
    differ = regions[:, None, :, None] != regions[:, None, None, :]
    if differ.any():
        apart = torch.zeros(differ.shape, dtype=torch.float32).masked_fill_(differ, 1.0)
    tokens, padding = tokens.flatten(), padding.flatten()
    if not padding.any():
        return Part(tokens, None, None, tokens, apart)
    kept = (~padding).nonzero().squeeze(1)
    return Part(tokens, padding[:, None], kept, tokens[kept], apart)


def _axis(size: int, window: int, shift: int, roll_first: bool) -> tuple[Tensor, Tensor]:
    """Source (-1 for padding) and region of each position of a rolled and padded axis."""
    padded = -(-size // window) * window
    position = torch.arange(padded)
    rolled = (position + shift) % (size if roll_first else padded)
    is_padding = position >= size if roll_first else rolled >= size
    source = torch.where(is_padding, -1, rolled)
    if shift == 0:
        return source, torch.zeros_like(position)
    return source, (position >= padded - window).int() + (position >= padded - shift).int()
