"""Layers that families share: convolutions with their norms, stochastic depth."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import (
    ACTIVATIONS,
    bottleneck_tail,
    conv1x1_dual,
    conv_bn_act,
    stem_conv_bn_relu_pool,
)
from fastbb_kernels.onednn import packed_conv
from fastbb_kernels.ops.conv_bn_act import as_pair

from ..weights.folded_weights import (
    folded,
    folded_packed,
    folded_with_shortcut,
    geometry,
    runs_folded,
    runs_packed,
)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drops whole samples of a residual branch (stochastic depth, Huang et al. 2016).

    Args:
        x: [B, ...].
        rate: probability of dropping a sample; the others are scaled up.
        training: False leaves `x` as it is.
    """
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x.div(keep) * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a module is a batch norm, or a frozen one of any library, and nothing else."""
    return type(norm) is nn.BatchNorm2d or type(norm).__name__.endswith("FrozenBatchNorm2d")


class ConvNorm(NamedTuple):
    """A convolution and the batch norm that it feeds."""

    conv: nn.Conv2d
    norm: nn.Module

    def __call__(
        self,
        x: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Convolves, normalizes, adds the residual, activates; one op in inference.

        Args:
            x: [B, C_in, H, W].
            activation: name of the activation, or None.
            residual: [B, C, h, w], added before the activation, or None.
            hidden: the result only goes into another convolution, see `packed_conv`.

        Returns:
            [B, C, h, w].
        """
        conv = self.conv
        if not runs_folded(conv, self.norm, x):
            x = self.norm(conv(x))
            x = x if residual is None else x + residual
            return x if activation is None else ACTIVATIONS[activation](x)
        options = {**geometry(conv), "activation": activation}
        if not runs_packed(conv, x) or (residual is not None and conv.groups > 1):
            return conv_bn_act(x, *folded(conv, self.norm), residual=residual, **options)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        packed, bias = folded_packed(conv, self.norm, x)
        return packed_conv(x, packed, bias, residual=residual, hidden=hidden, **options)

    def stem(self, x: Tensor, activation: str | None, pool: bool = True) -> Tensor:
        """The stem of a ResNet: convolves, normalizes, activates, and pools 3x3 by stride 2.

        Args:
            x: [B, C_in, H, W].
            activation: name of the activation, or None.
            pool: whether to pool.

        Returns:
            [B, C, h, w].
        """
        conv = self.conv
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        fuses = shape == _STEM and not runs_packed(conv, x) and runs_folded(conv, self.norm, x)
        if fuses:
            weight, bias = folded(conv, self.norm)
            return stem_conv_bn_relu_pool(x, weight, bias, activation=activation, pool=pool)
        x = self(x, activation)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1) if pool else x

    def end(
        self, x: Tensor, residual: Tensor, shortcut: "ConvNorm | None", activation: str | None
    ) -> Tensor:
        """`activation(self(x) + shortcut(residual))`, the end of a residual block.

        Args:
            x: [B, C_in, h, w].
            residual: [B, C_s, H, W]; without a shortcut, [B, C, h, w].
            shortcut: convolution of the residual, or None.
            activation: name of the activation, or None.

        Returns:
            [B, C, h, w].
        """
        if shortcut is None:
            return self(x, activation, residual)
        stride = as_pair(shortcut.conv.stride)[0]
        fuses = (
            _is_1x1(self.conv, 1)
            and _is_1x1(shortcut.conv, stride)
            and not runs_packed(self.conv, x)
            and runs_folded(self.conv, self.norm, x)
            and runs_folded(shortcut.conv, shortcut.norm, residual)
        )
        if not fuses:
            return self(x, activation, shortcut(residual))
        weight, shortcut_weight, bias = folded_with_shortcut(*self, *shortcut)
        return conv1x1_dual(
            x, weight, residual, shortcut_weight, bias, stride=stride, activation=activation
        )

    def tail(
        self, x: Tensor, expand: "ConvNorm", residual: Tensor, activation: str | None
    ) -> Tensor:
        """`activation(expand(relu(self(x))) + residual)`, the end of a bottleneck block.

        Args:
            x: [B, C_in, H, W].
            expand: of the result of this convolution.
            residual: [B, C, h, w].
            activation: name of the last activation, or None.

        Returns:
            [B, C, h, w].
        """
        conv, last = self.conv, expand.conv
        fuses = (
            _is_square_3x3(conv)
            and _is_1x1(last, 1)
            and not runs_packed(conv, x)
            and runs_folded(conv, self.norm, x)
            and runs_folded(last, expand.norm, x)
        )
        if not fuses:
            return expand(self(x, "relu", hidden=True), activation, residual)
        tensors = (*folded(conv, self.norm), *folded(last, expand.norm), residual)
        stride, dilation = conv.stride[0], conv.dilation[0]
        return bottleneck_tail(x, *tensors, stride=stride, dilation=dilation, activation=activation)


_STEM = ((7, 7), (2, 2), (3, 3), (1, 1), 1)


def _is_1x1(conv: nn.Conv2d, stride: int) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return shape == ((1, 1), (stride, stride), (0, 0), 1)


def _is_square_3x3(conv: nn.Conv2d) -> bool:
    """Whether `bottleneck_tail` can express it."""
    stride, dilation = as_pair(conv.stride)[0], as_pair(conv.dilation)[0]
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    wanted = ((3, 3), (stride, stride), (dilation, dilation), (dilation, dilation), 1)
    return shape == wanted and conv.in_channels == conv.out_channels
