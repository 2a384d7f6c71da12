"""3x3 convolution with its batch norm folded in, residual, activation.

Algorithm: GEMM over nine shifted maps (implicit: none of them exists); bias, residual and
activation in the epilogue.
Bound: flops from 128 channels on; memory and flops are even at 64.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import check_convolution, empty_output, finish, output_shape
from .._dispatch import (
    Architecture,
    Impl,
    architecture,
    chosen_impl,
    common_unsupported,
    current_check,
    launches_directly,
    use_triton,
)
from ..fp32_precision import convolution_precision
from ..launching import Launch, chosen_config, launches, note_binary
from .bias_act import _launch as _launch_bias_act


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

    Weight and bias have the batch norm folded in (`fastbb.fold`). On GPUs "auto" takes cuDNN's
    fused convolution, cuDNN's or MIOpen's plain one with `bias_act` behind it, or the Triton
    kernel, see `usual_way`. Where x is infinite, the fused one may give NaN.

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
        args = x, weight, bias, stride, dilation, residual, activation
        is_asked_for = chosen_impl("conv3x3_bn_act", impl) == "triton"
        if launches_directly():  # what a library computes there is not seen
            is_asked_for |= architecture(x.device) is None
            return _launch(*args) if is_asked_for else _run_fastest(*args)
        return _conv3x3_bn_act(*args) if is_asked_for else _fastest_conv3x3_bn_act(*args)
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


def _plain_pytorch(
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


def _fake(x: Tensor, weight: Tensor, bias: Tensor, stride: int, *_: object) -> Tensor:
    return empty_output(x, weight, stride)


_conv3x3_bn_act = torch.library.custom_op("fastbb::conv3x3_bn_act", _plain_pytorch, mutates_args=())
_conv3x3_bn_act.register_fake(_fake)


@launches(_conv3x3_bn_act)
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


_fastest_conv3x3_bn_act = torch.library.custom_op(
    "fastbb::fastest_conv3x3_bn_act", _plain_pytorch, mutates_args=()
)
_fastest_conv3x3_bn_act.register_fake(_fake)


class Conv3x3Way(NamedTuple):
    """Who convolves.

    Attributes:
        name: "fused": cuDNN, with all that follows; "plain": cuDNN or MIOpen, with `bias_act`
            behind it; "triton": our kernel.
    """

    name: str


def usual_way(
    n_rows: int,
    channels: int,
    out_channels: int,
    stride: int,
    residual: bool,
    activation: Activation,
    dtype: torch.dtype,
    arch: Architecture | None,
) -> Conv3x3Way:
    """What runs on GPUs where nothing was measured, for `n_rows` output pixels.

    Published Triton kernels for 3x3 have 0.7 to 0.87 of cuDNN's speed. Its fused convolution saves
    passes over the map, but has relu only, and without a residual needs x to have the shape of y:
    where it cannot run, the plain one does.
    """
    return Conv3x3Way("plain" if isinstance(arch, str) or activation != "relu" else "fused")


@_fastest_conv3x3_bn_act.register_kernel("cuda")
def _run_fastest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    batch, out_channels, height, width = output_shape(x, weight, stride)
    sizes = (
        *(batch * height * width, x.shape[1], out_channels, stride, residual is not None),
        *(activation, x.dtype),
    )
    way = chosen_config("conv3x3_way", usual_way, x.device, *sizes).name
    if way == "triton":
        return _launch(x, weight, bias, stride, dilation, residual, activation)
    has_z = residual is not None or x.shape == (batch, out_channels, height, width)
    if way == "fused" and activation == "relu" and has_z and _fused_op_may_run():
        check, args = current_check(), (x, weight, bias, stride, dilation, residual)
        if check is None or check.trusts(_choice_of_cudnn(*args), _cudnn, args):
            return _call_cudnn(*args)
        return _launch(*args, activation)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = F.conv2d(x, weight, None, stride, dilation, dilation)
    return _launch_bias_act(y, bias, residual, activation)


def _fused_op_may_run() -> bool:
    """Whether there is cuDNN, and no flag is set that its fused op does not heed."""
    flags = torch.backends.cudnn
    exact = flags.deterministic or torch.are_deterministic_algorithms_enabled()
    return flags.enabled and not exact and torch.version.hip is None


def _call_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
) -> Tensor:
    """Runs convolution, residual, bias and relu as one cuDNN graph, with fp32 between them.

    By PyTorch's ConvShared.cpp and Conv_v8.cpp the aten op takes the memory format that x or weight
    suggests, copies what has another, passes every tensor in its own dtype, and raises where cuDNN
    has no engine. `cudnn_convolution_relu`, the one without a residual, has cuDNN read the
    uninitialized result and multiply it by 0, which makes NaN of NaN: here x stands for a residual
    that is not there, times 0.
    """
    note_binary("cuDNN")
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    geometry = [stride] * 2, [dilation] * 2, [dilation] * 2
    if launches_directly() and architecture(x.device) is not None:  # a GPU that is not there
        return empty_output(x, weight, stride)
    z, alpha = (x, 0.0) if residual is None else (residual, 1.0)
    y = torch.ops.aten.cudnn_convolution_add_relu(
        x, weight, z, alpha, bias.contiguous(), *geometry, 1
    )
    return y.contiguous(memory_format=torch.channels_last)


def _choice_of_cudnn(x: Tensor, weight: Tensor, *options: Any) -> tuple[object, ...]:
    """What cuDNN chooses its engine by: sizes, dtype and flags."""
    flags = convolution_precision(), torch.backends.cudnn.benchmark
    stride, dilation, residual = options[1:]
    sizes = *x.shape, *weight.shape, stride, dilation, residual is not None
    return "conv3x3", x.dtype, *flags, *sizes


_cudnn = Launch(
    "cuDNN's fused 3x3 convolution",
    _call_cudnn,
    eager=partial(_plain_pytorch, activation="relu"),
)
