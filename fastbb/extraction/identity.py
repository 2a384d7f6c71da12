"""Identity of models: their weights, their configuration, and changes of a backbone object."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..backbone.base import Backbone
from ..backbone.description import description
from .layout import canonical_json


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
        name: description(module) for name, module in backbone.without_weights().named_modules()
    }
    own = {name: description(module) for name, module in backbone.named_modules()}
    differ = {name: text for name, text in own.items() if fresh.get(name) != text}
    return differ | dict.fromkeys(fresh.keys() - own.keys(), "removed")


def changes_digest(found: Mapping[str, str]) -> str:
    """Returns the SHA-256 of what `changes` found."""
    return hashlib.sha256(canonical_json(sorted(found.items()))).hexdigest()
