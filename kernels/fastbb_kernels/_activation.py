"""Activations by the names that transformers' configs use."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = str | None


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact (erf)
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "hardswish": F.hardswish,
}


def check_activation(op: str, activation: Activation) -> None:
    """Raises a ValueError unless the argument `activation` of `op` is a name above or None."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation must be None or one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Applies the named activation to `x` of any shape; None leaves it as it is."""
    return x if activation is None else ACTIVATIONS[activation](x)
