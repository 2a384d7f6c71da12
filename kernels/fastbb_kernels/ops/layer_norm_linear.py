"""Layer normalization followed by a linear layer, with an optional activation.

Algorithm: normalize each row, multiply by the weight, add the bias, activate.
Bound: memory at Swin's widths (read x, write y); the normalized x never needs to exist.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate, check_activation
from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches


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

    The statistics are fp32. The kernel keeps fp32 from the product to the result, where eager
    PyTorch rounds before the activation.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        weight: [C_out, C].
        bias: [C_out] or None.
        eps: added to the variance.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = x, norm_weight, norm_bias, weight, bias
    _check(*tensors, activation)
    unsupported = layer_norm_linear_unsupported(*tensors, eps=eps, activation=activation)
    if use_triton("layer_norm_linear", impl, unsupported, x):
        run = _launch if launches_directly() else _layer_norm_linear
        return run(*tensors, eps, activation)
    return layer_norm_linear_eager(*tensors, eps=eps, activation=activation)


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


def layer_norm_linear_unsupported(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(
        x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias
    )


def layer_norm_linear_n_bytes(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
) -> int:
    """Bytes of a call: x and the parameters read once, y written once."""
    out_features, features = weight.shape
    n_rows = x.numel() // max(features, 1)
    n_elements = n_rows * (features + out_features) + weight.numel() + 2 * features
    return x.element_size() * (n_elements + (0 if bias is None else out_features))


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "layer_norm_linear: weight must be [C_out, C] for x [..., C], "
            f"got weight {list(weight.shape)} and x {list(x.shape)}"
        )
    out_features, features = weight.shape
    for name, tensor, size in (
        ("norm_weight", norm_weight, features),
        ("norm_bias", norm_bias, features),
        ("bias", bias, out_features),
    ):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(
                f"layer_norm_linear: {name} must be [{size}], got {list(tensor.shape)}"
            )
    check_activation("layer_norm_linear", activation)


@torch.library.custom_op("fastbb::layer_norm_linear", mutates_args=())
def _layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    tensors = x, norm_weight, norm_bias, weight, bias
    return layer_norm_linear_eager(*tensors, eps=eps, activation=activation).contiguous()


@_layer_norm_linear.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@launches(_layer_norm_linear)
def _launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.layer_norm_linear import launch

    return launch(x, norm_weight, norm_bias, weight, bias, eps, activation)
