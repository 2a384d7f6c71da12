"""3x3 convolution with its batch norm folded in, residual, activation.

Algorithm: GEMM over nine shifted maps (implicit: none of them exists); bias, residual and
activation in the epilogue.
Bound: flops from 128 channels on; memory and flops are even at 64.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import check_convolution, empty_output, finish, output_shape
from .._dispatch import Impl, chosen_impl, common_unsupported, launches_directly, use_triton


def conv3x3_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x, weight, bias) + residual)`, padded with zeros by `dilation`.

    Weight and bias have the batch norm folded in (`fastbb.fold`). "auto" takes PyTorch's library:
    MIOpen on AMD GPUs, cuDNN on NVIDIA's, for "relu" its fused convolution: no Triton kernel for
    3x3 was measured to be faster.

    Args:
        x: [B, C_in, H, W] floating point, any strides; channels-last is not copied.
        weight: [C, C_in, 3, 3], any strides; channels-last is not copied.
        bias: [C].
        stride: of the convolution, both ways.
        dilation: of the convolution, both ways.
        residual: [B, C, h, w], added before the activation, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`, h = (H - 1) // stride + 1; channels-last from kernels.

    Raises:
        ValueError: shapes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    options = {
        "stride": stride,
        "dilation": dilation,
        "residual": residual,
        "activation": activation,
    }
    check_convolution("conv3x3_bn_act", x, weight, bias, kernel=3, **options)
    unsupported = conv3x3_bn_act_unsupported(x, weight, bias, **options)
    if use_triton("conv3x3_bn_act", impl, unsupported, x):
        if launches_directly():
            return _launch(x, weight, bias, stride, dilation, residual, activation)
        if chosen_impl("conv3x3_bn_act", impl) == "triton":
            return _conv3x3_bn_act(x, weight, bias, stride, dilation, residual, activation)
        if activation == "relu" and not torch.version.hip:
            return _cudnn_conv3x3_bn_relu(x, weight, bias, stride, dilation, residual)
    return conv3x3_bn_act_eager(x, weight, bias, **options)


def conv3x3_bn_act_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, dilation, dilation)
    return finish(y, activation, residual)


def conv3x3_bn_act_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(x, weight=weight, bias=bias, residual=residual)


def conv3x3_bn_act_n_bytes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> int:
    """Bytes of a call: what is used of x, the parameters and the residual read once, y written."""
    batch, channels, height, width = x.shape
    used = _n_used(height, stride, dilation) * _n_used(width, stride, dilation)
    maps = (1 if residual is None else 2) * math.prod(output_shape(x, weight, stride))
    n_elements = batch * channels * used + weight.numel() + bias.numel() + maps
    return x.element_size() * n_elements


def _n_used(size: int, stride: int, dilation: int) -> int:
    """Rows (or columns) of a map of `size` that some tap of some output falls on."""
    centers = range(0, size, stride)
    taps = {center + offset for center in centers for offset in (-dilation, 0, dilation)}
    return len(taps.intersection(range(size)))


@torch.library.custom_op("fastbb::conv3x3_bn_act", mutates_args=())
def _conv3x3_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    y = conv3x3_bn_act_eager(
        x, weight, bias, stride=stride, dilation=dilation, residual=residual, activation=activation
    )
    return empty_output(x, weight, stride).copy_(y)


@_conv3x3_bn_act.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: int, *_: object) -> Tensor:
    return empty_output(x, weight, stride)


@_conv3x3_bn_act.register_kernel("cuda")
def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.conv3x3_bn_act import launch

    y = empty_output(x, weight, stride)
    return launch(x, weight, bias, stride, dilation, residual, activation, y)


@torch.library.custom_op("fastbb::cudnn_conv3x3_bn_relu", mutates_args=())
def _cudnn_conv3x3_bn_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
) -> Tensor:
    return _conv3x3_bn_act(x, weight, bias, stride, dilation, residual, "relu")


@_cudnn_conv3x3_bn_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: int, *_: object) -> Tensor:
    return empty_output(x, weight, stride)


@_cudnn_conv3x3_bn_relu.register_kernel("cuda")
def _call_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
) -> Tensor:
    """Runs convolution, residual, bias and relu as one cuDNN graph, with fp32 between them.

    The aten ops have no fake kernel, hence the custom op. By PyTorch's ConvShared.cpp and
    Conv_v8.cpp they take the memory format that x or weight suggests, copy what has another, pass
    every tensor in its own dtype, and raise where cuDNN has no engine. They heed `allow_tf32` and
    `benchmark`, but neither `enabled` nor `deterministic`. Without a residual cuDNN is given the
    uninitialized result for it, times 0.
    """
    flags = torch.backends.cudnn
    if not flags.enabled or flags.deterministic or torch.are_deterministic_algorithms_enabled():
        y = conv3x3_bn_act_eager(
            x, weight, bias, stride=stride, dilation=dilation, residual=residual, activation="relu"
        )
        return empty_output(x, weight, stride).copy_(y)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    geometry = [stride] * 2, [dilation] * 2, [dilation] * 2
    bias = bias.contiguous()
    if residual is None:
        y = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry, 1)
    else:
        y = torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry, 1)
    return y.contiguous(memory_format=torch.channels_last)
