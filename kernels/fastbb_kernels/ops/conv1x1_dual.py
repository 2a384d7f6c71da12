"""Sum of two 1x1 convolutions with the batch norms folded in, then an activation.

Algorithm: two GEMMs into one accumulator, over the pixels of channels-last maps.
Bound: memory (read both maps, write y); the second product is never written.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import check_convolution, check_shape, empty_output, finish
from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches


def conv1x1_dual(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x, weight) + conv2d(shortcut, shortcut_weight, stride) + bias)`.

    This ends the first block of a residual stage: its last convolution and the projection of its
    input. The batch norms are folded into weights and bias (`fastbb.fold`). The kernel works on
    channels-last memory and copies maps that are not; it keeps fp32 from the products to the
    result, where eager PyTorch rounds each product.

    Args:
        x: [B, C_in, h, w] floating point, any strides.
        weight: [C, C_in, 1, 1].
        shortcut: [B, C_s, H, W] with h = ceil(H / stride) and w likewise, any strides.
        shortcut_weight: [C, C_s, 1, 1].
        bias: [C], the sum of both.
        stride: of the shortcut's convolution, in both directions.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`; the kernel's is channels-last.

    Raises:
        ValueError: shapes that do not fit together, no stride or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = x, weight, shortcut, shortcut_weight, bias
    _check(*tensors, stride, activation)
    unsupported = conv1x1_dual_unsupported(*tensors, stride=stride, activation=activation)
    if use_triton("conv1x1_dual", impl, unsupported, x):
        run = _launch if launches_directly() else _conv1x1_dual
        return run(*tensors, stride, activation)
    return conv1x1_dual_eager(*tensors, stride=stride, activation=activation)


def conv1x1_dual_eager(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    activation: Activation = None,
) -> Tensor:
    y = F.conv2d(x, weight, bias)
    return finish(y, activation, F.conv2d(shortcut, shortcut_weight, stride=stride))


def conv1x1_dual_unsupported(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    activation: Activation = None,
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(
        x, weight=weight, shortcut=shortcut, shortcut_weight=shortcut_weight, bias=bias
    )


def conv1x1_dual_n_bytes(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    activation: Activation = None,
) -> int:
    """Bytes of a call: the pixels that it uses and the parameters read once, y written once."""
    batch, channels, height, width = x.shape
    maps = channels + shortcut.shape[1] + weight.shape[0]
    parameters = weight.numel() + shortcut_weight.numel() + bias.numel()
    return x.element_size() * (batch * height * width * maps + parameters)


def _check(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: Activation,
) -> None:
    check_convolution(
        "conv1x1_dual", x, weight, bias, kernel=1, stride=stride, activation=activation
    )
    batch, _, height, width = x.shape
    if (
        shortcut.ndim != 4
        or shortcut.shape[0] != batch
        or -(-shortcut.shape[2] // stride) != height
        or -(-shortcut.shape[3] // stride) != width
    ):
        raise ValueError(
            f"conv1x1_dual: shortcut must be [{batch}, C_s, H, W] with ceil(H / {stride}) = "
            f"{height} and ceil(W / {stride}) = {width}, got {list(shortcut.shape)}"
        )
    projection = (weight.shape[0], shortcut.shape[1], 1, 1)
    check_shape("conv1x1_dual", "shortcut_weight", shortcut_weight, projection)


@torch.library.custom_op("fastbb::conv1x1_dual", mutates_args=())
def _conv1x1_dual(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: str | None,
) -> Tensor:
    tensors = x, weight, shortcut, shortcut_weight, bias
    y = conv1x1_dual_eager(*tensors, stride=stride, activation=activation)
    return empty_output(x, weight).copy_(y)


@_conv1x1_dual.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: str | None,
) -> Tensor:
    return empty_output(x, weight)


@launches(_conv1x1_dual)
def _launch(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.conv1x1_dual import launch

    y = empty_output(x, weight)
    return launch(x, weight, shortcut, shortcut_weight, bias, stride, activation, y)
