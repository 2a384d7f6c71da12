"""Parts of a model: its layers in the form that the forward of a family takes, for any owner.

A builder finds the parts inside the modules of one library, and raises `Refused` for modules that
it does not cover. The parts are cached for a backbone until its layers change.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..weights.recognize import activation_name
from ..weights.watch import ModuleSettings, ModuleStructure, follow_layers, is_observed

Value = TypeVar("Value")


class Refused(Exception):
    """A module that fastbb does not compute itself; the message gives the reason."""


def activation_of(module: Any) -> str:
    """The name in `ACTIVATIONS` of the function that a module computes.

    Raises:
        Refused: the module computes another function.
    """
    # torch's own classes are recognized by their settings, which a compiler can trace
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    name = None if torch.compiler.is_compiling() else activation_name(module)
    if name is None:
        raise Refused(f"its activation is a {type(module).__name__}")
    return name


class Kept(Generic[Value]):
    """A value computed from the layers of a backbone, cached for it until the layers change.

    Args:
        backbone: owner of the layers.
        value: must not refer to the backbone itself.
        read: module inside the backbone if the value depends on its settings too, or None.
        options: other values that it depends on.
    """

    def __init__(
        self,
        backbone: nn.Module,
        value: Value,
        read: nn.Module | None = None,
        options: Hashable = None,
    ) -> None:
        self.value, self._options = value, options
        # stands for the backbone, which would never be freed if this referred to it
        self._root = nn.Module()
        self._root.training = False
        self._root._modules.update(backbone._modules)
        self._structure = ModuleStructure(self._root)
        classes = dict.fromkeys(map(type, self._structure.modules))
        self._forwards = [(cls, cls.forward) for cls in classes]
        self._settings = None if read is None else ModuleSettings(read)
        follow_layers([backbone])  # the structure has the stand-in in its place
        _KEPT[backbone] = self

    @classmethod
    def of(cls, backbone: nn.Module, options: Hashable = None) -> "Kept[Any] | None":
        """The cached value of a backbone, or None if what it depends on changed."""
        kept = _KEPT.get(backbone)
        return kept if kept is not None and kept._is_current(backbone, options) else None

    def _is_current(self, backbone: nn.Module, options: Hashable) -> bool:
        return (
            self._options == options
            and backbone._modules == self._root._modules
            and self._structure.is_intact()
            and all(cls.forward is forward for cls, forward in self._forwards)
            and (self._settings is None or self._settings.change() is None)
        )

    def is_observed(self) -> bool:
        """Whether the layers have hooks now, or forwards that other code set."""
        return bool(self._structure.hooks() or self._structure.foreign_forwards())

    def trains(self) -> bool:
        """Whether any layer is in training mode now."""
        return self._structure.trains()


_KEPT: weakref.WeakKeyDictionary[nn.Module, Kept[Any]] = weakref.WeakKeyDictionary()


def kept_parts(backbone: nn.Module, build: Callable[[], Value], options: Hashable = None) -> Value:
    """Parts of a native backbone, built once, and again after its layers or options changed.

    Args:
        backbone: owner of the parts.
        build: builds the parts.
        options: fields of the configuration that they depend on.

    Raises:
        ValueError: see `check_untouched`.
    """
    if torch.compiler.is_compiling():  # in the graph, which guards the values that it reads
        check_untouched(backbone)
        return build()
    kept = Kept.of(backbone, options)
    if kept is None or kept.is_observed():
        check_untouched(backbone)
        kept = kept or Kept(backbone, build(), options=options)
    return kept.value


def check_untouched(backbone: nn.Module) -> None:
    """Refuses changes of modules that a computation from the parameters would silently ignore.

    Raises:
        ValueError: a submodule has forward hooks, or was replaced by one with another forward
            (LoRA, quantized layers).
    """
    for name, module in backbone.named_modules():
        if module is backbone or ".parametrizations." in name:
            continue  # the forward reads the weight that parametrizations computed
        if is_observed(module):
            raise ValueError(
                f"{type(backbone).__name__} computes from its parameters, so the hooks of {name!r} "
                "(or a forward put on it) would never run: remove them, or hook the whole backbone"
            )
        if type(module).forward not in _KNOWN_FORWARDS:
            raise ValueError(
                f"{type(backbone).__name__} computes from its parameters, so the "
                f"{type(module).__name__} put in place of {name!r} would be passed over: "
                "merge adapters into the weights first"
            )


_KNOWN = (nn.Module, nn.Identity, nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d)
_KNOWN_FORWARDS = {cls.forward for cls in (*_KNOWN, nn.SyncBatchNorm)}
