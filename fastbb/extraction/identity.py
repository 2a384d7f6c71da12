"""Identity of models: their weights, their configuration, and changes of a backbone object."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base import Backbone
from ..weights.watch import has_foreign_forward, is_bookkeeping
from .layout import canonical_json

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OWN_ATTRIBUTES = set(vars(nn.Module()))


def weights_digest(states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """Returns the SHA-256 of state dicts, each with the name of its kind."""
    digest = hashlib.sha256()
    for kind, state in states:
        digest.update(canonical_json([kind, len(state)]))
        for name, tensor in sorted(state.items()):
            digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
            flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def json_types(value: Any, name: str) -> Any:
    """Converts a value to what JSON gives back.

    Args:
        value: tuples become lists, classes and functions their names.
        name: of the value, for the message.

    Raises:
        ValueError: another process could not write the same.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_types(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(item, f"{name}[{i}]") for i, item in enumerate(value)]
    qualified = getattr(value, "__qualname__", None)
    text = repr(value) if qualified is None else f"{value.__module__}.{qualified}"
    if " at 0x" in text or "<lambda>" in text or "<locals>" in text:
        raise ValueError(
            f"model: {name} is {value!r}, which has no name by which another process finds it: "
            "give a class or function of a module"
        )
    return text


def changes(backbone: Backbone) -> dict[str, str]:
    """Compares a backbone with a fresh one of its configuration, in all but the weights.

    Returns:
        By the name of a module, its class, settings and hooks where they are others. "" stands for
        the backbone itself.
    """
    fresh = {
        name: _description(module) for name, module in backbone.without_weights().named_modules()
    }
    own = {name: _description(module) for name, module in backbone.named_modules()}
    differ = {name: text for name, text in own.items() if fresh.get(name) != text}
    return differ | dict.fromkeys(fresh.keys() - own.keys(), "removed")


def changes_digest(found: Mapping[str, str]) -> str:
    """Returns the SHA-256 of what `changes` found."""
    return hashlib.sha256(canonical_json(sorted(found.items()))).hexdigest()


def _description(module: nn.Module) -> str:
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
