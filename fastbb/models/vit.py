"""Vision Transformers of transformers: DINOv2 and 3, BEiT, ViT, DeiT, CLIP, SigLIP.

Upstream: transformers `models/dinov2/`, `dinov2_with_registers/`, `dinov3_vit/`, `beit/`, `vit/`,
`deit/`, `clip/`, `siglip/`. The last four have no backbone class there: their maps are the hidden
states of `ViTModel`, `DeiTModel`, `CLIPVisionModel` and `SiglipVisionModel`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base import Backbone
from ..backbone.checkpoint import LoadingInfo, StateDict, find_prefix, matches, strip_prefix
from ..backbone.configuration import BackboneConfig
from ..backbone.output import BackboneOutput
from ..backbone.registry import Family, TransformersModel, register
from .parts import CalledModules, Refused, kept_parts, untouched
from .vit_build import build_ends, build_layers, has_own_bias, n_extra
from .vit_config import (
    BeitConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTFamilyConfig,
    pair,
)
from .vit_forward import normed_map, normed_tokens, vit_states
from .vit_libraries import timm_maps, timm_parts
from .vit_modules import ViTContainer, ViTEmbeddings, ViTLayer
from .vit_names import NAMES, ViTNames, in_files, in_memory, part, put
from .vit_parts import ViTEmbeddingParts, ViTParts
from .vit_positions import (
    Grid,
    Rotation,
    patch_grid,
)
from .vit_timm import timm_upstream

CONFIGS = (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
    DeiTConfig,
    CLIPVisionConfig,
    SiglipVisionConfig,
    DINOv3ViTConfig,
    BeitConfig,
)


# modules after the layers that a checkpoint may lack, and those that are outside of the root
_OPTIONAL_ENDS = ("pooler.", "beit.pooler.", "visual_projection.")
_BESIDE = ("visual_projection.", "fpn.")


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
    optional_weights = ("*mask_token", *(f"{end}*" for end in _OPTIONAL_ENDS))
    unused_weights = ("*mask_token", "*position_ids", "*relative_position_index", "*inv_freq")
    has_tokens = True
    visual_projection: nn.Module | None
    head: nn.Module | None
    fpn: nn.Module | None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.hidden_size] * len(self.stage_names)
        self.names = NAMES[config.model_type]
        self.n_prefix_tokens = (self.names.cls_token is not None) + n_extra(config)
        build_layers(self, config)
        build_ends(self, config)
        self._init_weights()

    @property
    def has_projection(self) -> bool:  # type: ignore[override]  # depends on the checkpoint
        return self._end("visual_projection") is not None or self.head is not None

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

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes feature maps; see `Backbone.forward`.

        With `return_class_token` (DINOv3) the output has `cls_tokens` too, [B, C] of each returned
        stage, with the norm that the maps have.
        """
        if not self._returns_class_tokens:
            return super().forward(
                pixel_values, output_hidden_states, output_attentions, return_dict, **kwargs
            )
        output = super().forward(
            pixel_values, output_hidden_states, output_attentions, True, **kwargs
        )
        n_maps = len(self.out_features)
        maps, tokens = output.feature_maps[:n_maps], output.feature_maps[n_maps:]
        output = BackboneOutput(maps, output.hidden_states, output.attentions, tokens)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @property
    def _returns_class_tokens(self) -> bool:
        return self.config.field("return_class_token", default=False)

    def _parts(self, called: CalledModules) -> ViTParts:
        """All layers except the final norm, and those that have to be called."""
        names = self.names

        def container(path: str) -> nn.Module | None:
            """A module around others, if its hooks have to see the call."""

            def read() -> None:
                untouched(part(self, path), ViTContainer)

            return called.read_or_call(read, part(self, path))

        def read_embeddings() -> ViTEmbeddingParts:
            return untouched(embeddings, ViTEmbeddings).parts()

        embeddings = part(self, names.embeddings)
        shared = self.config.field("use_shared_relative_position_bias", default=False)
        return ViTParts(
            called.read_or_call(read_embeddings, embeddings),
            None if names.pre_norm is None else part(self, names.pre_norm),
            called.read_each(part(self, names.layers), ViTLayer),
            root=container(names.root[:-1]) if names.root else None,
            encoder=container(names.encoder) if names.encoder else None,
            rope=None if names.rope is None else self._rotation,
            shared_bias=part(self, f"{names.root}shared_position_bias") if shared else None,
            takes_resolution=has_own_bias(self.config),
        )

    def _rotation(self, grid: Grid) -> Rotation:
        """The rotation of the patches of a grid."""
        return part(self, str(self.names.rope))(next(self.parameters()), grid)

    def called_modules(self) -> dict[str, str]:
        called = kept_parts(self, self._parts)[1].by_name(self)
        try:
            untouched(part(self, self.names.norm), nn.LayerNorm, nn.Identity)
        except Refused as refused:
            called[self.names.norm] = str(refused)
        return called

    def feature_map(self, stage: str, hidden_state: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Computes the returned map from the tokens [B, N, C] of a stage.

        Returns:
            [B, C, h, w], or tokens as upstream's with `reshape_hidden_states=False`.
        """
        config = self.config
        n_prefix = self.n_prefix_tokens
        if not config.reshape_hidden_states:
            state = self.final_state(hidden_state) if config.apply_layernorm else hidden_state
            return state if self.names.keeps_prefix else state[:, n_prefix:]
        grid = patch_grid(config.patch, image_size)
        if config.apply_layernorm:
            try:
                norm = untouched(self.final_norm, nn.LayerNorm)
            except Refused:
                hidden_state = self.final_norm(hidden_state)
            else:
                return normed_map(hidden_state[:, n_prefix:].unflatten(1, grid), norm)
        return hidden_state[:, n_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)

    def returned_maps(self, stages: dict[str, Tensor], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes maps from hidden states, and after them the class tokens if `forward` does."""
        maps = super().returned_maps(stages, pixel_values)
        if self._returns_class_tokens:
            tokens = [stages[name][:, :1] for name in self.out_features]
            if self.config.apply_layernorm:
                tokens = [self.final_state(token) for token in tokens]
            maps += tuple(token[:, 0] for token in tokens)
        if self.fpn is None:
            return maps
        if len(maps) != 4:
            raise ValueError(
                f"the feature pyramid (add_fpn) is computed of four maps, got {len(maps)}: choose "
                "four out_indices, ask for --features maps of all four, or load the model with "
                "add_fpn=False"
            )
        return self.fpn(maps)

    def _end(self, name: str) -> nn.Module | None:
        """A module after the layers, or None if the checkpoint lacks it."""
        # a copy that shares the modules has no attribute of one that was dropped later
        return getattr(self, name, None)

    def _pooler(self) -> nn.Module | None:
        """Computes the image embedding, or None if that is the class token."""
        return getattr(
            part(self, self.names.root[:-1]) if self.names.root else self, "pooler", None
        )

    @property
    def final_norm(self) -> Any:
        # the norm of the mean of the patches stands in for that of tokens
        if not self.norms_tokens:
            return getattr(self._pooler(), "layernorm", None)
        return part(self, self.names.norm)

    @property
    def norms_tokens(self) -> bool:
        return not isinstance(part(self, self.names.norm), nn.Identity)

    @property
    def lacks_final_norm(self) -> bool:
        return self.final_norm is None or super().lacks_final_norm

    def final_state(self, hidden_state: Tensor) -> Tensor:
        norm = part(self, self.names.norm)
        try:
            return normed_tokens(hidden_state, untouched(norm, nn.LayerNorm))
        except Refused:
            return norm(hidden_state)

    def embedding_of(self, final_state: Tensor) -> Tensor:
        pool = self._pooler() if self.head is None else self.head
        if pool is not None:
            return pool(final_state)
        if self.names.cls_token is None:
            raise ValueError(
                f"embedding: this {self.config.model_type} has no pooling head and no class token; "
                "ask for --features pooled or patch_mean"
            )
        return final_state[:, 0]

    def projection_of(self, final_state: Tensor) -> Tensor:
        embedding, projection = self.embedding_of(final_state), self._end("visual_projection")
        return embedding if projection is None else projection(embedding)

    def tokens_of(self, state: Tensor) -> Tensor:
        return state

    def patch_mean_of(self, state: Tensor) -> Tensor:
        return state[:, self.n_prefix_tokens :].float().mean(1)

    def used_weights(self, maps: Sequence[str], final: bool) -> StateDict:
        ends = () if final else (*_OPTIONAL_ENDS, "head.")
        if not final and not (self.config.apply_layernorm and maps):
            ends += (f"{self.names.norm}.",)
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(ends) and not name.endswith("mask_token")
        }

    def init_optional_weights(self) -> None:
        for name, parameter in list(self.named_parameters()):
            if matches(name, self.optional_weights):
                put(self, name, nn.Parameter(torch.zeros(parameter.shape)))

    def report_loading(self, name: str, info: LoadingInfo) -> None:
        super().report_loading(name, info)
        self._drop_ends(info.initialized)

    def _load_from_state_dict(
        self, state_dict: StateDict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Drops ends that the checkpoint of a whole backbone lacks, as they would be untrained.

        A part of the weights (those of an adapter) leaves all modules as they are.
        """
        missing = [name for name in self.state_dict() if prefix + name not in state_dict]
        if all(matches(name, self.optional_weights) for name in missing):
            self._drop_ends(missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _drop_ends(self, missing: Sequence[str]) -> None:
        """Drops the modules after the layers of which a weight is missing."""
        for end in _OPTIONAL_ENDS:
            if any(name.startswith(end) for name in missing):
                put(self, end[:-1], None)

    @classmethod
    def from_state_dict(
        cls, config: Any, state: StateDict, **options: Any
    ) -> tuple[Any, LoadingInfo]:
        for name, tensor in state.items():
            # the model around a vision tower decides the size
            projects = config.field("projection_dim", default=None) is not None
            if projects and name.endswith("visual_projection.weight"):
                fields = {"projection_dim": tensor.shape[0]}
                config = type(config).from_dict(config.to_dict(), **fields)
        return super().from_state_dict(config, state, **options)

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: Any
    ) -> tuple[StateDict, str, list[str]]:
        names: ViTNames = backbone.names
        found, root = in_memory(names, state), names.root
        # outside of the root are a projection and a pyramid
        own = [name for name in backbone.state_dict() if not name.startswith(_BESIDE)]
        expected = [name.removeprefix(root) for name in own]
        prefix = find_prefix(found, expected, names.upstream)
        inside, outside = strip_prefix(found, prefix)
        parent = prefix.removesuffix(root or names.file_prefix)
        beside = {name: name.removeprefix(parent) for name in outside if name.startswith(parent)}
        wanted = {name for name in backbone.state_dict() if name.startswith(_BESIDE)}
        beside = {name: inner for name, inner in beside.items() if inner in wanted}
        tensors = {root + name: tensor for name, tensor in inside.items()}
        tensors |= {inner: found[name] for name, inner in beside.items()}
        return tensors, prefix, [name for name in outside if name not in beside]

    def to_checkpoint_names(self) -> StateDict:
        return in_files(self.names, self.state_dict())

    @classmethod
    def config_classes(cls) -> dict[str, type[BackboneConfig]]:
        return {config.model_type: config for config in CONFIGS}


def _upstream(backbone: ViTBackbone) -> TransformersModel:
    package, name = "transformers", backbone.names.upstream
    names = backbone.names
    # DINOv3's backbone normalizes the last stage in any case, and BEiT's has no pooler
    is_as_asked = backbone.config.apply_layernorm or names.rope is None
    has_all = not names.root or backbone.fpn is not None
    if names.has_backbone and is_as_asked and has_all:
        return TransformersModel(package, name, _backbone_state)
    return TransformersModel(package, name, _model_state, partial(_model_maps, backbone))


def _backbone_state(backbone: ViTBackbone) -> StateDict:
    """The weights by the names of upstream's backbone, which has no pooler."""
    pooler = f"{backbone.names.root}pooler."
    return {n: tensor for n, tensor in backbone.state_dict().items() if not n.startswith(pooler)}


def _model_state(backbone: ViTBackbone) -> StateDict:
    """The weights by the names of upstream's model, whose pooler is NaN where there is none."""
    state = {n.removeprefix(backbone.names.root): t for n, t in backbone.state_dict().items()}
    state.pop("visual_projection.weight", None)
    absent = type(backbone)(backbone.config).state_dict() if backbone._pooler() is None else {}
    for name, tensor in absent.items():
        name = name.removeprefix(backbone.names.root)
        if name.startswith("pooler."):
            state[name] = torch.full(tensor.shape, torch.nan)
    return state


def _model_maps(backbone: ViTBackbone, module: Any, pixel_values: Tensor) -> list[Tensor]:
    """The selected maps of upstream's model, from its hidden states."""
    config, n_prefix = backbone.config, backbone.n_prefix_tokens
    height, width = pixel_values.shape[2:]
    is_other = (height, width) != pair(config.image_size)
    options = {"interpolate_pos_encoding": is_other} if backbone.names.positions else {}
    out = module(pixel_values, output_hidden_states=True, **options)
    states = [out.hidden_states[index] for index in backbone.out_indices]
    if config.apply_layernorm:
        states = [part(module, backbone.names.norm)(state) for state in states]
    if not config.reshape_hidden_states:
        return states if backbone.names.keeps_prefix else [state[:, n_prefix:] for state in states]
    grid = patch_grid(config.patch, (height, width))
    return [state[:, n_prefix:].unflatten(1, grid).permute(0, 3, 1, 2) for state in states]


register(
    Family(
        backbone=ViTBackbone,
        configs=CONFIGS,
        timm_parts=timm_parts,
        maps=timm_maps,
        upstream=_upstream,
        timm_upstream=timm_upstream,
    )
)
