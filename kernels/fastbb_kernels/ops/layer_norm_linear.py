"""Layer normalization followed by a linear layer, with an optional activation.

Algorithm: normalize each row, multiply by the weight, add the bias, activate.
Bound: memory at Swin's widths (read x, write y); the normalized x never needs to exist.
"""

from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate
from .._dispatch import Impl, eager_only


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(linear(layer_norm(x)))`.

    Args:
        x: [..., C] floating point.
        norm_weight: [C].
        norm_bias: [C].
        weight: [C_out, C].
        bias: [C_out] or None.
        eps: added to the variance.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.
    """
    eager_only("layer_norm_linear", impl)
    return layer_norm_linear_eager(
        x, norm_weight, norm_bias, weight, bias, eps=eps, activation=activation
    )


def layer_norm_linear_eager(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return activate(F.linear(x, weight, bias), activation)
