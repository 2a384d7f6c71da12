"""The attention half of a Swin block: norm, queries, keys and values, attention, projection.

Algorithm: y = x + proj(window_attention(linear(layer_norm(x)))), for one window of the map at a
time; nothing between x and y is stored. Swin V2 has the norm after the layers, and cosines:
y = x + layer_norm(proj(window_attention(linear(x)))).
Bound: memory at Swin's first two stages (read x, write y); at more channels re-reading the weights
for every window costs more than it saves, and the separate ops run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Architecture, Impl, architecture, common_unsupported
from .._window_geometry import MASK_VALUE, WindowGeometry, check_geometry
from ..op import Op
from .layer_norm_linear import LayerNormLinear, layer_norm_linear
from .linear_norm_residual import LinearNormResidual, linear_norm_residual
from .linear_residual import LinearResidual, linear_residual
from .window_attention import WindowAttention, window_attention

TRITON_HEAD_DIMS = (16, 32, 64)
TRITON_MAX_TOKENS = 64  # of a window

# most channels that compile without spilling registers
_MOST_CHANNELS: dict[Architecture, int] = {
    80: 128,
    86: 64,
    89: 64,
    90: 192,
    100: 256,
    120: 96,
    "gfx90a": 256,
    "gfx942": 256,
}
# with fewer, most multiprocessors have nothing to do, and the parts have more programs
_ENOUGH_WINDOWS = 32


def swin_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    geometry: WindowGeometry,
    eps: float = 1e-5,
    logit_scale: Tensor | None = None,
    mask_value: float = MASK_VALUE,
    post_norm: bool = False,
    norm_linear: Callable[..., Tensor] = layer_norm_linear,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `x + proj(window_attention(layer_norm_linear(x)))`.

    With `post_norm`, it computes `x + layer_norm(proj(window_attention(linear(x))))`.

    If the kernel of this op cannot run, the ops `layer_norm_linear`, `window_attention` and
    `linear_residual` run (a linear layer, `window_attention` and `linear_norm_residual` with
    `post_norm`), with the same `impl`. "auto" also takes these on a GPU for less than 32 windows.

    Args:
        x: [B, H, W, C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        qkv_weight: [3A, C]: queries, keys and values one below the other, heads inside each; A is
            C, except in timm's Swins with a `head_dim` option.
        qkv_bias: [3A] or None.
        bias: [num_heads, N, P] relative position bias, N tokens per window; columns beyond N are
            ignored, they only align the rows for wide loads.
        proj_weight: [C, A].
        proj_bias: [C] or None.
        num_heads: number of heads; must divide A.
        geometry: windows, shift and order of padding and rolling.
        eps: added to the variance.
        logit_scale: as of `window_attention`.
        mask_value: as of `window_attention`.
        post_norm: whether the norm comes after the layers, before the residual.
        norm_linear: computes the norm and the first layer where the parts run, by the arguments of
            `layer_norm_linear`.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, H, W, C], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = SwinAttentionBlock(
        *(x, norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, proj_bias),
        *(num_heads, geometry, eps, logit_scale, mask_value, post_norm),
    )
    call.check()
    if _op.takes(call, impl):
        return _op.kernel(call)
    norm = norm_weight, norm_bias
    if post_norm:
        qkv = F.linear(x, qkv_weight, qkv_bias)
    else:
        qkv = norm_linear(x, *norm, qkv_weight, qkv_bias, eps=eps, impl=impl)
    y = window_attention(
        qkv,
        bias,
        qkv_bias,
        num_heads=num_heads,
        geometry=geometry,
        logit_scale=logit_scale,
        mask_value=mask_value,
        impl=impl,
    )
    if post_norm:
        return linear_norm_residual(y, proj_weight, proj_bias, *norm, x, eps=eps, impl=impl)
    return linear_residual(y, proj_weight, proj_bias, x, impl=impl)


class SwinAttentionBlock(NamedTuple):
    """A call of `swin_attention_block`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    num_heads: int
    geometry: WindowGeometry
    eps: float
    logit_scale: Tensor | None = None
    mask_value: float = MASK_VALUE
    post_norm: bool = False

    def check(self) -> None:
        x, qkv_weight, num_heads = self.x, self.qkv_weight, self.num_heads
        if x.ndim != 4:
            raise ValueError(f"swin_attention_block: x must be [B, H, W, C], got {list(x.shape)}")
        if num_heads < 1 or qkv_weight.ndim != 2 or qkv_weight.shape[0] % (3 * num_heads):
            raise ValueError(
                "swin_attention_block: qkv_weight must be [3A, C] with A divisible by "
                f"num_heads={num_heads}, got {list(qkv_weight.shape)}"
            )
        A, C = qkv_weight.shape[0] // 3, x.shape[-1]
        shapes: dict[str, tuple[Tensor | None, list[int]]] = {
            "norm_weight": (self.norm_weight, [C]),
            "norm_bias": (self.norm_bias, [C]),
            "qkv_weight": (qkv_weight, [3 * A, C]),
            "qkv_bias": (self.qkv_bias, [3 * A]),
            "proj_weight": (self.proj_weight, [C, A]),
            "proj_bias": (self.proj_bias, [C]),
            "logit_scale": (self.logit_scale, [num_heads]),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(
                    f"swin_attention_block: {name} must be {shape} for x {list(x.shape)}, "
                    f"got {list(tensor.shape)}"
                )
        check_geometry("swin_attention_block", self.geometry, self.bias, num_heads)

    def eager(self) -> Tensor:
        if self.post_norm:
            qkv = F.linear(self.x, self.qkv_weight, self.qkv_bias)
        else:
            qkv = LayerNormLinear(*self[:5], self.eps, None).eager()
        options = self.num_heads, self.geometry, 0.0, self.logit_scale, self.mask_value
        y = WindowAttention(qkv, self.bias, self.qkv_bias, *options).eager()
        proj = self.proj_weight, self.proj_bias
        if self.post_norm:
            norm = self.norm_weight, self.norm_bias
            return LinearNormResidual(y, *proj, *norm, self.x, self.eps).eager()
        return LinearResidual(y, *proj, self.x).eager()

    def unsupported(self) -> str | None:
        reason = common_unsupported(self)
        if reason is not None:
            return reason
        x, n_tokens = self.x, math.prod(self.geometry.window)
        if n_tokens > TRITON_MAX_TOKENS:
            return f"needs windows of at most {TRITON_MAX_TOKENS} tokens, got {n_tokens}"
        channels = x.shape[-1]
        if self.qkv_weight.shape[0] != 3 * channels:
            n_others = self.qkv_weight.shape[0] // 3
            return f"needs {channels} channels in the heads too, got {n_others}"
        head_dim = channels // self.num_heads
        if head_dim not in TRITON_HEAD_DIMS:
            return f"needs a head dimension of {TRITON_HEAD_DIMS}, got {head_dim}"
        if channels % 32:
            return f"needs a multiple of 32 channels, got {channels}"
        if x.shape[1:].numel() >= 2**31:
            return f"needs images of less than 2**31 elements, got {list(x.shape[1:])}"
        arch = architecture(x.device)
        if arch is None:  # the interpreter has no limits
            return None
        if x.dtype == torch.float32:
            return "needs fp16 or bf16: fp32 products spill registers, and are not bound by memory"
        most = _MOST_CHANNELS.get(arch, 0)
        if channels > most:
            return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
        return None

    def pays(self) -> bool:
        """Whether the kernel is expected to be faster than those of the separate ops."""
        batch, height, width, _ = self.x.shape
        rows, cols = self.geometry.window
        n_windows = batch * -(-height // rows) * -(-width // cols)
        return n_windows >= _ENOUGH_WINDOWS or architecture(self.x.device) is None

    def n_bytes(self) -> int:
        """Counts x and the parameters read once, y written once.

        The columns of the position bias count up to the end of the last wide load.
        """
        n_tokens = math.prod(self.geometry.window)
        n_bias_cols = min(self.bias.shape[2], -(-n_tokens // 16) * 16)
        parameters = (*self[1:5], self.proj_weight, self.proj_bias, self.logit_scale)
        n_elements = 2 * self.x.numel() + self.num_heads * n_tokens * n_bias_cols
        n_elements += sum(parameter.numel() for parameter in parameters if parameter is not None)
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.x.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.swin_attention_block import launch

        options = self.geometry, self.eps, self.mask_value, self.post_norm
        return launch(*self[:8], self.logit_scale, *options)


_op = Op("swin_attention_block", SwinAttentionBlock, is_block=True)
