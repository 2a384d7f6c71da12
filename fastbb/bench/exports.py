"""Files of a bench: CSV with timm's columns, JSON, and checks of where files go."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..extraction.layout import write_file
from .noise import inside_ratio, inside_share, is_valid, speed
from .rates import bound_shares
from .results import Cell, Results, Way
from .table import ratio_to_upstream

# JSON has no infinity; this is a number, which readers take as one
_INFINITY, _BEYOND = "\x00infinity", "1e999"


def check_targets(targets: Mapping[str, str | os.PathLike[str]]) -> None:
    """Checks before a measurement that its files can be written.

    Args:
        targets: paths by option, such as "--csv".

    Raises:
        ValueError: a path is no file that can be written, or two options have the same.
    """
    owners: dict[Path, str] = {}
    for option, given in targets.items():
        path = Path(given)
        if not os.fspath(given):
            raise ValueError(f"{option}: wanted a path of a file, got ''")
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a directory; give a file in it")
        if path.exists() and not path.is_file():
            raise ValueError(f"{option} {path}: is no regular file; give another path")
        parent = path.parent
        if not parent.is_dir():
            raise ValueError(f"{option} {path}: there is no directory {parent}; make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ValueError(f"{option} {path}: {parent} cannot be written; give another path")
        if (other := owners.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{option} {path}: {other} writes the same file; give another path")


def write_csv(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes a row for each way of each cell.

    The first columns are those of timm's `benchmark.py`, with its units: milliseconds, millions,
    10^9 multiply-adds. Ours begin with `fb_`; times are empty for a way that is wrong.
    """
    file = io.StringIO(newline="")
    rows = [_row(results, cell, way) for cell in results.cells for way in cell.ways]
    writer = csv.DictWriter(file, [*_TIMM_COLUMNS, *_OUR_COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(Path(path), file.getvalue().encode())


def write_json(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes everything, for `Results.read`."""
    text = json.dumps(_strict(results.to_dict()), allow_nan=False)
    write_file(Path(path), text.replace(json.dumps(_INFINITY), _BEYOND).encode() + b"\n")


def _strict(value: Any) -> Any:
    """The same without floats that JSON lacks; NaN becomes null."""
    if isinstance(value, dict):
        return {name: _strict(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else _INFINITY  # errors are never negative
    return value


_TIMM_COLUMNS = (
    "model",
    "infer_img_size",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "param_count",
    "infer_gmacs",
    "infer_macts",
)
_OUR_COLUMNS = (
    "fb_way",
    "fb_ours",
    "fb_kind",
    "fb_precision",
    "fb_batch_asked",
    "fb_height",
    "fb_width",
    "fb_p50_ms",
    "fb_p90_ms",
    "fb_p99_ms",
    "fb_samples_per_sec_low",
    "fb_samples_per_sec_high",
    "fb_upstream",
    "fb_ratio",
    "fb_ratio_low",
    "fb_ratio_high",
    "fb_verdict",
    "fb_rounds",
    "fb_calls",
    "fb_memory_bytes",
    "fb_cold_start_s",
    "fb_compile_s",
    "fb_error",
    "fb_allowed",
    "fb_wrong",
    "fb_reason",
    "fb_note",
    "fb_inside_share",
    "fb_inside_ratio",
    "fb_products_share",
    "fb_weights_share",
    "fb_date",
    "fb_device",
    "fb_threads",
    "fb_torch",
    "fb_commit",
)


def _row(results: Results, cell: Cell, way: Way) -> dict[str, Any]:
    environment = results.environment
    height, width = cell.size
    return {
        "model": cell.model,
        "infer_img_size": width,  # as timm's, which has the last side
        "infer_batch_size": cell.batch,
        "param_count": _scaled(cell.params, 1e6),
        "infer_gmacs": _scaled(cell.macs, 1e9),
        "infer_macts": _scaled(cell.activations, 1e6),
        "fb_way": way.name,
        "fb_ours": _word(way.ours),
        "fb_kind": cell.kind,
        "fb_precision": cell.precision,
        "fb_batch_asked": cell.asked_batch,
        "fb_height": height,
        "fb_width": width,
        "fb_upstream": _word(way.name == cell.upstream),
        **(_speeds(cell, way) if is_valid(way) else {}),
        "fb_memory_bytes": way.memory_bytes,
        "fb_cold_start_s": _scaled(way.cold_start_s, 1, 3),
        "fb_compile_s": _scaled(way.compile_s, 1, 3),
        "fb_error": way.error,
        "fb_allowed": way.allowed,
        "fb_wrong": way.wrong,
        "fb_reason": way.reason,
        "fb_note": way.note,
        "fb_date": environment.get("date"),
        "fb_device": environment.get("gpu") or environment.get("cpu"),
        "fb_threads": environment.get("threads"),
        "fb_torch": (environment.get("versions") or {}).get("torch"),
        "fb_commit": environment.get("fastbb_commit"),
    }


def _speeds(cell: Cell, way: Way) -> dict[str, Any]:
    """The columns of times, of a way that has them."""
    measured, upstream = speed(way, cell.batch), cell.way(cell.upstream)
    assert measured is not None
    found = ratio_to_upstream(cell, way)
    shares = bound_shares(cell, way) or {}
    inside = inside_ratio(way, upstream) if upstream and is_valid(upstream) else None
    return {
        "infer_samples_per_sec": round(measured.images_per_s, 2),
        "infer_step_time": _scaled(measured.p50_s, 1e-3, 3),
        "fb_p50_ms": _scaled(measured.p50_s, 1e-3, 3),
        "fb_p90_ms": _scaled(measured.p90_s, 1e-3, 3),
        "fb_p99_ms": _scaled(measured.p99_s, 1e-3, 3),
        "fb_samples_per_sec_low": _scaled(measured.low, 1),
        "fb_samples_per_sec_high": _scaled(measured.high, 1),
        "fb_ratio": _scaled(found and found.value, 1, 4),
        "fb_ratio_low": _scaled(found and found.low, 1, 4),
        "fb_ratio_high": _scaled(found and found.high, 1, 4),
        "fb_verdict": found and way is not upstream and found.verdict or None,
        "fb_rounds": sum(map(bool, way.rounds_s)),
        "fb_calls": measured.n_calls,
        "fb_inside_share": _scaled(inside_share(way), 1, 4),
        "fb_inside_ratio": _scaled(inside and inside.value, 1, 4),
        "fb_products_share": _scaled(shares.get("products"), 1, 4),
        "fb_weights_share": _scaled(shares.get("weights"), 1, 4),
    }


def _scaled(value: float | None, unit: float, digits: int = 2) -> float | None:
    """A value in a unit, rounded as timm's `benchmark.py` does."""
    return None if value is None else round(value / unit, digits)


def _word(value: bool) -> str:
    return "true" if value else "false"
