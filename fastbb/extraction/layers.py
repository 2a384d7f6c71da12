"""Features of single modules, which run in upstream's own model, eagerly."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base import Backbone
from ..backbone.checkpoint import find_prefix, strip_prefix
from ..backbone.registry import TransformersModel, family_of
from ..models.timm_full import POOLED_OR_MAPS
from .models import FeatureModel, no_final_norm


class LayerModel(FeatureModel):
    """Outputs of modules of an upstream model, by upstream's names.

    Args:
        module: upstream's, in eval mode.
        layers: names of modules inside it.

    Raises:
        ValueError: there is no such module; names close ones.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        check_modules(module, layers)
        super().__init__(module)
        self._layers = layers

    def check(self, pixels: Tensor) -> None:
        self._rows(self._outputs(pixels, to_the_end=True), len(pixels))

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        return self._rows(self._outputs(pixels), len(pixels))

    def _outputs(self, pixels: Tensor, to_the_end: bool = False) -> dict[str, list[Tensor]]:
        """Runs the model until every layer has run, or to the end as far as it can."""
        outputs: dict[str, list[Tensor]] = {layer: [] for layer in self._layers}

        def keep(layer: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = _first_tensor(output)
                # what follows may compute in place
                outputs[layer] += [] if first is None else [first.detach().clone()]
                if all(outputs.values()) and not to_the_end:
                    raise _AllSeenError

            return hook

        with ExitStack() as hooks:
            for layer in self._layers:
                hooked = self.module.get_submodule(layer)
                hooks.enter_context(hooked.register_forward_hook(keep(layer)))
            try:
                self.module(pixels)
            except _AllSeenError:
                pass
            except (AssertionError, RuntimeError):  # a later layer may need larger images
                if not all(outputs.values()):
                    raise
        return outputs

    def _rows(self, outputs: dict[str, list[Tensor]], n_images: int) -> dict[str, Tensor]:
        for layer, found in outputs.items():
            if len(found) != 1:
                problem = f"gives {len(found)} tensors in one forward pass, wanted one"
            elif found[0].ndim < 2 or len(found[0]) != n_images:
                problem = f"gives {list(found[0].shape)} for {n_images} images: no row for each"
            else:
                continue
            raise ValueError(f"layer:{layer}: the module {problem}; ask for one around it")
        return {f"layer:{layer}": found[0] for layer, found in outputs.items()}


class _AllSeenError(Exception):
    """Ends a forward pass whose wanted layers have run."""


def check_modules(module: nn.Module, layers: Sequence[str]) -> None:
    """Raises a ValueError for the name of a module that is not there; names close ones."""
    names = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in names:
            close = difflib.get_close_matches(layer, names, n=5) or names[:5]
            raise ValueError(
                f"layer:{layer}: {type(module).__name__} has no such module; did you mean "
                f"{', '.join(close)}?"
            )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    found = map(_first_tensor, output) if isinstance(output, (list, tuple)) else iter(())
    return next((x for x in found if x is not None), None)


# the modules before the final norm
_STAGES = ("embeddings", "embedder", "encoder", "layers", "model", "features")


def upstream_model(backbone: Backbone, layers: Sequence[str] = ()) -> nn.Module:
    """The model of a native backbone's own library, with its weights, in eval mode.

    That is transformers' `SwinModel` or `ResNetModel`, and torchvision's SwinTransformer for its
    semantics.

    Args:
        backbone: of a native family.
        layers: names of the modules that are wanted.

    Raises:
        ValueError: the library is not installed, the family names no upstream, or a layer comes
            after a final norm that the checkpoint lacks.
    """
    family, _ = family_of(backbone.config.model_type)
    backbone.check_own_weights()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            upstream = family.upstream(backbone) if family.upstream is not None else None
            if isinstance(upstream, TransformersModel):
                module = _of_transformers(backbone, upstream)
            elif upstream is not None:
                module = upstream.module
                if isinstance(getattr(module, "head", None), nn.Linear):
                    headless = [layer for layer in layers if layer.partition(".")[0] == "head"]
                    if headless:
                        raise ValueError(
                            f"layer:{headless[0]}: a {type(backbone).__name__} has no head"
                        )
                    module.head = nn.Identity()  # with random weights
            else:
                raise ValueError(f"layer: {type(backbone).__name__} names no upstream model")
    except ImportError as error:
        raise ValueError(
            f"layer: modules of a {type(backbone).__name__} are run by its own library, which is "
            f"not installed ({error}): pip install 'fastbb[transformers]'"
        ) from error
    check_modules(module, layers)
    late = [layer for layer in layers if layer.partition(".")[0] not in _STAGES]
    if late and backbone.lacks_final_norm:
        raise ValueError(f"layer:{late[0]}: {no_final_norm(backbone)}; {POOLED_OR_MAPS}")
    return module.to(backbone.device, backbone.dtype).eval()


def _of_transformers(backbone: Backbone, named: TransformersModel) -> nn.Module:
    library = import_module(named.package)
    config = getattr(library, f"{named.name}Config").from_dict(backbone.config.to_dict())
    module: nn.Module = getattr(library, f"{named.name}Model")(config)
    state, expected = named.state(backbone), list(module.state_dict())
    state, _ = strip_prefix(state, find_prefix(state, expected, named.name))
    module.load_state_dict({name: state[name] for name in expected})
    return module
