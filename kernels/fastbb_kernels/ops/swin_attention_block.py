"""The attention half of a Swin block: norm, queries, keys and values, attention, projection.

Algorithm: y = x + proj(window_attention(linear(layer_norm(x)))), for one window of the map at a
time, so that nothing between x and y exists in memory.
Bound: memory at Swin's first two stages (read x, write y); at more channels re-reading the weights
for every window costs more than it saves, and the separate ops run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import (
    Architecture,
    Impl,
    architecture,
    common_unsupported,
    launches_directly,
    use_block,
)
from ..launching import launches
from .layer_norm_linear import layer_norm_linear, layer_norm_linear_eager
from .linear_residual import linear_residual, linear_residual_eager
from .window_attention import WindowGeometry, window_attention, window_attention_eager

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
    impl: Impl | None = None,
) -> Tensor:
    """Computes `x + proj(window_attention(layer_norm_linear(x)))`.

    Where its own kernel does not run, the three ops `layer_norm_linear`, `window_attention` and
    `linear_residual` do, each by the same `impl`.

    Args:
        x: [B, H, W, C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        qkv_weight: [3A, C]: queries, keys and values one below the other, heads inside each; A is
            C in all Swins but timm's with a `head_dim` of their own.
        qkv_bias: [3A] or None.
        bias: [num_heads, N, P] relative position bias, N tokens per window; columns beyond N, which
            make rows easy to load, are not read.
        proj_weight: [C, A].
        proj_bias: [C] or None.
        num_heads: number of heads; must divide A.
        geometry: windows, shift and order of padding and rolling.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, H, W, C], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, proj_bias)
    _check(*tensors, num_heads, geometry)
    unsupported = swin_attention_block_unsupported(
        *tensors, num_heads=num_heads, geometry=geometry, eps=eps
    )
    if use_block("swin_attention_block", impl, unsupported, x):
        run = _launch if launches_directly() else _swin_attention_block
        return run(*tensors, *geometry, eps)
    qkv = layer_norm_linear(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps=eps, impl=impl)
    y = window_attention(qkv, bias, qkv_bias, num_heads=num_heads, geometry=geometry, impl=impl)
    return linear_residual(y, proj_weight, proj_bias, x, impl=impl)


def swin_attention_block_eager(
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
) -> Tensor:
    qkv = layer_norm_linear_eager(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps=eps)
    y = window_attention_eager(qkv, bias, qkv_bias, num_heads=num_heads, geometry=geometry)
    return linear_residual_eager(y, proj_weight, proj_bias, x)


def swin_attention_block_unsupported(
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
) -> str | None:
    """Why the block's own kernel cannot run this call, or None."""
    reason = common_unsupported(
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        bias=bias,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
    )
    if reason is not None:
        return reason
    n_tokens = geometry.window[0] * geometry.window[1]
    if n_tokens > TRITON_MAX_TOKENS:
        return f"needs windows of at most {TRITON_MAX_TOKENS} tokens, got {n_tokens}"
    channels = x.shape[-1]
    if qkv_weight.shape[0] != 3 * channels:
        return f"needs {channels} channels in the heads too, got {qkv_weight.shape[0] // 3}"
    head_dim = channels // num_heads
    if head_dim not in TRITON_HEAD_DIMS:
        return f"needs a head dimension of {TRITON_HEAD_DIMS}, got {head_dim}"
    if channels % 32:
        return f"needs a multiple of 32 channels, got {channels}"
    if x.shape[1:].numel() >= 2**31:
        return f"needs images of less than 2**31 elements, got {list(x.shape[1:])}"
    arch = architecture(x.device)
    if arch is None:  # the interpreter runs anything
        return None
    if x.dtype == torch.float32:
        return "needs fp16 or bf16: fp32 products spill registers, and are not bound by memory"
    most = _MOST_CHANNELS.get(arch, 0)
    if channels > most:
        return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
    return None


def swin_attention_block_n_bytes(
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
) -> int:
    """Bytes of a call: x and the parameters read once, y written once.

    Of the position bias those columns count that a wide load of the used ones takes along.
    """
    n_tokens = geometry.window[0] * geometry.window[1]
    n_bias_cols = min(bias.shape[2], -(-n_tokens // 16) * 16)
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    n_elements = 2 * x.numel() + num_heads * n_tokens * n_bias_cols
    n_elements += sum(parameter.numel() for parameter in parameters if parameter is not None)
    return x.element_size() * n_elements


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    geometry: WindowGeometry,
) -> None:
    (h, w), shift = geometry.window, geometry.shift
    if x.ndim != 4:
        raise ValueError(f"swin_attention_block: x must be [B, H, W, C], got {list(x.shape)}")
    if num_heads < 1 or qkv_weight.ndim != 2 or qkv_weight.shape[0] % (3 * num_heads):
        raise ValueError(
            "swin_attention_block: qkv_weight must be [3A, C] with A divisible by "
            f"num_heads={num_heads}, got {list(qkv_weight.shape)}"
        )
    A, C = qkv_weight.shape[0] // 3, x.shape[-1]
    shapes: dict[str, tuple[Tensor | None, list[int]]] = {
        "norm_weight": (norm_weight, [C]),
        "norm_bias": (norm_bias, [C]),
        "qkv_weight": (qkv_weight, [3 * A, C]),
        "qkv_bias": (qkv_bias, [3 * A]),
        "proj_weight": (proj_weight, [C, A]),
        "proj_bias": (proj_bias, [C]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"swin_attention_block: {name} must be {shape} for x {list(x.shape)}, "
                f"got {list(tensor.shape)}"
            )
    if h < 1 or w < 1:
        raise ValueError(f"swin_attention_block: windows must be at least 1x1, got {h}x{w}")
    if bias.ndim != 3 or bias.shape[:2] != (num_heads, h * w) or bias.shape[2] < h * w:
        raise ValueError(
            f"swin_attention_block: bias must be [{num_heads}, {h * w}, at least {h * w}] for "
            f"{num_heads} heads and a {h}x{w} window, got {list(bias.shape)}"
        )
    if not (0 <= shift[0] < h and 0 <= shift[1] < w):
        raise ValueError(
            "swin_attention_block: shift must be at least 0 and below the window "
            f"{h}x{w}, got {shift}"
        )


@torch.library.custom_op("fastbb::swin_attention_block", mutates_args=())
def _swin_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    eps: float,
) -> Tensor:
    y = swin_attention_block_eager(
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        bias,
        proj_weight,
        proj_bias,
        num_heads=bias.shape[0],
        geometry=WindowGeometry((window[0], window[1]), (shift[0], shift[1]), roll_first),
        eps=eps,
    )
    return y.contiguous()


@_swin_attention_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@launches(_swin_attention_block)
def _launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    eps: float,
) -> Tensor:
    from ..triton_kernels.swin_attention_block import launch

    return launch(
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        bias,
        proj_weight,
        proj_bias,
        WindowGeometry((window[0], window[1]), (shift[0], shift[1]), roll_first),
        eps,
    )
