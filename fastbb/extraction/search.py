"""Search of the rows with the closest features, exactly and shard by shard."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..engine.explanation import Report
from .outputs import unit_length
from .reading import Reader

Metric = Literal["cosine", "dot"]
_CHUNK_BYTES = 64 * 2**20
# norms of this size are exact, as squares of larger and smaller numbers may not be in fp32
_SMALL = 2.0**-40
_MAX_QUERIES = 1024  # at once, which bounds the memory of the scores


@dataclass(frozen=True)
class Neighbours:
    """The rows with the closest features, closest first; shown as a table.

    Attributes:
        ids: of the rows, [k]; of several queries, a list of lists.
        scores: their similarity to the query, fp32 [k] or [n, k].
        rows: their positions among all rows, int64 [k] or [n, k].
    """

    ids: list[str] | list[list[str]]
    scores: Tensor
    rows: Tensor

    def __repr__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        k = self.rows.shape[-1]
        if self.rows.ndim == 1:
            cells = zip(self.ids, self.scores.tolist(), self.rows.tolist())
            rows = [(repr(id), f"{score:.4f}", str(row)) for id, score, row in cells]
            return Report(f"{k} neighbours", [("id", "score", "row"), *rows])
        cells = zip(self.ids, self.scores)
        rows = [
            (str(i), repr(ids[0]) if ids else "", f"{scores[0]:.4f}" if ids else "")
            for i, (ids, scores) in enumerate(cells)
        ]
        title = f"{k} neighbours of {len(self.rows)} queries; the closest of each"
        return Report(title, [("query", "id", "score"), *rows])


def search(
    reader: Reader,
    query: str | Tensor | np.ndarray | Sequence[float],
    k: int,
    name: str,
    metric: str,
) -> Neighbours:
    """Finds neighbours, see `Features.search`."""
    if metric not in get_args(Metric):
        raise ValueError(f"metric: wanted {' or '.join(get_args(Metric))}, got {metric!r}")
    k = _count(k)
    shape = reader.plan["outputs"][name]["shape"]
    if len(shape) != 1:
        raise ValueError(f"name: wanted features of one dimension, got {name} of shape {shape}")
    queries, itself = _vectors(reader, query, name)
    if queries.ndim not in (1, 2) or queries.shape[-1] != shape[0]:
        raise ValueError(
            f"query: wanted [{shape[0]}] or [n, {shape[0]}], got {list(queries.shape)}"
        )
    if not queries.isfinite().all():
        raise ValueError("query: wanted finite numbers, got NaN or infinity")
    best = _Best(queries.reshape(-1, shape[0]), k, metric, itself)
    n_rows = max(1, _CHUNK_BYTES // (4 * shape[0]))
    for block in reader.computed_blocks:
        for rows, tensors in reader.pieces(block, [name]):
            for part, features in zip(rows.split(n_rows), tensors[name].split(n_rows)):
                best.add(part, features.float())
    ids = reader.ids_of(best.rows.flatten().tolist())
    named = [[ids[row] for row in found] for found in best.rows.tolist()]
    if queries.ndim == 1:
        return Neighbours(named[0], best.scores[0], best.rows[0])
    return Neighbours(named, best.scores, best.rows)


def _count(k: Any) -> int:
    with contextlib.suppress(TypeError):
        if not isinstance(k, bool) and operator.index(k) >= 1:
            return operator.index(k)
    raise ValueError(f"k: wanted a whole number, at least 1, got {k!r}")


def _vectors(
    reader: Reader, query: str | Tensor | np.ndarray | Sequence[float], name: str
) -> tuple[Tensor, int | None]:
    """Returns the vectors of a query, and the number of the row that it is."""
    if not isinstance(query, str):
        return torch.as_tensor(query, device="cpu").detach().float(), None
    row = reader.row_of_id(query)
    if row is None:
        raise ValueError(f"query: wanted the id of a row, got {query!r}")
    block = reader.block_of(row)
    if row not in (reader.tensors(block, [])[0] if block.computed else []):
        raise ValueError(f"query: {query!r} has no features, see errors()")
    return reader.row(row, [name])[name].float(), row


class _Best:
    """The closest rows so far.

    Attributes:
        scores: fp32 [n, k], falling.
        rows: int64 [n, k].
    """

    def __init__(self, queries: Tensor, k: int, metric: str, itself: int | None) -> None:
        self._cosine = metric == "cosine"
        self._queries = unit_length(queries) if self._cosine else queries
        self._k, self._itself = k, itself
        self.scores = torch.empty(len(queries), 0)
        self.rows = torch.empty(len(queries), 0, dtype=torch.int64)

    def add(self, rows: Tensor, features: Tensor) -> None:
        """Compares rows [m] with features [m, C]."""
        if self._itself is not None and (others := rows != self._itself).logical_not().any():
            rows, features = rows[others], features[others]
        k = min(self._k, len(rows))
        norms = torch.ones(())
        if self._cosine:
            # in this thread: torch's would wait for each other at every shard where cores are busy
            squares = np.einsum("ij,ij->i", features.numpy(), features.numpy())
            norms = torch.from_numpy(np.sqrt(squares))
            if not ((norms > _SMALL) & (norms < 1 / _SMALL)).all():
                features, norms = unit_length(features), torch.ones(())
        parts = [
            (queries @ features.T).div_(norms).topk(k, dim=1)
            for queries in self._queries.split(_MAX_QUERIES)
        ]
        scores = torch.cat([self.scores, torch.cat([part.values for part in parts])], 1)
        found = torch.cat([self.rows, rows[torch.cat([part.indices for part in parts])]], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores = scores[:, : self._k]
        self.rows = found.gather(1, order[:, : self._k])
