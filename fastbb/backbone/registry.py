"""The registry of families, with the facts that each family states about itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .base import Backbone
from .checkpoint import StateDict
from .configuration import BackboneConfig

# pixels [B, C, H, W] and indices of wanted maps, at least one -> those maps [B, C, h, w]
MapsForward = Callable[[Tensor, Sequence[int]], list[Tensor]]


@dataclass(frozen=True)
class Upstream:
    """A module of upstream that `verify` compares with.

    Attributes:
        name: of its library and class, for a report.
        module: in eval mode; only copies of it run, because some modules change when they run.
        maps: computes the maps [B, C, h, w] of pixels [B, C, H, W] with a copy of the module.
        other_maps: stages that this library computes otherwise than the one that decides, each with
            the reason.
    """

    name: str
    module: nn.Module
    maps: Callable[[nn.Module, Tensor], list[Tensor]]
    other_maps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformersModel:
    """transformers' `<name>Backbone`, whose configuration takes the fields of ours.

    Attributes:
        package: module that has the class and its `<name>Config`.
        name: of the model.
        state: returns the weights of one of our backbones by the names of that class.
        maps: computes the maps with `<name>Model`, of which transformers has no backbone class.
    """

    package: str
    name: str
    state: Callable[[Any], StateDict] = Backbone.state_dict
    maps: Callable[[nn.Module, Tensor], list[Tensor]] | None = None


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
        backbone: its class.
        configs: its configurations; each has its own `model_type`.
        timm_parts: reads the parts of timm's features-only module, from which `maps` computes the
            same maps; raises `models.parts.Refused` if the module is not exactly of this family.
        maps: computes the maps from parts, pixels [B, C, H, W] and indices of wanted maps.
        torchvision_models: torchvision's models of this family, with the fields of the
            configuration that identify their weights.
        from_torchvision: returns configuration and renamed tensors of a torchvision state dict.
        upstream: returns the model, with the weights of a backbone, that `verify` compares the
            backbone with; without it `verify` is an error.
        timm_upstream: returns timm's model with the weights of a backbone, for images of (height,
            width), which `fastbb bench` measures; raises ValueError where timm has none.

    The class of the backbone states the size of its images (`default_size`) and its allowed error
    (`exactness`).
    """

    backbone: type[Backbone]
    configs: tuple[type[BackboneConfig], ...]
    timm_parts: Callable[[nn.Module], Any] | None = None
    maps: Callable[[Any, Tensor, Sequence[int]], list[Tensor]] | None = None
    torchvision_models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    from_torchvision: Callable[[StateDict], tuple[BackboneConfig, StateDict]] | None = None
    upstream: Callable[[Any], Upstream | TransformersModel] | None = None
    timm_upstream: Callable[[Any, tuple[int, int]], Upstream] | None = None


FAMILIES: list[Family] = []


def register(family: Family) -> None:
    """Adds a family, which AutoBackbone, AutoConfig and TimmBackbone then use."""
    FAMILIES.append(family)


def family_of(model_type: str | None) -> tuple[Family, type[BackboneConfig]]:
    """The family and configuration class of a `model_type`.

    Raises:
        ValueError: no family has it; the message lists the supported ones.
    """
    for family in FAMILIES:
        for config in family.configs:
            if model_type in config.model_types():
                return family, config
    supported = sorted(
        name for family in FAMILIES for config in family.configs for name in config.model_types()
    )
    raise ValueError(
        f"model_type {model_type!r} is not supported: fastbb has backbones for "
        f"{', '.join(supported)}, and any timm model by its timm name"
    )
