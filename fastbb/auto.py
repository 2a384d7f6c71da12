"""One entry point for all backbones: loads a backbone of the right family from a name."""

import enum
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import models  # noqa: F401  # registers the families
from .backbone.base import Backbone
from .backbone.checkpoint import StateDict, not_tensors
from .backbone.configuration import BackboneConfig
from .backbone.hub import ConfigFile, HubOptions
from .backbone.registry import FAMILIES, Family, family_of
from .hosts.model_types import BACKBONE_TYPES, PLAIN_TYPES
from .hosts.transformers_backbone import TransformersBackbone  # registers transformers' other types
from .models.lookup import find_config, list_backbones, pretrained_config
from .models.timm import TimmBackbone

__all__ = ["AutoBackbone", "AutoConfig", "list_backbones", "list_types"]


@dataclass(frozen=True)
class TypeRow:
    """A model type of transformers' checkpoints, and what loads it.

    Attributes:
        model_type: in config.json.
        loads_as: class of fastbb.
        is_native: whether its forward is fastbb's own.
        upstream: class of transformers that it is held to.
        needs: transformers where that computes it, else "-".
        example: a checkpoint on the Hub.
    """

    model_type: str
    loads_as: str
    is_native: bool
    upstream: str
    needs: str
    example: str


def list_types(filter: str = "") -> list[TypeRow]:
    """The model types of transformers' checkpoints that `AutoBackbone.from_pretrained` loads.

    Args:
        filter: shell pattern such as `dino*`; default: all.
    """
    rows = []
    for name, known in (BACKBONE_TYPES | PLAIN_TYPES).items():
        if filter and not fnmatch.fnmatch(name, filter):
            continue
        backbone = family_of(name)[0].backbone
        is_native = backbone not in (TransformersBackbone, TimmBackbone)
        wrapped = backbone is TransformersBackbone
        needs = f"transformers>={known.since}" if wrapped else "-"
        row = TypeRow(name, backbone.__name__, is_native, known.backbone, needs, known.example)
        rows.append(row)
    return rows


class AutoConfig:
    """Loads configurations of every family, chosen by `model_type`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> BackboneConfig:
        """Reads the configuration of a backbone, or of the backbone inside a model.

        Args:
            pretrained_model_name_or_path: directory, bundled model, Hub repository or timm name.
            revision: branch, tag or commit on the Hub.
            cache_dir: cache of downloads.
            token: access token for the Hub.
            local_files_only: do not ask the Hub.
            overrides: fields of the configuration.

        Raises:
            OSError: the model does not exist.
            ValueError: fastbb has no backbone for this kind of model.
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        return pretrained_config(pretrained_model_name_or_path, hub, **overrides)

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> BackboneConfig:
        """Builds a configuration of a `model_type` with the given fields."""
        return family_of(model_type)[1].from_dict({"model_type": model_type, **kwargs})


