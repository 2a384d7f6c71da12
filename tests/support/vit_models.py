"""Tiny ViTs of transformers with random weights, one per type."""

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from reference_models import randomize_
from torch import Tensor

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
STAGES = (0, 1, 2, 3)

# package and name of transformers' classes, and further fields of the configuration
TYPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("dinov2", "Dinov2", {}),
    "dinov2_with_registers": (
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        {"num_register_tokens": 2},
    ),
    "vit": ("vit", "ViT", {"intermediate_size": 48}),
    "deit": ("deit", "DeiT", {"intermediate_size": 48}),
    "clip_vision_model": ("clip", "CLIPVision", {"intermediate_size": 48}),
    "siglip_vision_model": ("siglip", "SiglipVision", {"intermediate_size": 48}),
    "dinov3_vit": ("dinov3_vit", "DINOv3ViT", {"intermediate_size": 48, "num_register_tokens": 2}),
    "beit": (
        "beit",
        "Beit",
        {"intermediate_size": 48, "use_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
}
# of the types that transformers has no backbone class of: tokens before the patches, final norm,
# and whether the maps have it by default
PLAIN = {
    "vit": (1, "layernorm", True),
    "deit": (2, "layernorm", True),
    "clip_vision_model": (1, "post_layernorm", False),
    "siglip_vision_model": (0, "post_layernorm", True),
}


def upstream_class(kind: str, name: str) -> Any:
    """A class of transformers, such as the "Model" or "Config" of a type."""
    package, prefix, _ = TYPES[kind]
    return getattr(import_module(f"transformers.models.{package}"), prefix + name)


def vit_config(kind: str, **config: Any) -> Any:
    """transformers' tiny configuration of a type, all stages selected."""
    fields = {**SHAPE, **TYPES[kind][2], "out_indices": list(STAGES), **config}
    return upstream_class(kind, "Config")(**fields)


def hf_vit(kind: str, **config: Any) -> Any:
    """transformers' tiny backbone of a type, all stages selected."""
    own = _plain_class(kind) if kind in PLAIN else upstream_class(kind, "Backbone")
    return randomize_(own(vit_config(kind, **config)))


@cache
def _plain_class(kind: str) -> Any:
    """A backbone of transformers' model; name and module decide how transformers saves it."""
    model = upstream_class(kind, "Model")
    n_prefix, norm_name, is_normed = PLAIN[kind]

    def __init__(self: Any, config: Any) -> None:
        model.__init__(self, config)
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, config.num_hidden_layers + 1))]

    def forward(
        self: Any, pixel_values: Tensor, output_hidden_states: Any = True, **options: Any
    ) -> Any:
        options = {"interpolate_pos_encoding": True, "output_hidden_states": True, **options}
        out = model.forward(self, pixel_values, **options)
        states, fields = list(out.hidden_states), vars(self.config)
        (height, width), side = pixel_values.shape[2:], self.config.patch_size
        maps = [states[index] for index in self.config.out_indices]
        if fields.get("apply_layernorm", is_normed):
            maps = [getattr(self, norm_name)(x) for x in maps]
        if fields.get("reshape_hidden_states", True):
            maps = [patches(x, n_prefix, (height // side, width // side)) for x in maps]
        if isinstance(output_hidden_states, list):
            kept = {index % len(states) for index in output_hidden_states}
            states = [x if index in kept else None for index, x in enumerate(states)]
        return SimpleNamespace(
            feature_maps=maps, hidden_states=tuple(states), attentions=out.attentions
        )

    members = {"__init__": __init__, "forward": forward, "__module__": model.__module__}
    return type(model.__name__, (model,), members)


def hf_vit_model(kind: str, **config: Any) -> Any:
    """transformers' tiny model of a type, which has `pooler_output`."""
    return randomize_(upstream_class(kind, "Model")(vit_config(kind, **config)))


def patches(tokens: Tensor, n_prefix: int, grid: tuple[int, int]) -> Tensor:
    """The map [B, C, h, w] of the patches of tokens [B, N, C]."""
    return tokens[:, n_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
