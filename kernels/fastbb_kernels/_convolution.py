"""Helpers of the convolution ops: memory for the result, checks, residual and activation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._activation import Activation, activate, check_activation


def output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    """Returns the output shape of a convolution that is centered on each `stride`-th pixel."""
    batch, _, height, width = x.shape
    return batch, weight.shape[0], -(-height // stride), -(-width // stride)


def empty_output(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Allocates the result, with the strides of channels-last even where sizes are 1.

    Where a size is 1, several strides count as channels-last, and torch may return any of them. A
    custom op copies such a result, so that its strides agree with its fake and its kernel.
    """
    return torch.empty(
        output_shape(x, weight, stride),
        dtype=weight.dtype,
        device=weight.device,
        memory_format=torch.channels_last,
    )


def finish(y: Tensor, activation: Activation, residual: Tensor | None = None) -> Tensor:
    """Adds a residual to a convolution's result and activates the sum, in place.

    No other code holds the result, and autograd does not save it. In place, the two steps allocate
    nothing.
    """
    if residual is not None:
        y.add_(residual)
    return F.relu_(y) if activation == "relu" else activate(y, activation)


def check_convolution(
    op: str,
    kernel: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: Activation,
) -> None:
    """Checks that the arguments of a convolution with square kernels fit together.

    Raises:
        ValueError: an argument does not fit; the message names `op` and the requirement.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], kernel, kernel):
        raise ValueError(
            f"{op}: weight must be [C, C_in, {kernel}, {kernel}] for x [B, C_in, H, W], "
            f"got weight {list(weight.shape)} and x {list(x.shape)}"
        )
    check_shape(op, "bias", bias, weight.shape[:1])
    check_positive(op, stride=stride, dilation=dilation)
    if residual is not None:
        check_shape(op, "residual", residual, output_shape(x, weight, stride))
    check_activation(op, activation)


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises a ValueError unless the argument `name` has this shape."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def check_positive(op: str, **numbers: int) -> None:
    """Raises a ValueError unless all numbers are positive."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {number}")
