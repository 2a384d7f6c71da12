"""Vision Transformers of transformers: DINOv2, DINOv2 with registers, ViT, DeiT, CLIP, SigLIP.

Upstream: transformers `models/dinov2/`, `dinov2_with_registers/`, `vit/`, `deit/`, `clip/`,
`siglip/`. The last four have no backbone class there: their maps are the hidden states of
`ViTModel`, `DeiTModel`, `CLIPVisionModel` and `SiglipVisionModel`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base import Backbone
from ..backbone.checkpoint import StateDict, find_prefix, strip_prefix
from ..backbone.configuration import BackboneConfig
from ..backbone.registry import Family, TransformersModel, register
from .parts import CalledModules, Refused, kept_parts, untouched
from .vit_config import Dinov2Config, Dinov2WithRegistersConfig, ViTFamilyConfig
from .vit_forward import normed_map, normed_tokens, vit_states
from .vit_modules import LayerShape, ViTEmbeddings, ViTEncoder, ViTLayer
from .vit_names import NAMES, ViTNames, in_files, in_memory, part, put
from .vit_parts import ViTBlockSpec, ViTEmbeddingParts, ViTParts
from .vit_positions import PositionRules, patch_grid

CONFIGS = (Dinov2Config, Dinov2WithRegistersConfig)


class ViTBackbone(Backbone):
    """A ViT with transformers' parameter names. Calls may have images of different sizes.

    The configuration decides the type. Stages: "stem" (the embedding), then one per layer,
    "stage1", "stage2" ... Hidden states are tokens [B, N, C]: class token, registers or
    distillation token, patches. Maps are those of the patches, [B, C, h, w].

    Position embeddings are interpolated, as upstream does, for any other size than the trained one.
    transformers' ViT, DeiT, CLIP and SigLIP raise an error for other sizes unless they are called
    with `interpolate_pos_encoding=True`; this class never does. Pixels beyond the last whole patch
    are dropped.
    """

    config_class = ViTFamilyConfig
    config: ViTFamilyConfig
    # `mask_token` is of training by masked patches
    optional_weights = ("*mask_token",)
    unused_weights = ("*mask_token", "*position_ids")
    has_tokens = True

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.hidden_size] * len(self.stage_names)
        self.names = NAMES[config.model_type]
        n_extra = _n_extra(config, self.names)
        self.n_prefix_tokens = (self.names.cls_token is not None) + n_extra
        self._build(self.names, n_extra)
        self._init_weights()

    def _build(self, names: ViTNames, n_extra: int) -> None:
        config, channels = self.config, self.config.hidden_size
        projection = nn.Conv2d(config.num_channels, channels, config.patch, config.patch)
        n_positions = self.n_prefix_tokens if names.extras_have_positions else 1
        rules = PositionRules(
            config.grid,
            n_positions if names.cls_token is not None else 0,
            names.antialias,
            names.in_fp32,
        )
        self.embeddings = ViTEmbeddings(
            projection,
            names,
            rules,
            n_extra,
            names.positions is not None,
            (1, channels) if config.field("use_mask_token", default=True) else None,
            config.field("hidden_dropout_prob", default=0.0),
        )
        shape, specs = _layer_shape(config), _block_specs(config)
        layers = nn.ModuleList(ViTLayer(shape, spec, names) for spec in specs)
        outer, _, inner = names.layers.partition(".")
        if inner:
            setattr(self, outer, ViTEncoder())
        put(self, names.layers, layers)
        put(self, names.norm, nn.LayerNorm(channels, eps=config.layer_norm_eps))

    @torch.no_grad()
    def _init_weights(self) -> None:
        std = self.config.field("initializer_range", default=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ViTEmbeddings):
                for name, parameter in module.named_parameters():
                    if parameter.ndim < 4 and not name.endswith(("bias", "mask_token")):
                        nn.init.normal_(parameter, std=std)

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        parts, _ = kept_parts(self, self._parts)
        assert parts is not None  # nothing refuses the whole
        states = vit_states(
            parts,
            pixel_values,
            [self.stage_names.index(name) for name in wanted],
            patch=self.config.patch,
            attentions=attentions,
            run_block=self.block_runner(),
        )
        return dict(zip(wanted, states))

    def _parts(self, called: CalledModules) -> ViTParts:
        """All layers except the final norm, and those that have to be called."""
        names = self.names
        outer, _, inner = names.layers.partition(".")
        encoder = getattr(self, outer) if inner else None
        if encoder is not None:  # None if it need not be called
            encoder = called.read_or_call(partial(_check_encoder, encoder), encoder)

        def read_embeddings() -> ViTEmbeddingParts:
            return untouched(self.embeddings, ViTEmbeddings).parts()

        return ViTParts(
            called.read_or_call(read_embeddings, self.embeddings),
            None if names.pre_norm is None else part(self, names.pre_norm),
            () if encoder is not None else called.read_each(part(self, names.layers), ViTLayer),
            encoder,
        )

    def called_modules(self) -> dict[str, str]:
        called = kept_parts(self, self._parts)[1].by_name(self)
        try:
            untouched(self.final_norm, nn.LayerNorm)
        except Refused as refused:
            called[self.names.norm] = str(refused)
        return called

    def feature_map(self, stage: str, hidden_state: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Computes the returned map from the tokens [B, N, C] of a stage.

        Returns:
            [B, C, h, w], or tokens as upstream's with `reshape_hidden_states=False`.
        """
        config = self.config
        if not config.reshape_hidden_states:
            return self.final_state(hidden_state) if config.apply_layernorm else hidden_state
        grid, n_prefix = patch_grid(config.patch, image_size), self.n_prefix_tokens
        if config.apply_layernorm:
            try:
                norm = untouched(self.final_norm, nn.LayerNorm)
            except Refused:
                hidden_state = self.final_norm(hidden_state)
            else:
                return normed_map(hidden_state[:, n_prefix:].unflatten(1, grid), norm)
        return hidden_state[:, n_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)

    @property
    def final_norm(self) -> Any:
        return part(self, self.names.norm)

    def final_state(self, hidden_state: Tensor) -> Tensor:
        try:
            return normed_tokens(hidden_state, untouched(self.final_norm, nn.LayerNorm))
        except Refused:
            return self.final_norm(hidden_state)

    def embedding_of(self, final_state: Tensor) -> Tensor:
        return final_state[:, 0]

    def tokens_of(self, state: Tensor) -> Tensor:
        return state

    def patch_mean_of(self, state: Tensor) -> Tensor:
        return state[:, self.n_prefix_tokens :].float().mean(1)

    def used_weights(self, maps: Sequence[str], final: bool) -> StateDict:
        norm, state = f"{self.names.norm}.", self.state_dict()
        is_normed = final or (self.config.apply_layernorm and bool(maps))
        return {
            name: tensor
            for name, tensor in state.items()
            if not name.endswith("mask_token") and (is_normed or not name.startswith(norm))
        }

    def init_optional_weights(self) -> None:
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "mask_token":
                    setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: Any
    ) -> tuple[StateDict, str, list[str]]:
        names: ViTNames = backbone.names
        found = in_memory(names, state)
        expected = list(backbone.state_dict())
        anchor = f"embeddings.{names.patches}.weight"
        expected.sort(key=lambda name: name != anchor)
        prefix = find_prefix(found, expected, names.upstream)
        inside, outside = strip_prefix(found, prefix)
        return inside, prefix, outside

    def to_checkpoint_names(self) -> StateDict:
        return in_files(self.names, self.state_dict())

    @classmethod
    def config_classes(cls) -> dict[str, type[BackboneConfig]]:
        return {config.model_type: config for config in CONFIGS}


