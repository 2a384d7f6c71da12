"""3x3 convolution with its batch norm folded in, residual, activation.

Algorithm: implicit GEMM over nine shifted maps, which are never stored; bias, residual and
activation in the epilogue.
Bound: flops from 128 channels on; memory and flops at 64.
"""

import math
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
    computes_nothing,
    current_check,
)
from ..fp32_precision import convolution_precision
from ..launching import Launch, chosen_config, note_binary
from ..op import CustomOp, Op
from .bias_act import _op as _bias_act


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
    kernel, see `usual_way`. The fused convolution may give NaN where x is infinite.

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
    call = Conv3x3BnAct(x, weight, bias, stride, dilation, residual, activation)
    call.check()
    if not _op.takes(call, impl):
        return call.eager()
    # the interpreter cannot trace the convolutions of libraries
    is_seen = architecture(x.device) is not None
    if chosen_impl("conv3x3_bn_act", impl) == "triton" or not is_seen:
        return _op.kernel(call)
    return _fastest(call)


class Conv3x3BnAct(NamedTuple):
    """A call of `conv3x3_bn_act`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    stride: int
    dilation: int
    residual: Tensor | None
    activation: Activation

    def check(self) -> None:
        check_convolution("conv3x3_bn_act", 3, *self)

    def eager(self) -> Tensor:
        x, weight, bias, stride, dilation, residual, activation = self
        y = F.conv2d(x, weight, bias, stride, dilation, dilation)
        return finish(y, activation, residual)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts the used pixels of x, parameters and residual read once, y written once."""
        x, weight, bias, stride, dilation, residual, _ = self
        batch, channels, height, width = x.shape
        used = _n_used(height, stride, dilation) * _n_used(width, stride, dilation)
        maps = (1 if residual is None else 2) * math.prod(output_shape(x, weight, stride))
        n_elements = batch * channels * used + weight.numel() + bias.numel() + maps
        return x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.weight, self.stride)

    def launch(self) -> Tensor:
        from ..triton_kernels.conv3x3_bn_act import launch

        return launch(*self, self.empty_result())


def _n_used(size: int, stride: int, dilation: int) -> int:
    """Number of rows (or columns) of a map of `size` that a tap of some output reads."""
    centers = range(0, size, stride)
    taps = {center + offset for center in centers for offset in (-dilation, 0, dilation)}
    return len(taps.intersection(range(size)))


class Conv3x3Way(NamedTuple):
    """Choice of the implementation of a convolution.

    Attributes:
        name: "fused": cuDNN with residual, bias and activation; "plain": cuDNN or MIOpen, then
            `bias_act`; "triton": our kernel.
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
    """Returns the choice on GPUs without a measurement, for `n_rows` output pixels.

    Published Triton kernels for 3x3 have 0.7 to 0.87 of cuDNN's speed. cuDNN's fused convolution
    saves passes over the map, but it only has relu, and without a residual x must have the shape of
    y. If it cannot run, the plain convolution runs.
    """
    return Conv3x3Way("plain" if isinstance(arch, str) or activation != "relu" else "fused")


def _run_fastest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: Activation,
) -> Tensor:
    batch, out_channels, height, width = output_shape(x, weight, stride)
    sizes = (
        *(batch * height * width, x.shape[1], out_channels, stride, residual is not None),
        *(activation, x.dtype),
    )
    way = chosen_config("conv3x3_way", usual_way, x.device, *sizes).name
    if way == "triton":
        return _op.launch(x, weight, bias, stride, dilation, residual, activation)
    has_z = residual is not None or x.shape == (batch, out_channels, height, width)
    if way == "fused" and activation == "relu" and has_z and _fused_op_may_run():
        check, args = current_check(), (x, weight, bias, stride, dilation, residual)
        if check is None or check.trusts(_choice_of_cudnn(*args), _cudnn, args):
            return _call_cudnn(*args)
        return _op.launch(*args, activation)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = F.conv2d(x, weight, None, stride, dilation, dilation)
    return _bias_act.launch(y, bias, residual, activation)


def _fused_op_may_run() -> bool:
    """Whether cuDNN exists, and no flag is set that its fused op would ignore."""
    flags = torch.backends.cudnn
    exact = flags.deterministic or torch.are_deterministic_algorithms_enabled()
    return flags.enabled and not exact and torch.version.hip is None


def _call_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
) -> Tensor:
    """Runs convolution, residual, bias and relu as one cuDNN graph, with fp32 between them.

    According to PyTorch's ConvShared.cpp and Conv_v8.cpp, the aten op takes the memory format that
    x or weight suggests, copies tensors of another format, passes every tensor in its own dtype,
    and raises if cuDNN has no engine. `cudnn_convolution_relu`, the op without a residual, makes
    cuDNN read the uninitialized result and multiply it by 0, which keeps a NaN. So here a missing
    residual is x times 0.
    """
    note_binary("cuDNN")
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    geometry = [stride] * 2, [dilation] * 2, [dilation] * 2
    if computes_nothing():
        return empty_output(x, weight, stride)
    z, alpha = (x, 0.0) if residual is None else (residual, 1.0)
    y = torch.ops.aten.cudnn_convolution_add_relu(
        x, weight, z, alpha, bias.contiguous(), *geometry, 1
    )
    return y.contiguous(memory_format=torch.channels_last)


def _choice_of_cudnn(x: Tensor, weight: Tensor, *options: Any) -> tuple[object, ...]:
    """Returns the values by which cuDNN chooses its engine: sizes, dtype and flags."""
    flags = convolution_precision(), torch.backends.cudnn.benchmark
    stride, dilation, residual = options[1:]
    sizes = *x.shape, *weight.shape, stride, dilation, residual is not None
    return "conv3x3", x.dtype, *flags, *sizes


_op = Op("conv3x3_bn_act", Conv3x3BnAct)
_fastest = CustomOp("fastest_conv3x3_bn_act", Conv3x3BnAct, _run_fastest)
_cudnn = Launch(
    "cuDNN's fused 3x3 convolution",
    _call_cudnn,
    eager=lambda *args: _fastest.eager(*args, "relu"),
)
