"""Backbones of transformers that fastbb does not compute itself, behind fastbb's API.

`TransformersBackbone` holds transformers' own module and gives it what the native families have:
loading with clear errors, outputs that can be changed, `prepare`, `verify`, feature extraction.
This module needs the extra `transformers` when a backbone is built, not when it is imported.

Upstream: transformers 5.23 `backbone_utils.py` and `models/*/modeling_*.py`.
"""

import copy
import importlib.metadata
import inspect
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbb_kernels.warning import warn_caller

from ..backbone.base import Backbone
from ..backbone.checkpoint import (
    LoadingInfo,
    StateDict,
    as_dtype,
    check_dtypes,
    rename,
    shapes_only,
    some,
)
from ..backbone.configuration import DECIDE_NOTHING, BackboneConfig
from ..backbone.hub import unwrap_head
from ..backbone.output import BackboneOutput
from ..backbone.registry import FAMILIES, Family, Upstream, register
from .model_types import BACKBONE_TYPES, OLDEST

Config = TypeVar("Config", bound="TransformersBackboneConfig")

# norms of maps, which exist for the selected stages only, and which classifiers lack
_STAGE_NORMS = "hidden_states_norms."
_SELECTION = {"out_features", "out_indices"}
# of every configuration of transformers: written by it, or said by a call
_NOT_OF_THE_MODEL = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type"),
    *("stage_names", "transformers_version"),
}


def transformers() -> Any:
    """Imports transformers.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this backbone is computed by transformers, which is not installed: "
            f"pip install 'transformers>={OLDEST}' (the extra fastbb[transformers])"
        ) from error
    return transformers


def _config_class(model_type: str) -> Any:
    """transformers' configuration class of a model type.

    Raises:
        ImportError: transformers is missing, too old, or lacks NATTEN for Dinat.
    """
    library = transformers()
    needs = BACKBONE_TYPES[model_type].since
    if model_type not in library.CONFIG_MAPPING:
        raise ImportError(
            f"model_type {model_type!r} needs transformers {needs} or later, installed is "
            f"{library.__version__}: pip install -U transformers"
        )
    if model_type == "dinat":
        _check_natten()
    return library.CONFIG_MAPPING[model_type]


def _check_natten() -> None:
    try:
        version = importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or tuple(map(int, version.split(".")[:2])) >= (0, 20):
        raise ImportError(
            "model_type 'dinat' needs NATTEN below 0.20, whose functions transformers calls and "
            f"later versions removed; installed is {version or 'none'}"
        )


def wrapped_types() -> tuple[str, ...]:
    """Model types that transformers' own module computes: those of no native family."""
    native = {
        config.model_type
        for family in FAMILIES
        for config in family.configs
        if config is not TransformersBackboneConfig
    }
    return tuple(name for name in BACKBONE_TYPES if name not in native)


