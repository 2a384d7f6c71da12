"""Reading of a features directory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..engine.explanation import table
from .decode import RowError
from .layout import (
    file_name,
    plan_sha256,
    read_commit,
    read_generations,
    read_plan,
    totals,
)
from .sources import first_few

_N_ERRORS_SHOWN = 10


class RowErrors(list[RowError]):
    """Rows without features; shown as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no errors"
        shown = self[:_N_ERRORS_SHOWN]
        rows = [(str(e.row), repr(e.id), e.kind, e.message) for e in shown]
        more = [f"... and {len(self) - len(shown):,} more"] if len(self) > len(shown) else []
        return "\n".join([table([("row", "id", "kind", "message"), *rows]), *more])


class Features:
    """A features directory, read only: the rows of its committed shards.

    Files are compared with their commits by size; running the extraction again reads them all and
    redoes a shard whose sha256 differs.

    Args:
        directory: the output of an extraction.

    Attributes:
        plan: the settings that the features were computed with.
        complete: whether every shard is committed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        path = self.directory / "plan.json"
        if not path.exists():
            raise FileNotFoundError(f"{self.directory} is no features directory: no plan.json")
        self.plan = read_plan(path)
        identity = plan_sha256(self.plan)
        self.gens = read_generations(self.directory, self.plan)
        self.shards = [s for g in self.gens for s in g.shards]
        n_shards = len(self.shards)
        commits = (read_commit(self.directory, s, self.plan, identity) for s in self.shards)
        self._commits = [commit for commit in commits if commit is not None]
        self.complete = len(self._commits) == n_shards

    def __repr__(self) -> str:
        counts = totals(self._commits)
        failed = counts["rows"] - counts["ok"]
        state = "complete" if self.complete else "not finished"
        first = f"{self.directory}: features of {counts['ok']:,} images, {failed:,} failed, {state}"
        outputs = self.plan["outputs"].items()
        rows = [(f"  {name}", str([len(self), *o["shape"]]), o["dtype"]) for name, o in outputs]
        return f"{first}\n{table(rows)}"

    def __len__(self) -> int:
        """Number of rows that have features."""
        return sum(commit["ok"] for commit in self._commits)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, such as "pooled" or "maps.stage4"."""
        return tuple(self.plan["outputs"])

    @functools.cached_property
    def ids(self) -> list[str]:
        """Ids of the rows that have features, in the order of the input."""
        return [row["id"] for row in self._index() if row["status"] == "ok"]

    def __getitem__(self, name: str) -> Tensor:
        """The features [n, ...] of the rows in `ids`; one shard is mapped, several are read."""
        parts = [tensors[name] for _, tensors in self.iter_shards([name])]
        if len(parts) == 1:
            return parts[0]
        output = self.plan["outputs"][name]
        empty = torch.empty(0, *output["shape"], dtype=getattr(torch, output["dtype"]))
        return torch.cat([empty, *parts])

    def iter_shards(
        self, names: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """Yields ids and features [n, ...] shard by shard, for what does not fit into memory.

        Args:
            names: which features; default: all.

        Raises:
            KeyError: there are no such features.
        """
        names = self.names if names is None else names
        for name in names:
            if name not in self.names:
                raise KeyError(f"no features {name!r}; there are {', '.join(self.names)}")
        for commit in self._commits:
            path = self.directory / file_name("features", commit["shard"])
            ids = [row["id"] for row in self._shard_index(commit) if row["status"] == "ok"]
            with safe_open(path, framework="pt") as file:
                yield ids, {name: file.get_tensor(name) for name in names}

    def errors(self) -> list[RowError]:
        """The rows that have no features, in the order of the input."""
        return RowErrors(self._errors())

    def describe(self) -> str:
        """Returns a summary of the directory: plan, rows, failures and speed, as lines of text."""
        plan, model, pixels = self.plan, self.plan["model"], self.plan["preprocessing"]
        counts, (speed, stopped) = totals(self._commits), self._last_runs()
        state = "complete" if self.complete else "not finished, the same command again goes on"
        outputs = (f"{name} {o['shape']} {o['dtype']}" for name, o in plan["outputs"].items())
        lines = [
            f"features  {self.directory}: {state}",
            *([f"reason    {stopped}"] if stopped and not self.complete else []),
            f"model     {model['name']} ({model['class']}, weights {model['weights_sha256'][:12]})",
            f"pixels    {pixels['image_processor_type']}: resize {pixels['resize']} "
            f"{pixels['size']}, crop {pixels['crop_size']}",
            f"run       {plan['precision']} on {plan['device']} ({plan['runs']}), batches of "
            f"{plan['batch_size']}, "
            f"torch {plan['versions']['torch']}",
            f"outputs   {', '.join(outputs)}",
            f"rows      {counts['rows']:,} of {sum(g.rows for g in self.gens):,}, "
            f"in {counts['shards']:,} of {len(self.shards):,} shards",
            f"speed     {'unknown' if speed is None else f'{speed:,.1f} images/s'}",
            f"ok        {counts['ok']:,}",
            f"failed    {counts['rows'] - counts['ok']:,}",
        ]
        lines += [f"  {kind:20} {n:,}" for kind, n in sorted(counts["errors"].items())]
        for error in itertools.islice(self._errors(), _N_ERRORS_SHOWN):
            lines.append(f"  {error.id!r}: {error.kind}, {error.message}")
        if counts["rows"] - counts["ok"] > _N_ERRORS_SHOWN:
            lines.append("  ...")
        if lost := self.gens[-1].unreadable if self.gens else ():
            lines.append(f"not read  {len(lost):,} directories: {first_few(lost)}")
        return "\n".join(lines)

    def _errors(self) -> Iterator[RowError]:
        for row in self._index():
            if row["status"] == "error":
                yield RowError(row["row"], row["id"], row["kind"], row["message"])

    def _index(self) -> Iterator[dict[str, Any]]:
        for commit in self._commits:
            yield from self._shard_index(commit)

    def _shard_index(self, commit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with open(self.directory / file_name("index", commit["shard"]), "rb") as file:
            yield from map(json.loads, file)

    def _last_runs(self) -> tuple[float | None, str | None]:
        """Rows per second over all shards that are logged, and why the last run stopped, if so."""
        path = self.directory / "run.jsonl"
        rows, seconds, stopped = 0, 0.0, None
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a crash
                event = json.loads(line)
                if event["event"] == "shard":
                    rows, seconds = rows + event["rows"], seconds + event["seconds"]
                else:
                    stopped = event.get("reason")  # a start has none
        return (rows / seconds if seconds else None), stopped


def open_features(directory: str | os.PathLike[str]) -> Features:
    """Opens a features directory for reading.

    Args:
        directory: the output of `fastbb extract` or `fastbb.extract`, finished or not.

    Raises:
        FileNotFoundError: it is no features directory.
        ValueError: it was written by a later version.
    """
    return Features(directory)
