"""Parts of a model: its layers in the form that the forward of a family takes, for any owner.

A builder finds the parts inside the modules of one library, and raises `Refused` for modules that
it does not cover. The parts are cached for a backbone until its layers or their hooks change.

A native backbone computes from the parameters of its layers. A block that holds hooks, adapters
(LoRA) or other replaced layers is called as a module instead, and calls its layers one by one.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..weights.recognize import activation_name
from ..weights.watch import ModuleSettings, ModuleStructure, follow_layers, is_observed

Value = TypeVar("Value")
Module = TypeVar("Module", bound=nn.Module)


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


# --- the layers of native backbones

# the forwards as they were when this was imported: one that was put on a class is another
_FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward
    for cls in (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
}


def untouched(module: Module, *classes: type[nn.Module]) -> Module:
    """Returns a module if computing from its parameters is the same as calling it.

    Args:
        module: of a native backbone.
        classes: that it may be of; subclasses with the same forward are too (parametrizations).

    Raises:
        Refused: it is something else, or has hooks.
    """
    if type(module).forward not in [_FORWARDS.get(cls, cls.forward) for cls in classes]:
        library = type(module).__module__.partition(".")[0]
        raise Refused(f"a {type(module).__name__} of {library} was put into it")
    if is_observed(module) or _has_any_global_hook():
        raise Refused(f"hooks on a {type(module).__name__}")
    return module


class Called:
    """The modules of a backbone that its forward calls.

    Attributes:
        reasons: the modules with the reasons; None stands for the backbone itself.
    """

    def __init__(self) -> None:
        self.reasons: list[tuple[nn.Module | None, str]] = []

    def unless(self, read: Callable[[], Value], module: Module) -> Value | Module:
        """The parts that `read` finds, or the module, which is called if `read` refuses."""
        try:
            return read()
        except Refused as refused:
            self.reasons.append((module, str(refused)))
            return module

    def by_name(self, backbone: nn.Module) -> dict[str, str]:
        """Names of the modules in the backbone ("" is the backbone itself), and the reasons."""
        names = {id(module): name for name, module in backbone.named_modules()}
        return {names[id(m)] if m is not None else "": reason for m, reason in self.reasons}


# --- cached parts


class Kept(Generic[Value]):
    """A value computed from the layers of a backbone, cached for it until they change.

    Args:
        backbone: owner of the layers.
        value: must not refer to the backbone itself.
        read: module inside the backbone if the value depends on its settings too, or None.
    """

    def __init__(self, backbone: nn.Module, value: Value, read: nn.Module | None = None) -> None:
        self.value = value
        # stands for the backbone, which would never be freed if this referred to it
        self._root = nn.Module()
        self._root.training = False
        self._root._modules.update(backbone._modules)
        self._structure = ModuleStructure(self._root)
        classes = dict.fromkeys(map(type, self._structure.modules))
        self._forwards = [(cls, cls.forward) for cls in classes]
        self._settings = None if read is None else ModuleSettings(read)
        self._observed = self._read_observed()
        follow_layers([backbone])  # the structure has the stand-in in its place
        _KEPT[backbone] = self

    @classmethod
    def of(cls, backbone: nn.Module) -> "Kept[Any] | None":
        """The cached value of a backbone, or None if what it depends on changed."""
        kept = _KEPT.get(backbone)
        return kept if kept is not None and kept._is_current(backbone) else None

    def _is_current(self, backbone: nn.Module) -> bool:
        return (
            backbone._modules == self._root._modules
            and self._structure.is_intact()
            and self._read_observed() == self._observed
            and all(cls.forward is forward for cls, forward in self._forwards)
            and (self._settings is None or self._settings.change() is None)
        )

    def _read_observed(self) -> tuple[list[int], bool]:
        return self._structure.observed(), bool(_has_any_global_hook())

    def is_observed(self) -> bool:
        """Whether layers had hooks, or forwards that other code set, when this was made."""
        return bool(self._observed[0])

    def trains(self) -> bool:
        """Whether any layer is in training mode now."""
        return self._structure.trains()


_KEPT: weakref.WeakKeyDictionary[nn.Module, Kept[Any]] = weakref.WeakKeyDictionary()


def kept_parts(
    backbone: nn.Module, build: Callable[[Called], Value]
) -> tuple[Value | None, Called]:
    """Parts of a native backbone, built once, and again after its layers or hooks changed.

    Args:
        backbone: owner of the parts.
        build: builds the parts; notes modules that have to be called.

    Returns:
        The parts, or None if `build` refused, so that the whole backbone calls its modules; and
        the modules that are called.
    """
    if torch.compiler.is_compiling():  # in the graph, which guards the values that it reads
        return _built(build)
    kept: Kept[Any] = Kept.of(backbone) or Kept(backbone, _built(build))
    return kept.value


def _built(build: Callable[[Called], Value]) -> tuple[Value | None, Called]:
    called = Called()
    try:
        return build(called), called
    except Refused as refused:
        called.reasons[:] = [(None, str(refused))]
        return None, called