class TransformersBackboneConfig(BackboneConfig):
    """Configuration of a backbone that transformers computes: the fields of transformers' class.

    Args:
        model_type: one of the types of transformers' AutoBackbone without a native family.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return; default: the last.
        fields: of transformers' class.

    Raises:
        ImportError: transformers is not installed, or too old for the type.
        ValueError: transformers refuses the fields.
    """

    num_channels = 3  # of types whose configuration has no such field

    def __init__(
        self,
        model_type: str,
        *,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        config_class = _config_class(model_type)
        self.model_type = model_type  # type: ignore[misc]  # one class serves all types
        fields.pop("stage_names", None)  # derived
        try:
            upstream = config_class.from_dict(_with_lists(fields))
        except Exception as error:  # validators of transformers raise classes of their own
            raise ValueError(f"transformers refuses the configuration: {error}") from error
        values = upstream.to_dict()
        for name in ("model_type", *_SELECTION):
            values.pop(name, None)
        for name, value in _with_lists(values).items():
            setattr(self, name, value)
        self._set_stages(list(upstream.stage_names), out_features, out_indices)

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        return wrapped_types()

    @classmethod
    def from_dict(cls: type[Config], config_dict: dict[str, Any], **overrides: Any) -> Config:
        selected = {n: config_dict[n] for n in _SELECTION if config_dict.get(n) is not None}
        values = {**unwrap_head(config_dict), **selected}
        if _SELECTION & overrides.keys():
            for name in _SELECTION:
                values.pop(name, None)
        model_type = values.pop("model_type")
        known = {*_config_class(model_type)().to_dict(), *values}
        if unknown := sorted(overrides.keys() - known):
            fields = ", ".join(sorted(known - _NOT_OF_THE_MODEL))
            raise TypeError(
                f"a configuration of {model_type!r} has no field {', '.join(unknown)}; "
                f"its fields are {fields}"
            )
        return cls(model_type, **{**values, **overrides})

    def deciding_fields(self) -> dict[str, Any]:
        declared: set[str] = set()
        library = transformers()
        for base in _config_class(self.model_type).__mro__:
            if issubclass(library.PreTrainedConfig, base):
                break
            declared |= set(vars(base).get("__annotations__", ()))
        names = sorted(n for n in declared - DECIDE_NOTHING if not n.startswith("_"))
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return copy.deepcopy({"model_type": self.model_type, **values})

    def upstream(self, stages: Sequence[str] | None = None) -> Any:
        """transformers' configuration with the same fields.

        Args:
            stages: names of the stages to return; default: those of this configuration.
        """
        values = self.to_dict() | {"out_features": list(stages or self.out_features or ())}
        values["out_indices"] = None
        return _config_class(self.model_type).from_dict(values)


def _with_lists(value: Any) -> Any:
    """Returns a value with lists for tuples, which some of transformers' models add to lists."""
    if isinstance(value, (list, tuple)):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return value


class TransformersBackbone(Backbone):
    """A backbone computed by transformers' own module, which is `model`.

    Stages, maps, hidden states and flags are those of transformers' class: a ViT's hidden states
    are tokens [B, N, C], and so are its maps where `reshape_hidden_states` is False. A norm of a
    stage that the checkpoint lacks has weight 1 and bias 0, with a warning.

    Better than upstream: `out_features` may change after loading (upstream raises a KeyError for
    Hiera); `channels` are those of the maps (upstream's differ for HGNetV2, PP-LCNet and UVDoc);
    FocalNet's default configuration builds; Pixio's final norm is loaded.
    """

    config_class = TransformersBackboneConfig
    config: TransformersBackboneConfig
    _untrained_norms: frozenset[str] = frozenset()

    def __init__(self, config: TransformersBackboneConfig) -> None:
        super().__init__(config)
        self.stage_names = list(self.config.stage_names or ())
        # upstream builds norms of maps for the selected stages; these may change
        self._set_model(_model_class(self.config)(self.config.upstream(self.stage_names)))

    def _set_model(self, model: nn.Module) -> None:
        self.model = model
        self.has_attentions = bool(getattr(model, "has_attentions", True))
        model.config = self.config.upstream()  # type: ignore[assignment]  # not a module
        self._selected: tuple[list[str], Any] | None = None

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
        only_maps = not (output_hidden_states or output_attentions or options)
        if self._engine is not None and only_maps:
            output = BackboneOutput(self._engine(pixel_values))
        else:
            if output_hidden_states:
                options["output_hidden_states"] = True
            if output_attentions and self.has_attentions:
                options["output_attentions"] = True
            found = self._upstream_output(pixel_values, **options)
            output = BackboneOutput({n: v for n, v in found.items() if v is not None})
            if output_hidden_states and not isinstance(output_hidden_states, bool):
                named: Any = dict(zip(self.stage_names, output.hidden_states or ()))
                output["hidden_states"] = self._hidden_states(named, output_hidden_states)
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._upstream_output(pixel_values).feature_maps)

    def _upstream_output(self, pixel_values: Tensor, **options: Any) -> Any:
        return self._selected_model()(pixel_values, return_dict=True, **options)

    def _selected_model(self) -> Any:
        """transformers' module with the selected stages; its parts are those of `model`."""
        wanted = list(self.out_features)
        model: Any = self.model
        if model.config._out_features == wanted:
            return model
        if self._selected is None or self._selected[0] != wanted:
            other = copy.copy(model)  # the same parts, with a configuration of its own
            other.config = self.config.upstream()
            self._selected = wanted, other
        return self._selected[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_selected": None}

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
        return pixel_values

    def outputs_changed(self) -> None:
        names = [name for name in self.out_features if name in self._untrained_norms]
        if names:
            self._untrained_norms -= set(names)
            warn_caller(
                f"The checkpoint has no norm for {', '.join(names)}: those feature maps are "
                "normalized with weight 1 and bias 0, as transformers does."
            )

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
        model_class: Any = type(backbone.model)
        what = f"{model_class.__name__} from {name!r}"
        expected = backbone.model.state_dict()
        weights = [n for n, tensor in expected.items() if tensor.is_floating_point()]
        if config.model_type in _DETECTORS:
            state = rename(state, _detector_name)
        found, prefix, outside = inside(state, _names(backbone.model), what)
        check_dtypes(found, weights, what)
        floating = as_dtype(dtype) or _dtype_of(found.values())
        with _quiet():
            try:
                model, info = model_class.from_pretrained(
                    None,
                    config=config.upstream(backbone.stage_names),
                    state_dict=found,
                    output_loading_info=True,
                    dtype=floating,
                )
            except RuntimeError as error:  # of shapes
                raise ValueError(f"The weights do not fit {what}. {error}") from error
        _mend_pixio(model, found)
        initialized = sorted(n for n in info["missing_keys"] if n.startswith(_STAGE_NORMS))
        counters = {n for n in info["missing_keys"] if n.endswith("num_batches_tracked")}
        missing = sorted(info["missing_keys"] - {*initialized, *counters} - _mended(model))
        shapes = [
            f"{n}: {list(a)} in the checkpoint, {list(b)} in the model"
            for n, a, b in info["mismatched_keys"]
        ]
        if missing or shapes:
            problems = [f"missing: {some(missing)}"] if missing else []
            problems += [f"of the wrong shape: {some(shapes)}"] if shapes else []
            raise ValueError(f"The weights do not fit {what}. " + "\n".join(problems))
        for norm in initialized:
            value = 1.0 if norm.endswith("weight") else 0.0
            model.get_parameter(norm).data.fill_(value)
        backbone._set_model(model.to(device or "cpu"))
        backbone.eval()
        loaded = LoadingInfo(prefix, sorted({*outside, *info["unexpected_keys"]}), initialized)
        backbone.report_loading(name, loaded)
        backbone._untrained_norms = frozenset(norm.split(".")[1] for norm in initialized)
        backbone.outputs_changed()
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
        left_out = tuple(f"{_STAGE_NORMS}{name}." for name in unselected)
        model = self._selected_model()
        state = {n: t for n, t in model.state_dict().items() if not n.startswith(left_out)}
        if "pixio.layernorm.weight" in state:  # upstream swaps the two when it loads them
            for part in ("weight", "bias"):
                state[f"pixio.layernorm.{part}"] = state[f"layernorm.{part}"].clone()
        with _quiet():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            model.save_pretrained(save_directory, state_dict=state)


_ARGUMENTS = ("output_hidden_states", "output_attentions", "return_dict", "args")


def _model_class(config: TransformersBackboneConfig) -> Any:
    mapping: Any = transformers().AutoBackbone._model_mapping
    return mapping[_config_class(config.model_type)]


def _dtype_of(tensors: Iterable[Tensor]) -> torch.dtype:
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


# their detectors save layers under older names, which upstream renames for the detector only
_DETECTORS = ("lw_detr_vit", "rf_detr_dinov2")
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".attention.output.": ".attention.o_proj.",
}


