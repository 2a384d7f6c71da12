"""What may change inside a module beside its tensors, and decides what it computes."""

from collections.abc import Collection
from functools import partial
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_NUMBERS = (bool, int, float, str, type(None), torch.dtype)
_PLAIN = (*_NUMBERS, FunctionType, BuiltinFunctionType, partial, type)


class ModuleSettings:
    """The settings of a module and of all inside it, as they were when something was made of them.

    A setting is an attribute that is no tensor: eps, a stride, a window, the scale of an attention,
    an activation and its arguments; the class, and which parameters there are. A module's own
    forward reads them at every call. Whoever reads them once asks here before it uses what it made
    of them.

    Args:
        module: with everything inside.
        ignored: names of attributes that are not settings, because they are read at every call.
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
        # what an itemgetter of one key returns is no tuple
        self._read = [tuple(values) if len(values) > 1 else values[0] for _, _, values in own]

    def change(self) -> str | None:
        """What differs now, in words, or None."""
        # every inference asks this; a comparison of tuples looks at identities first. A compiler
        # follows the words instead, and so guards every setting
        if not torch.compiler.is_compiling() and self._is_same():
            return None
        parts = zip(self._names, self._parts, self._classes, self._keys, self._values)
        for name, part, cls, keys, values in parts:
            if type(part) is not cls:
                return f"{name or 'it'} is a {type(part).__name__}, was a {cls.__name__}"
            for key, old in zip(keys, values):
                new = getattr(part, key, "gone")
                if new is not old and not (_is_plain(new) and new == old):
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
        except Exception:  # deleted, or a tensor now, which is neither equal nor not
            return False


def _is_setting(module: nn.Module, name: str, value: Any) -> bool:
    if name.startswith("_") or name == "training":
        return False
    # a method that was put over the class's own is watched elsewhere
    return not callable(getattr(type(module), name, None)) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _kept(values: Any) -> Any:
    """A copy of what may be changed in place."""
    if isinstance(values, list):
        return [_kept(value) for value in values]
    return tuple(map(_kept, values)) if type(values) is tuple else values
