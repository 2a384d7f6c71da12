"""Models of other libraries by name, their inputs and outputs, and what `accelerate` replaces."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from ..engine.measuring import describe
from ..hosts.accelerate import AccelerateReport, AccelerateWarning, accelerate
from ..inspect.loading import draw_norms
from .subject import N_IMAGES, image_of_each

AS_IS, ACCELERATED = "upstream", "fastbb.accelerate"
WANTED = (
    "a directory or Hub name of transformers, a class of transformers with --random-weights, a "
    "timm name, torchvision/NAME, or MODULE:FUNCTION"
)
# usual (height, width) of heads whose configuration names no size, by part of their class's name
_USUAL_SIZES = {
    "SemanticSegmentation": (512, 512),
    "Segmentation": (800, 1088),
    "Detection": (800, 1088),
}
_DETECTION, _SEGMENTATION = "torchvision.models.detection.", "torchvision.models.segmentation."
_TORCHVISION_SIZES = {_DETECTION: (800, 1088), _SEGMENTATION: (520, 520)}
_SIZE = (224, 224)
_TEXT = (101, 1037, 4937, 1012, 102)  # "[CLS] a cat . [SEP]" in BERT's vocabulary
_N_CLOSE = 3


def build_host(name: str, random_weights: bool) -> nn.Module:
    """Builds a whole model in eval mode on the CPU.

    Args:
        name: see `WANTED`.
        random_weights: draws the weights, the same ones every time, and loads none.

    Raises:
        ValueError: the name is none of these, or what it names cannot be built.
        OSError: weights or a configuration cannot be had.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        module = _builder(name, random_weights)()
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"--accelerate {name}: wanted a torch.nn.Module, got {type(module).__name__}"
            )
        if random_weights:
            draw_norms(module)
    return module.eval()


def _builder(name: str, random_weights: bool) -> Callable[[], Any]:
    if not name:  # a path that is empty is the working directory
        raise ValueError(f"--accelerate: wanted {WANTED}, got ''")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"--accelerate {name}: the directory has no config.json")
        return lambda: _of_transformers(name, random_weights)
    if ":" in name and not name.startswith("hf-hub:"):
        return partial(_called, name)
    library, _, model = name.partition("/")
    if library == "torchvision" and model:
        return _of_torchvision(model, random_weights)
    if name.isidentifier() and (cls := _transformers_class(name)) is not None:
        if not random_weights:
            raise ValueError(
                f"--accelerate {name}: a class has no weights; add --random-weights, or give a "
                "directory or Hub name"
            )
        return lambda: cls(_without_downloads(cls.config_class()))
    if name in _classes_of_transformers():
        raise ValueError(
            f"--accelerate {name}: this class has no configuration of its own; give a class that "
            "has one, or a directory or Hub name"
        )
    timm = _imported("timm")
    bare = name.removeprefix("timm/")
    if timm is not None and (name.startswith("hf-hub:") or timm.is_model(bare.split(".")[0])):
        return partial(_of_timm, timm, bare, random_weights)
    if model and not name.startswith(("timm/", ".", "/")):
        return lambda: _of_transformers(name, random_weights)
    raise _wrong(name)


def _wrong(name: str) -> ValueError:
    """The error for a name that nothing has; with close ones."""
    known = _known_names()
    close = difflib.get_close_matches(name, known, n=_N_CLOSE)
    hint = f"; close names: {', '.join(close)}" if close else ""
    missing = [lib for lib in ("transformers", "timm", "torchvision") if _imported(lib) is None]
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    return ValueError(f"--accelerate {name}: wanted {WANTED}; nothing has this name{hint}{absent}")


def _known_names() -> list[str]:
    timm = _imported("timm")
    names = [] if timm is None else list(timm.list_models())
    return [
        *names,
        *_classes_of_transformers(),
        *(f"torchvision/{name}" for name in _torchvision_names()),
    ]


def _classes_of_transformers() -> list[str]:
    names = dir(_imported("transformers") or object)
    return [n for n in names if "For" in n or n.endswith(("Model", "Backbone"))]


