"""Convolution, batch normalization with running statistics, residual, activation.

Algorithm: the normalization is an affine map of the convolution's output.
Bound: memory for 1x1 kernels, flops for 3x3.
"""

from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate
from .._dispatch import Impl, eager_only


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(batch_norm(conv2d(x)) + residual)`, normalizing with running statistics.

    Args:
        x: [B, C_in, H, W] floating point, any strides.
        weight: [C, C_in / groups, kh, kw].
        bias: [C] or None.
        running_mean: [C].
        running_var: [C].
        norm_weight: [C] or None.
        norm_bias: [C] or None.
        eps: added to the variance; may be 0.
        stride: of the convolution, (height, width).
        padding: with zeros on each side, (height, width) in pixels.
        dilation: of the convolution, (height, width).
        groups: of the convolution.
        residual: [B, C, h, w], added before the activation, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`.
    """
    eager_only("conv_bn_act", impl)
    return conv_bn_act_eager(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        norm_weight,
        norm_bias,
        eps=eps,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=activation,
    )


def conv_bn_act_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    x = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x = F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, eps=eps)
    # x is ours: in place saves a pass of allocation each, and autograd keeps neither value
    if residual is not None:
        x.add_(residual)
    return F.relu_(x) if activation == "relu" else activate(x, activation)
