"""Configurations of the native ViTs: transformers' fields and defaults, one class per type."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, ClassVar

from fastbb_kernels import ACTIVATIONS

from ..backbone.configuration import (
    BackboneConfig,
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_size,
    hierarchical_stage_names,
)

Size = int | Sequence[int]


# names of transformers for others of `ACTIVATIONS`
_SAME_ACTIVATIONS = {"gelu_python": "gelu"}


def _check_activation(name: str, value: Any) -> str:
    return check_choice(name, value, [*ACTIVATIONS, *_SAME_ACTIVATIONS])


def _check_pooler_activation(name: str, value: Any) -> str:
    return check_choice(name, value, ["tanh", *ACTIVATIONS, *_SAME_ACTIVATIONS])


def activation_name(name: str) -> str:
    """The name in `ACTIVATIONS` of an activation of transformers."""
    return _SAME_ACTIVATIONS.get(name, name)


# transformers refuses to read an integer where it wants a float, and 4.0 where it wants 4
def _check_float(name: str, value: Any) -> float:
    return float(check_number(name, value))


def _check_positive(name: str, value: Any) -> float:
    if _check_float(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return float(value)


def _check_rate(name: str, value: Any) -> float:
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"{name} must be in 0 ... 1, got {value!r}")
    return float(value)


def _check_ratio(name: str, value: Any) -> float:
    value = _check_positive(name, value)
    return int(value) if value.is_integer() else value


def _check_optional_float(name: str, value: Any) -> float | None:
    return None if value is None else _check_float(name, value)


def _check_count(name: str, value: Any) -> int:
    return check_integer(name, value, minimum=0)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        check_integer,
    ),
    **dict.fromkeys(("num_channels", "encoder_stride", "vocab_size"), check_integer),
    **dict.fromkeys(("projection_dim", "pooler_output_size"), check_integer),
    **dict.fromkeys(("image_size", "patch_size"), check_size),
    "hidden_act": _check_activation,
    "pooler_act": _check_pooler_activation,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), _check_rate),
    **dict.fromkeys(("attention_dropout", "drop_path_rate"), _check_rate),
    **dict.fromkeys(("layer_norm_eps", "rope_theta"), _check_positive),
    "mlp_ratio": _check_ratio,
    **dict.fromkeys(("initializer_range", "initializer_factor"), _check_float),
    **dict.fromkeys(("layerscale_value", "layer_scale_init_value"), _check_float),
    **dict.fromkeys(
        ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"), _check_optional_float
    ),
    "num_register_tokens": _check_count,
}


class ViTFamilyConfig(BackboneConfig):
    """Base of the configurations of the ViTs; these fields mean the same in all of them.

    Args:
        hidden_size: channels of a token.
        num_hidden_layers: layers, each of which is a stage.
        num_attention_heads: attention heads; they divide the channels.
        intermediate_size: hidden width of the MLP.
        hidden_act: activation of the MLP.
        hidden_dropout_prob: dropout of the embeddings (and of the branches of ViT, DeiT, BEiT).
        attention_probs_dropout_prob: dropout of attention weights; also `attention_dropout`.
        layer_norm_eps: of all norms.
        image_size: pixels, one number or (height, width), of the trained position embeddings.
        patch_size: pixels per patch, one number or (height, width).
        num_channels: channels of the input.
        apply_layernorm: whether maps are normalized by the final norm.
        reshape_hidden_states: whether maps are [B, C, h, w]; otherwise they are tokens [B, N, C].
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the embedding, 1 the first layer.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    def _take(self, values: dict[str, Any]) -> None:
        """Checks and sets the arguments of a constructor, which are all local names of it."""
        values = {name: value for name, value in values.items() if name != "self"}
        unknown = values.pop("unknown")
        stages = values.pop("out_features"), values.pop("out_indices")
        if unknown.get("num_experts") or unknown.get("moe_num_experts"):
            raise ValueError(
                f"{type(self).__name__}: a mixture of experts is not supported; its layers have "
                "one MLP"
            )
        BackboneConfig.__init__(self, **unknown)
        for name, value in values.items():
            setattr(self, name, _CHECKS.get(name, check_boolean)(name, value))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, got {self.num_attention_heads} "
                f"heads for {self.hidden_size} channels"
            )
        if unknown.get("head_dim", self.head_size) != self.head_size:
            raise ValueError(
                f"head_dim must be hidden_size / num_attention_heads, that is {self.head_size}, "
                f"got {unknown['head_dim']}"
            )
        self._set_stages(hierarchical_stage_names(self.num_hidden_layers), *stages)

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return self.intermediate_size

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the trained size."""
        (height, width), (h, w) = pair(self.image_size), self.patch
        return height // h, width // w

    def field(self, name: str, default: Any) -> Any:
        """A field that only some types have; a stray one of the same name is ignored."""
        known = name in signature(type(self).__init__).parameters
        return getattr(self, name) if known else default


def pair(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class _SwigluConfig(ViTFamilyConfig):
    """Base of the configurations whose MLP is given by a ratio, and may be a SwiGLU."""

    @property
    def mlp_size(self) -> int:
        hidden = int(self.hidden_size * self.mlp_ratio)
        # SwiGLU has two thirds of it, rounded up to a multiple of 8
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else hidden


class Dinov2Config(_SwigluConfig):
    """Configuration of DINOv2 (Oquab et al. 2023); see `ViTFamilyConfig`.

    Args:
        mlp_ratio: hidden width of the MLP over the channels.
        layerscale_value: initial value of the layer scales.
        drop_path_rate: stochastic depth of every layer.
        use_swiglu_ffn: whether the MLP is a SwiGLU.
        use_mask_token: whether there is the token of masked patches, which no map depends on.
    """

    model_type: ClassVar[str] = "dinov2"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: Size = 224,
        patch_size: Size = 14,
        num_channels: int = 3,
        qkv_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_swiglu_ffn: bool = False,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        use_mask_token: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        self._take(locals())


class Dinov2WithRegistersConfig(_SwigluConfig):
    """Configuration of DINOv2 with registers (Darcet et al. 2023); see `Dinov2Config`.

    Args:
        num_register_tokens: tokens between the class token and the patches.
    """

    model_type: ClassVar[str] = "dinov2_with_registers"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: Size = 224,
        patch_size: Size = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_swiglu_ffn: bool = False,
        num_register_tokens: int = 4,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        self._take(locals())


class ViTConfig(ViTFamilyConfig):
    """Configuration of ViT (Dosovitskiy et al. 2020); see `ViTFamilyConfig`.

    Args:
        pooler_output_size: channels of the pooler, by default `hidden_size`.
        pooler_act: activation of the pooler.
        encoder_stride: kept for transformers' masked-image head.
    """

    model_type: ClassVar[str] = "vit"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        image_size: Size = 224,
        patch_size: Size = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        encoder_stride: int = 16,
        pooler_output_size: int | None = None,
        pooler_act: str = "tanh",
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        pooler_output_size = pooler_output_size or hidden_size
        self._take(locals())


class DeiTConfig(ViTConfig):
    """Configuration of DeiT (Touvron et al. 2020), with a distillation token; see `ViTConfig`."""

    model_type: ClassVar[str] = "deit"


class CLIPVisionConfig(ViTFamilyConfig):
    """Configuration of CLIP's vision tower (Radford et al. 2021); see `ViTFamilyConfig`.

    Args:
        projection_dim: channels of the space that images share with text.
        initializer_factor: kept for transformers.
    """

    model_type: ClassVar[str] = "clip_vision_model"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: Size = 224,
        patch_size: Size = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        apply_layernorm: bool = False,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        self._take(locals())


class SiglipVisionConfig(ViTFamilyConfig):
    """Configuration of SigLIP's vision tower (Zhai et al. 2023); see `ViTFamilyConfig`.

    Args:
        vision_use_head: whether there is an attention pooling head.
    """

    model_type: ClassVar[str] = "siglip_vision_model"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: Size = 224,
        patch_size: Size = 16,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        vision_use_head: bool = True,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        self._take(locals())


class DINOv3ViTConfig(ViTFamilyConfig):
    """Configuration of DINOv3's ViT (Siméoni et al. 2025); see `ViTFamilyConfig`.

    Args:
        rope_theta: base of the rotary position embeddings.
        query_bias: whether queries have a bias.
        key_bias: whether keys have a bias.
        value_bias: whether values have a bias.
        proj_bias: whether the output projection has a bias.
        mlp_bias: whether the layers of the MLP have a bias.
        layerscale_value: initial value of the layer scales.
        drop_path_rate: stochastic depth of every layer.
        use_gated_mlp: whether the MLP is gated.
        num_register_tokens: tokens between the class token and the patches.
        pos_embed_shift: in training, coordinates of patches shift by up to this.
        pos_embed_jitter: in training, each axis of coordinates is scaled by up to this factor.
        pos_embed_rescale: in training, coordinates are scaled by up to this factor.
        return_class_token: whether the output has `cls_tokens`.
    """

    model_type: ClassVar[str] = "dinov3_vit"

    def __init__(
        self,
        *,
        patch_size: Size = 16,
        hidden_size: int = 384,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        hidden_act: str = "gelu",
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        rope_theta: float = 100.0,
        image_size: Size = 224,
        num_channels: int = 3,
        query_bias: bool = True,
        key_bias: bool = False,
        value_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_gated_mlp: bool = False,
        num_register_tokens: int = 0,
        pos_embed_shift: float | None = None,
        pos_embed_jitter: float | None = None,
        pos_embed_rescale: float | None = 2.0,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        return_class_token: bool = False,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        self._take(locals())
        if self.head_size % 4:
            raise ValueError(
                "the rotary position embeddings need hidden_size / num_attention_heads divisible "
                f"by 4, got {self.head_size}"
            )


class BeitConfig(ViTFamilyConfig):
    """Configuration of BEiT (Bao et al. 2021); maps have no norm; see `ViTFamilyConfig`.

    Args:
        vocab_size: kept for transformers' masked-image head.
        use_mask_token: whether there is the token of masked patches, which no map depends on.
        use_absolute_position_embeddings: whether there are absolute position embeddings.
        use_relative_position_bias: whether each layer has a relative position bias of its own.
        use_shared_relative_position_bias: whether all layers share one.
        layer_scale_init_value: initial value of the layer scales; there are none if it is 0.
        drop_path_rate: stochastic depth of the last layer; the rate grows linearly with depth.
        use_mean_pooling: whether the image embedding is the normalized mean of the patches;
            otherwise it is the class token after the final norm.
        add_fpn: whether a feature pyramid is computed from four maps.
    """

    model_type: ClassVar[str] = "beit"
    apply_layernorm = False

    def __init__(
        self,
        *,
        vocab_size: int = 8192,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        image_size: Size = 224,
        patch_size: Size = 16,
        num_channels: int = 3,
        use_mask_token: bool = False,
        use_absolute_position_embeddings: bool = False,
        use_relative_position_bias: bool = False,
        use_shared_relative_position_bias: bool = False,
        layer_scale_init_value: float = 0.1,
        drop_path_rate: float = 0.1,
        use_mean_pooling: bool = True,
        add_fpn: bool = False,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        if "segmentation_indices" in unknown and out_indices is None:
            out_indices = unknown.pop("segmentation_indices")
        unknown.pop("apply_layernorm", None)  # upstream ignores it
        self._take(locals())
        if self.add_fpn and len(self.out_indices or ()) != 4:
            raise ValueError(
                "add_fpn=True needs exactly four out_indices, of which the pyramid is computed; "
                f"got {self.out_indices}. [3, 5, 7, 11] are usual for 12 layers"
            )