def _check_encoder(encoder: nn.Module) -> None:
    """Raises `Refused` if the module around the layers has to be called."""
    untouched(encoder, ViTEncoder)


def _n_extra(config: ViTFamilyConfig, names: ViTNames) -> int:
    """Number of tokens between the class token and the patches."""
    if names.extra_tokens is None:
        return 0
    return config.field("num_register_tokens", default=1)


def _layer_shape(config: ViTFamilyConfig) -> LayerShape:
    qkv_bias = config.field("qkv_bias", default=True)
    return LayerShape(
        channels=config.hidden_size,
        hidden=config.mlp_size,
        eps=config.layer_norm_eps,
        qkv_bias=(qkv_bias, qkv_bias, qkv_bias),
        is_gated=config.field("use_swiglu_ffn", default=False),
        layer_scale=config.field("layerscale_value", default=None),
        patch=config.patch,
    )


def _block_specs(config: ViTFamilyConfig) -> list[ViTBlockSpec]:
    is_gated = config.field("use_swiglu_ffn", default=False)
    spec = ViTBlockSpec(
        num_heads=config.num_attention_heads,
        activation="silu" if is_gated else config.hidden_act,
        drop_path=config.field("drop_path_rate", default=0.0),
        attention_dropout=config.field("attention_probs_dropout_prob", default=0.0),
    )
    return [spec] * config.num_hidden_layers


def _upstream(backbone: ViTBackbone) -> TransformersModel:
    return TransformersModel("transformers", backbone.names.upstream)


register(Family(backbone=ViTBackbone, configs=CONFIGS, upstream=_upstream))
