"""Shifted-window attention of Swin and Swin V2 over a map of queries, keys and values.

Algorithm: pad and roll the map, cut it into windows, attend within each window with a relative
position bias and -100 between tokens of different regions, put the windows back. Swin V2 takes the
cosines of queries and keys, times a scale of each head, in place of their scaled products.
Bound: memory (read qkv, write the output); padding, roll and windows are address arithmetic.
Source: Liu et al. 2021, section 3.2, and 2022, section 3.3; microsoft/Swin-Transformer
`WindowAttention`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from .._window_geometry import MASK_VALUE, WindowGeometry, check_geometry
from ..op import Op

TRITON_MAX_HEAD_DIM = 64
TRITON_MAX_TOKENS = 256  # of a window
TRITON_MAX_FP32_TOKENS = 144  # with a head dimension of 64: more fill registers or shared memory


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    qkv_pad: Tensor | None,
    *,
    num_heads: int,
    geometry: WindowGeometry,
    dropout_p: float = 0.0,
    logit_scale: Tensor | None = None,
    mask_value: float = MASK_VALUE,
    impl: Impl | None = None,
) -> Tensor:
    """Attends within the windows of a map. Padded tokens are keys and values like all others.

    Args:
        qkv: [B, H, W, 3C] floating point: queries, keys and values side by side, heads inside each.
        bias: [num_heads, N, P] relative position bias, N tokens per window. Columns beyond N are
            ignored; with P a multiple of 16, loads are wide.
        qkv_pad: [3C] value of a padded token (the bias of the projection), or None for zeros.
        num_heads: number of heads; must divide C.
        geometry: windows, shift and order of padding and rolling.
        dropout_p: probability of dropping an attention weight.
        logit_scale: [num_heads] factors of the cosines of queries and keys (Swin V2); None: the
            scores are products over the root of the head dimension (Swin).
        mask_value: added to the score of two tokens of different regions.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, H, W, C], dtype of `qkv`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    options = num_heads, geometry, dropout_p, logit_scale, mask_value
    return _op(WindowAttention(qkv, bias, qkv_pad, *options), impl)


def window_attention_weights(
    qkv: Tensor,
    bias: Tensor,
    qkv_pad: Tensor | None,
    *,
    num_heads: int,
    geometry: WindowGeometry,
    dropout_p: float = 0.0,
    logit_scale: Tensor | None = None,
    mask_value: float = MASK_VALUE,
) -> tuple[Tensor, Tensor]:
    """`window_attention` that also returns the attention weights, [B * nW, num_heads, N, N]."""
    options = num_heads, geometry, dropout_p, logit_scale, mask_value
    call = WindowAttention(qkv, bias, qkv_pad, *options)
    q, k, v, mask = call.by_window()
    scores = (q @ k.transpose(-2, -1)) * call.scale + mask
    statistics = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=statistics).to(v.dtype)
    weights = F.dropout(weights, dropout_p)
    return call.as_map(weights @ v), weights.unflatten(1, (-1, num_heads)).flatten(0, 1)


