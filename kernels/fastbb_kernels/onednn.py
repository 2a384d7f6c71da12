"""Linear layers and convolutions on CPUs, by oneDNN's ops for weights that are packed once.

PyTorch has these ops for its compiler only. `F.linear` reorders the weights in every call, in fp32
for a BLAS that may not be the fastest on this CPU, and needs separate passes for the activation and
the residual.

Upstream: PyTorch `aten/src/ATen/native/mkldnn/Linear.cpp`, `Conv.cpp` and `MKLDNNConversions.cpp`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._activation import activate
from .heap import keep_freed_memory

# activations that oneDNN fuses, by our names: its name, scalars and algorithm. Its ReLU turns NaN
# into 0 and its leaky ReLU does not; the tiny rest of a negative value counts as 0 in a product
_LEAK = 1e-30
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("leaky_relu", [_LEAK], ""),
    "gelu": ("gelu", [], "none"),
}


def packs(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and CPU multiply packed weights of a dtype at full speed."""
    return torch.backends.mkldnn.enabled and _packs(dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    try:
        if not torch.backends.mkldnn.is_available() or not supported[dtype]():
            return False
        # the operations are not public: use them only if they still compute the expected values
        with torch.inference_mode(False), torch.no_grad():
            x, weight = (torch.linspace(-1, 1, n * 16, device="cpu").view(n, 16) for n in (3, 16))
            keep_freed_memory()  # the ways that pack make many blocks, all of them small
            x, weight, bias = x.to(dtype), weight.to(dtype), weight[0].to(dtype)
            packed = pack_linear(weight)
            want = F.gelu(F.linear(x, weight, bias)) + F.linear(x, weight, bias)
            got = packed_linear(x, packed, bias, activation="gelu")
            got = got + packed_linear(x, packed, bias, residual=torch.zeros_like(x))
            return torch.allclose(got.float(), want.float(), rtol=3e-2, atol=3e-2)
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return False


def pack_linear(weight: Tensor) -> Tensor:
    """Packs the weight of a linear layer [out, in] into a layout for `packed_linear` only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Computes `activation(x @ weight.T + bias)`, or `x @ weight.T + bias + residual`.

    "relu" is for hidden layers: it multiplies a negative value by `1e-30`, instead of giving 0.

    Args:
        x: [M, in], contiguous.
        packed: from `pack_linear`.
        bias: [out] or None.
        activation: name of the activation, or None.
        residual: [M, out], contiguous, not together with an activation.

    Returns:
        [M, out].
    """
    ops: Any = torch.ops.mkldnn
    if residual is not None:
        return ops._linear_pointwise.binary(x, residual, packed, bias, "add")
    if activation in _FUSED:
        return ops._linear_pointwise(x, packed, bias, *_FUSED[activation])
    return activate(ops._linear_pointwise(x, packed, bias, "none", [], ""), activation)


def pack_conv(
    weight: Tensor,
    shape: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Packs the weight of a convolution [C, C_in / groups, kh, kw] into a layout for `packed_conv`.

    Args:
        weight: of the convolution; the result of `packed_conv` has its memory format.
        shape: of the input [B, C_in, H, W]; inputs of other shapes are computed, but slowly.
        stride: of the convolution, (height, width), as all below.
        padding: with zeros on each side.
        dilation: between the taps.
        groups: of channels.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, shape
    )


def packed_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    activation: str | None = None,
    residual: Tensor | None = None,
    hidden: bool = False,
) -> Tensor:
    """Computes `activation(conv2d(x) + residual)`.

    Args:
        x: [B, C_in, H, W], in the memory format of the weight.
        packed: from `pack_conv`.
        bias: [C].
        stride: of the convolution, (height, width), as all below.
        padding: with zeros on each side.
        dilation: between the taps.
        groups: of channels.
        activation: name of the activation, or None.
        residual: [B, C, h, w] in that format, or None; not for grouped convolutions.
        hidden: the result only goes into another convolution, so that "relu" may leave `1e-30`
            times a negative value instead of 0.

    Returns:
        [B, C, h, w].
    """
    ops: Any = torch.ops.mkldnn
    geometry = padding, stride, dilation, groups
    if residual is not None and residual.shape[2:] == (1, 1):
        # the fused addition of torch 2.11 fails on one pixel: "could not create a memory"
        y = ops._convolution_pointwise(x, packed, bias, *geometry, *_FUSED[None]) + residual
    elif residual is not None:
        y = ops._convolution_pointwise.binary(
            x, residual, packed, bias, *geometry, "add", None, None, [], None
        )
    elif activation in _FUSED and (hidden or activation != "relu"):
        return ops._convolution_pointwise(x, packed, bias, *geometry, *_FUSED[activation])
    else:
        y = ops._convolution_pointwise(x, packed, bias, *geometry, *_FUSED[None])
    return torch.relu_(y) if activation == "relu" else activate(y, activation)