def _detector_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _names(model: Any) -> set[str]:
    """Names of a module's tensors, in memory and in files of transformers."""
    state = model.state_dict()
    names = set(state)
    with suppress(Exception):  # internals of transformers, which may move
        from transformers.core_model_loading import revert_weight_conversion

        names |= set(revert_weight_conversion(model, state))
    return names


def inside(
    state: StateDict, expected: Collection[str], what: str
) -> tuple[StateDict, str, list[str]]:
    """Finds a module of transformers in a checkpoint, whose names may be older than the module's.

    Args:
        state: names and tensors of the checkpoint.
        expected: names of the module's tensors, some of which the checkpoint has.
        what: the module, for the error.

    Returns:
        Its tensors without the prefix, the prefix, and the names of the others.

    Raises:
        ValueError: the module is not in the checkpoint, or more than once.
    """
    votes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                votes["".join(f"{part}." for part in parts[:start])] += 1
    if not votes:
        raise ValueError(
            f"The checkpoint holds no {what}: it has none of its tensors, with or without a "
            f"prefix. It holds {some(sorted(state))}"
        )
    best = [prefix for prefix, count in votes.items() if count == max(votes.values())]
    if len(best) > 1:
        raise ValueError(f"The checkpoint holds more than one {what}: under {sorted(best)}")
    (prefix,) = best
    found = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return found, prefix, sorted(n for n in state if not n.startswith(prefix))


def _mended(model: Any) -> set[str]:
    return {"layernorm.weight", "layernorm.bias"} if hasattr(model, "pixio") else set()


@torch.no_grad()
def _mend_pixio(model: Any, state: StateDict) -> None:
    """Gives a PixioBackbone the final norm of its checkpoint.

    Upstream loads the norm of a PixioModel into another layer and leaves the norm of the maps as
    it was built, and swaps the two of a checkpoint that a PixioBackbone saved.
    """
    if not hasattr(model, "pixio"):
        return
    for part in ("weight", "bias"):
        norm = state[f"layernorm.{part}"]
        model.get_parameter(f"layernorm.{part}").copy_(norm)
        whole = state.get(f"encoder.layernorm.{part}", norm)
        model.get_parameter(f"pixio.layernorm.{part}").copy_(whole)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from drawing progress bars and tables of names, which errors here have."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
