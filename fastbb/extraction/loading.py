"""Loads what an extractor needs: the models of its features, and the image processor."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..auto import AutoBackbone
from ..backbone.base import Backbone
from ..backbone.configuration import BackboneConfig
from ..backbone.hub import DEFAULT_HUB, HubOptions, absolute_name
from ..engine.computation import without_engine
from ..hosts.transformers_backbone import TransformersBackbone
from ..hosts.transformers_config import TransformersBackboneConfig
from ..images.processor import AutoImageProcessor, ImageProcessor
from ..models.lookup import find_config
from ..models.timm import TimmBackbone, TimmBackboneConfig
from ..models.timm_full import POOLED_OR_MAPS, check_same_weights, load_full
from .identity import changes, changes_digest
from .layers import LayerModel, upstream_model
from .models import BackboneModel, FeatureModel, TimmModel
from .outputs import Wanted
from .transformers_model import TransformersFullModel

Origin = tuple[str, HubOptions]
# libraries that compute features, by the configuration of a backbone
LIBRARIES: dict[type, str] = {
    TimmBackboneConfig: "timm",
    TransformersBackboneConfig: "transformers",
}


@dataclass(frozen=True)
class Loaded:
    """The models of an extractor.

    Attributes:
        name: of the checkpoint; an absolute path of a directory.
        models: each computes some of the features.
        config: of the backbone.
        stages: names of the maps that "maps" and "pooled" stand for.
        changed: digest of changes of a backbone object, other than of weights; None without any.
    """

    name: str
    models: tuple[FeatureModel, ...]
    config: BackboneConfig
    stages: tuple[str, ...]
    changed: str | None


def origin_of(model: Any) -> Origin | None:
    """Name and options of the checkpoint of a model; None where that is not known.

    Raises:
        TypeError: it is neither a name nor a backbone.
    """
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model), DEFAULT_HUB
    if isinstance(model, Backbone):
        return model._origin
    raise TypeError(
        "model: wanted a name, a directory or a backbone (AutoBackbone.from_pretrained), got "
        f"{type(model).__name__}"
    )


def check_processor(processor: object) -> None:
    """Raises a TypeError if it is no image processor."""
    if not isinstance(processor, ImageProcessor):
        raise TypeError(
            "processor: wanted an ImageProcessor (AutoImageProcessor.from_pretrained), got "
            f"{type(processor).__name__}"
        )


def load_processor(
    model: Any, processor: ImageProcessor | None, use_test_size: bool
) -> ImageProcessor:
    """Returns the image processor that belongs to a model, unless another is given.

    Raises:
        OSError: the model has none.
        TypeError: the given one is no image processor.
        ValueError: it is not known where the model was loaded from, or it has no test size.
    """
    origin = origin_of(model)
    if processor is not None:
        check_processor(processor)
        if use_test_size:
            raise ValueError("size: 'test' chooses a processor, and processor= is given")
        return processor
    if origin is None:
        raise ValueError(
            f"processor: this {type(model).__name__} was not loaded by from_pretrained, so how its "
            "images are to be processed is unknown: give processor="
        )
    name, hub = origin
    if not isinstance(model, Backbone):
        find_config(name, hub)  # a wrong name is told as such, not as one without a processor
    processor = AutoImageProcessor.from_pretrained(name, **asdict(hub))
    if not use_test_size:
        return processor
    if processor.spec.reference != "timm":
        raise ValueError(f"size: 'test' is the test size of timm models, and {name!r} is not one")
    return AutoImageProcessor.from_pretrained(name, **asdict(hub), use_test_size=True)


def load_models(
    model: Any,
    wanted: Wanted,
    *,
    out_indices: Sequence[int | str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Loaded:
    """Loads the models that compute the wanted features.

    Args:
        model: a name, a directory or a backbone in eval mode, which stays as it is.
        wanted: features.
        out_indices: the requested maps, by index or name; default: the model's own choice.
        dtype: of the weights.
        device: of the weights.

    Raises:
        OSError: the model cannot be had.
        ValueError: the model has not all of the features.
    """
    if out_indices is not None and not {"pooled", "maps"} & set(wanted.names):
        raise ValueError(
            f"out_indices: {list(out_indices)} is for pooled and maps, and neither is among "
            f"{', '.join(wanted.names)}"
        )
    origin = origin_of(model)
    is_timm = _is_timm(model)
    layers = [f"layer:{layer}" for layer in wanted.layers]
    is_wrapped = is_timm or isinstance(model, TransformersBackbone)
    changed = _changes_digest(model, [*(wanted.full if is_wrapped else ()), *layers])
    backbone = None
    if isinstance(model, Backbone) or wanted.has_stages or not is_timm:
        backbone = _load_backbone(model, wanted.has_stages, out_indices, dtype, device)
    models: list[FeatureModel] = []
    stages: tuple[str, ...] = ()
    maps: dict[str, Any] = {}
    if backbone is not None and wanted.has_stages:
        stages, maps = _select_maps(backbone, wanted)
    if isinstance(backbone, TransformersBackbone) and wanted.full:
        if origin is None:
            raise ValueError(
                f"{wanted.full[0]}: this backbone is a part of transformers' model, and was not "
                f"loaded by from_pretrained: {POOLED_OR_MAPS}"
            )
        is_object = isinstance(model, Backbone)
        models.append(TransformersFullModel(backbone, origin, wanted.full, wanted.norm, is_object))
    elif backbone is not None and wanted.full and not is_timm:
        whole = backbone.with_library_windows()
        together = maps if whole is backbone else {}
        models.append(BackboneModel(whole, wanted.full, wanted.norm, **together))
        maps = {} if together else maps
    if backbone is not None and maps:
        models.append(BackboneModel(backbone, **maps))
    config = None if backbone is None else backbone.config
    if is_timm:
        for modules in [*([()] if wanted.full else []), *([wanted.layers] if layers else [])]:
            if origin is None:
                raise ValueError(
                    f"{(*wanted.full, *wanted.layers)[0]}: this TimmBackbone has no final norm and "
                    f"no head, and was not loaded by from_pretrained: {POOLED_OR_MAPS}"
                )
            projects = not modules and "projection" in wanted.full
            own = config if isinstance(config, TimmBackboneConfig) else None
            config, full_model = load_full(*origin, config=own, projects=projects, layers=modules)
            full_model = full_model.to(device, dtype)
            if isinstance(backbone, TimmBackbone):
                check_same_weights(backbone, full_model)
            if modules:
                models.append(LayerModel(full_model, modules))
            else:
                models.insert(0, TimmModel(full_model, wanted.full, wanted.norm, config.img_size))
    elif wanted.layers:
        assert backbone is not None
        models.append(LayerModel(upstream_model(backbone, wanted.layers), wanted.layers))
    assert config is not None
    name = type(model).__name__ if origin is None else absolute_name(origin[0])
    return Loaded(name, tuple(models), config, stages, changed)


# modules whose parts are run one by one, without their own hooks
_NOT_CALLED = {"", "_backbone", "_backbone.model"}


def _changes_digest(model: Any, others: Sequence[str]) -> str | None:
    """Describes how a backbone object computes other values than its configuration says.

    Args:
        model: a name or a backbone.
        others: features that another model computes.

    Returns:
        A digest; None where only weights may differ.

    Raises:
        ValueError: the features would be without the changes.
    """
    found = changes(without_engine(model)) if isinstance(model, Backbone) else {}
    if not found:
        return None
    what = f"{min(found) or 'the backbone itself'!r} of this {type(model).__name__} has hooks, "
    what += "settings or layers that are not those of its configuration"
    if others:
        raise ValueError(
            f"{others[0]}: {what}, and another model without them computes this feature: undo the "
            "changes, or ask for features of the backbone alone"
        )
    if _NOT_CALLED & found.keys():
        raise ValueError(f"model: {what}, which do not run here: change the modules inside it")
    return changes_digest(found)


def _is_timm(model: Any) -> bool:
    if isinstance(model, Backbone):
        return isinstance(model, TimmBackbone)
    found = find_config(model, DEFAULT_HUB)
    return found is None or found.backbone.get("model_type") == TimmBackboneConfig.model_type


def _load_backbone(
    model: Any,
    has_maps: bool,
    out_indices: Sequence[int | str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Backbone:
    if not isinstance(model, Backbone):
        options = {} if out_indices is None else _selection(out_indices)
        with warnings.catch_warnings():
            if not has_maps:  # of norms that only maps have
                warnings.filterwarnings("ignore", message="The checkpoint has no norm for")
            backbone = AutoBackbone.from_pretrained(model, dtype=dtype, device=device, **options)
        return backbone.eval()
    backbone = without_engine(model)
    if any(module.training for module in backbone.modules()):
        raise ValueError("model: the backbone is in training mode: call .eval() first")
    if (backbone.dtype, backbone.device) != (dtype, device):
        with torch.inference_mode(False):
            backbone = copy.deepcopy(backbone).to(device, dtype)
    if out_indices is not None:
        for name, value in _selection(out_indices).items():
            setattr(backbone, name, value)
    return backbone


def _selection(stages: Sequence[int | str]) -> dict[str, Any]:
    """Stages by index or by name, as a backbone takes them."""
    by_name = any(isinstance(stage, str) for stage in stages)
    return {"out_features" if by_name else "out_indices": list(stages)}


def _select_maps(backbone: Backbone, wanted: Wanted) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Selects the stages that are needed.

    Returns:
        The requested stages, as far as a feature without the name of a stage depends on them, and
        arguments of `BackboneModel`.

    Raises:
        ValueError: there is no such stage.
    """
    requested = list(backbone.out_features)
    for stage in wanted.named_maps:
        if stage not in backbone.stage_names:
            raise ValueError(
                f"maps.{stage}: there is no such stage; the model has "
                f"{', '.join(backbone.stage_names)}"
            )
    asked = requested if "maps" in wanted.names else []
    pooled = requested[-1] if "pooled" in wanted.names else None
    stored = [name for name in backbone.stage_names if name in {*asked, *wanted.named_maps}]
    stages = tuple(asked or ([] if pooled is None else [pooled]))
    backbone.out_features = [name for name in backbone.stage_names if name in {*stored, pooled}]
    return stages, {"stored": stored, "pooled": pooled}
