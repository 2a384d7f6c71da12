"""Computes shards of a features directory, and commits each."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.interruption import check_interrupted
from .decode import RowError
from .layout import PlanMismatchError, Shard
from .listing import archive_state
from .pipeline import FeatureBatch, FeatureExtractor, chunked
from .sources import Source
from .store import FeatureWriter


@dataclass(frozen=True)
class Computed:
    """Some rows of a shard were computed, which is not committed yet.

    Attributes:
        shard: its number.
        rows: how many.
        errors: those that have no features.
    """

    shard: int
    rows: int
    errors: tuple[RowError, ...] = ()


@dataclass(frozen=True)
class Committed:
    """A shard was committed.

    Attributes:
        shard: its number.
        commit: what its commit file holds.
    """

    shard: int
    commit: dict[str, Any]


@dataclass(frozen=True)
class Lost:
    """A worker ended inside a shard.

    Attributes:
        shard: its number.
        computed: what the worker had computed of it, which does not count.
        reason: how the worker ended.
        is_left: whether it is not tried again in this run.
    """

    shard: int
    computed: tuple[Computed, ...]
    reason: str
    is_left: bool


ShardEvent = Computed | Committed | Lost


def compute_shards(
    extractor: FeatureExtractor, writer: FeatureWriter, shards: Sequence[Shard]
) -> Generator[Computed | Committed, None, None]:
    """Computes shards one after the other; images of the next are decoded meanwhile.

    Raises:
        PlanMismatchError: an archive has changed since its images were listed.
        OutputError: the directory cannot be written.
    """
    archives: dict[int, dict[str, Mapping[str, int]]] = {}  # of the shards that are being read

    def chunks() -> Iterator[list[tuple[int, str, Source]]]:
        for shard in shards:
            rows = writer.rows(shard)
            archives[shard.shard] = _archives(writer, shard, rows)
            _check_archives(archives[shard.shard])
            named = ((row, source.id, source) for row, source in rows)
            yield from chunked(named, extractor.batch_size)

    # a first job smaller than a batch is not padded to one; its size is frozen with it
    pad_to = min(extractor.batch_size, writer.generations[0].rows)
    with closing(extractor.run(chunks(), pad_to=pad_to)) as batches:
        for shard in shards:
            n_left = shard.rows
            parts: list[FeatureBatch] = []
            while n_left:
                batch = next(batches)
                check_interrupted()
                parts.append(batch)
                n_batch = len(batch.ids) + len(batch.errors)
                n_left -= n_batch
                yield Computed(shard.shard, n_batch, tuple(batch.errors))
            _check_archives(archives.pop(shard.shard))
            commit = writer.commit(shard, *shard_content(parts, writer.plan["outputs"]))
            yield Committed(shard.shard, commit)
            check_interrupted()


def shard_content(
    parts: Sequence[FeatureBatch], outputs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Returns tensors and index of a shard."""
    rows = [row for part in parts for row in part.rows]
    tensors = {"row_id": torch.tensor(rows, dtype=torch.int64)}
    for name, output in outputs.items():
        found = [part.features[name] for part in parts if part.ids]
        empty = torch.empty(0, *output["shape"], dtype=getattr(torch, output["dtype"]))
        tensors[name] = torch.cat([empty, *found])
    index: list[dict[str, Any]] = [
        {"row": error.row, "id": error.id, "status": "error"}
        | {"kind": error.kind, "message": error.message}
        for part in parts
        for error in part.errors
    ]
    ids = [name for part in parts for name in part.ids]
    index += [
        {"row": row, "id": name, "status": "ok", "pos": pos}
        for pos, (row, name) in enumerate(zip(rows, ids))
    ]
    return tensors, sorted(index, key=lambda entry: entry["row"])


def _archives(
    writer: FeatureWriter, shard: Shard, rows: Sequence[tuple[int, Source]]
) -> dict[str, Mapping[str, int]]:
    """Returns the archives that rows of a shard are in, as they were when they were listed."""
    listed = next(g.archives for g in writer.generations if shard in g.shards)
    paths = {source.path for _, source in rows} if listed else set()
    return {path: listed[path] for path in sorted(paths & listed.keys())}


def _check_archives(archives: Mapping[str, Mapping[str, int]]) -> None:
    """Raises if an archive is another one now, so that rows are no places in it."""
    for path, state in archives.items():
        try:
            changed = archive_state(path) != state
        except OSError:
            changed = True
        if changed:
            raise PlanMismatchError(
                f"{path} has changed or is gone since its images were listed, and some of them "
                "are still to be extracted; restore it, or use another directory"
            )
