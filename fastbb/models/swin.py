"""Swin Transformer (Liu et al. 2021) with the semantics of transformers, torchvision and timm.

Registers Swin V2 too, which `swin_v2.py` has.

Upstream: transformers `models/swin/` and `models/maskformer/modeling_maskformer_swin.py`,
torchvision and timm `models/swin_transformer.py`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels import WindowGeometry, relative_position_index

from ..backbone.checkpoint import StateDict, find_prefix, rename, strip_prefix
from ..backbone.registry import Family, TransformersModel, Upstream, register
from .parts import CalledModules, kept_parts, untouched
from .stage_norms import StageNorms
from .swin_config import (
    MaskFormerSwinConfig,
    SwinConfig,
    Swinv2Config,
    TorchvisionSwinConfig,
    as_pair,
)
from .swin_forward import swin_maps
from .swin_modules import (
    SwinAttention,
    SwinEmbeddings,
    SwinEncoder,
    SwinLayer,
    SwinModel,
    SwinPatchEmbeddings,
    SwinPatchMerging,
    SwinStage,
)
from .swin_names import (
    in_memory_name,
    legacy_name,
    on_disk_name,
    stage_norm_name,
    timm_upstream,
    torchvision_fields,
    torchvision_upstream,
)
from .swin_parts import SwinBlockSpec, SwinParts, timm_parts
from .swin_v2 import Swinv2Backbone
from .swin_v2_forward import swinv2_maps
from .swin_v2_parts import timm_parts as timm_v2_parts


class SwinBackbone(StageNorms):
    """Swin with transformers' parameter names. Calls may have images of different sizes.

    The configuration decides the semantics. `SwinConfig` and `MaskFormerSwinConfig` have
    transformers': windows always shift, every returned map has a layer norm, odd sizes are padded.
    `TorchvisionSwinConfig` has torchvision's: no shift along an axis that one window covers, no
    norm, pixels beyond the last whole patch are dropped.

    Stages: "stem" (the patch embedding), "stage1", ... Channels C, C, 2C, 4C, 8C; strides 4, 4, 8,
    16, 32 for patches of 4.
    """

    config_class = SwinConfig
    config: SwinConfig
    optional_weights = ("hidden_states_norms.*", "swin.layernorm.*")
    unused_weights = ("*relative_position_index", "*.attn_mask", "*.mask_token")
    forward_options = ("interpolate_pos_encoding",)
    final_norm_name = "swin.layernorm"
    has_tokens = True

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.embed_dim] + [
            config.stage_channels(stage) for stage in range(len(config.depths))
        ]
        self.swin = _model(config)
        is_normed = not isinstance(config, TorchvisionSwinConfig)
        normed = self.out_feature_channels if is_normed else {}
        self.hidden_states_norms = nn.ModuleDict(
            {name: nn.LayerNorm(channels) for name, channels in normed.items()}
        )
        self._init_weights()

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        indices = [self.stage_names.index(name) for name in wanted]
        options = {
            "attentions": attentions,
            "interpolate_positions": interpolate_pos_encoding,
            "run_block": self.block_runner(),
        }
        parts, _ = kept_parts(self, self._parts)
        if parts is None:
            states = self.swin(pixel_values, indices, **options)
            maps = [x.permute(0, 3, 1, 2) for x in states]
        else:
            maps = swin_maps(parts, pixel_values, indices, **options)
        return dict(zip(wanted, maps))

    def _parts(self, called: CalledModules) -> SwinParts:
        """All layers except the norms of maps, and those that have to be called."""
        return untouched(self.swin, SwinModel).parts(called)

    def called_modules(self) -> dict[str, str]:
        return kept_parts(self, self._parts)[1].by_name(self) | self.called_norms()

    def final_state(self, hidden_state: Tensor) -> Tensor:
        return self._normed(hidden_state, self.swin.layernorm)

    @property
    def lacks_final_norm(self) -> bool:
        # MaskFormer never trains it
        return isinstance(self.config, MaskFormerSwinConfig) or super().lacks_final_norm

    def with_library_windows(self) -> "SwinBackbone":
        if type(self.config) is not SwinConfig:
            return self
        return _with_clamped_windows(self)

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: nn.Module
    ) -> tuple[StateDict, str, list[str]]:
        state = rename(state, in_memory_name)
        expected = [
            name.removeprefix("swin.") for name in backbone.state_dict() if name.startswith("swin.")
        ]
        prefix = find_prefix(state, expected, "Swin")
        found, outside = strip_prefix(state, prefix)
        found = rename(found, lambda name: name.removeprefix("swin."))
        norms = {name: t for name, t in found.items() if name.startswith("hidden_states_norms.")}
        if prefix.endswith(("swin.", "model.")):
            # the norms are next to the model whose maps they normalize
            parent = re.sub(r"(swin|model)\.$", "", prefix)
            beside = [n for n in outside if n.startswith(f"{parent}hidden_states_norms.")]
            norms |= {name.removeprefix(parent): state[name] for name in beside}
            outside = [name for name in outside if name not in beside]
        found = {f"swin.{name}": t for name, t in found.items() if name not in norms}
        return {**found, **rename(norms, stage_norm_name)}, prefix, outside

    def to_checkpoint_names(self) -> StateDict:
        state = self.with_norms_of(self._saved_norms())
        if isinstance(self.config, MaskFormerSwinConfig):
            return self._to_maskformer_names(state)
        return rename(state, on_disk_name)

    def _saved_norms(self) -> list[str]:
        if isinstance(self.config, MaskFormerSwinConfig):
            return self.stage_names[1:]
        return self.out_features

    def _to_maskformer_names(self, state: StateDict) -> StateDict:
        def name_of(name: str) -> str:
            if name.startswith("hidden_states_norms."):
                _, stage, parameter = name.split(".")
                return f"hidden_states_norms.{self.stage_names.index(stage) - 1}.{parameter}"
            return "model." + legacy_name(name.removeprefix("swin."))

        window = (self.config.window_size, self.config.window_size)
        index = relative_position_index(window, torch.device("cpu"))
        index = index.view(window[0] ** 2, -1)
        return {
            **rename(state, name_of),
            **{
                name_of(name).replace("bias_table", "index"): index
                for name in state
                if name.endswith("relative_position_bias_table")
            },
        }


def _with_clamped_windows(module: Any) -> Any:
    """Copies the attention of blocks, with windows clamped on both axes, and what is around it.

    All other modules, hooks and tensors are shared.
    """
    if module is None:
        return None
    children = {name: _with_clamped_windows(child) for name, child in module._modules.items()}
    has_spec = isinstance(module, (SwinLayer, SwinAttention))
    if not has_spec and all(children[name] is child for name, child in module._modules.items()):
        return module
    other = copy.copy(module)
    other._modules = children
    if has_spec:
        other.spec = replace(module.spec, clamp_both=True)
    return other


def _block_specs(config: SwinConfig) -> list[list[SwinBlockSpec]]:
    torchvision = isinstance(config, TorchvisionSwinConfig)
    window, shift, total = config.window_size, config.window_size // 2, sum(config.depths)
    specs: list[list[SwinBlockSpec]] = []
    done = 0
    for depth, num_heads in zip(config.depths, config.num_heads):
        stage = []
        for block in range(depth):
            rate = config.drop_path_rate * (done + block) / max(total - 1, 1)
            shifts = (shift, shift) if block % 2 else (0, 0)
            spec = SwinBlockSpec(
                num_heads=num_heads,
                geometry=WindowGeometry((window, window), shifts),
                clamp_shift=torchvision,
                activation=config.hidden_act,
                drop_path=rate,
                mlp_drop_path=rate if torchvision else 0.0,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
            )
            stage.append(spec)
        specs.append(stage)
        done += depth
    return specs


def _model(config: SwinConfig) -> SwinModel:
    patch, (height, width) = as_pair(config.patch_size), as_pair(config.image_size)
    ragged = "drop" if isinstance(config, TorchvisionSwinConfig) else "pad"
    embeddings = SwinEmbeddings(
        SwinPatchEmbeddings(config.num_channels, config.embed_dim, patch, ragged),
        config.embed_dim,
        n_positions=(
            (height // patch[0]) * (width // patch[1]) if config.use_absolute_embeddings else None
        ),
        dropout=config.hidden_dropout_prob,
    )
    stages = []
    for index, specs in enumerate(_block_specs(config)):
        channels = config.stage_channels(index)
        hidden, eps = int(config.mlp_ratio * channels), config.layer_norm_eps
        is_last = index == len(config.depths) - 1
        stages.append(
            SwinStage(
                [SwinLayer(channels, hidden, eps, config.qkv_bias, spec) for spec in specs],
                None if is_last else SwinPatchMerging(channels),
            )
        )
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return SwinModel(embeddings, SwinEncoder(stages), norm)


def torchvision_swin(state: StateDict) -> tuple[TorchvisionSwinConfig, StateDict]:
    """Reads configuration and renamed tensors of a torchvision Swin v1."""
    fields, renamed = torchvision_fields(state)
    return TorchvisionSwinConfig(**fields), renamed


def _upstream(backbone: SwinBackbone) -> Upstream | TransformersModel:
    if isinstance(backbone.config, TorchvisionSwinConfig):
        return torchvision_upstream(backbone)
    if isinstance(backbone.config, MaskFormerSwinConfig):
        package = "transformers.models.maskformer"
        return TransformersModel(package, "MaskFormerSwin", SwinBackbone.to_checkpoint_names)
    return TransformersModel("transformers", "Swin")


def _torchvision_shape(embed_dim: int, heads: int, third_depth: int) -> dict[str, Any]:
    return {
        "depths": [2, 2, third_depth, 2],
        "embed_dim": embed_dim,
        "num_heads": [heads, 2 * heads, 4 * heads, 8 * heads],
        "window_size": 7,
    }


register(
    Family(
        backbone=SwinBackbone,
        configs=(SwinConfig, MaskFormerSwinConfig, TorchvisionSwinConfig),
        timm_parts=timm_parts,
        maps=swin_maps,
        torchvision_models={
            "swin_t": _torchvision_shape(96, 3, 6),
            "swin_s": _torchvision_shape(96, 3, 18),
            "swin_b": _torchvision_shape(128, 4, 18),
        },
        from_torchvision=torchvision_swin,
        upstream=_upstream,
        timm_upstream=timm_upstream,
    )
)
register(
    Family(
        backbone=Swinv2Backbone,
        configs=(Swinv2Config,),
        timm_parts=timm_v2_parts,
        maps=swinv2_maps,
        upstream=lambda backbone: TransformersModel("transformers", "Swinv2"),
    )
)