def _of_timm(timm: Any, name: str, random_weights: bool) -> Any:
    try:
        return timm.create_model(name, pretrained=not random_weights)
    except OSError:  # weights that cannot be had
        raise
    except Exception as error:  # an unknown tag, or a model without weights
        raise ValueError(f"--accelerate {name}: timm raises {describe(error)}") from error


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError:
        return None


def _of_function(name: str) -> Callable[[], Any]:
    """The function that `module:function` names, with the working directory on the path."""
    module_name, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(
            f"--accelerate {name}: cannot import {module_name}: {located(error)}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if inspect.isroutine(value)]
        close = difflib.get_close_matches(function, functions, n=_N_CLOSE) or functions[:_N_CLOSE]
        raise ValueError(
            f"--accelerate {name}: {module_name} has no function {function!r}; "
            f"it has {', '.join(close) or 'none'}"
        )
    return found


def located(error: BaseException) -> str:
    """An error in one line, with the last line of code outside of installed packages."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "/fastbb/", "<frozen"))
    ]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return describe(error) + where


def _called(name: str) -> Any:
    """The result of the function that `module:function` names."""
    function = _of_function(name)
    try:
        return function()
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(f"--accelerate {name}: it raises {located(error)}") from error


def _torchvision_names() -> list[str]:
    torchvision = _imported("torchvision")
    return [] if torchvision is None else list(torchvision.models.list_models())


def _of_torchvision(model: str, random_weights: bool) -> Callable[[], Any]:
    torchvision = _imported("torchvision")
    if model not in _torchvision_names():
        raise _wrong(f"torchvision/{model}")
    weights = None if random_weights else "DEFAULT"
    # heads load a backbone's weights otherwise
    accepts = inspect.signature(torchvision.models.get_model_builder(model)).parameters
    options = {"weights_backbone": None} if "weights_backbone" in accepts else {}
    return lambda: torchvision.models.get_model(model, weights=weights, **options)


def _transformers_class(name: str) -> Any:
    """A class of transformers that has a configuration, or None."""
    transformers = _imported("transformers")
    cls = getattr(transformers, name, None) if transformers is not None else None
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    return cls if is_model and getattr(cls, "config_class", None) is not None else None


def _of_transformers(name: str, random_weights: bool) -> Any:
    """A model of transformers from a directory or the Hub."""
    transformers = _imported("transformers")
    if transformers is None:
        raise ValueError(f"--accelerate {name}: needs transformers; pip install transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:  # of transformers, for several lines
        why = str(error).splitlines()[0]
        raise ValueError(f"--accelerate {name}: wanted {WANTED}; {why}") from error
    cls = next(
        (found for one in config.architectures or () if (found := _transformers_class(one))),
        transformers.AutoModel,
    )
    if not random_weights:
        return cls.from_pretrained(name)
    config = _without_downloads(config)
    return cls.from_config(config) if cls is transformers.AutoModel else cls(config)


def _without_downloads(config: Any) -> Any:
    """Has a head draw the weights of its backbone, which it loads otherwise."""
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False
    return config


def _root(module: nn.Module) -> str:
    """Import path of the first class above a module's that is of a library."""
    names = (f"{cls.__module__}." for cls in type(module).__mro__)
    return next((n for n in names if n.startswith(("transformers.", "torchvision."))), "")


def default_size(module: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that a model was made for, or usual ones."""
    root = _root(module)
    for part, size in _TORCHVISION_SIZES.items():
        if root.startswith(part):
            return size
    found = getattr(getattr(module, "config", None), "image_size", None)
    if found is None:
        found = (getattr(module, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:]
    if isinstance(found, int):
        return found, found
    if found:
        return int(found[0]), int(found[1])
    name = type(module).__name__
    return next((size for part, size in _USUAL_SIZES.items() if part in name), _SIZE)


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model's call.

    Attributes:
        pixels: [B, C, H, W].
        wrap: makes positional and named arguments from pixels.
    """

    pixels: Tensor
    wrap: Callable[[Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]]

    def call(self, module: nn.Module, pixels: Tensor | None = None) -> Any:
        args, kwargs = self.wrap(self.pixels if pixels is None else pixels)
        return module(*args, **kwargs)


def make_inputs(module: nn.Module, batch: int, size: tuple[int, int]) -> Inputs:
    """Random inputs of a model, the same ones every time, in fp32 on the CPU; images repeat.

    Raises:
        ValueError: the model takes no pixels.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (min(batch, N_IMAGES), _channels(module), *size)
    pixels = torch.randn(shape, generator=generator, device="cpu")[image_of_each(batch)]
    root = _root(module)
    if root.startswith(_DETECTION):
        return Inputs(pixels, lambda pixels: ((list(pixels),), {}))
    if not root.startswith("transformers."):
        return Inputs(pixels, lambda pixels: ((pixels,), {}))
    accepts = inspect.signature(type(module).forward).parameters
    if "pixel_values" not in accepts:
        raise ValueError(
            f"{type(module).__name__} takes no pixel_values, only {', '.join(accepts)}"
        )
    ids = _text(module) if "input_ids" in accepts else None

    def named(pixels: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        given: dict[str, Any] = {"pixel_values": pixels}
        if ids is not None:
            text = ids.expand(len(pixels), -1).to(pixels.device)
            given |= {"input_ids": text, "attention_mask": torch.ones_like(text)}
        return (), given

    return Inputs(pixels, named)


def _channels(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    found = getattr(config, "num_channels", None)
    found = found or getattr(getattr(config, "backbone_config", None), "num_channels", None)
    cfg = getattr(module, "pretrained_cfg", None) or {}
    return int(found or getattr(module, "in_chans", None) or cfg.get("input_size", (3,))[0])


def _text(module: Any) -> Tensor:
    """Token ids [1, N] within the vocabulary of a model."""
    configs = (module.config, getattr(module.config, "text_config", None))
    sizes = [n for one in configs if (n := getattr(one, "vocab_size", None))]
    return torch.tensor([_TEXT]).clamp(max=min(sizes, default=max(_TEXT) + 1) - 1)


def named_outputs(result: Any, name: str = "output") -> dict[str, Tensor]:
    """The floating tensors of a result by their path in it; infinities of masks are 0.

    Args:
        result: of a model or a module.
        name: of a result that is a tensor.
    """
    leaves, _ = tree_flatten_with_path(result)
    return {
        ".".join(map(_key, path)) or name: _without_infinities(leaf)
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _key(entry: Any) -> str:
    """A part of a path: an index, a key or an attribute."""
    found = (getattr(entry, kind, None) for kind in ("idx", "key", "name"))
    return str(next(key for key in found if key is not None))


class RecordedOutputs:
    """The tensors that some modules of a model return while the block runs, by name."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._watched = [(name, model.get_submodule(name)) for name in names if name]

    def __enter__(self) -> dict[str, Tensor]:
        self._handles = [
            module.register_forward_hook(partial(self._record, name))
            for name, module in self._watched
        ]
        return self.tensors

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str, module: nn.Module, args: Any, result: Any) -> None:
        for path, tensor in named_outputs(result, "").items():
            self.tensors[f"{name}: {path}" if path else name] = tensor.clone()


def _without_infinities(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=float("nan"), posinf=0.0, neginf=0.0)


def on_meta(values: Any, dtype: torch.dtype) -> Any:
    """Values with their tensors on the meta device, floating ones in a dtype."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to("meta", dtype if tensor.is_floating_point() else tensor.dtype)

    return tree_map_only(Tensor, moved, values)


def accelerated(module: nn.Module, mode: str = "auto") -> AccelerateReport:
    """Accelerates a model without warnings: the report has what they say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerateWarning)
        return accelerate(module, mode=mode)


def outermost(names: Sequence[str]) -> list[str]:
    """Names of modules without those inside another one of them."""

    def is_inside(name: str, outer: str) -> bool:
        return name != outer and (not outer or name.startswith(f"{outer}."))

    return [name for name in names if not any(is_inside(name, outer) for outer in names)]