class AutoBackbone:
    """Loads backbones of every family."""

    def __init__(self) -> None:
        raise OSError(
            "AutoBackbone is designed to be instantiated using "
            "`AutoBackbone.from_pretrained(pretrained_model_name_or_path)` or "
            "`AutoBackbone.from_config(config)`."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: BackboneConfig | None = None,
        use_timm_backbone: bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a pretrained backbone, in eval mode.

        A name is looked up in this order: an existing directory or bundled model, a timm name, a
        repository of the Hub.

        Args:
            pretrained_model_name_or_path: `microsoft/swin-tiny-patch4-window7-224`, `resnet50`,
                `timm/resnet50.a1_in1k`, `./my-model`; may be a model that contains a backbone.
            config: replaces config.json.
            use_timm_backbone: whether the name is timm's.
            dtype: of the weights; default (or "auto"): that of the checkpoint.
            device: of the weights; default: CPU.
            revision: branch, tag or commit on the Hub.
            cache_dir: cache of downloads.
            token: access token for the Hub.
            local_files_only: do not ask the Hub.
            kwargs: fields of the configuration (`out_indices=(1,)`, `out_features=["stage1"]`),
                `output_loading_info=True`; for timm, `native=False` and options of the model.

        Returns:
            The backbone, or (backbone, LoadingInfo).

        Raises:
            OSError: the model does not exist, cannot be downloaded, or its files are corrupt.
            ValueError: fastbb has no backbone of this kind, or the weights do not fit.
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        name = pretrained_model_name_or_path
        given: BackboneConfig | ConfigFile | None = config
        if config is None and not use_timm_backbone:
            given = find_config(name, hub)
        if given is None or use_timm_backbone:
            model_type = "timm_backbone"
        elif isinstance(given, ConfigFile):
            model_type = given.backbone.get("model_type")
        else:
            model_type = getattr(given, "model_type", type(given).__name__)
        family, _ = family_of(model_type)
        return family.backbone.from_pretrained(
            name,
            config=given,
            dtype=dtype,
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            **kwargs,
        )

    @classmethod
    def from_config(cls, config: BackboneConfig, **kwargs: Any) -> Backbone:
        """Builds a backbone with random weights (timm's if `use_pretrained_backbone` is set).

        Args:
            config: of any family.
            kwargs: `dtype`; `attn_implementation` is accepted and ignored.
        """
        family, _ = family_of(getattr(config, "model_type", None))
        backbone = family.backbone.from_config(config)
        kwargs.pop("attn_implementation", None)
        dtype = kwargs.pop("dtype", None)
        if kwargs:
            raise ValueError(
                f"from_config takes dtype and attn_implementation, got {sorted(kwargs)}"
            )
        return backbone if dtype is None else backbone.to(dtype)

    @classmethod
    def from_torchvision(
        cls,
        name: str | None,
        state_dict: Any,
        *,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Backbone:
        """Builds a backbone with torchvision's weights and semantics, in eval mode.

        Stages have transformers' names: "stem", "stage1" ... The map of "stem" is a ResNet's after
        the pool, and a Swin's patch embedding. Maps are NCHW in shape.

        Args:
            name: `resnet18` ... `resnet152`, `swin_t`, `swin_s`, `swin_b`: the weights must belong
                to that model. None accepts a ResNet or Swin of any depths and widths.
            state_dict: state dict of torchvision's model, the model itself, or a member of its enum
                of weights (`ResNet18_Weights.DEFAULT`), which is downloaded.
            out_features: names of the stages to return.
            out_indices: indices of the stages to return; default: the last.
            dtype: of the weights; default: that of the given tensors.
            device: of the weights; default: CPU.

        Raises:
            ValueError: fastbb does not have the model, or the tensors are not of that model.
            TypeError: `state_dict` is of another type.
            OSError: the download failed.
        """
        known = [model for family in FAMILIES for model in family.torchvision_models]
        if name is not None and name not in known:
            raise ValueError(
                f"torchvision's {name!r} is not supported; fastbb has {', '.join(known)}"
            )
        family, config, state = _read_torchvision(
            name, _torchvision_state(state_dict, known if name is None else [name])
        )
        config.set_output_features_output_indices(
            out_features, None if out_indices is None else list(out_indices)
        )
        what = f"torchvision {name or 'weights'}, by transformers' names of its tensors,"
        backbone, _ = family.backbone.from_state_dict(
            config, state, name=what, dtype=dtype, device=device
        )
        return backbone


def _torchvision_state(weights: Any, wanted: Sequence[str]) -> StateDict:
    """Returns the tensors of torchvision's model, its state dict or a member of its enum.

    torchvision is not imported: the enum is recognized by its method.
    """
    state: Any = weights
    download = getattr(weights, "get_state_dict", None)
    if isinstance(weights, nn.Module):
        state = weights.state_dict()
    elif isinstance(weights, enum.Enum) and download is not None:
        model = type(weights).__name__.removesuffix("_Weights").lower()
        if model not in wanted:  # raised before the download
            raise ValueError(
                f"{weights} are the weights of torchvision's {model}, wanted {', '.join(wanted)}"
            )
        try:
            state = download(progress=False, check_hash=True)
        except Exception as error:  # an error of the network, the disk or the hash
            raise OSError(f"the download of torchvision's {weights} failed: {error}") from error
    problem = not_tensors(state)
    if problem:
        raise TypeError(
            "weights must be torchvision's model, its state dict or a member of its enum of "
            f"weights such as ResNet18_Weights.DEFAULT, {problem}"
        )
    return dict(state)


def _read_torchvision(
    name: str | None, state: StateDict
) -> tuple[Family, BackboneConfig, StateDict]:
    """Returns family, configuration and renamed tensors of a torchvision model's weights.

    Raises:
        ValueError: the weights are those of another model than the named one, or of no family.
    """
    refusals: dict[str, ValueError] = {}
    for family in FAMILIES:
        if family.from_torchvision is None:
            continue
        try:
            config, renamed = family.from_torchvision(state)
        except ValueError as error:
            refusals |= dict.fromkeys(family.torchvision_models, error)
        except LookupError as error:
            incomplete = ValueError(f"the tensors that say the model's shape lack {error}")
            refusals |= dict.fromkeys(family.torchvision_models, incomplete)
        else:
            if name is not None:
                _check_torchvision_model(name, family, config)
            return family, config, renamed
    if name is not None:
        raise refusals[name]
    raise ValueError("; ".join(dict.fromkeys(str(error) for error in refusals.values())))


def _check_torchvision_model(name: str, family: Family, config: BackboneConfig) -> None:
    """Refuses weights whose shapes are not those of the named model."""
    for model, shape in family.torchvision_models.items():
        if all(getattr(config, field) == value for field, value in shape.items()):
            if model == name:
                return
            raise ValueError(
                f"these are the weights of torchvision's {model}, not of {name}: "
                f"say from_torchvision({model!r}, ...)"
            )
    wrong = [
        f"{field} {getattr(config, field)} instead of {value}"
        for field, value in family.torchvision_models.get(name, {}).items()
        if getattr(config, field) != value
    ]
    raise ValueError(
        f"these are not the weights of torchvision's {name}, but have "
        f"{', '.join(wrong) or f'the names of a {family.backbone.__name__}'}: "
        "say from_torchvision(None, ...) for a model of other depths and widths"
    )
