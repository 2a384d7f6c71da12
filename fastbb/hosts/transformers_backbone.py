"""Backbones of transformers that fastbb does not compute itself, behind fastbb's API.

`TransformersBackbone` holds transformers' own module and gives it what the native families have:
loading with clear errors, outputs that can be changed, `prepare`, `verify`, feature extraction.
This module needs the extra `transformers` when a backbone is built, not when it is imported.

Upstream: transformers 5.23 `backbone_utils.py` and `models/*/modeling_*.py`.
"""

import copy
import inspect
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..backbone.checkpoint import LoadingInfo, StateDict, shapes_only
from ..backbone.configuration import BackboneConfig
from ..backbone.output import BackboneOutput
from ..backbone.registry import Family, Upstream, register
from ..models.stage_norms import NORMS, UntrainedNorms
from ..weights.watch import has_foreign_forward
from .model_types import BACKBONE_TYPES
from .transformers_config import TransformersBackboneConfig, config_class, transformers
from .transformers_loading import load_module, quiet


class TransformersBackbone(UntrainedNorms):
    """A backbone computed by transformers' own module, which is `model`.

    Stages, maps, hidden states and flags are those of transformers' class: a ViT's hidden states
    are tokens [B, N, C], and so are its maps where `reshape_hidden_states` is False. Flags are read
    when the backbone is built. A norm of a stage that the checkpoint lacks has weight 1 and bias 0,
    with a warning.

    Better than upstream: `out_features` may change after loading (upstream raises a KeyError for
    Hiera); `channels` are those of the maps (upstream's differ for HGNetV2, PP-LCNet and UVDoc);
    FocalNet's default configuration builds; Pixio's final norm is loaded.
    """

    config_class = TransformersBackboneConfig
    config: TransformersBackboneConfig

    def __init__(self, config: TransformersBackboneConfig) -> None:
        super().__init__(config)
        self.stage_names = list(self.config.stage_names or ())
        if getattr(self.config, "num_experts", 1) > 1:
            raise ValueError(
                f"this {self.config.model_type} is a mixture of experts, which needs the number of "
                "a dataset with every image: fastbb has none for it"
            )
        # upstream builds norms of maps for the selected stages; these may change
        try:
            model = _model_class(self.config)(self.config.upstream(self.stage_names))
        except KeyError as error:
            raise ValueError(f"transformers does not know the activation {error}") from error
        self._set_model(model)

    def _set_model(self, model: nn.Module) -> None:
        self.model = model
        self.has_attentions = bool(getattr(model, "has_attentions", True))
        model.config = self.config.upstream()  # type: ignore[assignment]  # not a module
        self._selected = _Selected()

    @cached_property
    def num_features(self) -> list[int]:  # type: ignore[override]  # computed at first use
        """Channels of each stage."""
        model = _model_class(self.config)
        height, width = self.default_size
        with shapes_only(), torch.no_grad():
            pixels = torch.empty(1, self.config.num_channels, height, width)
            try:
                maps = model(self.config.upstream(self.stage_names)).eval()(pixels).feature_maps
            except RuntimeError:  # it has tensors that are made on a CPU
                return list(self.model.num_features)  # type: ignore[arg-type]  # upstream's list
        return [m.shape[1] if m.ndim == 4 else m.shape[2] for m in maps]

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        pixel_values = self._checked(pixel_values)
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        options = {name: v for name, v in kwargs.items() if name in self._options and v is not None}
        more = output_hidden_states or output_attentions or options
        only_maps = not (more or getattr(config, "return_class_token", False))
        if self._engine is not None and only_maps:
            output = BackboneOutput(self._engine(pixel_values))
        else:
            if output_hidden_states:
                options["output_hidden_states"] = True
            if output_attentions and self.has_attentions:
                options["output_attentions"] = True
            found = self._call(pixel_values, self.out_features, **options)
            output = BackboneOutput({n: v for n, v in found.items() if v is not None})
            output["feature_maps"] = tuple(found.feature_maps or ())
            if output_hidden_states and not isinstance(output_hidden_states, bool):
                named: Any = dict(zip(self.stage_names, output.hidden_states or ()))
                output["hidden_states"] = self._hidden_states(named, output_hidden_states)
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Computes the maps of the wanted stages; upstream runs all stages."""
        if not wanted:
            return {}
        return dict(zip(wanted, self._call(pixel_values, wanted).feature_maps))

    def _call(self, pixel_values: Tensor, stages: Sequence[str], **options: Any) -> Any:
        model = self._model_for(stages)
        if len(pixel_values):
            return model(pixel_values, return_dict=True, **options)
        # many models of transformers cannot reshape an empty batch
        one = model(pixel_values.new_zeros(1, *pixel_values.shape[1:]), return_dict=True, **options)
        return tree_map(lambda x: x[:0] if isinstance(x, Tensor) else x, one)

    def _model_for(self, stages: Sequence[str]) -> Any:
        """transformers' module that returns these stages; its parts are those of `model`."""
        model: Any = self.model
        if model.config._out_features == list(stages):
            return model
        if has_foreign_forward(model):  # it is bound to this very module
            model.config.out_features = list(stages)
            return model
        other = self._selected.model
        if other is None or other.config._out_features != list(stages):
            other = copy.copy(model)
            other.config = copy.copy(model.config)
            other.config.out_features = list(stages)
            self._selected.model = other
        other.training = model.training
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_selected": _Selected()}

    @cached_property
    def _options(self) -> set[str]:
        """Names of the further arguments of upstream's forward."""
        parameters = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        return {*parameters} - {"self", "pixel_values", "kwargs", *_ARGUMENTS}

    def _checked(self, pixel_values: Any) -> Tensor:
        pixel_values = super()._checked(pixel_values)
        size, config = tuple(pixel_values.shape[2:]), self.config
        if BACKBONE_TYPES[config.model_type].size == "fixed" and size != self.default_size:
            raise ValueError(
                f"transformers' {config.model_type} takes images of its configured size only, "
                f"{self.default_size[0]}x{self.default_size[1]}, got {size[0]}x{size[1]}"
            )
        patch = getattr(config, "patch_size", 1)
        patch = [patch] * 2 if isinstance(patch, int) else patch
        if any(side < part for side, part in zip(size, patch)):
            raise ValueError(
                f"the image must be at least one patch of {patch[0]}x{patch[1]} pixels, got "
                f"{size[0]}x{size[1]}"
            )
        windows = _WINDOWS.get(config.model_type, lambda config: 1)(config)
        if any(side % (part * windows) for side, part in zip(size, patch)) and windows > 1:
            raise ValueError(
                f"transformers' {config.model_type} cuts its patches of {patch[0]}x{patch[1]} "
                f"pixels into {windows}x{windows} windows: height and width must be divisible by "
                f"{patch[0] * windows} and {patch[1] * windows}, got {size[0]}x{size[1]}"
            )
        return pixel_values

    @classmethod
    def own_config(cls, config: Any) -> Any:
        model_type = getattr(config, "model_type", "")
        if isinstance(config, BackboneConfig) or model_type not in cls.config_class.model_types():
            return super().own_config(config)
        return cls.config_class.from_dict(config.to_dict())

    @classmethod
    def config_classes(cls) -> dict[str, type[BackboneConfig]]:
        return dict.fromkeys(cls.config_class.model_types(), cls.config_class)

    @classmethod
    @torch.inference_mode(False)
    def from_state_dict(  # type: ignore[override]  # returns the same
        cls,
        config: TransformersBackboneConfig,
        state: StateDict,
        *,
        name: str = "the checkpoint",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> tuple["TransformersBackbone", LoadingInfo]:
        with shapes_only():
            backbone = cls(config)
        upstream = config.upstream(backbone.stage_names)
        model, loaded = load_module(backbone.model, upstream, state, name, dtype)
        for norm in loaded.initialized:
            value = 1.0 if norm.endswith("weight") else 0.0
            model.get_parameter(norm).data.fill_(value)
        backbone._set_model(model.to(device or "cpu"))
        backbone.eval()
        backbone.report_loading(name, loaded)
        return backbone, loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors with transformers' own method.

        Args:
            save_directory: created if it does not exist.

        Raises:
            ValueError: adapters or other layers have weights that a checkpoint has no names for.
        """
        self.check_own_weights()
        unselected = [n for n in self.stage_names if n not in self.out_features]
        left_out = tuple(f"{NORMS}{name}." for name in unselected)
        model = self._model_for(self.out_features)
        state = {n: t for n, t in model.state_dict().items() if not n.startswith(left_out)}
        if "pixio.layernorm.weight" in state:  # upstream swaps the two when it loads them
            for part in ("weight", "bias"):
                state[f"pixio.layernorm.{part}"] = state[f"layernorm.{part}"].clone()
        with quiet():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            model.save_pretrained(save_directory, state_dict=state)


# windows along a side of the image, of detectors' backbones
_WINDOWS: dict[str, Callable[[Any], int]] = {
    "rf_detr_dinov2": lambda config: config.num_windows,
    "lw_detr_vit": lambda config: math.isqrt(config.num_windows),
}


class _Selected:
    """Holds transformers' module with other stages selected; shared by copies of a backbone."""

    model: Any = None


_ARGUMENTS = ("output_hidden_states", "output_attentions", "return_dict", "args")


def _model_class(config: TransformersBackboneConfig) -> Any:
    mapping: Any = transformers().AutoBackbone._model_mapping
    return mapping[config_class(config.model_type)]


def _upstream(backbone: TransformersBackbone) -> Upstream:
    """transformers' module with the weights of a backbone."""
    module = _model_class(backbone.config)(backbone.config.upstream())
    own = module.state_dict()
    module.load_state_dict({n: t for n, t in backbone.model.state_dict().items() if n in own})
    name = f"transformers {transformers().__version__}, {type(module).__name__}"
    return Upstream(name, module.eval(), _maps)


def _maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    return list(module(pixel_values).feature_maps)


register(
    Family(
        backbone=TransformersBackbone,
        configs=(TransformersBackboneConfig,),
        upstream=_upstream,
    )
)
