"""Descriptions of modules: what decides their results, in all but the weights."""

from __future__ import annotations

import dataclasses
from types import CodeType
from typing import Any

from torch import nn

from ..weights.watch import has_foreign_forward, is_bookkeeping
from .base import Backbone

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OWN_ATTRIBUTES = set(vars(nn.Module()))


def description(module: nn.Module) -> str:
    """Text of a module's own class, settings, hooks and forward, which another process repeats."""
    values = [
        (name, text)
        for name, value in vars(module).items()
        if name not in _OWN_ATTRIBUTES
        and not isinstance(module, Backbone)  # whose attributes are the configuration and caches
        and not is_bookkeeping(module, name)
        and "checkpoint" not in name
        and (text := _setting(value)) is not None
    ]
    hooks = [_function(hook) for name in _HOOKS for hook in getattr(module, name).values()]
    forward = [_function(vars(module)["forward"])] if has_foreign_forward(module) else []
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return repr((kind, module.extra_repr(), sorted(values), hooks, forward))


def _setting(value: Any) -> str | None:
    """Text of a plain value; None for others."""
    if isinstance(value, (tuple, list)):
        texts = [_setting(item) for item in value]
        return None if None in texts else repr(texts)
    is_frozen = dataclasses.is_dataclass(value) and not isinstance(value, type)
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if is_plain or is_frozen else None


def _function(function: Any) -> str:
    """Name of a function or of the class of a callable, and a function's instructions."""
    named = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None)
    instructions = _instructions(code) if isinstance(code, CodeType) else ""
    return f"{named.__module__}.{named.__qualname__} {instructions}"


def _instructions(code: CodeType) -> str:
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
