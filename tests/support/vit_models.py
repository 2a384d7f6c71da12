"""Tiny ViTs of transformers with random weights, one per type."""

from importlib import import_module
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
    return randomize_(upstream_class(kind, "Backbone")(vit_config(kind, **config)))


def hf_vit_model(kind: str, **config: Any) -> Any:
    """transformers' tiny model of a type, which has `pooler_output`."""
    return randomize_(upstream_class(kind, "Model")(vit_config(kind, **config)))


def patches(tokens: Tensor, n_prefix: int, grid: tuple[int, int]) -> Tensor:
    """The map [B, C, h, w] of the patches of tokens [B, N, C]."""
    return tokens[:, n_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
