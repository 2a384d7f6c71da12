"""Library functions for the product in an op, to be timed beside its kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
    return F.linear(x, weight, bias)


def _addmm(x: Tensor, weight: Tensor, residual: Tensor, **_: Any) -> Tensor:
    """Computes the product and the residual; this call has no parameter for the bias."""
    rows, width = residual.reshape(-1, residual.shape[-1]), x.shape[-1]
    return torch.addmm(rows, x.reshape(-1, width), weight.t())


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, **_: Any) -> Tensor:
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def _conv_as_linear(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, **_: Any) -> Tensor:
    pixels = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
    return F.linear(pixels, weight.flatten(1), bias)


LIBRARIES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "linear_residual": {"F.linear": _linear, "addmm, no bias": _addmm},
    "layer_norm_linear": {"F.linear": _linear},
    "conv1x1_bn_act": {"cuDNN 1x1": _conv, "F.linear": _conv_as_linear},
    "conv3x3_bn_act": {"cuDNN plain, alone": _conv},
}
