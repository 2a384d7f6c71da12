"""Depthwise convolution, batch norm and activation: the middle of an inverted bottleneck.

Algorithm: each channel is convolved with its own k x k taps; bias and activation in the epilogue.
Bound: memory for 3x3 (read x, write y), instructions from 5x5 on.
"""

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, check_activation
from .._convolution import check_positive, check_shape, empty_output, finish, output_shape
from .._dispatch import Impl, common_unsupported
from ..op import Op

# the kernel unrolls a column of taps; larger ones are not checked for spills
_TRITON_KERNEL_SIZES = (3, 5, 7)


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x))` with one filter per channel.

    The batch norm is folded into weight and bias (`fastbb.fold`). Zeros pad the map: every
    `stride`-th pixel is the center of a window. The kernel works on channels-last memory; it keeps
    fp32 from the product to the result, where eager PyTorch rounds before the activation.

    Args:
        x: [B, C, H, W] floating point, any strides; copied unless it is channels-last.
        weight: [C, 1, k, k], k odd, any strides; copied unless C is its fastest axis, as in
            `weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)`.
        bias: [C].
        stride: of the convolution, in both directions.
        dilation: of the convolution, in both directions.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`; h and w are H / stride and W / stride, rounded up. The kernel's
        is channels-last.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(DepthwiseConvBnAct(x, weight, bias, stride, dilation, activation), impl)


class DepthwiseConvBnAct(NamedTuple):
    """A call of `depthwise_conv_bn_act`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    stride: int
    dilation: int
    activation: Activation

    def check(self) -> None:
        x, weight, bias, stride, dilation, activation = self
        if (
            x.ndim != 4
            or weight.ndim != 4
            or weight.shape[:2] != (x.shape[1], 1)
            or weight.shape[2] != weight.shape[3]
            or weight.shape[2] % 2 == 0
        ):
            raise ValueError(
                "depthwise_conv_bn_act: weight must be [C, 1, k, k], k odd, for x [B, C, H, W], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        check_shape("depthwise_conv_bn_act", "bias", bias, weight.shape[:1])
        if x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"depthwise_conv_bn_act: x must have pixels, got {x.shape[2]}x{x.shape[3]}"
            )
        check_positive("depthwise_conv_bn_act", stride=stride, dilation=dilation)
        check_activation("depthwise_conv_bn_act", activation)

    def eager(self) -> Tensor:
        x, weight, bias, stride, dilation, activation = self
        channels, _, k, _ = weight.shape
        y = F.conv2d(x, weight, bias, stride, dilation * (k // 2), dilation, groups=channels)
        return finish(y, activation)

    def unsupported(self) -> str | None:
        if self.weight.shape[2] not in _TRITON_KERNEL_SIZES:
            return f"needs k in {_TRITON_KERNEL_SIZES}, got {self.weight.shape[2]}"
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts weight, bias and the used pixels of x read once, y written once."""
        batch, channels, *size = self.x.shape
        reach = self.dilation * (self.weight.shape[2] // 2)

        def n_read(side: int) -> int:
            taps = range(-reach, reach + 1, self.dilation)
            read = {center + tap for center in range(0, side, self.stride) for tap in taps}
            return len(read & set(range(side)))

        n_rows, n_cols = map(n_read, size)
        n_pixels = batch * n_rows * n_cols
        n_results = math.prod(output_shape(self.x, self.weight, self.stride))
        n_elements = n_pixels * channels + n_results + self.weight.numel() + channels
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.weight, self.stride)

    def launch(self) -> Tensor:
        from ..triton_kernels.depthwise_conv_bn_act import launch

        return launch(*self, self.empty_result())


_op = Op("depthwise_conv_bn_act", DepthwiseConvBnAct)
