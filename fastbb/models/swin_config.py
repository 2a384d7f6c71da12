"""Configurations of Swin and Swin V2: transformers' fields and defaults."""

from collections.abc import Sequence
from typing import Any, ClassVar

from fastbb_kernels import ACTIVATIONS

from ..backbone.configuration import (
    BackboneConfig,
    check_boolean,
    check_choice,
    check_integer,
    check_integers,
    check_number,
    check_size,
    hierarchical_stage_names,
)


class SwinFields(BackboneConfig):
    """The fields that the configurations of Swin and Swin V2 have in common; see `SwinConfig`."""

    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str = "gelu",
        use_absolute_embeddings: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        encoder_stride: int = 32,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self.image_size = check_size("image_size", image_size)
        self.patch_size = check_size("patch_size", patch_size)
        self.num_channels = check_integer("num_channels", num_channels)
        self.embed_dim = check_integer("embed_dim", embed_dim)
        self.depths = check_integers("depths", depths)
        self.num_heads = check_integers("num_heads", num_heads, len(self.depths))
        self.window_size = check_integer("window_size", window_size)
        self.mlp_ratio = check_number("mlp_ratio", mlp_ratio)
        self.qkv_bias = check_boolean("qkv_bias", qkv_bias)
        self.hidden_dropout_prob = check_number("hidden_dropout_prob", hidden_dropout_prob)
        self.attention_probs_dropout_prob = check_number(
            "attention_probs_dropout_prob", attention_probs_dropout_prob
        )
        self.drop_path_rate = check_number("drop_path_rate", drop_path_rate)
        self.hidden_act = check_choice("hidden_act", hidden_act, list(ACTIVATIONS))
        self.use_absolute_embeddings = check_boolean(
            "use_absolute_embeddings", use_absolute_embeddings
        )
        self.initializer_range = check_number("initializer_range", initializer_range)
        self.layer_norm_eps = check_number("layer_norm_eps", layer_norm_eps)
        self.encoder_stride = check_integer("encoder_stride", encoder_stride)
        for stage, heads in enumerate(self.num_heads[: len(self.depths)]):
            if self.stage_channels(stage) % heads:
                raise ValueError(
                    f"num_heads must divide the channels of each stage, got {heads} heads for "
                    f"{self.stage_channels(stage)} channels in stage{stage + 1}"
                )
        # derived fields, which transformers reads
        self.num_layers = len(self.depths)
        self.hidden_size = self.stage_channels(len(self.depths) - 1)
        self._set_stages(hierarchical_stage_names(len(self.depths)), out_features, out_indices)

    def stage_channels(self, stage: int) -> int:
        """Channels of stage 0, 1, ..."""
        return self.embed_dim * 2**stage


class SwinConfig(SwinFields):
    """Configuration of a Swin backbone: transformers' fields and defaults.

    Args:
        image_size: pixels, one number or (height, width); only for the size of absolute embeddings.
        patch_size: pixels per patch, one number or (height, width).
        num_channels: channels of the input.
        embed_dim: channels of the first stage; each further stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: tokens per side of a window.
        mlp_ratio: hidden width of the MLP over the channels.
        qkv_bias: whether queries, keys and values have a bias.
        hidden_dropout_prob: dropout of embeddings, attention output and MLP output.
        attention_probs_dropout_prob: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly with depth.
        hidden_act: activation of the MLP.
        use_absolute_embeddings: whether there are absolute position embeddings too.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of the norms inside blocks; the other norms use 1e-5.
        encoder_stride: kept for transformers' masked-image head.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the stem, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "swin"

    def deciding_fields(self) -> dict[str, Any]:
        fields = super().deciding_fields()
        if not self.use_absolute_embeddings:
            del fields["image_size"]
        return fields


class MaskFormerSwinConfig(SwinConfig):
    """Configuration of a Swin saved by MaskFormer: other names of weights, no stem map."""

    model_type: ClassVar[str] = "maskformer-swin"

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        before = self._out_features, self._out_indices
        super().set_output_features_output_indices(out_features, out_indices)
        if "stem" in (self._out_features or ()):
            self._out_features, self._out_indices = before
            raise ValueError("This backbone does not support 'stem' in the `out_features`.")


class TorchvisionSwinConfig(SwinConfig):
    """Configuration of a Swin with torchvision's semantics.

    transformers does not know the `model_type`, so it cannot load the weights wrongly.
    """

    model_type: ClassVar[str] = "fastbb-torchvision-swin"


class Swinv2Config(SwinFields):
    """Configuration of a Swin V2 backbone: transformers' fields and defaults.

    Args:
        image_size: pixels, one number or (height, width). A stage whose map has fewer rows than
            `window_size` has windows of that many, and one whose map is a single window does not
            shift; images of other sizes have the same windows.
        patch_size: pixels per patch, one number or (height, width).
        num_channels: channels of the input.
        embed_dim: channels of the first stage; each further stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: tokens per side of a window.
        pretrained_window_sizes: tokens per side of the windows of each stage in pretraining, which
            positions are relative to; 0: those of the stage. Default: 0 for each stage.
        mlp_ratio: hidden width of the MLP over the channels.
        qkv_bias: whether queries and values have a bias.
        hidden_dropout_prob: dropout of embeddings and MLP output.
        attention_probs_dropout_prob: dropout of attention weights and attention output.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly with depth.
        hidden_act: activation of the MLP.
        use_absolute_embeddings: must be False: transformers' own model makes one position too
            many, and fails.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of the norms inside blocks; the other norms use 1e-5.
        encoder_stride: kept for transformers' masked-image head.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the stem, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "swinv2"

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        pretrained_window_sizes: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str = "gelu",
        use_absolute_embeddings: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        encoder_stride: int = 32,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            num_channels=num_channels,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            drop_path_rate=drop_path_rate,
            hidden_act=hidden_act,
            use_absolute_embeddings=use_absolute_embeddings,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            encoder_stride=encoder_stride,
            out_features=out_features,
            out_indices=out_indices,
            **unknown,
        )
        if self.use_absolute_embeddings:
            raise ValueError(
                "use_absolute_embeddings must be False for a swinv2: transformers' own model makes "
                "one position too many, and fails"
            )
        name, n_stages = "pretrained_window_sizes", len(self.depths)
        sizes = [0] * n_stages if pretrained_window_sizes is None else pretrained_window_sizes
        if not isinstance(sizes, (list, tuple)) or len(sizes) < n_stages:
            raise ValueError(f"{name} must be a list of {n_stages} integers, got {sizes!r}")
        self.pretrained_window_sizes = [check_integer(name, size, minimum=0) for size in sizes]


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a field that is one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
