"""What follows a convolution that a library computes: its bias, a residual, an activation.

Algorithm: one pass over the map.
Bound: memory (read x and the residual, write y).
"""

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._convolution import check_shape, finish
from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches


def bias_act(
    x: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(x + bias + residual)`.

    The kernel keeps fp32 between x and the result, where eager PyTorch rounds after each addition.

    Args:
        x: [B, C, H, W] floating point, any strides; channels-last is not copied.
        bias: [C], dtype of `x`.
        residual: [B, C, H, W], dtype of `x`, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W], dtype of `x`; channels-last from the kernel.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    _check(x, bias, residual, activation)
    unsupported = bias_act_unsupported(x, bias, residual=residual)
    if use_triton("bias_act", impl, unsupported, x):
        run = _launch if launches_directly() else _bias_act
        return run(x, bias, residual, activation)
    return bias_act_eager(x, bias, residual=residual, activation=activation)


def bias_act_eager(
    x: Tensor, bias: Tensor, *, residual: Tensor | None = None, activation: Activation = None
) -> Tensor:
    return finish(x + bias[:, None, None], activation, residual)


def bias_act_unsupported(
    x: Tensor, bias: Tensor, *, residual: Tensor | None = None, activation: Activation = None
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(x, bias=bias, residual=residual)


def bias_act_n_bytes(
    x: Tensor, bias: Tensor, *, residual: Tensor | None = None, activation: Activation = None
) -> int:
    """Bytes of a call: x, bias and residual read once, y written once."""
    maps = 2 if residual is None else 3
    return x.element_size() * (maps * x.numel() + (bias.numel() if x.numel() else 0))


def _check(x: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"bias_act: x must be [B, C, H, W] floating point, got {list(x.shape)} {x.dtype}"
        )
    check_shape("bias_act", "bias", bias, x.shape[1:2])
    if residual is not None:
        check_shape("bias_act", "residual", residual, x.shape)
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"bias_act: {name} must be {x.dtype} as x, got {tensor.dtype}")
    check_activation("bias_act", activation)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("fastbb::bias_act", mutates_args=())
def _bias_act(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    return _empty(x).copy_(bias_act_eager(x, bias, residual=residual, activation=activation))


@_bias_act.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    return _empty(x)


@launches(_bias_act)
def _launch(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    from ..triton_kernels.bias_act import launch

    return launch(x, bias, residual, activation, _empty(x))
