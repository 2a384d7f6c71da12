"""Activations by the names that transformers' configs use."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

Activation = str | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact (erf)
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "hardswish": F.hardswish,
}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Applies the named activation to `x` of any shape; None leaves it as it is."""
    return x if activation is None else ACTIVATIONS[activation](x)
