"""Launch configurations that were measured on a GPU; they take precedence over the usual ones.

`configs/<GPU>.json` of this package is committed and reviewed; measurements outside of a checkout
are in the result cache of the machine. Both hold, by table, a list of entries:

    {"sizes": {"n_rows": 200704, "features": 96, "dtype": "bfloat16"}, "config": [128, 64, 8]}

`sizes` are the arguments of the table's `launch_config`, `config` the fields of its result.
"""

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._dispatch import Architecture, current_check, machine_check
from .machine import device_slug

CONFIGS = Path(__file__).parent / "configs"
SECTION = "configs"  # name in the result cache
# a measurement at n rows applies to n / 2 to 2 * n rows
_MOST_RATIO = 2.0

_log = logging.getLogger(__name__)
_Config = TypeVar("_Config", bound=tuple[Any, ...])
Entry = Mapping[str, Any]


@lru_cache(maxsize=4096)
def unforced_config(
    table: str,
    launch_config: Callable[..., _Config],
    device: torch.device,
    arch: Architecture | None,
    sizes: tuple[Any, ...],
) -> _Config:
    """Returns the fastest configuration measured on a GPU for such sizes, else the usual one.

    Args:
        table: name of the choice.
        launch_config: makes the usual one from `sizes` and `arch`.
        device: of the launch; there are measurements of GPUs only.
        arch: of the launch.
        sizes: arguments of the choice; the measurement must have the same ones, except for
            "n_rows", of which the nearest is taken.
    """
    usual = launch_config(*sizes, arch)
    if device.type != "cuda":
        return usual
    named = dict(zip(inspect.signature(launch_config).parameters, sizes))
    return _measured_config(table, usual, device, named) or usual


def is_measured(table: str, device: torch.device) -> bool:
    """Whether there is a measurement of a GPU for any sizes."""
    return device.type == "cuda" and any(table in entries for entries in _entries(device))


def _measured_config(
    table: str, usual: _Config, device: torch.device, sizes: Mapping[str, Any]
) -> _Config | None:
    for entries in _entries(device):
        entry = _nearest(entries.get(table, ()), plain_sizes(sizes))
        if entry is not None:
            try:
                return _of_the_form(usual, entry["config"])
            except (TypeError, ValueError, KeyError) as error:
                _log.info("ignored a measured configuration of %s: %s", table, error)
    return None


def plain_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Converts sizes to values of JSON."""
    return {
        name: str(size).removeprefix("torch.") if isinstance(size, torch.dtype) else size
        for name, size in sizes.items()
    }


def config_path(device_name: str) -> Path:
    """Returns the file of a GPU in this package."""
    return CONFIGS / f"{device_slug(device_name)}.json"


def write_configs(
    device_name: str,
    tables: Mapping[str, Sequence[Entry]],
    facts: Mapping[str, str],
    path: Path | None = None,
) -> Path:
    """Writes configurations measured on a GPU.

    Args:
        device_name: as torch names it.
        tables: entries by table; additional fields of an entry (microseconds) are kept.
        facts: versions, commit and date.
        path: of the file; default: in this package.
    """
    path = config_path(device_name) if path is None else path
    content = {"device": device_name, **facts, "configs": tables}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)
    forget()
    return path


def forget() -> None:
    """Makes the next launches read the measurements again."""
    unforced_config.cache_clear()
    _entries.cache_clear()


@cache
def _entries(device: torch.device) -> tuple[dict[str, list[Entry]], ...]:
    """Reads the entries of a GPU by table: those of the package, and those of its result cache."""
    check = current_check() or machine_check()
    path = config_path(torch.cuda.get_device_name(device))
    found: list[Any] = []
    try:
        found.append(json.loads(path.read_text())["configs"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.info("ignored %s: %s", path, error)
    if check is not None:
        found.append(check.cache(device).items(SECTION))
    return tuple(
        {table: entries for table, entries in tables.items() if isinstance(entries, list)}
        for tables in found
        if isinstance(tables, dict)
    )


def _nearest(entries: Sequence[Any], sizes: Mapping[str, Any]) -> Entry | None:
    """Returns the entry of equal sizes with the nearest number of rows, if that is near enough."""
    others = {name: size for name, size in sizes.items() if name != "n_rows"}
    best, least = None, math.log(_MOST_RATIO)
    for entry in entries:
        found = entry.get("sizes") if isinstance(entry, dict) else None
        if not isinstance(found, dict) or found.keys() != sizes.keys():
            continue
        if any(found[name] != size for name, size in others.items()):
            continue
        rows, wanted = found.get("n_rows", 1), sizes.get("n_rows", 1)
        if not isinstance(rows, int) or min(rows, wanted) < 1:
            continue
        distance = abs(math.log(rows / wanted))
        if distance <= least:
            best, least = entry, distance
    return best


def _of_the_form(usual: Any, values: Any) -> Any:
    """Makes a named tuple of the type of `usual` with these values.

    Raises:
        ValueError: the values do not have its form.
    """
    if isinstance(usual, tuple):
        if not isinstance(values, list | tuple) or len(values) != len(usual):
            raise ValueError(f"wanted {len(usual)} values as in {usual}, got {values!r}")
        return type(usual)(*(_of_the_form(one, value) for one, value in zip(usual, values)))
    if usual is not None and values is not None and type(values) is not type(usual):
        raise ValueError(f"wanted a value as {usual!r}, got {values!r}")
    return values
