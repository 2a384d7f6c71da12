"""Reference convolution and batch norm for the tests of ops, and their folding.

The ops are tested without fastbb, so this is not `fastbb.weights.fold`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def conv_and_norm(channels: int, out_channels: int, stride: int) -> Any:
    """A 1x1 convolution and its norm in eval mode, with statistics as after training."""
    norm = nn.BatchNorm2d(out_channels)
    state = {name: torch.randn(out_channels) for name in ("bias", "running_mean")}
    state |= {name: torch.rand(out_channels) + 0.5 for name in ("weight", "running_var")}
    norm.load_state_dict(state, strict=False)
    module = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), norm)
    return module.eval().requires_grad_(False)


def folded(conv_and_norm: Any) -> tuple[Tensor, Tensor]:
    """Folds the norm into the convolution; returns weight and bias in float64."""
    conv, norm = (copy.deepcopy(module).double() for module in conv_and_norm)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values in channels-last memory."""
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)
