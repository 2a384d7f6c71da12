"""Residual blocks, ResNets and convolutions of BiT in models of transformers, timm, torchvision."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.settings import Settings
from ..models.resnet_forward import residual_block, resnet_maps
from ..models.resnet_parts import (
    ResNetBlockParts,
    timm_block,
    torchvision_block,
    transformers_block,
    transformers_parts,
)
from ..weights.derived import derive
from .host_backbone import TransformersHostBackbone, check_parts
from .module_forward import ModuleForward


class _ResNetBlock(ModuleForward):
    """A residual block: [B, C, H, W] to [B, C', h, w]."""

    reads_settings = True
    read: ClassVar[Callable[[Any], ResNetBlockParts]]

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = type(self).read(module)

    def timing_key(self) -> Hashable:
        strides = (pair.conv.stride for pair in self._parts.convolutions())
        shapes = (parameter.shape for parameter in self.module.parameters())
        return type(self).__name__, *strides, *shapes

    def forward(self, x: Tensor) -> Tensor:
        return residual_block(x, self._parts)


class TransformersResNetBlock(_ResNetBlock):
    """ResNetBasicLayer, ResNetBottleNeckLayer, and RT-DETR's."""

    read = staticmethod(transformers_block)


class TorchvisionResNetBlock(_ResNetBlock):
    """BasicBlock and Bottleneck of torchvision."""

    read = staticmethod(torchvision_block)


class TimmResNetBlock(_ResNetBlock):
    """BasicBlock and Bottleneck of timm."""

    read = staticmethod(timm_block)


class TransformersResNet(TransformersHostBackbone):
    """ResNetBackbone and RT-DETR's."""

    reads_settings = True

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = transformers_parts(module)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        names, out_features = self.module.stage_names, self.module.out_features
        wanted = [index for index, name in enumerate(names) if name in out_features]
        return tuple(resnet_maps(self._parts, pixel_values, wanted))


class StandardizedConv(ModuleForward):
    """StdConv2d of timm: a convolution that standardizes its weight in every call, here once.

    Source: Qiao et al. 2019, arXiv 1903.10520.
    """

    reads_settings = True

    def timing_key(self) -> Hashable:
        return type(self).__name__, self.module.stride, self.module.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        conv = self.module
        (weight,) = derive(
            conv,
            "standardized",
            lambda weight: (standardized(weight, conv.eps),),
            conv.weight,
            constants=conv.eps,
        )
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        return F.conv2d(self.padded(x), weight, conv.bias, *geometry)

    def padded(self, x: Tensor) -> Tensor:
        """Pads the input as upstream does beside the padding of the convolution."""
        return x


class TransformersStandardizedConv(StandardizedConv):
    """WeightStandardizedConv2d of BiT."""

    def padded(self, x: Tensor) -> Tensor:
        return x if self.module.pad is None else self.module.pad(x)


def standardized(weight: Tensor, eps: float) -> Tensor:
    """Standardizes each filter of a weight [C, ...], in float64, rounded once.

    Args:
        weight: of a convolution.
        eps: added to the variance.
    """
    exact = weight.double().flatten(1)
    variance, mean = torch.var_mean(exact, dim=1, correction=0, keepdim=True)
    return ((exact - mean) * (variance + eps).rsqrt()).view_as(weight).to(weight.dtype)


_TRANSFORMERS, _TIMM = "transformers.models", "timm.models.resnet"
_TORCHVISION = "torchvision.models.resnet"
REPLACED: dict[str, type[ModuleForward]] = {
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBackbone": TransformersResNet,
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBackbone": TransformersResNet,
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBasicLayer": TransformersResNetBlock,
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBottleNeckLayer": TransformersResNetBlock,
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBasicLayer": (
        TransformersResNetBlock
    ),
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBottleNeckLayer": (
        TransformersResNetBlock
    ),
    f"{_TIMM}.BasicBlock": TimmResNetBlock,
    f"{_TIMM}.Bottleneck": TimmResNetBlock,
    f"{_TRANSFORMERS}.bit.modeling_bit.WeightStandardizedConv2d": TransformersStandardizedConv,
    "timm.layers.std_conv.StdConv2d": StandardizedConv,
    f"{_TORCHVISION}.BasicBlock": TorchvisionResNetBlock,
    f"{_TORCHVISION}.Bottleneck": TorchvisionResNetBlock,
}
