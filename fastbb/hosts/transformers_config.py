"""Configurations of the backbones that transformers computes."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any, TypeVar

from ..backbone.configuration import DECIDE_NOTHING, BackboneConfig
from ..backbone.hub import unwrap_head
from ..backbone.registry import FAMILIES
from .model_types import BACKBONE_TYPES, OLDEST

Config = TypeVar("Config", bound="TransformersBackboneConfig")

_SELECTION = {"out_features", "out_indices"}
_ONLY_MAPS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
# fields that a model of transformers reads, and its configuration does not declare
_UNDECLARED = {"sapiens2": ("return_class_token",)}
# written into every configuration by transformers
_NOT_OF_THE_MODEL = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type"),
    *("stage_names", "transformers_version"),
}


class CannotComputeError(ImportError):
    """transformers, or a package that it needs for a backbone, is missing or too old."""

    exit_code = 2  # of a command: the same as of a wrong name


def transformers() -> Any:
    """Imports transformers.

    Raises:
        CannotComputeError: it is not installed; the message says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise CannotComputeError(
            "this backbone is computed by transformers, which is not installed: "
            f"pip install 'transformers>={OLDEST}' (the extra fastbb[transformers])"
        ) from error
    return transformers


def config_class(model_type: str) -> Any:
    """transformers' configuration class of a model type.

    Raises:
        CannotComputeError: transformers is missing, too old, or lacks NATTEN for Dinat.
    """
    library = transformers()
    needs = BACKBONE_TYPES[model_type].since
    if model_type not in library.CONFIG_MAPPING:
        raise CannotComputeError(
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
        raise CannotComputeError(
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
        CannotComputeError: transformers is not installed, or too old for the type.
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
        self.model_type = model_type  # type: ignore[misc]  # one class serves all types
        fields.pop("stage_names", None)  # derived
        fields = _with_lists(fields)
        stage_names = _made(model_type, fields).stage_names
        self._set_stages(list(stage_names), out_features, out_indices)
        # windows of RF-DETR follow from the selected stages, where no field says them
        upstream = _made(model_type, {**fields, "out_features": self.out_features})
        values = upstream.to_dict()
        for name in ("model_type", "stage_names", *_SELECTION):
            values.pop(name, None)
        for name, value in _with_lists(values).items():
            setattr(self, name, value)

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
        known = {*config_class(model_type)().to_dict(), *values, *_UNDECLARED.get(model_type, ())}
        if unknown := sorted(overrides.keys() - known):
            fields = ", ".join(sorted(known - _NOT_OF_THE_MODEL))
            raise TypeError(
                f"a configuration of {model_type!r} has no field {', '.join(unknown)}; "
                f"its fields are {fields}"
            )
        return cls(model_type, **{**values, **overrides})

    def deciding_fields(self) -> dict[str, Any]:
        of_every_model = transformers().PreTrainedConfig().to_dict().keys()
        left_out = {*of_every_model, *DECIDE_NOTHING, *_NOT_OF_THE_MODEL}
        values = {n: v for n, v in sorted(self.to_dict().items()) if n not in left_out}
        return {"model_type": self.model_type, **values}

    def upstream(self, stages: Sequence[str] | None = None) -> Any:
        """transformers' configuration with the same fields.

        Args:
            stages: names of the stages to return; default: those of this configuration.
        """
        chosen = self.out_features if stages is None else stages
        values = self.to_dict() | {"out_features": list(chosen or ()), "out_indices": None}
        values |= _ONLY_MAPS  # calls ask for more
        return config_class(self.model_type).from_dict(values)


def _made(model_type: str, fields: dict[str, Any]) -> Any:
    """transformers' configuration with these fields.

    Raises:
        ValueError: transformers refuses them.
    """
    try:
        return config_class(model_type).from_dict(fields)
    except CannotComputeError:
        raise
    except Exception as error:  # validators of transformers raise classes of their own
        raise ValueError(f"transformers refuses the configuration: {error}") from error


def _with_lists(value: Any) -> Any:
    """Returns a value with lists for tuples, which some of transformers' models add to lists."""
    if isinstance(value, (list, tuple)):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return value
