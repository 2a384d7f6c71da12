"""Features of transformers' full models, for types that fastbb does not compute itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.checkpoint import read_state_dict, shapes_only
from ..backbone.hub import HubOptions
from ..hosts.transformers_backbone import TransformersBackbone
from ..hosts.transformers_config import transformers
from ..hosts.transformers_loading import load_module
from ..models.timm_full import POOLED_OR_MAPS
from .models import FeatureModel, of_tokens
from .outputs import TOKENS, Norm

# types whose tokens are before the final norm, which their pooler has
_UNNORMED = ("hiera",)
# number of tokens before those of patches, of types whose models have a class token
_PREFIX = {
    "pixio": lambda config: config.n_cls_tokens,
    "sapiens2": lambda config: 1 + config.num_register_tokens,
    "tipsv2_vision_model": lambda config: 1 + config.num_register_tokens,
}


@dataclass(frozen=True)
class _FullOutputs:
    """Computes what a model of transformers returns by name: the `Computation` of its engine."""

    module: Any
    wanted: tuple[str, ...]
    exactness: float

    @property
    def outputs(self) -> Hashable:
        return self.wanted

    @property
    def cache_key(self) -> str:
        config = json.dumps(self.module.config.to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256(config.encode()).hexdigest()[:8]
        return "-".join([type(self.module).__name__, digest, *self.wanted])

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.module(pixel_values, return_dict=True)
        return tuple(output[name] for name in self.wanted)

    def copied(self) -> _FullOutputs:
        return replace(self, module=copy.deepcopy(self.module))


class TransformersFullModel(FeatureModel):
    """transformers' full model.

    Args:
        backbone: of the same checkpoint.
        origin: name and options of the checkpoint.
        full: features to compute.
        norm: of the tokens.
        is_object: whether the backbone was given as an object, whose weights may be others.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: the model has no such feature, or the checkpoint lacks a weight of it.
    """

    def __init__(
        self,
        backbone: TransformersBackbone,
        origin: tuple[str, HubOptions],
        full: Sequence[str],
        norm: Norm | None,
        is_object: bool,
    ) -> None:
        model_type = backbone.config.model_type
        self._n_prefix = _PREFIX.get(model_type, lambda config: 0)(backbone.config)
        _check_features(model_type, self._n_prefix, full, norm)
        self.backbone = backbone
        config = backbone.config.upstream()
        mapping: Any = transformers().AutoModel._model_mapping
        model_class = mapping.get(type(config), None)
        if model_class is None or model_class is type(backbone.model):
            raise ValueError(
                f"{full[0]}: transformers' {model_type} is a backbone alone; {POOLED_OR_MAPS}"
            )
        name, hub = origin
        try:
            state = read_state_dict(name, hub)
            with shapes_only():
                empty = model_class(config)
            model, _ = load_module(empty, config, state, name, backbone.dtype)
        except ValueError as error:
            raise ValueError(
                f"{full[0]}: the checkpoint lacks a trained part of transformers' "
                f"{model_class.__name__}; {POOLED_OR_MAPS}. {error}"
            ) from error
        model.to(backbone.device)
        if is_object:
            _check_same_weights(backbone, model)
        wanted = tuple(name for name, features in _OUTPUTS.items() if {*features} & {*full})
        super().__init__(model, _FullOutputs(model, wanted, backbone.exactness))
        self._full, self._wanted = full, wanted
        with torch.no_grad():
            example = torch.zeros(1, backbone.config.num_channels, *backbone.default_size)
            output = model(example.to(backbone.device, backbone.dtype), return_dict=True)
        tokens = [feature for feature in full if feature in TOKENS]
        if tokens and output.last_hidden_state.ndim != 3:
            raise ValueError(
                f"{tokens[0]}: transformers' {model_class.__name__} is a CNN and has no tokens; "
                f"{POOLED_OR_MAPS}"
            )
        if output.get(wanted[0]) is None:
            raise ValueError(
                f"{full[0]}: transformers' {model_class.__name__} has no {wanted[0]}; "
                f"{POOLED_OR_MAPS}"
            )

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        pixels = self.backbone._checked(pixels)
        found = dict(zip(self._wanted, self.computed(pixels, plain)))
        features: dict[str, Tensor] = {}
        for name in self._full:
            if name == "embedding":
                features[name] = found["pooler_output"].flatten(1)
            else:
                features[name] = of_tokens(name, found["last_hidden_state"], self._n_prefix)
        return features


_OUTPUTS = {"pooler_output": ("embedding",), "last_hidden_state": TOKENS}


def _check_features(model_type: str, n_prefix: int, full: Sequence[str], norm: Norm | None) -> None:
    """Raises a ValueError for a feature that a model of transformers has not."""
    what = f"transformers' {model_type}"
    if "projection" in full:
        raise ValueError(f"projection: {what} has none; ask for --features embedding")
    is_normed = model_type not in _UNNORMED
    if norm is not None and (norm == "final") != is_normed:
        given = "after" if is_normed else "before"
        other = "--norm final" if is_normed else "--norm none"
        raise ValueError(f"norm: tokens of {what} are there {given} its norm only: {other}")
    if "cls" in full and not n_prefix:
        raise ValueError(f"cls: {what} has no class token; ask for --features embedding or pooled")


def _check_same_weights(backbone: TransformersBackbone, full: nn.Module) -> None:
    """Refuses a backbone whose weights are not those of the checkpoint it was loaded from."""
    theirs = full.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        other = theirs.get(name, theirs.get(name.partition(".")[2]))
        if other is not None and not torch.equal(other, tensor):
            raise ValueError(
                f"the weight {name!r} of this backbone is not its checkpoint's, and the rest of "
                "the model is of the checkpoint: save transformers' full model with the changed "
                f"weights and give its directory, or {POOLED_OR_MAPS}"
            )
