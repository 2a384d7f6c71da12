"""Parts of a model: its layers in the form that the forward of a family takes, for any owner.

A builder finds the parts inside the modules of one library, and raises `Refused` for modules that
it does not cover. The parts are cached for a backbone until its layers or their hooks change.

A native backbone computes from the parameters of its layers. A block that holds hooks, adapters
(LoRA) or other layers is called as a module instead, and calls its layers one by one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbb_kernels import ACTIVATIONS

from ..backbone.base import PUT_INTO_IT
from ..weights.recognize import activation_name
from ..weights.watch import ModuleSettings, ModuleStructure, is_observed

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
    for cls in (
        *(nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm),
        *(nn.MaxPool2d, nn.Dropout, nn.Identity, nn.Sequential),
    )
}


class NativeModule(nn.Module):
    """Base of the modules inside native backbones, whose forward calls their layers one by one."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _FORWARDS[cls] = cls.forward


class Activation(NativeModule):
    """An activation, by its name in `ACTIVATIONS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


def untouched(module: Module, *classes: type[nn.Module]) -> Module:
    """Returns a module if computing from its parameters is the same as calling it.

    Args:
        module: of a native backbone.
        classes: allowed classes. A subclass with the same forward is allowed too, as
            parametrizations make them.

    Raises:
        Refused: it is of another class, has hooks, or has no parameters where the ops need them.
    """
    name = type(module).__name__
    if type(module).forward not in [_FORWARDS[cls] for cls in classes]:
        if type(module) in classes:
            raise Refused(f"the forward of {name} was changed")
        library = type(module).__module__.partition(".")[0]
        raise Refused(f"a {name} of {library} {PUT_INTO_IT}")
    if is_observed(module) or _has_any_global_hook():
        raise Refused(f"hooks on a {name}")
    if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
        raise Refused(f"a {name} without weight or bias {PUT_INTO_IT}")
    return module


class CalledModules:
    """The modules of a backbone that its forward calls.

    Attributes:
        reasons: the modules with the reasons; None stands for the backbone itself.
    """

    def __init__(self) -> None:
        self.reasons: list[tuple[nn.Module | None, str]] = []

    def read_or_call(self, read: Callable[[], Value], module: Module) -> Value | Module:
        """The parts that `read` returns, or the module, which is called if `read` refuses it."""
        try:
            return read()
        except Refused as refused:
            self.reasons.append((module, str(refused)))
            return module

    def read_blocks(
        self, stage: Any, name: str, stage_class: type[nn.Module], block_class: type[nn.Module]
    ) -> tuple[Any, ...]:
        """The parts of the blocks of a stage; a block that has to be called stays a module.

        Args:
            stage: with its blocks.
            name: attribute of the stage that holds them.
            stage_class: class of the stage.
            block_class: class of the blocks, whose `parts` reads one.

        Returns:
            An entry for each block; the stage alone if the whole stage has to be called.
        """

        def read_stage() -> tuple[Any, ...]:
            return self.read_each(getattr(untouched(stage, stage_class), name), block_class)

        found = self.read_or_call(read_stage, stage)
        return found if isinstance(found, tuple) else (stage,)

    def read_each(self, blocks: Iterable[Any], block_class: type[nn.Module]) -> tuple[Any, ...]:
        """The parts of each block, or the block itself if it has to be called.

        Args:
            blocks: in order of depth.
            block_class: their class, whose `parts` reads one.
        """

        def read(block: Any) -> Any:
            return untouched(block, block_class).parts()

        return tuple(self.read_or_call(partial(read, block), block) for block in blocks)

    def by_name(self, backbone: nn.Module) -> dict[str, str]:
        """Names of the modules in the backbone ("" is the backbone itself), and the reasons."""
        names = {id(module): name for name, module in backbone.named_modules()}
        return {names[id(m)] if m is not None else "": reason for m, reason in self.reasons}


# --- cached parts


class CachedParts(Generic[Value]):
    """A value computed from the layers of a backbone, cached in it until they change.

    Args:
        backbone: owner of the layers.
        value: the value.
        read: module inside the backbone if the value depends on its settings too, or None.
    """

    def __init__(self, backbone: nn.Module, value: Value, read: nn.Module | None = None) -> None:
        self.value = value
        self._layers = dict(backbone._modules)
        self._structure = ModuleStructure(backbone)
        classes = dict.fromkeys(map(type, self._structure.modules))
        self._forwards = [(cls, cls.forward) for cls in classes]
        self._settings = None if read is None else ModuleSettings(read)
        self._observed = self._read_observed()
        # a dictionary of weak references would keep a backbone alive that hooks refer to
        backbone._cached_parts = self  # type: ignore[assignment]  # a plain attribute

    @classmethod
    def of(cls, backbone: nn.Module) -> "CachedParts[Any] | None":
        """The cached value of a backbone, or None if what it depends on changed."""
        cached = vars(backbone).get("_cached_parts")
        return cached if cached is not None and cached._is_current(backbone) else None

    def _is_current(self, backbone: nn.Module) -> bool:
        return (
            backbone._modules == self._layers  # a replica has other ones
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
        """Whether the backbone or any layer is in training mode now."""
        return self._structure.trains()


def kept_parts(
    backbone: nn.Module,
    build: Callable[[CalledModules], Value],
    read: nn.Module | None = None,
) -> tuple[Value | None, CalledModules]:
    """Parts of a native backbone, built once, and again after its layers or hooks changed.

    Args:
        backbone: owner of the parts.
        build: builds the parts; notes modules that have to be called.
        read: module whose settings the parts depend on, or None.

    Returns:
        The parts, or None if `build` refused, so that the whole backbone calls its modules; and
        the modules that are called.
    """
    if torch.compiler.is_compiling():  # in the graph, which guards the values that it reads
        return _built(build)
    cached: Any = CachedParts.of(backbone)
    return (cached or CachedParts(backbone, _built(build), read)).value


def _built(build: Callable[[CalledModules], Value]) -> tuple[Value | None, CalledModules]:
    called = CalledModules()
    try:
        return build(called), called
    except Refused as refused:
        called.reasons[:] = [(None, str(refused))]
        return None, called
