"""ViTs inside models of transformers and timm: blocks, and whole backbones of transformers."""

from collections.abc import Hashable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..engine.settings import Settings
from ..models.vit_forward import normed_tokens, vit_block, vit_states
from ..models.vit_libraries import (
    eva_rotation,
    timm_block,
    timm_eva_block,
    transformers_block,
    transformers_parts,
)
from ..models.vit_names import NAMES, ViTNames, part
from ..models.vit_parts import ViTBlockParts
from ..models.vit_positions import Grid, Rotation, patch_grid
from .host_backbone import NothingToDo, TransformersHostBackbone, check_parts
from .module_forward import ModuleForward


class _ViTBlock(ModuleForward):
    """A block of any library: [B, N, C] to the same."""

    reads_settings = True
    patch: Grid = (1, 1)  # only BEiT's bias depends on it

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = self.read()

    def read(self) -> ViTBlockParts:
        """Reads the parts of the module."""
        raise NotImplementedError

    def timing_key(self) -> Hashable:
        parts = self._parts
        shapes = (parameter.shape for parameter in self.module.parameters())
        return type(self).__name__, parts.spec(), parts.position_bias is None, *shapes

    def computed(self, x: Tensor, **options: Any) -> Tensor:
        """Computes the result."""
        return vit_block(x, self._parts, self.patch, **options)


# --- transformers

_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"}


def _other_attention(config: Any) -> str | None:
    """Why the attention of a model is not ours to choose, or None."""
    chosen = getattr(config, "_attn_implementation", None)
    if chosen not in ("eager", "sdpa", None):
        return f"attn_implementation={chosen!r} is the host's choice"
    return None


