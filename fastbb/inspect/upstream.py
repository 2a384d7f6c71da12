"""The model that a backbone is held to: its own library's, with the same weights."""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels import use_impl

from ..backbone.base import Backbone
from ..backbone.checkpoint import matches
from ..backbone.registry import TransformersModel, Upstream, family_of
from ..engine.measuring import describe

# only maps, whatever the user's configuration asks for besides
_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


def upstream_of(backbone: Backbone) -> tuple[Upstream, str | None]:
    """The model that a backbone is held to, with its weights; why it is not upstream's, or None.

    The family says which model that is. Where its library is missing or raises, our own plain
    PyTorch stands in. Of a backbone on the meta device it is on that device too.

    Raises:
        ValueError: the family names no model, or the backbone has weights that no such model has.
    """
    backbone.check_own_weights()
    family, _ = family_of(backbone.config.model_type)
    if family.upstream is None:
        raise ValueError(
            f"{type(backbone).__name__} has nothing to be held to: its family names no upstream "
            "model (Family.upstream); give reference=, a module that returns the same maps"
        )
    # modules draw their first weights at random, on the device that is the default
    is_meta = any(parameter.is_meta for parameter in backbone.parameters())
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_meta else "cpu"):
        try:
            named = family.upstream(backbone)
            if isinstance(named, TransformersModel):
                named = _of_transformers(backbone, named)
            return named, None
        except Exception as error:  # whatever a missing library, or another version of it, raises
            return _ours(backbone), describe(error)


@torch.no_grad()
def run_upstream(upstream: Upstream, pixel_values: Tensor) -> list[Tensor]:
    """The maps [B, C, h, w], in the dtype of the input and computed in it, by a copy."""
    module = copy.deepcopy(upstream.module).to(pixel_values.device, pixel_values.dtype)
    return upstream.maps(module, pixel_values)


def upstream_from(module: nn.Module, backbone: Backbone) -> Upstream:
    """A module that the user holds for the truth.

    Args:
        module: returns an object with `feature_maps`, or a list, tuple or dict of maps
            [B, C, h, w], those of `backbone.out_features` in that order.
        backbone: whose maps they should be.

    Raises:
        ValueError: it is no module, or (when it runs) returns something else.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            "reference must be 'auto' or a module that returns the same maps, "
            f"got {type(module).__name__}"
        )

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        found = _listed(module(pixel_values))
        if len(found) != len(backbone.out_features):
            raise ValueError(
                f"reference must return the maps of {', '.join(backbone.out_features)}, "
                f"got {len(found)} maps; `backbone.out_indices` chooses what is compared"
            )
        return found

    return Upstream(type(module).__name__, copy.deepcopy(module).eval(), maps)


def _listed(output: Any) -> list[Tensor]:
    maps = getattr(output, "feature_maps", output)
    maps = list(maps.values()) if isinstance(maps, Mapping) else maps
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) for m in maps):
        raise ValueError(
            "reference must return `.feature_maps`, or a list, tuple or dict of maps [B, C, h, w], "
            f"got {type(output).__name__}"
        )
    return list(maps)


def _of_transformers(backbone: Backbone, named: TransformersModel) -> Upstream:
    """transformers' model with the backbone's weights; raises whatever transformers raises."""
    library = import_module(named.package)
    fields = {**backbone.config.to_dict(), **_OUTPUT}
    config = getattr(library, f"{named.name}Config").from_dict(fields)
    class_name = f"{named.name}{'Backbone' if named.maps is None else 'Model'}"
    module = getattr(library, class_name)(config)
    state = named.state(backbone)
    # it has norms for the selected stages only, and may lack the final one
    other = {
        name
        for name in state.keys() - module.state_dict()
        if matches(name, backbone.optional_weights)
    }
    module.load_state_dict({n: tensor for n, tensor in state.items() if n not in other})
    label = f"transformers {import_module('transformers').__version__}, {class_name}"
    return Upstream(label, module.eval(), named.maps or _transformers_maps)


def _transformers_maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    return list(module(pixel_values).feature_maps)


def _ours(backbone: Backbone) -> Upstream:
    module = type(backbone).from_config(backbone.config)
    module.load_state_dict(backbone.state_dict())

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        with use_impl("eager"):
            return list(module(pixel_values, return_dict=True).feature_maps)

    return Upstream("fastbb's own plain PyTorch", module.eval(), maps)
