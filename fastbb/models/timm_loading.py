"""Builds timm's features-only modules and full models, and loads timm's weights into them."""

import difflib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone.checkpoint import (
    check_dtypes,
    not_tensors,
    read_weights_file,
    reading,
    shapes_only,
)
from ..backbone.hub import HubOptions, TimmSource, find_file, local_directory


class MissingWeightsError(OSError):
    """The weights of a checkpoint lack some tensors of a model.

    Attributes:
        names: of these tensors.
        classifiers: names of the model's classifiers.
    """

    def __init__(self, model: str, names: Sequence[str], classifiers: Sequence[str]) -> None:
        super().__init__(f"The weights of timm's {model!r} lack {', '.join(names)}")
        self.names, self.classifiers = names, classifiers


_LOADING = threading.Lock()
# torch's message where nothing else is wrong
_LACKED = re.compile(
    r'Error\(s\) in loading state_dict for \w+:\s+Missing key\(s\) in state_dict: ("[^\n]+")\.\s*'
)
TIMM_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def create_features(
    name: str,
    kwargs: dict[str, Any],
    source: TimmSource | None,
    hub: HubOptions,
    last_stage: int | None = None,
    stages: Sequence[int] | None = None,
) -> nn.Module:
    """Builds timm's features-only module up to a stage, for all image sizes that timm supports.

    Args:
        name: of the architecture.
        kwargs: of `timm.create_model`; None selects timm's default.
        source: of the weights; None: random weights.
        hub: options for downloads.
        last_stage: index of the last stage to build; default: the last of the model.
        stages: indices of the stages with maps; default: all up to the last.

    Raises:
        ValueError: timm has no such model, or cannot build it with these arguments.
        OSError: the weights do not load.
    """

    def arguments(model: nn.Module) -> dict[str, Any]:
        if not hasattr(model, "feature_info"):
            import timm

            raise ValueError(f"timm {timm.__version__} has no stages of {name!r}")
        info: Any = model.feature_info
        # a placeholder (tresnet) counts as a stage but has no module
        built = [i for i in range(len(info)) if info[i]["module"]]
        wanted = [i for i in built if last_stage is None or i <= last_stage]
        return {"features_only": True, "out_indices": tuple(stages or wanted)}

    return _create(name, kwargs, source, hub, arguments)


def create_full(
    name: str,
    kwargs: dict[str, Any],
    source: TimmSource,
    hub: HubOptions,
    *,
    head: bool = False,
) -> nn.Module:
    """Builds timm's full model with its weights, for all image sizes that timm supports.

    Args:
        name: of the architecture.
        kwargs: of `timm.create_model`; None selects timm's default.
        source: of the weights.
        hub: options for downloads.
        head: keep the classifier, whose weights the checkpoint then has to have; default: the model
            that timm builds for `num_classes=0`.

    Raises:
        ValueError: timm has no such model, or cannot build it with these arguments.
        MissingWeightsError: the weights lack a tensor.
        OSError: the weights do not load.
    """
    kwargs = kwargs if head else {**kwargs, "num_classes": 0}
    return _create(name, kwargs, source, hub, lambda model: {})


def _create(
    name: str,
    kwargs: dict[str, Any],
    source: TimmSource | None,
    hub: HubOptions,
    arguments: Callable[[nn.Module], dict[str, Any]],
) -> nn.Module:
    """Builds a module of timm with the weights of a source.

    Args:
        name: of the architecture.
        kwargs: of `timm.create_model`; None selects timm's default.
        source: of the weights; None: random weights.
        hub: options for downloads.
        arguments: further ones, for a model of that architecture without memory.
    """
    import timm

    if not timm.is_model(name.removeprefix("timm/").partition(".")[0]):
        raise ValueError(unknown_model(name))
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    name = name.removeprefix("timm/")
    try:
        model, kwargs = _probe(name, kwargs)
        more = arguments(model)
        pretrained = _pretrained_arguments(source, hub, model)
        with _missing_weights() as missing, _only_tensors(name, pretrained):
            try:
                module = timm.create_model(name, **more, **pretrained, **kwargs)
            except RuntimeError as error:  # of timm's full models, which load strictly
                if lacked := _LACKED.fullmatch(str(error)):
                    names = lacked[1].replace('"', "").split(", ")
                    raise MissingWeightsError(name, names, classifier_names(model)) from error
                raise
        # timm's features-only modules join the names of nested modules by underscores
        own = {joined(key) for key in module.state_dict()}
        names = [key for key in missing if joined(key) in own]
        if source is not None and names:
            raise MissingWeightsError(name, names, classifier_names(model))
        return module
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm's {name!r} cannot be built with {kwargs}: {error}") from error
    except (RuntimeError, LookupError, AttributeError) as error:
        if source is None:
            raise
        raise OSError(f"timm's weights for {name!r} do not load: {error}") from error


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifiers of timm's full model."""
    found: Any = None
    with suppress(AttributeError):  # timm has models without the method, or without the layer
        found = model.get_classifier()  # type: ignore[operator]
    classifiers = found if isinstance(found, (tuple, list)) else [found]
    return [name for name, module in model.named_modules() if any(module is c for c in classifiers)]


