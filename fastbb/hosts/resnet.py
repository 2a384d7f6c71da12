"""Residual blocks and ResNets inside models of transformers, timm and torchvision."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..engine.settings import Settings
from ..models.resnet_forward import residual_block, resnet_maps
from ..models.resnet_parts import (
    ResNetBlockParts,
    timm_block,
    torchvision_block,
    transformers_block,
    transformers_parts,
)
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
    f"{_TORCHVISION}.BasicBlock": TorchvisionResNetBlock,
    f"{_TORCHVISION}.Bottleneck": TorchvisionResNetBlock,
}
