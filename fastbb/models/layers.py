"""Layers that families share: convolutions with their norms, stochastic depth."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS, conv_bn_act
from fastbb_kernels.onednn import packed_conv

from ..weights.folded_weights import folded, folded_packed, geometry, runs_folded, runs_packed


def drop_path(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Drops whole samples of a residual branch (stochastic depth, Huang et al. 2016).

    Args:
        x: [B, ...].
        rate: probability of dropping a sample; the others are scaled up.
        training: False returns `x` as it is.
    """
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x.div(keep) * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a module is exactly a batch norm, or a frozen one of any library."""
    return type(norm) is nn.BatchNorm2d or type(norm).__name__.endswith("FrozenBatchNorm2d")


class ConvNorm(NamedTuple):
    """A convolution and the batch norm after it."""

    conv: nn.Conv2d
    norm: nn.Module

    def __call__(
        self,
        x: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Convolves, normalizes, adds the residual and activates, in one op in inference.

        Args:
            x: [B, C_in, H, W].
            activation: name of the activation, or None.
            residual: [B, C, h, w], added before the activation, or None.
            hidden: whether only another convolution reads the result, see `packed_conv`.

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
