"""Swin and Swin V2 in models of transformers, timm and torchvision: blocks, mergings, backbones."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..engine.settings import Settings
from ..models.swin_forward import merge_patches, swin_block, swin_maps
from ..models.swin_parts import (
    SwinBlockParts,
    SwinParts,
    maskformer_block,
    merging_parts,
    timm_block,
    torchvision_block,
    transformers_block,
    transformers_parts,
)
from ..models.swin_v2_forward import swinv2_block, swinv2_maps
from ..models.swin_v2_parts import timm_block as timm_v2_block
from ..models.swin_v2_parts import transformers_block as transformers_v2_block
from ..models.swin_v2_parts import transformers_parts as transformers_v2_parts
from .host_backbone import TransformersHostBackbone, check_parts
from .module_forward import ModuleForward


class _SwinBlock(ModuleForward):
    """A block of any library: [B, H, W, C] to the same."""

    reads_settings = True
    read: ClassVar[Callable[[Any], SwinBlockParts]]
    compute: ClassVar[Callable[..., Tensor]] = staticmethod(swin_block)

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = type(self).read(module)

    def timing_key(self) -> Hashable:
        parts, spec = self._parts, self._parts.spec()
        return type(self).__name__, parts.proj.out_features, spec.num_heads, spec.geometry

    def why_not(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return self._parts.misfit()

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self._parts)


class TimmSwinBlock(_SwinBlock):
    """SwinTransformerBlock of timm."""

    read = staticmethod(timm_block)

    def why_not(self, x: Tensor) -> str | None:
        block = self.module
        if not getattr(block, "dynamic_mask", False) and x.shape[1:3] != block.input_resolution:
            return "it was built for maps of another size"
        return self._parts.misfit()


class TorchvisionSwinBlock(_SwinBlock):
    """SwinTransformerBlock of torchvision."""

    read = staticmethod(torchvision_block)


class TransformersSwinBlock(_SwinBlock):
    """SwinLayer: tokens [B, H * W, C] and (H, W)."""

    read = staticmethod(transformers_block)
    read_at_every_call = ("window_size", "shift_size")  # its own forward changes them

    def why_not(
        self,
        x: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> str | None:
        config = self.module.attention.config
        if kwargs.get("output_attentions", config.output_attentions):
            return "attention weights are asked for"
        if config._attn_implementation not in ("eager", "sdpa"):
            return f"attn_implementation={config._attn_implementation!r} is the host's choice"
        if config._attn_implementation == "eager" and self.module._forward_hooks:
            return "it has hooks, which may look at the attention weights"
        if not always_partition:
            self.module.set_shift_and_window_size(input_dimensions)  # as in its own forward
        return self._parts.misfit()

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], *_: Any, **__: Any) -> Any:
        return self.apply(x, input_dimensions), None

    def apply(self, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        height, width = input_dimensions
        tokens = x.view(x.shape[0], height, width, x.shape[2])
        return self.compute(tokens, self._parts).view(x.shape)

    def comparable(self, result: Any) -> Any:
        return result[0]  # the other results are attention weights, which were not requested


class MaskFormerSwinBlock(TransformersSwinBlock):
    """MaskFormerSwinLayer."""

    read = staticmethod(maskformer_block)

    def why_not(  # type: ignore[override]  # of a layer with other arguments
        self, x: Tensor, input_dimensions: tuple[int, int], output_attentions: Any = False
    ) -> str | None:
        return "attention weights are asked for" if output_attentions else self._parts.misfit()

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], *_: Any) -> Any:
        return (self.apply(x, input_dimensions),)


class Merging(ModuleForward):
    """Patch merging of timm and torchvision: [B, H, W, C] to [B, h, w, 2C]."""

    reads_settings = True

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        merging_parts(module)

    def timing_key(self) -> Hashable:
        return type(self).__name__, self.module.reduction.in_features

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, self.module)


class TransformersMerging(Merging):
    """Patch merging of transformers: [B, H * W, C] and (H, W) to [B, h * w, 2C]."""

    def forward(self, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:  # type: ignore[override]
        height, width = input_dimensions
        tokens = x.view(x.shape[0], height, width, x.shape[2])
        return super().forward(tokens).flatten(1, 2)


class TransformersSwin(TransformersHostBackbone):
    """SwinBackbone and MaskFormerSwinBackbone."""

    reads_settings = True
    read_at_every_call = TransformersSwinBlock.read_at_every_call
    read: ClassVar[Callable[[Any], SwinParts]] = staticmethod(transformers_parts)
    maps: ClassVar[Callable[..., list[Tensor]]] = staticmethod(swin_maps)

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = type(self).read(module)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        problem = super().why_not(*args, **kwargs)
        if problem is not None:
            return problem
        attention = getattr(self.module.config, "_attn_implementation", "eager")
        if attention not in ("eager", "sdpa", None):
            return f"attn_implementation={attention!r} is the host's choice"
        parts: Any = self._parts  # none of them is called as a module
        if parts.embedding.owner.position_embeddings is not None:
            return "it has absolute position embeddings"
        problems = (block.misfit() for stage in parts.stages for block in stage.blocks)
        return next((problem for problem in problems if problem is not None), None)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        out_features, normed = self.module.out_features, self._parts.norms
        wanted = [
            index
            for index, name in enumerate(self.module.stage_names)
            if name in out_features
            and (index or not normed or 0 in normed)  # MaskFormer's has no map of the stem
        ]
        return tuple(type(self).maps(self._parts, pixel_values, wanted))


class TimmSwinv2Block(TimmSwinBlock):
    """SwinTransformerV2Block of timm."""

    read = staticmethod(timm_v2_block)
    compute = staticmethod(swinv2_block)


class TransformersSwinv2Block(MaskFormerSwinBlock):
    """Swinv2Layer, whose windows are those that it was made with."""

    read = staticmethod(transformers_v2_block)
    compute = staticmethod(swinv2_block)
    read_at_every_call = ()


class TransformersSwinv2(TransformersSwin):
    """Swinv2Backbone."""

    read = staticmethod(transformers_v2_parts)
    maps = staticmethod(swinv2_maps)
    read_at_every_call = ()


_TRANSFORMERS, _TIMM = "transformers.models", "timm.models.swin_transformer"
_TORCHVISION = "torchvision.models.swin_transformer"
REPLACED: dict[str, type[ModuleForward]] = {
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinBackbone": TransformersSwin,
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinLayer": TransformersSwinBlock,
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinPatchMerging": TransformersMerging,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinBackbone": TransformersSwin,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": MaskFormerSwinBlock,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinPatchMerging": (
        TransformersMerging
    ),
    f"{_TIMM}.SwinTransformerBlock": TimmSwinBlock,
    f"{_TIMM}.PatchMerging": Merging,
    f"{_TORCHVISION}.SwinTransformerBlock": TorchvisionSwinBlock,
    f"{_TORCHVISION}.PatchMerging": Merging,
    f"{_TRANSFORMERS}.swinv2.modeling_swinv2.Swinv2Backbone": TransformersSwinv2,
    f"{_TRANSFORMERS}.swinv2.modeling_swinv2.Swinv2Layer": TransformersSwinv2Block,
    f"{_TIMM}_v2.SwinTransformerV2Block": TimmSwinv2Block,
}
