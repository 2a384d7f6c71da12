"""Configurations: stages by name and index, config.json in transformers' format."""

import copy
import json
import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .hub import HubOptions, read_config

Config = TypeVar("Config", bound="BackboneConfig")
Choice = TypeVar("Choice")


class BackboneConfigMixin:
    """`out_features` and `out_indices` over `stage_names`, aligned with each other.

    Rules and messages are those of transformers 5.23 (`backbone_utils.BackboneConfigMixin`), except
    that values are validated before they are assigned, and an index below `-len(stage_names)` is a
    ValueError.
    """

    stage_names: list[str] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        """Sets both, deriving a missing one from the other; the last stage if both are None.

        Raises:
            ValueError: a value is invalid; the configuration is left as it was.
        """
        names = self.stage_names
        if isinstance(out_indices, tuple):
            out_indices = list(out_indices)
        _verify(names, out_features, out_indices)
        assert names is not None
        if out_features is None and out_indices is None:
            out_features, out_indices = [names[-1]], [len(names) - 1]
        elif out_indices is None and out_features is not None:
            out_indices = [names.index(name) for name in out_features]
        elif out_features is None and out_indices is not None:
            out_features = [names[index] for index in out_indices]
        assert out_features is not None and out_indices is not None
        self._out_features, self._out_indices = list(out_features), list(out_indices)

    def verify_out_features_out_indices(self) -> None:
        """Raises a ValueError if `out_features` and `out_indices` do not fit `stage_names`."""
        _verify(self.stage_names, self._out_features, self._out_indices)

    @property
    def out_features(self) -> list[str] | None:
        """Names of the stages whose feature maps are returned."""
        return self._out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.set_output_features_output_indices(out_features=out_features, out_indices=None)

    @property
    def out_indices(self) -> list[int] | None:
        """Indices into `stage_names` of the stages whose feature maps are returned."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        if isinstance(out_indices, (int, str)):
            raise ValueError(f"out_indices must be a list, got {type(out_indices)}")
        out_indices = list(out_indices) if out_indices is not None else None
        self.set_output_features_output_indices(out_features=None, out_indices=out_indices)


def _verify(names: list[str] | None, out_features: Any, out_indices: Any) -> None:
    if names is None:
        raise ValueError("Stage_names must be set for transformers backbones")
    if out_features is not None:
        _verify_features(names, out_features)
    if out_indices is not None:
        _verify_indices(names, out_indices)
    if out_features is not None and out_indices is not None:
        if len(out_features) != len(out_indices):
            raise ValueError(
                "out_features and out_indices should have the same length if both are set"
            )
        if out_features != [names[index] for index in out_indices]:
            raise ValueError(
                "out_features and out_indices should correspond to the same stages if both are set"
            )


def _verify_features(names: list[str], out_features: Any) -> None:
    if not isinstance(out_features, list):
        raise ValueError(f"out_features must be a list got {type(out_features)}")
    if any(name not in names for name in out_features):
        raise ValueError(
            f"out_features must be a subset of stage_names: {names} got {out_features}"
        )
    if len(out_features) != len(set(out_features)):
        raise ValueError(f"out_features must not contain any duplicates, got {out_features}")
    ordered = [name for name in names if name in out_features]
    if out_features != ordered:
        raise ValueError(
            "out_features must be in the same order as stage_names, "
            f"expected {ordered} got {out_features}"
        )


def _verify_indices(names: list[str], out_indices: Any) -> None:
    if not isinstance(out_indices, list):
        raise ValueError(f"out_indices must be a list, got {type(out_indices)}")
    integers = all(isinstance(i, int) and not isinstance(i, bool) for i in out_indices)
    if not integers or any(i not in range(-len(names), len(names)) for i in out_indices):
        raise ValueError(
            f"out_indices must be valid indices for stage_names {names}, got {out_indices}"
        )
    positive = tuple(i % len(names) for i in out_indices)
    if len(positive) != len(set(positive)):
        raise ValueError(
            f"out_indices must not contain any duplicates, got {out_indices}"
            f"(equivalent to {positive}))"
        )
    if positive != tuple(sorted(positive)):
        ordered = [index for _, index in sorted(zip(positive, out_indices))]
        raise ValueError(
            "out_indices must be in the same order as stage_names, "
            f"expected {ordered} got {out_indices}"
        )


_COMMON = ("output_hidden_states", "output_attentions", "return_dict")
# constructor fields that decide no value in inference
DECIDE_NOTHING = {
    *("out_features", "out_indices", "unknown", "initializer_range", "encoder_stride"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
}


class BackboneConfig(BackboneConfigMixin):
    """Base of the configurations: plain attributes, saved as transformers saves them.

    Unknown fields are kept as attributes and written back.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}

    # fields of every configuration in transformers (_COMMON); written only if set
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True

    def __init__(self, **unknown: Any) -> None:
        for name, value in unknown.items():
            if callable(getattr(type(self), name, None)):
                raise ValueError(f"{type(self).__name__} cannot have a field {name!r}: a method is")
            if name != "model_type":
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only if no such attribute exists
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BackboneConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, with transformers' names."""
        values = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        values |= {
            "model_type": self.model_type,
            "out_features": self._out_features,
            "out_indices": self._out_indices,
        }
        return copy.deepcopy(values)

    def deciding_fields(self) -> dict[str, Any]:
        """The fields that decide what a model with these weights computes in inference."""
        fields = signature(type(self).__init__).parameters.keys() - {"self", *DECIDE_NOTHING}
        values = {name: getattr(self, name) for name in sorted(fields)}
        return copy.deepcopy({"model_type": self.model_type, **values})

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        """Values of `model_type` that this class serves."""
        return (cls.model_type,)

    def to_json_string(self) -> str:
        """`to_dict` as JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls: type[Config], config_dict: dict[str, Any], **overrides: Any) -> Config:
        """Builds a configuration.

        Args:
            config_dict: as `to_dict` gives it; derived and unknown fields are allowed.
            overrides: fields that replace those of the dictionary. `out_features` or `out_indices`
                replaces both.

        Raises:
            TypeError: an override is not a field of this configuration.
        """
        values = dict(config_dict)
        known = {*signature(cls.__init__).parameters, *values, *cls.attribute_map, *_COMMON}
        if unknown := sorted(overrides.keys() - known):
            raise TypeError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields are "
                f"{', '.join(list(signature(cls.__init__).parameters)[1:-1])}"
            )
        if {"out_features", "out_indices"} & overrides.keys():
            values.pop("out_features", None)
            values.pop("out_indices", None)
        return cls(**{**values, **overrides})

    @classmethod
    def from_pretrained(
        cls: type[Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Config:
        """Reads config.json of a directory, bundled model or Hub repository; see `from_dict`.

        Raises:
            OSError: the model does not exist, or it has no config.json.
            ValueError: the file is another model's configuration.
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        values = read_config(pretrained_model_name_or_path, hub)
        known = cls.model_types()
        if values.get("model_type", known[0]) not in known:
            raise ValueError(
                f"{cls.__name__} reads model_type {' or '.join(map(repr, known))}, but "
                f"{str(pretrained_model_name_or_path)!r} is {values['model_type']!r}; "
                "AutoConfig.from_pretrained chooses the class by itself"
            )
        return cls.from_dict(values, **overrides)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes config.json into a directory, which is created if it does not exist."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    def _set_stages(self, names: list[str], out_features: Any, out_indices: Any) -> None:
        """Names the stages and selects the ones to return; every constructor ends with it."""
        self.stage_names = names
        self.set_output_features_output_indices(out_features, out_indices)


