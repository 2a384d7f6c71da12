"""Interface of an engine to a native backbone, or to a backbone inside another library's model."""

import copy
import hashlib
import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..backbone.base import Backbone
from .settings import torch_dtype

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)

# raised when fastbb computes other values from the same weights and pixels
NUMERICS = 1


class Computation(Protocol):
    """Tensors computed from pixels by modules whose weights may change."""

    @property
    def module(self) -> nn.Module:
        """The module with every weight, layer and hook that the result depends on."""
        ...

    @property
    def outputs(self) -> Hashable:
        """Selection of results; a change makes the engine forget every choice."""
        ...

    @property
    def cache_key(self) -> str:
        """Key of measured choices: names of model and outputs."""
        ...

    @property
    def exactness(self) -> float:
        """Allowed error in fp32, relative to the largest exact magnitude of a result."""
        ...

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes the results for checked pixels [B, C, H, W], op by op."""
        ...

    def copied(self) -> "Computation":
        """Returns the same computation over copies of all modules and weights."""
        ...


@dataclass(frozen=True)
class BackboneMaps:
    """Computes the feature maps of a native backbone."""

    module: Backbone

    @property
    def outputs(self) -> Hashable:
        return tuple(self.module.out_features)

    @property
    def cache_key(self) -> str:
        config = self.module.config.to_dict()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        return f"{config.get('backbone') or config['model_type']}-{digest.hexdigest()[:8]}"

    @property
    def exactness(self) -> float:
        return self.module.exactness

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.module.feature_maps(pixel_values)

    def copied(self) -> "BackboneMaps":
        return BackboneMaps(copy.deepcopy(without_engine(self.module)))


class MapsModule(nn.Module):
    """A computation as a module, because only modules can be exported."""

    def __init__(self, computation: Computation) -> None:
        super().__init__()
        self.module = computation.module
        self._computation = computation

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self._computation.feature_maps(pixel_values)


def without_engine(backbone: AnyBackbone) -> AnyBackbone:
    """Returns the same backbone, unprepared, over the same modules and parameters."""
    other = copy.copy(backbone)
    other.config = copy.copy(backbone.config)
    other._engine = None
    return other


def in_precision(computation: Computation, precision: str | None) -> Computation:
    """Returns the computation, or one over converted weights if the precision has another dtype."""
    dtype = None if precision is None else torch_dtype(precision)
    if dtype in (None, dtype_of(computation.module)):
        return computation
    with torch.inference_mode(False):
        copied = computation.copied()
        copied.module.to(dtype)
    return copied


def dtype_of(module: nn.Module) -> torch.dtype:
    """dtype of the weights."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def device_of(module: nn.Module) -> torch.device:
    """Device of the weights."""
    return next(module.parameters()).device