class WindowAttention(NamedTuple):
    """A call of `window_attention`."""

    qkv: Tensor
    bias: Tensor
    qkv_pad: Tensor | None
    num_heads: int
    geometry: WindowGeometry
    dropout_p: float
    logit_scale: Tensor | None = None
    mask_value: float = MASK_VALUE

    def check(self) -> None:
        qkv, bias, qkv_pad, num_heads, geometry, _, logit_scale, _ = self
        if num_heads < 1 or qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
            raise ValueError(
                "window_attention: qkv must be [B, H, W, 3C] with C divisible by "
                f"num_heads={num_heads}, got {list(qkv.shape)}"
            )
        check_geometry("window_attention", geometry, bias, num_heads)
        if qkv_pad is not None and qkv_pad.shape != qkv.shape[-1:]:
            raise ValueError(
                f"window_attention: qkv_pad must be [{qkv.shape[-1]}], got {list(qkv_pad.shape)}"
            )
        if logit_scale is not None and list(logit_scale.shape) != [num_heads]:
            raise ValueError(
                f"window_attention: logit_scale must be [{num_heads}], "
                f"got {list(logit_scale.shape)}"
            )

    def eager(self) -> Tensor:
        return self.as_map(_attend(*self.by_window(), self.scale, self.dropout_p))

    @property
    def scale(self) -> float:
        """Factor of the products of the queries and keys that `by_window` returns."""
        if self.logit_scale is not None:
            return 1.0
        return (self.qkv.shape[-1] // (3 * self.num_heads)) ** -0.5

    def by_window(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns queries, keys, values [B, M * num_heads, N, head_dim] and the bias of the scores.

        With a shift, each of the M windows of an image has its own mask. The windows then count as
        heads, so that one mask [1, M * num_heads, N, N] serves the whole batch. Without a shift, M
        is 1, and B counts the windows.
        """
        qkv, bias, qkv_pad, num_heads, geometry, _, logit_scale, mask_value = self
        q, k, v = _windows(qkv, qkv_pad, num_heads, geometry)
        if logit_scale is not None:
            q, k = cosine_operands(q, k, logit_scale)
        mask = _scores_bias(qkv, bias, geometry, mask_value)
        split = (q.shape[0] // mask.shape[0], mask.shape[0])
        q, k, v = (x.unflatten(0, split).flatten(1, 2) for x in (q, k, v))
        return q, k, v, mask.flatten(0, 1).unsqueeze(0)

    def as_map(self, attended: Tensor) -> Tensor:
        """Converts [B, M * num_heads, N, head_dim] to [B, H, W, C]."""
        windows = attended.unflatten(1, (-1, self.num_heads)).flatten(0, 1)
        return _unwindow(windows, self.qkv.shape[1], self.qkv.shape[2], self.geometry)

    def unsupported(self) -> str | None:
        n_tokens = math.prod(self.geometry.window)
        head_dim = self.qkv.shape[-1] // (3 * self.num_heads)
        if self.dropout_p > 0:
            return f"the kernel has no dropout, got dropout_p={self.dropout_p}"
        if n_tokens > TRITON_MAX_TOKENS:
            return f"needs windows of at most {TRITON_MAX_TOKENS} tokens, got {n_tokens}"
        if head_dim > TRITON_MAX_HEAD_DIM:
            return f"needs a head dimension of at most {TRITON_MAX_HEAD_DIM}, got {head_dim}"
        is_large = head_dim > 32 and n_tokens > TRITON_MAX_FP32_TOKENS
        if is_large and self.qkv.dtype == torch.float32:
            return (
                f"in fp32 with a head dimension over 32 needs windows of at most "
                f"{TRITON_MAX_FP32_TOKENS} tokens, got {n_tokens}"
            )
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts qkv and bias read once, the output written once.

        The columns of the bias count up to the end of the last wide load. Of `qkv_pad` the keys and
        values count, if there are padded tokens.
        """
        (h, w), (_, H, W, C3) = self.geometry.window, self.qkv.shape
        n_bias_cols = min(self.bias.shape[2], -(-(h * w) // 16) * 16)
        n_elements = self.qkv.numel() + self.qkv.numel() // 3
        n_elements += self.num_heads * h * w * n_bias_cols
        n_elements += 0 if self.logit_scale is None else self.num_heads
        if self.qkv_pad is not None and (H % h or W % w):
            n_elements += 2 * C3 // 3
        return self.qkv.element_size() * n_elements

    def empty_result(self) -> Tensor:
        B, H, W, qkv_channels = self.qkv.shape
        return self.qkv.new_empty(B, H, W, qkv_channels // 3)

    def launch(self) -> Tensor:
        from ..triton_kernels.window_attention import launch

        tensors = self.qkv, self.bias, self.qkv_pad, self.logit_scale
        return launch(*tensors, self.geometry, self.mask_value)


def cosine_operands(q: Tensor, k: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys whose products are cosines times the scale of the head.

    Args:
        q: [..., num_heads, N, head_dim].
        k: of the same shape.
        logit_scale: [num_heads].
    """
    # rounded once: a cosine that is rounded, and then scaled by up to 100, would lose more
    statistics = torch.promote_types(q.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(x.to(statistics), dim=-1) for x in (q, k))
    scale = logit_scale.to(statistics)[:, None, None]
    return (unit_q * scale).to(q.dtype), unit_k.to(k.dtype)


def _windows(
    qkv: Tensor, qkv_pad: Tensor | None, num_heads: int, geometry: WindowGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits [B, H, W, 3C] into three tensors [B * nW, num_heads, N, head_dim]."""
    if geometry.roll_first:
        qkv = _pad(_roll(qkv, geometry.shift, -1), qkv_pad, geometry.window)
    else:
        qkv = _roll(_pad(qkv, qkv_pad, geometry.window), geometry.shift, -1)
    h, w = geometry.window
    qkv = qkv.unflatten(3, (3, num_heads, -1)).unflatten(2, (-1, w)).unflatten(1, (-1, h))
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, B, rows, columns, heads, h, w, head_dim]
    q, k, v = qkv.flatten(5, 6).flatten(1, 3)
    return q, k, v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """Computes softmax(q @ k.T * scale + mask) @ v.

    On windows of 49 tokens PyTorch's attention for CPUs, made for long sequences, takes twice the
    time of two batched products in low precision.

    Args:
        q: [B, heads, N, head_dim], as are k and v.
        k: keys.
        v: values.
        mask: [1, heads, N, N].
        scale: factor of the products.
        dropout_p: probability of dropping an attention weight.
    """
    low = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not low or dropout_p > 0 or torch.compiler.is_compiling():
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    split = q.shape[:2]
    mask = mask.expand(split[0], -1, -1, -1).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    return (F.softmax(scores, dim=-1) @ v).unflatten(0, split)


def _unwindow(windows: Tensor, height: int, width: int, geometry: WindowGeometry) -> Tensor:
    """Converts [B * nW, num_heads, N, head_dim] to [B, H, W, C]."""
    h, w = geometry.window
    rows, columns = -(-height // h), -(-width // w)
    batch = windows.shape[0] // (rows * columns)
    x = windows.unflatten(2, (h, w)).unflatten(0, (batch, rows, columns))
    x = x.permute(0, 1, 4, 2, 5, 3, 6)  # [B, rows, h, columns, w, heads, head_dim]
    if torch.compiler.is_exporting():  # else views are recorded that only fit this device's strides
        x = x.clone(memory_format=torch.contiguous_format)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if geometry.roll_first:
        return _roll(x[:, :height, :width], geometry.shift, 1)
    return _roll(x, geometry.shift, 1)[:, :height, :width]


def _pad(x: Tensor, value: Tensor | None, window: tuple[int, int]) -> Tensor:
    """Pads [B, H, W, C] at the bottom and right to whole windows."""
    B, H, W, C = x.shape
    pad_h, pad_w = -H % window[0], -W % window[1]
    if not (pad_h or pad_w):
        return x
    if value is None:
        return F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    value = value.to(x.dtype)
    x = torch.cat([x, value.expand(B, H, pad_w, C)], dim=2)
    return torch.cat([x, value.expand(B, pad_h, W + pad_w, C)], dim=1)


def _roll(x: Tensor, shift: tuple[int, int], direction: int) -> Tensor:
    if not any(shift):
        return x
    return torch.roll(x, (direction * shift[0], direction * shift[1]), dims=(1, 2))


def _scores_bias(qkv: Tensor, bias: Tensor, geometry: WindowGeometry, mask_value: float) -> Tensor:
    """Returns position bias plus mask [nW or 1, num_heads, N, N], the same for every image."""
    bias = bias[..., : bias.shape[1]].to(qkv.dtype)
    if not any(geometry.shift):
        return bias.unsqueeze(0)
    mask = _apart(qkv.shape[1], qkv.shape[2], geometry, qkv.device)  # [nW, N, N]
    mask = torch.zeros_like(mask, dtype=qkv.dtype).masked_fill(mask, mask_value)
    return bias.unsqueeze(0) + mask.unsqueeze(1)


def _apart(height: int, width: int, geometry: WindowGeometry, device: torch.device) -> Tensor:
    """Returns whether two tokens of a window are from different regions, [nW, N, N]."""
    h, w = geometry.window
    rows = _regions(height, h, geometry.shift[0], device)
    columns = _regions(width, w, geometry.shift[1], device)
    regions = rows.view(-1, 1, h, 1) * 3 + columns.view(1, -1, 1, w)  # [nW_h, nW_w, h, w]
    regions = regions.flatten(2).flatten(0, 1)  # [nW, N]
    return regions.unsqueeze(1) != regions.unsqueeze(2)


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Returns the region of each position along one axis of the padded and rolled map."""
    padded = -(-size // window) * window
    position = torch.arange(padded, device=device)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= padded - window).long() + (position >= padded - shift).long()


_op = Op("window_attention", WindowAttention)