def hierarchical_stage_names(n_stages: int) -> list[str]:
    """transformers' names for a stem and `n_stages` stages."""
    return ["stem", *(f"stage{index}" for index in range(1, n_stages + 1))]


def check_integer(name: str, value: Any, minimum: int = 1) -> int:
    """Returns a value that is an integer of at least `minimum`, or raises a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    """Returns a value that is a number, or raises a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


def check_boolean(name: str, value: Any) -> bool:
    """Returns a value that is True or False, or raises a ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_integers(name: str, value: Any, at_least: int = 1) -> list[int]:
    """Returns `at_least` or more positive integers as a list, or raises a ValueError.

    transformers accepts more integers than there are stages, so this does too.
    """
    if not isinstance(value, (list, tuple)) or len(value) < at_least:
        raise ValueError(f"{name} must be a list of {at_least} integers, got {value!r}")
    return [check_integer(name, item) for item in value]


def check_size(name: str, value: Any) -> int | list[int]:
    """Returns one integer for both sides or two for (height, width), or raises a ValueError."""
    if not isinstance(value, (list, tuple)):
        return check_integer(name, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be one integer or (height, width), got {value!r}")
    return check_integers(name, value)


def check_choice(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """Returns a value that equals one of `choices` and has its type: 1 is not True.

    Raises:
        ValueError: the value is none of them; the message calls it `name`.
    """
    for choice in choices:
        if isinstance(value, type(choice)) and value == choice:
            return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
