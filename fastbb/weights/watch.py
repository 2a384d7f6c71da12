"""Detects changes of modules: of their settings, layers, hooks and weights.

Code that reads a module once, and uses the values at later calls, asks one of these classes before
each call whether the module is still the same:

* `ModuleSettings` watches plain attributes, for values computed from them (a scale, a fused
  activation).
* `ModuleStructure` watches layers, hooks and forwards, for code that computes from the parameters.
* `Places` watches that a few modules stay at their places in a model.
* `ModuleStamp` watches all of these and the weights, for artefacts that contain the weights: a
  compiled model, a CUDA graph, a converted copy.
"""

import itertools
import operator
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from ctypes import c_char
from functools import partial
from operator import attrgetter, itemgetter, methodcaller
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

STATISTICS = ("running_mean", "running_var")  # buffers of a batch norm
_COUNT = "num_batches_tracked"  # as well
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NUMBERS = (bool, int, float, str, type(None), torch.dtype)
_PLAIN = (*_NUMBERS, FunctionType, BuiltinFunctionType, partial, type)


class ModuleSettings:
    """A record of the settings of a module and of all modules inside it, to detect changes.

    Settings are the class, the presence of parameters, and the attributes that are not tensors:
    eps, a stride, a window, the scale of an attention, an activation and its arguments. A module's
    own forward reads them at every call. Code that reads them once calls `change` before it uses
    values computed from them.

    Args:
        module: is watched with all modules inside it.
        ignored: names of attributes that do not count as settings, because they are read at every
            call.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str] = ()) -> None:
        self._names, self._parts = map(list, zip(*module.named_modules()))
        self._classes = list(map(type, self._parts))
        self._parameters = [part._parameters for part in self._parts if part._parameters]
        self._absent = self._read_absent()
        self._keys = [
            [k for k, v in vars(part).items() if k not in ignored and _is_setting(part, k, v)]
            for part in self._parts
        ]
        self._values = [
            [_kept(vars(part)[key]) for key in keys] for part, keys in zip(self._parts, self._keys)
        ]
        own = [entry for entry in zip(self._keys, self._parts, self._values) if entry[0]]
        self._readers = [(itemgetter(*keys), part) for keys, part, _ in own]
        # an itemgetter of one key returns no tuple
        self._read = [tuple(values) if len(values) > 1 else values[0] for _, _, values in own]

    def change(self) -> str | None:
        """Describes the first difference, or returns None if there is none."""
        # fast path, because every inference asks this: comparing tuples compares identities first.
        # A compiler traces the loop below instead, and so guards every setting
        if not torch.compiler.is_compiling() and self._is_same():
            return None
        parts = zip(self._names, self._parts, self._classes, self._keys, self._values)
        for name, part, cls, keys, values in parts:
            if type(part) is not cls:
                return f"{name or 'it'} is a {type(part).__name__}, was a {cls.__name__}"
            for key, old in zip(keys, values):
                new = getattr(part, key, "gone")
                if new is not old and not (_is_plain_value(new) and new == old):
                    return f"{f'{name}.{key}'.lstrip('.')} is {new!r:.60}, was {old!r:.60}"
        if self._read_absent() != self._absent:
            return "a parameter came or went"
        return None

    def _read_absent(self) -> list[bool]:
        return [p is None for parameters in self._parameters for p in parameters.values()]

    def _is_same(self) -> bool:
        if list(map(type, self._parts)) != self._classes or self._read_absent() != self._absent:
            return False
        try:
            return [read(part.__dict__) for read, part in self._readers] == self._read
        except Exception:  # an attribute was deleted, or is a tensor now, which has no truth value
            return False


_OWN_ATTRIBUTES = set(vars(nn.Module()))


def is_bookkeeping(module: nn.Module, name: str) -> bool:
    """Whether an attribute decides nothing, because transformers keeps its books in it.

    Private attributes of adapters switch them on and off.
    """
    is_theirs = type(module).__module__.startswith("transformers.")
    private = name.startswith("_") or name in ("config", "name_or_path")
    return (is_theirs and private) or name == "_is_hf_initialized"  # on torch's own layers too


def _is_setting(module: nn.Module, name: str, value: Any) -> bool:
    if name in _OWN_ATTRIBUTES or is_bookkeeping(module, name):
        return False
    # `ModuleStamp` and others watch methods that replace those of the class
    return not callable(getattr(type(module), name, None)) and _is_plain_value(value)


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain_value, (*value, *value.values())))
    if isinstance(value, (tuple, list, set)):
        return all(map(_is_plain_value, value))
    return isinstance(value, _PLAIN)


def _kept(values: Any) -> Any:
    """Copies what may be changed in place."""
    if isinstance(values, dict):
        return {key: _kept(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_kept(value) for value in values]
    if isinstance(values, set):
        return set(values)
    return tuple(map(_kept, values)) if type(values) is tuple else values


class OwnForward:
    """Base of objects with a bound method that fastbb sets as the forward of a module."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Raises an error; set on the module too, where torch.jit.script calls it."""
        raise RuntimeError(
            "torch.jit.script cannot read the forwards that fastbb puts on modules: call "
            "fastbb.restore(model) first, or take torch.export or torch.jit.trace"
        )


