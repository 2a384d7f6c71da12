"""Layer normalization of a channels-last map that leaves as NCHW.

Algorithm: normalize over C; the NCHW shape is a view with channels-last strides.
Bound: memory, 2 passes (read x, write y).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches

# a program holds whole rows in registers
MAX_CHANNELS = 8192


def layer_norm_nchw(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, impl: Impl | None = None
) -> Tensor:
    """Normalizes over the channels of an NHWC map.

    Args:
        x: [B, H, W, C] floating point, any strides.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W] in channels-last memory format, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    _check(x, weight, bias)
    unsupported = layer_norm_nchw_unsupported(x, weight, bias)
    if use_triton("layer_norm_nchw", impl, unsupported, x):
        run = _launch if launches_directly() else _layer_norm_nchw
        return run(x, weight, bias, eps)
    return layer_norm_nchw_eager(x, weight, bias, eps=eps)


def layer_norm_nchw_eager(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)


def layer_norm_nchw_unsupported(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> str | None:
    """Why Triton cannot run this call, or None."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"needs at most {MAX_CHANNELS} channels, got {x.shape[-1]}"
    return common_unsupported(x, weight=weight, bias=bias)


def layer_norm_nchw_n_bytes(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> int:
    """Bytes of a call: x, weight and bias read once, y written once."""
    return x.element_size() * (2 * x.numel() + weight.numel() + bias.numel())


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"layer_norm_nchw: x must be [B, H, W, C], got {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm_nchw: {name} must be {list(x.shape[-1:])} for x {list(x.shape)}, "
                f"got {list(tensor.shape)}"
            )


@torch.library.custom_op("fastbb::layer_norm_nchw", mutates_args=())
def _layer_norm_nchw(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm_nchw_eager(x, weight, bias, eps=eps)


@_layer_norm_nchw.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape).permute(0, 3, 1, 2)


@launches(_layer_norm_nchw)
def _launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from ..triton_kernels.layer_norm_nchw import launch

    return launch(x, weight, bias, eps)