def _probe(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a timm model without memory, and returns it with arguments for any image size."""
    any_size = {"dynamic_img_size": True, "strict_img_size": False}
    # both first, because timm's Swin before 1.0.31 accepts either and ignores the first
    for names in (tuple(any_size), ("dynamic_img_size",), ("strict_img_size",), ()):
        dynamic = {key: any_size[key] for key in names}
        try:
            model = _without_memory(name, {**dynamic, **kwargs})
        except TypeError as error:
            if not dynamic or not any(key in str(error) for key in dynamic):
                raise
        else:
            return model, {**dynamic, **kwargs}
    raise AssertionError("the last attempt returns or raises")


def _without_memory(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Builds a timm model on the meta device, or on the CPU if timm computes with its tensors."""
    import timm

    try:
        with shapes_only():
            return timm.create_model(name, **kwargs)
    except RuntimeError as error:  # before 1.0.21 most transformers, before 1.0.30 RegNets
        if "meta tensor" not in str(error).lower():
            raise
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, **kwargs)


def _pretrained_arguments(
    source: TimmSource | None, hub: HubOptions, model: nn.Module
) -> dict[str, Any]:
    """Arguments of `timm.create_model` that load the weights of a source into a model."""
    if source is None:
        return {"pretrained": False}
    from timm.models import PretrainedCfg

    known = {field.name for field in fields(PretrainedCfg)}
    cfg = {key: value for key, value in source.pretrained_cfg.items() if key in known}
    arguments: dict[str, Any] = {"pretrained": True, "pretrained_cfg": cfg}
    is_local = source.weights is not None and local_directory(source.weights) is not None
    if not source.weights or (cfg.get("custom_load") and not is_local):
        return {**arguments, "cache_dir": hub.cache_dir}  # timm downloads the file from its URL
    cfg["custom_load"] = False  # of the format of timm's own file
    names = (source.weights_file,) if source.weights_file else TIMM_WEIGHT_FILES
    path = next((p for p in (find_file(source.weights, n, hub) for n in names) if p), None)
    if path is None:
        raise OSError(f"{source.weights!r} has no weights: wanted one of {', '.join(names)}")
    # timm prefers a state dict in memory to all its other sources
    state = _read(path)
    weights = {name for name, t in model.state_dict().items() if t.is_floating_point()}
    # also the names of older checkpoints, which timm renames
    weights |= {name for name in state if name.endswith((".weight", ".bias"))}
    check_dtypes(state, weights, str(path))
    cfg |= {"state_dict": state, "source": None}
    return arguments


def _read(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    with reading(path):
        try:
            return load_state_dict(str(path), weights_only=True)
        except AttributeError:  # timm's error for a value that is no dictionary of names
            pass
    return read_weights_file(path)


@contextmanager
def _only_tensors(name: str, pretrained: dict[str, Any]) -> Iterator[None]:
    """Explains timm's failure to load a state dict by a value in it that is no tensor, if any.

    The values are not checked before, because timm unwraps and skips more than its own formats.
    """
    try:
        yield
    except Exception as error:
        state = pretrained.get("pretrained_cfg", {}).get("state_dict")
        problem = None if state is None else not_tensors(state)
        if problem is None:
            raise
        raise OSError(
            f"The weights for timm's {name!r} must be a dictionary of tensors, {problem}"
        ) from error


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collects the names of tensors that timm leaves at their random values, which it only logs."""
    log = logging.getLogger("timm.models._builder")
    names: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Missing keys ("):
            names.extend(message.removeprefix("Missing keys (").partition(")")[0].split(", "))

    handler = logging.Handler()
    handler.emit = emit
    _LOADING.acquire()  # the logger is global, so one model loads at a time
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield names
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        _LOADING.release()


def joined(name: str) -> str:
    """A name of a tensor that is equal for timm's full model and its features-only modules."""
    return name.replace(".", "_").removeprefix("model_")


def unknown_model(name: str) -> str:
    """The message for a name that timm does not have, with close names."""
    import timm

    known = timm.list_models() + timm.list_pretrained()
    close = difflib.get_close_matches(name.removeprefix("timm/"), known, n=5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"timm has no model {name!r}{hint} `fastbb list` shows all names."