def own_forward(module: nn.Module) -> OwnForward | None:
    """The `OwnForward` whose method is set as the forward of a module, or None."""
    forward = vars(module).get("forward")
    # not getattr() with a default, by which Dynamo of torch 2.11 finds no __self__
    owner = forward.__self__ if isinstance(forward, MethodType) else None
    return owner if isinstance(owner, OwnForward) else None


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether code other than fastbb set a forward on the instance of a module."""
    return "forward" in vars(module) and own_forward(module) is None


def is_observed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward that other code set on the instance."""
    return any(getattr(module, name) for name in _HOOKS) or has_foreign_forward(module)


# read anew each time: programs clear hooks by new dictionaries
_hooks_of = itemgetter(*_HOOKS)
_forward_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks")
_forward_of = methodcaller("get", "forward")
# of a module, and of a tensor
is_training, _VERSION = attrgetter("training"), attrgetter("_version")


def has_hooks(attributes: Iterable[dict[str, Any]]) -> bool:
    """Whether one of these modules, given by their dictionaries, has hooks of any kind."""
    return any(map(any, map(_hooks_of, attributes)))


def hooks_in(attributes: Iterable[dict[str, Any]]) -> list[Any]:
    """The hooks of these modules, given by their dictionaries."""
    kinds = itertools.chain.from_iterable(map(_hooks_of, attributes))
    return [hook for hooks in kinds for hook in hooks.values()]


def is_capturing(hook: Any) -> bool:
    """Whether a hook is transformers' own, which does nothing unless hidden states are asked for.

    Arguments of the forward say whether they are.
    """
    is_theirs = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    return is_theirs and getattr(hook, "__name__", "") == "output_capturing_hook"


class ModuleStructure:
    """A record of the layers inside a module, to detect replaced layers, hooks and forwards.

    Hooks and forwards of the module itself run in any case, around the computation from its
    parameters, so they are not watched.

    Args:
        module: is watched with all modules inside it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        # comparing the dictionaries of modules costs less than walking the tree
        self._layers = [m._modules for m in self.modules]
        self._layers_then = list(map(dict, self._layers))
        self._classes = list(map(type, self.modules))
        self._inside = self.modules[1:]
        self._attributes = [vars(m) for m in self._inside]
        self._owners = [m._parameters for m in self.modules if m._parameters]
        self._ids = set(map(id, self.modules))
        follow_layers(self.modules)

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._ids

    def trains(self) -> bool:
        """Whether any module is in training mode."""
        return any(map(is_training, self.modules))

    def is_intact(self) -> bool:
        """Whether every layer has its place and its class as before."""
        is_same_class = list(map(type, self.modules)) == self._classes
        return is_same_class and self._layers == self._layers_then

    def hooks(self) -> list[Any]:
        """The hooks of the layers inside the module."""
        return hooks_in(self._attributes) if has_hooks(self._attributes) else []

    def observed(self) -> list[int]:
        """Positions of the layers inside that have hooks, and of those with a foreign forward.

        Equal lists mean that the same layers are observed.
        """
        found = []
        if has_hooks(self._attributes):
            found = [i for i, kinds in enumerate(map(_hooks_of, self._attributes)) if any(kinds)]
        foreign = self.foreign_forwards()
        if foreign:
            found += [-1 - i for i, m in enumerate(self._inside) if m in foreign]
        return found

    def foreign_forwards(self) -> list[nn.Module]:
        """The layers inside on which other code set a forward."""
        bound = [m for m in self._inside if "forward" in m.__dict__]  # saves a call for most layers
        return [m for m in bound if has_foreign_forward(m)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The current parameters."""
        values = itertools.chain.from_iterable(owner.values() for owner in self._owners)
        return (parameter for parameter in values if parameter is not None)


