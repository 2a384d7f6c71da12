"""ConvNeXt (Liu et al. 2022), ConvNeXt V2 (Woo et al. 2023) and DINOv3's ConvNeXt.

Upstream: transformers `models/convnext/`, `convnextv2/` and `dinov3_convnext/`, timm
`models/convnext.py`.
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS

from ..backbone.checkpoint import StateDict, rename
from ..backbone.configuration import (
    BackboneConfig,
    check_choice,
    check_integer,
    check_integers,
    check_number,
    check_size,
    hierarchical_stage_names,
)
from ..backbone.registry import Family, TransformersModel, register
from .convnext_forward import convnext_maps
from .convnext_modules import (
    ConvNextEmbeddings,
    ConvNextEncoder,
    ConvNextLayer,
    ConvNextStage,
    DINOv3ConvNextLayer,
    DINOv3ConvNextStage,
    read_stage,
    read_stem,
)
from .convnext_parts import ConvNextParts
from .convnext_timm import timm_parts, timm_upstream
from .layers import MapLayerNorm
from .parts import CalledModules, kept_parts, untouched
from .stage_norms import StageNorms

EPS = 1e-6  # of all norms of transformers' ConvNeXt but the last


class _Config(BackboneConfig):
    """Fields that the three configurations have in common."""

    num_channels: int
    hidden_sizes: list[int]
    depths: list[int]
    hidden_act: str
    initializer_range: float
    layer_norm_eps: float
    drop_path_rate: float
    image_size: int | list[int]

    def _set(
        self,
        num_channels: int,
        hidden_sizes: Sequence[int],
        depths: Sequence[int],
        hidden_act: str,
        out_features: list[str] | None,
        out_indices: Sequence[int] | None,
        image_size: int | Sequence[int],
        **numbers: float,
    ) -> None:
        """Checks and sets fields, and selects the stages to return."""
        self.num_channels = check_integer("num_channels", num_channels)
        self.depths = check_integers("depths", depths)
        self.hidden_sizes = check_integers("hidden_sizes", hidden_sizes, len(self.depths))
        self.hidden_act = check_choice("hidden_act", hidden_act, list(ACTIVATIONS))
        self.image_size = check_size("image_size", image_size)
        for name, value in numbers.items():
            setattr(self, name, check_number(name, value))
        self._set_stages(hierarchical_stage_names(len(self.depths)), out_features, out_indices)

    def _set_stem(self, patch_size: int | Sequence[int], num_stages: int | None) -> None:
        """Checks and sets the fields of a model with a stem; `depths` is set."""
        self.patch_size = check_size("patch_size", patch_size)
        self.num_stages = check_integer("num_stages", num_stages or len(self.depths))
        if self.num_stages != len(self.depths):
            raise ValueError(
                f"num_stages must be the number of depths, got {num_stages} and {self.depths}"
            )

    def deciding_fields(self) -> dict[str, Any]:
        fields = super().deciding_fields()
        del fields["image_size"]  # it only names the usual one
        return fields

    def drop_rates(self) -> list[list[float]]:
        """Rates of stochastic depth of all blocks, by stage; they grow linearly with depth."""
        total = sum(self.depths)
        rates = iter([self.drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        return [list(islice(rates, depth)) for depth in self.depths]


class ConvNextConfig(_Config):
    """Configuration of a ConvNeXt backbone: transformers' fields and defaults.

    Args:
        num_channels: channels of the input.
        patch_size: pixels per patch of the stem, one number or (height, width).
        num_stages: number of stages; default: that of `depths`, which it must equal.
        hidden_sizes: channels of each stage.
        depths: blocks per stage.
        hidden_act: activation of the MLP.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of the norm after the last stage; the other norms use 1e-6.
        layer_scale_init_value: initial layer scale; 0 for no layer scale.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly with depth.
        image_size: pixels, one number or (height, width); only the usual size.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the stem, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "convnext"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_stages"}
    layer_scale_init_value: float

    def __init__(
        self,
        *,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 4,
        num_stages: int | None = None,
        hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int | Sequence[int] = 224,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self._set(
            num_channels=num_channels,
            hidden_sizes=hidden_sizes,
            depths=depths,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=drop_path_rate,
            image_size=image_size,
            out_features=out_features,
            out_indices=out_indices,
        )
        self._set_stem(patch_size, num_stages)


class ConvNextV2Config(_Config):
    """Configuration of a ConvNeXt V2 backbone: transformers' fields and defaults.

    Args:
        num_channels: channels of the input.
        patch_size: pixels per patch of the stem, one number or (height, width).
        num_stages: number of stages; default: that of `depths`, which it must equal.
        hidden_sizes: channels of each stage.
        depths: blocks per stage.
        hidden_act: activation of the MLP.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of the norm after the last stage; the other norms use 1e-6.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly with depth.
        image_size: pixels, one number or (height, width); only the usual size.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the stem, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "convnextv2"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_stages"}

    def __init__(
        self,
        *,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 4,
        num_stages: int | None = None,
        hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        drop_path_rate: float = 0.0,
        image_size: int | Sequence[int] = 224,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self._set(
            num_channels=num_channels,
            hidden_sizes=hidden_sizes,
            depths=depths,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            drop_path_rate=drop_path_rate,
            image_size=image_size,
            out_features=out_features,
            out_indices=out_indices,
        )
        self._set_stem(patch_size, num_stages)


class DINOv3ConvNextConfig(_Config):
    """Configuration of a ConvNeXt of DINOv3: transformers' fields and defaults.

    Args:
        num_channels: channels of the input.
        hidden_sizes: channels of each stage.
        depths: blocks per stage.
        hidden_act: activation of the MLP.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of all norms.
        layer_scale_init_value: initial layer scale.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly with depth.
        image_size: pixels, one number or (height, width); only the usual size.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the image, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "dinov3_convnext"
    layer_scale_init_value: float

    def __init__(
        self,
        *,
        num_channels: int = 3,
        hidden_sizes: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int | Sequence[int] = 224,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self._set(
            num_channels=num_channels,
            hidden_sizes=(96, 192, 384, 768) if hidden_sizes is None else hidden_sizes,
            depths=(3, 3, 9, 3) if depths is None else depths,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=drop_path_rate,
            image_size=image_size,
            out_features=out_features,
            out_indices=out_indices,
        )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.depths)


class _ConvNext(StageNorms):
    """What the three backbones have in common."""

    config: Any  # one of the three
    has_attentions = False
    norms_take_maps = True

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        indices = [self.stage_names.index(name) for name in wanted]
        parts, _ = kept_parts(self, self._parts)
        if parts is None:
            encoder, stem = self._encoder, self._stem
            x = pixel_values if stem is None else stem(pixel_values)
            maps = encoder(x, indices, run_block=self.block_runner())
        else:
            maps = convnext_maps(parts, pixel_values, indices, run_block=self.block_runner())
        return dict(zip(wanted, maps))

    @property
    def _encoder(self) -> nn.Module:
        raise NotImplementedError

    @property
    def _stem(self) -> nn.Module | None:
        return None

    def _parts(self, called: CalledModules) -> ConvNextParts:
        """All layers except the norms of maps, and those that have to be called."""
        encoder: Any = untouched(self._encoder, ConvNextEncoder)
        stages = tuple(read_stage(stage, called) for stage in encoder.stages)
        return ConvNextParts(() if self._stem is None else read_stem(self._stem, called), stages)

    def called_modules(self) -> dict[str, str]:
        return kept_parts(self, self._parts)[1].by_name(self) | self.called_norms()

    def to_checkpoint_names(self) -> StateDict:
        # transformers' whole models have the final norm, its backbones have not
        final = f"{self.final_norm_name}." if self.lacks_final_norm else None
        state = self.with_norms_of(self.out_features)
        return {n: t for n, t in state.items() if final is None or not n.startswith(final)}


class ConvNextBackbone(_ConvNext):
    """ConvNeXt with transformers' parameter names.

    Stages: "stem", "stage1", ... Strides 4, 4, 8, 16, 32 for patches of 4. Pixels beyond the last
    whole patch are dropped. Every returned map has a layer norm.
    """

    config_class = ConvNextConfig
    final_norm_name = "layernorm"
    optional_weights = ("hidden_states_norms.*", "layernorm.*")
    _has_grn: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        sizes = config.hidden_sizes[: len(config.depths)]
        self.stage_names = list(config.stage_names or ())
        self.num_features = [sizes[0], *sizes]
        self.embeddings = ConvNextEmbeddings(config.num_channels, sizes[0], config.patch_size, EPS)
        scale = None if self._has_grn else config.layer_scale_init_value
        stages = []
        for index, (channels, rates) in enumerate(zip(sizes, config.drop_rates())):
            before: list[nn.Module] = []
            if index:
                inputs = sizes[index - 1]
                before = [MapLayerNorm(inputs, eps=EPS), nn.Conv2d(inputs, channels, 2, stride=2)]
            layer = channels, EPS, config.hidden_act, scale or None
            blocks = [ConvNextLayer(*layer, rate, self._has_grn) for rate in rates]
            stages.append(ConvNextStage(before, blocks))
        self.encoder = ConvNextEncoder(stages)
        self.layernorm = nn.LayerNorm(sizes[-1], eps=config.layer_norm_eps)
        self.hidden_states_norms = nn.ModuleDict(
            {name: MapLayerNorm(n, eps=EPS) for name, n in self.out_feature_channels.items()}
        )
        self._init_weights()

    @property
    def _encoder(self) -> nn.Module:
        return self.encoder

    @property
    def _stem(self) -> nn.Module:
        return self.embeddings

    def final_state(self, hidden_state: Tensor) -> Tensor:
        """Normalizes the mean [B, C] of the hidden state [B, C, h, w] of the last stage."""
        return self.layernorm(_mean(hidden_state))

    def embedding_of(self, final_state: Tensor) -> Tensor:
        return final_state.float()


class ConvNextV2Backbone(ConvNextBackbone):
    """ConvNeXt V2, with global response normalization and no layer scale."""

    config_class = ConvNextV2Config
    _has_grn = True


class DINOv3ConvNextBackbone(_ConvNext):
    """ConvNeXt of DINOv3 with transformers' parameter names.

    Stages: "stem", which is the image itself, "stage1", ... Strides 1, 4, 8, 16, 32. No returned
    map has a norm.
    """

    config_class = DINOv3ConvNextConfig
    final_norm_name = "layer_norm"
    optional_weights = ("layer_norm.*",)
    # the model's tokens are those of the pixels, after their mean
    has_tokens = True
    n_prefix_tokens = 1

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config = self.config
        sizes, eps = config.hidden_sizes[: len(config.depths)], config.layer_norm_eps
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.num_channels, *sizes]
        stages, inputs = [], config.num_channels
        for index, (channels, rates) in enumerate(zip(sizes, config.drop_rates())):
            patch = 2 if index else 4
            conv = nn.Conv2d(inputs, channels, patch, stride=patch)
            norm = MapLayerNorm(inputs if index else channels, eps=eps)
            layer = channels, eps, config.hidden_act, config.layer_scale_init_value
            blocks = [DINOv3ConvNextLayer(*layer, rate, has_grn=False) for rate in rates]
            stages.append(DINOv3ConvNextStage([norm, conv] if index else [conv, norm], blocks))
            inputs = channels
        self.model = ConvNextEncoder(stages)
        self.layer_norm = nn.LayerNorm(inputs, eps=eps)
        self.hidden_states_norms = nn.ModuleDict()
        self._init_weights()

    @property
    def _encoder(self) -> nn.Module:
        return self.model

    def final_state(self, hidden_state: Tensor) -> Tensor:
        """Normalizes the tokens [B, 1 + N, C] of the last stage [B, C, h, w]."""
        return self.layer_norm(self.tokens_of(hidden_state))

    def embedding_of(self, final_state: Tensor) -> Tensor:
        return final_state[:, 0].float()

    def tokens_of(self, state: Tensor) -> Tensor:
        if state.ndim == 3:  # after the final norm
            return state
        return torch.cat([_mean(state)[:, None], super().tokens_of(state)], dim=1)

    def patch_mean_of(self, state: Tensor) -> Tensor:
        return self.tokens_of(state)[:, 1:].float().mean(1)

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: nn.Module
    ) -> tuple[StateDict, str, list[str]]:
        # files have no "model." before the stages
        in_memory = rename(
            state, lambda name: re.sub(r"(?<!model\.)\bstages\.", "model.stages.", name)
        )
        return super().from_checkpoint_names(in_memory, backbone)

    def to_checkpoint_names(self) -> StateDict:
        return rename(super().to_checkpoint_names(), lambda name: name.removeprefix("model."))


def _mean(x: Tensor) -> Tensor:
    """The mean [B, C] of the pixels of a map, summed in fp32."""
    return x.float().mean((2, 3)).to(x.dtype) if x.dtype != torch.float64 else x.mean((2, 3))


register(
    Family(
        backbone=ConvNextBackbone,
        configs=(ConvNextConfig,),
        timm_parts=timm_parts,
        maps=convnext_maps,
        upstream=lambda backbone: TransformersModel("transformers", "ConvNext"),
        timm_upstream=timm_upstream,
    )
)
register(
    Family(
        backbone=ConvNextV2Backbone,
        configs=(ConvNextV2Config,),
        upstream=lambda backbone: TransformersModel("transformers", "ConvNextV2"),
        timm_upstream=timm_upstream,
    )
)
register(
    Family(
        backbone=DINOv3ConvNextBackbone,
        configs=(DINOv3ConvNextConfig,),
        upstream=lambda backbone: TransformersModel("transformers", "DINOv3ConvNext"),
        timm_upstream=timm_upstream,
    )
)
