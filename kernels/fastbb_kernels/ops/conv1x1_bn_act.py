"""1x1 convolution with the batch norm folded in, residual, activation.

Algorithm: a GEMM over the pixels of channels-last maps; the rest is its epilogue.
Bound: memory (read x and the residual, write y).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import check_convolution, empty_output, finish, output_shape
from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches


def conv1x1_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x, weight, bias, stride) + residual)`.

    The batch norm is folded into weight and bias (`fastbb.fold`). The kernel works on channels-last
    memory and copies maps that are not; it keeps fp32 from the product to the result, where eager
    PyTorch rounds before the residual and the activation.

    Args:
        x: [B, C_in, H, W] floating point, any strides.
        weight: [C, C_in, 1, 1].
        bias: [C].
        stride: of the convolution, in both directions.
        residual: [B, C, h, w], added before the activation, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`, with h = ceil(H / stride) and w likewise; the kernel's is
        channels-last.

    Raises:
        ValueError: shapes that do not fit together, no stride or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    options = {"stride": stride, "residual": residual, "activation": activation}
    check_convolution("conv1x1_bn_act", x, weight, bias, kernel=1, **options)
    unsupported = conv1x1_bn_act_unsupported(x, weight, bias, **options)
    if use_triton("conv1x1_bn_act", impl, unsupported, x):
        run = _launch if launches_directly() else _conv1x1_bn_act
        return run(x, weight, bias, stride, residual, activation)
    return conv1x1_bn_act_eager(x, weight, bias, **options)


def conv1x1_bn_act_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    return finish(F.conv2d(x, weight, bias, stride), activation, residual)


def conv1x1_bn_act_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(x, weight=weight, bias=bias, residual=residual)


def conv1x1_bn_act_n_bytes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> int:
    """Bytes of a call: the pixels that it uses, residual and parameters read once, y written."""
    batch, channels, height, width = output_shape(x, weight, stride)
    maps = x.shape[1] + channels + (0 if residual is None else channels)
    n_elements = batch * height * width * maps + weight.numel() + channels
    return x.element_size() * n_elements


@torch.library.custom_op("fastbb::conv1x1_bn_act", mutates_args=())
def _conv1x1_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    y = conv1x1_bn_act_eager(
        x, weight, bias, stride=stride, residual=residual, activation=activation
    )
    return empty_output(x, weight, stride).copy_(y)


@_conv1x1_bn_act.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    return empty_output(x, weight, stride)


@launches(_conv1x1_bn_act)
def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.conv1x1_bn_act import launch

    y = empty_output(x, weight, stride)
    return launch(x, weight, bias, stride, residual, activation, y)
