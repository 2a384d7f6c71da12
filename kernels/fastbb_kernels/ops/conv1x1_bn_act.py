"""1x1 convolution with the batch norm folded in, residual, activation.

Algorithm: a GEMM over the pixels of channels-last maps; the rest is its epilogue.
Bound: memory (read x and the residual, write y).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate
from .._convolution import check_convolution, empty_output, finish, output_shape
from .._dispatch import Impl, common_unsupported
from ..op import Op
from .bias_act import BiasAct
from .bias_act import _op as _bias_act


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
    return _op(Conv1x1BnAct(x, weight, bias, stride, residual, activation), impl)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(linear(x))`, by the kernel of `conv1x1_bn_act` if it pays.

    Args:
        x: [..., C] floating point, any strides.
        weight: [C_out, C].
        bias: [C_out] or None.
        activation: name of the activation, or None.
        impl: as of `conv1x1_bn_act`.

    Returns:
        [..., C_out], dtype of `x`.
    """
    if activation is None:  # a library's product has its bias too
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    added = weight.new_zeros(weight.shape[0]) if bias is None else bias
    call = Conv1x1BnAct(pixels, weight[..., None, None], added, 1, None, activation)
    if not _op.takes(call, impl):
        return activate(F.linear(x, weight, bias), activation)
    return _op(call, impl).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Conv1x1BnAct(NamedTuple):
    """A call of `conv1x1_bn_act`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    stride: int
    residual: Tensor | None
    activation: Activation

    def check(self) -> None:
        x, weight, bias, stride, residual, activation = self
        check_convolution("conv1x1_bn_act", 1, x, weight, bias, stride, 1, residual, activation)

    def eager(self) -> Tensor:
        y = F.conv2d(self.x, self.weight, self.bias, self.stride)
        return finish(y, self.activation, self.residual)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts the used pixels of x, residual and parameters read once, y written once."""
        batch, channels, height, width = output_shape(self.x, self.weight, self.stride)
        maps = self.x.shape[1] + (1 if self.residual is None else 2) * channels
        n_elements = batch * height * width * maps + self.weight.numel() + channels
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.weight, self.stride)

    def library(self) -> Tensor:
        x, weight, bias, stride, residual, activation = self
        if stride == 1 and residual is None and activation in (None, "relu"):
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            ops = torch.ops.aten
            product = ops.addmm if activation is None else ops._addmm_activation  # with relu
            y = product(bias, rows, weight.flatten(1).t())
            return y.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        y = F.conv2d(x, weight, None, stride)
        return _bias_act.kernel(BiasAct(y, bias, residual, activation))

    def library_sizes(self) -> tuple[int, int, int, int, bool, Activation, torch.dtype]:
        batch, out_channels, height, width = output_shape(self.x, self.weight, self.stride)
        sizes = batch * height * width, self.x.shape[1], out_channels
        return *sizes, self.stride, self.residual is not None, self.activation, self.x.dtype

    def launch(self) -> Tensor:
        from ..triton_kernels.conv1x1_bn_act import launch

        return launch(*self, self.empty_result())


_op = Op("conv1x1_bn_act", Conv1x1BnAct)
