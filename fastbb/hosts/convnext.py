"""ConvNeXt inside models of transformers and timm: blocks, and transformers' whole backbones."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastbb_kernels import layer_norm_nchw

from ..engine.settings import Settings
from ..models.convnext_forward import convnext_block, convnext_maps
from ..models.convnext_parts import (
    ConvNextBlockParts,
    check_norm,
    transformers_block,
    transformers_parts,
)
from ..models.convnext_timm import timm_block
from .host_backbone import TransformersHostBackbone, check_parts
from .module_forward import ModuleForward


class _ConvNextBlock(ModuleForward):
    """A block of any library: a map [B, C, H, W] to the same."""

    reads_settings = True
    read: ClassVar[Callable[[Any], ConvNextBlockParts]]

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = type(self).read(module)

    def timing_key(self) -> Hashable:
        conv = self._parts.conv
        return type(self).__name__, conv.out_channels, conv.kernel_size, self._parts.grn is None

    def forward(self, x: Tensor) -> Tensor:
        return convnext_block(x, self._parts)


class TransformersConvNextBlock(_ConvNextBlock):
    """ConvNextLayer, ConvNextV2Layer and DINOv3ConvNextLayer."""

    read = staticmethod(transformers_block)


class TimmConvNextBlock(_ConvNextBlock):
    """ConvNeXtBlock of timm."""

    read = staticmethod(timm_block)


class TransformersConvNext(TransformersHostBackbone):
    """ConvNextBackbone, ConvNextV2Backbone and DINOv3ConvNextBackbone."""

    reads_settings = True

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = transformers_parts(module)
        for norm in getattr(module, "hidden_states_norms", {}).values():
            check_norm(norm, of_maps=True)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        module = self.module
        names = [name for name in module.stage_names if name in module.out_features]
        wanted = [module.stage_names.index(name) for name in names]
        maps = convnext_maps(self._parts, pixel_values, wanted)
        norms = getattr(module, "hidden_states_norms", None)
        if norms is None:
            return tuple(maps)
        return tuple(
            layer_norm_nchw(
                x.permute(0, 2, 3, 1), norms[name].weight, norms[name].bias, eps=norms[name].eps
            )
            for name, x in zip(names, maps)
        )


_CONVNEXT = "transformers.models.convnext.modeling_convnext.ConvNext"
_CONVNEXT_V2 = "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2"
_DINOV3 = "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNext"
REPLACED: dict[str, type[ModuleForward]] = {
    **{f"{name}Backbone": TransformersConvNext for name in (_CONVNEXT, _CONVNEXT_V2, _DINOV3)},
    **{f"{name}Layer": TransformersConvNextBlock for name in (_CONVNEXT, _CONVNEXT_V2, _DINOV3)},
    "timm.models.convnext.ConvNeXtBlock": TimmConvNextBlock,
}