class Places:
    """A record of the places of some modules in a model, to detect their replacement."""

    def __init__(self) -> None:
        self._found: list[tuple[nn.Module, str, nn.Module]] = []

    def add(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Adds a module, which `parent` has under `name`."""
        self._found.append((parent, name, module))
        follow_layers([parent])

    def modules(self) -> list[nn.Module]:
        """Returns the modules, in the order in which they were added."""
        return [module for _, _, module in self._found]

    def clear(self) -> None:
        """Removes all modules."""
        self._found.clear()

    def are_intact(self) -> bool:
        """Whether each module is still at its place."""
        return all(parent._modules.get(name) is module for parent, name, module in self._found)


class Statistics:
    """A copy of running statistics on a CPU, to detect changes of their values.

    Args:
        tensors: buffers [C]; buffers on a GPU count as unchanged. The caller keeps the tensors
            alive as long as it calls `are_current`.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # compares raw memory, because comparing tensors takes six times as long
        self._memory = [
            (c_char * _span(tensor)).from_address(tensor.data_ptr())
            for tensor in tensors
            if tensor.device.type == "cpu"
        ]
        self._bytes = self._read()

    def are_current(self) -> bool:
        """Whether all values are unchanged. Call it only if no tensor has moved in memory."""
        return self._read() == self._bytes

    def _read(self) -> list[bytes]:
        return [memory.raw for memory in self._memory]


def _span(tensor: Tensor) -> int:
    """Number of bytes from the first element of a tensor to the end of the last."""
    if not tensor.numel():
        return 0
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return (sum(steps) + 1) * tensor.element_size()


def statistics_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The running statistics of modules."""
    named = itertools.chain.from_iterable(module._buffers.items() for module in modules)
    return (tensor for name, tensor in named if name in STATISTICS and tensor is not None)


def statistics_note(module: nn.Module) -> str | None:
    """A note for reports about running statistics whose changes are not noticed, or None."""
    if any(tensor.is_cuda for tensor in statistics_of(module.modules())):
        return (
            "running statistics that F.batch_norm moved, without their module, are not noticed on "
            "a GPU: call refresh()"
        )
    return None


class ModuleStamp:
    """A record of a module for an artefact made from it: a compiled model, a CUDA graph, a copy.

    Call `is_current` before every use of the artefact. It notices weights that were written, moved
    or replaced, changed settings (see `ModuleSettings`), replaced layers, switched modes, and hooks
    of layers that were added or removed.

    Args:
        module: is watched with all modules inside it.

    Attributes:
        is_plain: whether no module was in training mode, and no layer had hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._structure = ModuleStructure(module)
        modules = self._structure.modules
        self._attributes = list(map(vars, modules))
        self._modes = list(map(is_training, modules))
        self._forwards = self._read_forwards()
        self._hook_ids = list(itertools.chain.from_iterable(self._read_hooks()))
        self.is_plain = not (self._structure.trains() or self._structure.hooks())
        self._owners = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._owned = self._read_owned()
        tensors = [tensor for tensor in self._owned if tensor is not None]
        self._ids = set(map(id, tensors))
        statistics = [
            t for t in statistics_of(modules) if is_plain_tensor(t) and t.device.type == "cpu"
        ]
        self._statistics = Statistics(statistics)
        # a forward in eval mode does not read it; on a GPU it tells that statistics have moved
        found = (m._buffers.get(_COUNT) for m in modules)
        counts = [t for t in found if t is not None and t.device.type == "cpu"]
        by_value, unread = set(map(id, statistics)), set(map(id, counts))
        self._tensors = [t for t in tensors if id(t) not in unread]
        self._versioned = [
            t for t in self._tensors if not t.is_inference() and id(t) not in by_value
        ]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._versions = self._read_versions()
        self._settings = ModuleSettings(module)
        self._is_written = False
        follow_optimizers()
        _STAMPS.add(self)

    def is_current(self) -> bool:
        """Whether nothing has changed since the record was made."""
        return (
            not self._is_written
            and list(map(is_training, self._structure.modules)) == self._modes
            and self._has_same_hooks()
            and self._read_forwards() == self._forwards
            and self._structure.is_intact()
            and self._owns_the_same()
            and self.has_same_memory()
            and self._read_versions() == self._versions
            and self._settings.change() is None
            and self._statistics.are_current()
        )

    def has_same_memory(self) -> bool:
        """Whether the tensors of then, which the record keeps, are where they were in memory."""
        # a new dtype or device gives a new address
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses

    def note_written(self, tensors: Iterable[Tensor]) -> None:
        """Makes the record out of date if it has one of these tensors, which were written."""
        self._is_written = self._is_written or any(id(tensor) in self._ids for tensor in tensors)

    def _read_owned(self) -> list[Tensor | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._owners)))

    def _owns_the_same(self) -> bool:
        owned = self._read_owned()
        return len(owned) == len(self._owned) and all(map(operator.is_, owned, self._owned))

    def _read_versions(self) -> list[int]:
        return list(map(_VERSION, self._versioned))

    def _read_forwards(self) -> list[Any]:
        """The forward that is set on the instance of each module."""
        return list(map(_forward_of, self._attributes))

    def _has_same_hooks(self) -> bool:
        if not self._hook_ids:  # faster
            return not any(self._read_hooks())
        return list(itertools.chain.from_iterable(self._read_hooks())) == self._hook_ids

    def _read_hooks(self) -> Iterator[dict[int, Any]]:
        """The hooks of the layers inside; those of the module run around the artefact."""
        # read anew each time: programs clear hooks by new dictionaries
        return itertools.chain.from_iterable(map(_forward_hooks_of, self._attributes[1:]))


