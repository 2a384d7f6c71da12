"""What a backbone is held to: its own library's model with the same weights."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels import use_impl

from ..backbone.base import Backbone
from ..models.resnet import ResNetBackbone
from ..models.swin import (
    MaskFormerSwinConfig,
    SwinBackbone,
    TorchvisionSwinConfig,
    torchvision_swin,
)
from ..models.timm import TimmBackbone
from ..weights.folding import is_folded

_STAGE_NORMS = "hidden_states_norms."
_TORCHVISION_EPS = 1e-5
# only maps, whatever the user's configuration asks for besides
_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


@dataclass(frozen=True)
class Upstream:
    """A module that computes the truth, and how to read it.

    Attributes:
        name: whose it is, for a report.
        why: why it is this one, where another would be better, or None.
        module: eval(), of its own; runs only as a copy, because some change when they run.
        maps: the maps [B, C, h, w] that a copy of the module gives for [B, C, H, W].
    """

    name: str
    why: str | None
    module: nn.Module
    maps: Callable[[nn.Module, Tensor], list[Tensor]]

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps [B, C, h, w], in the dtype of the input and computed in it."""
        module = copy.deepcopy(self.module).to(pixel_values.device, pixel_values.dtype)
        return self.maps(module, pixel_values)


def upstream_of(backbone: Backbone) -> Upstream:
    """The model of the library that a backbone's semantics are of, with the backbone's weights.

    Where that library is missing or has no such model, our own plain PyTorch.
    """
    if isinstance(backbone, TimmBackbone):
        return _timm(backbone)
    # modules draw their first weights at random, on the device that is the default
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            return _of_library(backbone)
        except Exception as error:  # whatever a missing library, or another version of it, raises
            first_line = str(error).partition("\n")[0]
            return _ours(backbone, f"{type(error).__name__}: {first_line}")


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

    return Upstream(type(module).__name__, None, copy.deepcopy(module).eval(), maps)


def _listed(output: Any) -> list[Tensor]:
    maps = getattr(output, "feature_maps", output)
    maps = list(maps.values()) if isinstance(maps, Mapping) else maps
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) for m in maps):
        raise ValueError(
            "reference must return `.feature_maps`, or a list, tuple or dict of maps [B, C, h, w], "
            f"got {type(output).__name__}"
        )
    return list(maps)


def _timm(backbone: TimmBackbone) -> Upstream:
    module = copy.deepcopy(backbone._backbone)
    for part in module.modules():
        if is_folded(part):
            del part.forward
    positions = [backbone._built.index(i % len(backbone.stage_names)) for i in backbone.out_indices]

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        found = module(pixel_values)
        if getattr(module, "output_fmt", "NCHW") == "NHWC":
            found = [x.permute(0, 3, 1, 2) for x in found]
        return [found[position] for position in positions]

    name = f"timm {import_module('timm').__version__}, {backbone.config.backbone}"
    return Upstream(name, None, module, maps)


def _of_library(backbone: Backbone) -> Upstream:
    """The model of transformers or torchvision, imported here; raises whatever they raise."""
    config = backbone.config
    if isinstance(config, TorchvisionSwinConfig):
        return _torchvision_swin(backbone, config)
    if isinstance(config, MaskFormerSwinConfig):
        place, name = "transformers.models.maskformer", "MaskFormerSwin"
        state = backbone.to_checkpoint_names()
    elif isinstance(backbone, (SwinBackbone, ResNetBackbone)):
        place, name = "transformers", type(backbone).__name__.removesuffix("Backbone")
        state = backbone.state_dict()
    else:
        raise ValueError(f"no library is known for {type(backbone).__name__}")
    library = import_module(place)
    own_config = getattr(library, f"{name}Config").from_dict({**config.to_dict(), **_OUTPUT})
    module = getattr(library, f"{name}Backbone")(own_config)
    # it has norms for the selected stages only
    unselected = {n for n in state.keys() - module.state_dict() if n.startswith(_STAGE_NORMS)}
    module.load_state_dict({n: tensor for n, tensor in state.items() if n not in unselected})
    label = f"transformers {import_module('transformers').__version__}, {name}Backbone"
    return Upstream(label, None, module.eval(), _transformers_maps)


def _transformers_maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    return list(module(pixel_values).feature_maps)


def _torchvision_swin(backbone: Backbone, config: TorchvisionSwinConfig) -> Upstream:
    swin = import_module("torchvision.models.swin_transformer")
    patch = config.patch_size
    module = swin.SwinTransformer(
        patch_size=[patch, patch] if isinstance(patch, int) else list(patch),
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=[config.window_size, config.window_size],
        mlp_ratio=config.mlp_ratio,
        num_classes=1,
    )
    # our tensors back into theirs, by the views that loading from them takes
    own, (_, views) = backbone.state_dict(), torchvision_swin(module.state_dict())
    with torch.no_grad():
        for name, view in views.items():
            if not name.endswith("relative_position_index"):
                view.copy_(own.pop(name))
    if own or config.layer_norm_eps != _TORCHVISION_EPS or config.hidden_act != "gelu":
        raise ValueError("torchvision has no such Swin")
    selected = backbone.out_indices

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        found, x = [], pixel_values
        assert isinstance(module.features, nn.Sequential)
        for i, layer in enumerate(module.features):
            x = layer(x)
            if i % 2 or i == 0:  # the others only merge patches
                found.append(x.permute(0, 3, 1, 2))
        return [found[index] for index in selected]

    name = f"torchvision {import_module('torchvision').__version__}, SwinTransformer"
    return Upstream(name, None, module.eval(), maps)


def _ours(backbone: Backbone, why: str) -> Upstream:
    module = type(backbone).from_config(backbone.config)
    module.load_state_dict(backbone.state_dict())

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        with use_impl("eager"):
            return list(module(pixel_values, return_dict=True).feature_maps)

    return Upstream("fastbb's own plain PyTorch", why, module.eval(), maps)