class _TransformersLayer(_ViTBlock):
    """A layer of transformers: hidden states, a mask, and options."""

    names: ClassVar[ViTNames]

    def read(self) -> ViTBlockParts:
        return transformers_block(self.module, self.names)

    def why_not(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> str | None:
        config = getattr(self.module, self.names.attention).config
        if kwargs.get("output_attentions", config.output_attentions):
            return "attention weights are asked for"
        if attention_mask is not None:
            return "it is called with an attention mask"
        for name, value in kwargs.items():
            if name not in _HARMLESS and value is not None and value is not False:
                return f"it is called with {name}"
        return _other_attention(config)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.computed(hidden_states)


class DinoLayer(_TransformersLayer):
    """Dinov2Layer and Dinov2WithRegistersLayer."""

    names = NAMES["dinov2"]


class PlainLayer(_TransformersLayer):
    """ViTLayer and DeiTLayer."""

    names = NAMES["vit"]


class TowerLayer(_TransformersLayer):
    """CLIPEncoderLayer and SiglipEncoderLayer; CLIP's layers of texts have a causal mask."""

    names = NAMES["clip_vision_model"]

    def read(self) -> ViTBlockParts:
        if self.module.self_attn.config.model_type == "clip_text_model":
            raise NothingToDo("its attention is causal")
        return super().read()


class DINOv3Layer(_TransformersLayer):
    """DINOv3ViTLayer: patches are rotated."""

    names = NAMES["dinov3_vit"]

    def why_not(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        **kwargs: Any,
    ) -> str | None:
        if position_embeddings is None or position_embeddings[0].ndim != 2:
            return "it is called with other position embeddings"
        return super().why_not(hidden_states, attention_mask, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.computed(hidden_states, position_embeddings=position_embeddings)


class BeitLayer(_TransformersLayer):
    """BeitLayer: a mask is the position bias that all layers share."""

    names = NAMES["beit"]

    def read(self) -> ViTBlockParts:
        size = self.module.patch_size
        self.patch = (size, size)
        return super().read()

    def why_not(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> str | None:
        if attention_mask is not None and not attention_mask.is_floating_point():
            return "it is called with an attention mask"
        if interpolate_pos_encoding:
            return "it is called with interpolate_pos_encoding"
        return super().why_not(hidden_states, None, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.computed(hidden_states, attention_mask=attention_mask, resolution=resolution)


class TransformersViT(TransformersHostBackbone):
    """Dinov2Backbone, Dinov2WithRegistersBackbone, DINOv3ViTBackbone and BeitBackbone."""

    reads_settings = True
    has_hidden_states = True
    names: ClassVar[ViTNames]

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        check_parts(module)
        self._parts = transformers_parts(module, self.names)
        projection = part(module, f"{self.names.embeddings}.{self.names.patches}")
        self._patch = projection.kernel_size

    def state(self) -> Hashable:
        config = self.module.config
        fields = ("apply_layernorm", "reshape_hidden_states", "return_class_token")
        return super().state(), *(getattr(config, name, None) for name in fields)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        if getattr(self.module.config, "return_class_token", False):
            return "class tokens are asked for"
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if not all(x.is_floating_point() for x in given):
            return "it is called with integers, which it converts"
        return super().why_not(*args, **kwargs) or _other_attention(self.module.config)

    def tensors(
        self, pixel_values: Tensor, output_hidden_states: bool = False, **constants: Any
    ) -> tuple[Tensor, ...]:
        module, is_map = self.module, self.module.config.reshape_hidden_states
        stages = range(len(module.stage_names))
        wanted = [index for index in stages if module.stage_names[index] in module.out_features]
        computed = stages if output_hidden_states else wanted
        states = vit_states(self._parts, pixel_values, computed, patch=self._patch)
        height, width = pixel_values.shape[2:]
        grid = patch_grid(self._patch, (height, width))
        n_prefix = states[0].shape[1] - grid[0] * grid[1]
        maps = []
        for index, x in zip(computed, states):
            if index not in wanted:
                continue
            if self.is_normed(index):
                x = normed_tokens(x, part(module, self.names.norm))
            if is_map or not self.names.keeps_prefix:
                x = x[:, n_prefix:]
            maps.append(x.unflatten(1, grid).permute(0, 3, 1, 2) if is_map else x)
        return (*maps, *states) if output_hidden_states else tuple(maps)

    def is_normed(self, index: int) -> bool:
        """Whether the map of a stage is normalized."""
        return self.module.config.apply_layernorm


class Dinov2(TransformersViT):
    """Dinov2Backbone."""

    names = NAMES["dinov2"]


class Dinov2WithRegisters(TransformersViT):
    """Dinov2WithRegistersBackbone."""

    names = NAMES["dinov2_with_registers"]


class DINOv3ViT(TransformersViT):
    """DINOv3ViTBackbone, which always normalizes the last stage."""

    names = NAMES["dinov3_vit"]
    output = "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackboneOutput"

    def is_normed(self, index: int) -> bool:
        return super().is_normed(index) or index == len(self.module.stage_names) - 1


class Beit(TransformersViT):
    """BeitBackbone, whose maps may pass a pyramid."""

    names = NAMES["beit"]

    def tensors(
        self, pixel_values: Tensor, output_hidden_states: bool = False, **constants: Any
    ) -> tuple[Tensor, ...]:
        found = super().tensors(pixel_values, output_hidden_states, **constants)
        n_maps = len(self.module.out_features)
        return (*self.module.fpn(found[:n_maps]), *found[n_maps:])

    def is_normed(self, index: int) -> bool:
        return False


# --- timm


class TimmViTBlock(_ViTBlock):
    """Block of timm's VisionTransformer."""

    def read(self) -> ViTBlockParts:
        return timm_block(self.module)

    def why_not(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> str | None:
        return "it is called with an attention mask" if attn_mask is not None or is_causal else None

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.computed(x)


class TimmEvaBlock(_ViTBlock):
    """EvaBlock of timm, without rotation or with that of DINOv3."""

    any_dtype = ("rope",)  # timm computes it in fp32

    def read(self) -> ViTBlockParts:
        return timm_eva_block(self.module)

    def why_not(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> str | None:
        if attn_mask is not None or is_causal:
            return "it is called with an attention mask"
        attention = self.module.attn
        if rope is not None and not (attention.rotate_half and rope.ndim == 2):
            return "it rotates queries and keys otherwise than DINOv3"
        if rope is not None and x.shape[1] - len(rope) != attention.num_prefix_tokens:
            return "its rotation is not that of all patches"
        return None

    def forward(self, x: Tensor, rope: Tensor | None = None, **_: Any) -> Tensor:
        rotation = None if rope is None else eva_rotation(rope.to(x.dtype))
        return self.computed(x, position_embeddings=rotation)


_DINOV2 = "transformers.models.dinov2.modeling_dinov2.Dinov2"
_REGISTERS = (
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters"
)
_DINOV3 = "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViT"
_BEIT = "transformers.models.beit.modeling_beit.Beit"
REPLACED: dict[str, type[ModuleForward]] = {
    f"{_DINOV2}Backbone": Dinov2,
    f"{_REGISTERS}Backbone": Dinov2WithRegisters,
    f"{_DINOV3}Backbone": DINOv3ViT,
    f"{_BEIT}Backbone": Beit,
    f"{_DINOV2}Layer": DinoLayer,
    f"{_REGISTERS}Layer": DinoLayer,
    f"{_DINOV3}Layer": DINOv3Layer,
    f"{_BEIT}Layer": BeitLayer,
    "transformers.models.vit.modeling_vit.ViTLayer": PlainLayer,
    "transformers.models.deit.modeling_deit.DeiTLayer": PlainLayer,
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": TowerLayer,
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": TowerLayer,
    "timm.models.vision_transformer.Block": TimmViTBlock,
    "timm.models.eva.EvaBlock": TimmEvaBlock,
}
