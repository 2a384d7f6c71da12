"""Any convolution with its batch norm folded in, a residual, an activation.

It calls another op that has a kernel for the geometry, and otherwise plain PyTorch.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import finish
from .._dispatch import Impl, eager_only, is_plainly_eager
from .conv1x1_bn_act import conv1x1_bn_act
from .conv3x3_bn_act import conv3x3_bn_act
from .depthwise_conv_bn_act import depthwise_conv_bn_act

Size = int | tuple[int, ...]  # one for both directions, or (height, width)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x) + residual)`, the batch norm folded in (`fastbb.fold`).

    Args:
        x: [B, C_in, H, W] floating point, any strides.
        weight: [C, C_in / groups, kh, kw].
        bias: [C] or None.
        stride: of the convolution, (height, width).
        padding: with zeros on each side, (height, width) in pixels, or torch's "same", "valid".
        dilation: of the convolution, (height, width).
        groups: of the convolution.
        residual: [B, C, h, w], added before the activation, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`.

    Raises:
        ValueError, RuntimeError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    if is_plainly_eager(x, impl):
        return conv_bn_act_eager(
            x, weight, bias, stride, padding, dilation, groups, residual, activation
        )
    op = conv_op(weight.shape, stride=stride, padding=padding, dilation=dilation, groups=groups)
    # the ops take one stride and one dilation for both directions
    options: dict[str, Any] = {"stride": as_pair(stride)[0], "activation": activation, "impl": impl}
    if bias is not None and op == "conv1x1_bn_act":
        return conv1x1_bn_act(x, weight, bias, residual=residual, **options)
    options["dilation"] = as_pair(dilation)[0]
    if bias is not None and op == "conv3x3_bn_act":
        return conv3x3_bn_act(x, weight, bias, residual=residual, **options)
    if bias is not None and op == "depthwise_conv_bn_act" and residual is None:
        return depthwise_conv_bn_act(x, weight, bias, **options)
    eager_only("conv_bn_act", impl)
    return conv_bn_act_eager(
        x, weight, bias, stride, padding, dilation, groups, residual, activation
    )


def conv_bn_act_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return finish(y, activation, residual)


def conv_op(
    weight_shape: tuple[int, ...],
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> str | None:
    """Returns the op that has a kernel for a convolution with a bias; None: there is none.

    Args:
        weight_shape: [C, C_in / groups, kh, kw].
        stride: of the convolution, (height, width).
        padding: (height, width) in pixels, or torch's "same", "valid".
        dilation: of the convolution, (height, width).
        groups: of the convolution.
    """
    outputs, inputs, *kernel = weight_shape
    stride, dilation = as_pair(stride), as_pair(dilation)
    padding = padding if isinstance(padding, str) else as_pair(padding)
    if kernel[0] != kernel[1] or stride[0] != stride[1] or dilation[0] != dilation[1]:
        return None
    if kernel[0] == 1:
        no_padding = padding in ((0, 0), "same", "valid")
        return "conv1x1_bn_act" if groups == 1 and no_padding else None
    if padding != (dilation[0] * (kernel[0] // 2),) * 2:
        return None
    if groups == 1:
        return "conv3x3_bn_act" if kernel[0] == 3 else None
    is_depthwise = groups == outputs and inputs == 1
    return "depthwise_conv_bn_act" if is_depthwise and kernel[0] in (3, 5, 7) else None


def as_pair(value: Size) -> tuple[int, ...]:
    """Returns (height, width)."""
    return (value, value) if isinstance(value, int) else value