# --- writes that do not change the version of a tensor


class _Untraced:
    """Events after which weights may differ although their versions are the same.

    Attributes:
        last_step: a new object after each step of any optimizer (fused ones do not change
            versions).
        last_layer: a new object after a layer was put into a followed module (merging LoRA into
            the layer that it wraps does not change versions either).
    """

    def __init__(self) -> None:
        self.last_step = object()
        self.last_layer = object()
        self.step_hook: RemovableHandle | None = None
        self.layer_hook: RemovableHandle | None = None
        self.followed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.lock = threading.Lock()


untraced = _Untraced()
_STAMPS: weakref.WeakSet[ModuleStamp] = weakref.WeakSet()


def note_written(tensors: Iterable[Tensor]) -> None:
    """Makes every `ModuleStamp` of a module with one of these tensors out of date."""
    tensors = list(tensors)
    for stamp in list(_STAMPS):
        stamp.note_written(tensors)


def follow_optimizers() -> None:
    """Starts to watch the steps of all optimizers."""
    with untraced.lock:
        if untraced.step_hook is None:
            untraced.step_hook = register_optimizer_step_post_hook(_note_step)


def follow_layers(modules: Iterable[nn.Module]) -> None:
    """Starts to watch layers that are put into these modules."""
    with untraced.lock:
        untraced.followed.update(modules)
        if untraced.layer_hook is None:
            untraced.layer_hook = register_module_module_registration_hook(_note_layer)


def _note_layer(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
    if parent in untraced.followed:  # a module around a backbone is not followed
        untraced.last_layer = object()
        if _STAMPS and layer is not None:
            note_written(layer.parameters())


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    untraced.last_step = object()
    if _STAMPS:
        note_written(p for group in optimizer.param_groups for p in group["params"])


def is_plain_tensor(value: Tensor) -> bool:
    """Whether a tensor may outlive the mode or the torch.func transform that computed it."""
    return type(value) is Tensor and not is_functorch_wrapped_tensor(value)
