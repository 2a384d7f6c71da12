"""Reading of a features directory."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ..engine.explanation import Report, table
from .decode import RowError
from .layout import FORMAT, file_name, read_events
from .reading import Block, Reader, numpy_array, reason, table_name, utf8
from .search import Metric, Neighbours, search
from .sources import first_few
from .tables import Tables

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]
    import pyarrow

_N_SHOWN = 10
_DEFAULT = "embedding"  # of several features
_VERSIONS = ("torch", "fastbb")
_TOO_MANY_FAILED = 4  # exit code of a run that the share of failures stopped


class RowErrors(list[RowError]):
    """Rows without features; shown as a table."""

    def __repr__(self) -> str:
        return "\n".join([table(self._rows()), *self._more()]) if self else "no errors"

    def _repr_html_(self) -> str:
        title = f"{len(self):,} images have no features" if self else "no errors"
        return Report(title, self._rows(), self._more()).html()

    def _rows(self) -> list[tuple[str, ...]]:
        shown = self[:_N_SHOWN]
        rows = [(str(e.row), repr(e.id), e.kind, e.message) for e in shown]
        return [("row", "id", "kind", "message"), *rows]

    def _more(self) -> list[str]:
        n_more = len(self) - _N_SHOWN
        return [f"... and {n_more:,} more"] if n_more > 0 else []


class Features:
    """A features directory, read only; rows are in the order of the input.

    Rows that have features are what `len`, `ds[0]`, iteration, `ids`, `row_ids`, `columns`,
    `ds["pooled"]`, `to_numpy`, `to_pandas` and `to_arrow` cover. `mask`, `all_ids`, `aligned` and
    `to_pandas(errors=True)` cover all rows, also those that failed or are not computed yet. Of a
    row that was tried again, the first attempt that is ok counts, else the latest.

    Files are compared with their commits by size; `verify_features` reads them all.

    Args:
        directory: the output of an extraction.

    Attributes:
        plan: the settings that the features were computed with.
        generations: the lists of rows, one per command that added rows or tried them again.
        complete: whether every shard is there.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._reader = Reader(directory)
        self.directory = self._reader.directory
        self.plan = self._reader.plan
        self.generations = self._reader.generations
        # first row, ids and columns of the block that was read last
        self._read: tuple[int, list[tuple[str, dict[str, Any]]]] = -1, []
        self.complete = bool(self.generations) and not self._reader.missing

    def __repr__(self) -> str:
        rows = [(f"  {name}", shape, dtype) for name, shape, dtype in self._outputs()]
        return f"{self._title()}\n{table(rows)}"

    def _repr_html_(self) -> str:
        return Report(self._title(), [("features", "shape", "dtype"), *self._outputs()]).html()

    def _title(self) -> str:
        state = "complete" if self.complete else "not finished"
        n_ok, kinds = self._counts
        return f"{self.directory}: features of {n_ok:,} images, {kinds.total():,} failed, {state}"

    def _outputs(self) -> list[tuple[str, str, str]]:
        outputs = self.plan["outputs"].items()
        return [(name, str([len(self), *o["shape"]]), o["dtype"]) for name, o in outputs]

    @functools.cached_property
    def _counts(self) -> tuple[int, Counter[str]]:
        return self._reader.counts()

    def __len__(self) -> int:
        """Number of rows that have features."""
        return self._counts[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, such as "pooled" or "maps.stage4"."""
        return tuple(self.plan["outputs"])

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the features."""
        return self.names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @functools.cached_property
    def ids(self) -> list[str]:
        """Ids of the rows that have features."""
        entries = map(self._reader.entries, self._reader.computed_blocks)
        return [row["id"] for rows in entries for row in rows if row["status"] == "ok"]

    @functools.cached_property
    def row_ids(self) -> Tensor:
        """Positions, among all rows, of the rows that have features, int64 [n]."""
        rows = [self._reader.tensors(block, [])[0] for block in self._reader.computed_blocks]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows])

    @property
    def mask(self) -> Tensor:
        """Whether a row has features, bool, for all rows."""
        mask = torch.zeros(self._reader.n_rows, dtype=torch.bool)
        mask[self.row_ids] = True
        return mask

    @functools.cached_property
    def all_ids(self) -> list[str]:
        """Ids of all rows."""
        blocks = self._reader.blocks
        return [row["id"] for block in blocks for row in self._reader.entries(block)]

    @functools.cached_property
    def columns(self) -> dict[str, list[Any]]:
        """Columns that rows carry from the input's lists, by name; None where a row has none.

        In rows of `ds[0]`, tables and exports, a column called `id`, `row`, `error` or as one of
        the features has the prefix `column_`.
        """
        mask = self.mask.tolist()
        rows = (self._reader.columns(block) for block in self._reader.blocks)
        return _by_name([row for row, ok in zip(itertools.chain.from_iterable(rows), mask) if ok])

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    def __getitem__(self, key: str | int) -> Tensor | dict[str, Any]:
        """The features [n, ...] of a name, or the row at a position in `ids`.

        A row is a dict of its `id`, its `row` (the position among all rows), its columns and its
        features. Features of one shard are mapped from the file, those of several are read.
        """
        if isinstance(key, str):
            self._check(key)
            if len(self._reader.blocks) == 1:
                return self._reader.tensors(self._reader.blocks[0], [key])[1][key]
            empty, start = self._reader.empty([key])[key], 0
            full = empty.new_empty(len(self), *empty.shape[1:])
            for _, tensors in self._tensors([key]):
                full[start : start + len(tensors[key])] = tensors[key]
                start += len(tensors[key])
            return full
        try:
            index = range(len(self))[key]
        except IndexError:
            raise IndexError(f"row {key} of {len(self):,} rows with features") from None
        if not isinstance(index, int):
            raise TypeError(f"wanted the name of features or one position, got {key!r}")
        row = int(self.row_ids[index])
        block = self._reader.block_of(row)
        if block.first != self._read[0]:
            ids = [entry["id"] for entry in self._reader.entries(block)]
            self._read = block.first, list(zip(ids, self._reader.columns(block)))
        id, columns = self._read[1][row - block.first]
        return self._row(id, row, columns, self._reader.row(row, self.names))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every row as `ds[0]` returns it; one shard is held at a time."""
        for block in self._reader.computed_blocks:
            entries, columns = self._reader.entries(block), self._reader.columns(block)
            rows, tensors = self._reader.tensors(block, self.names)
            for position, row in enumerate(rows.tolist()):
                features = {name: tensor[position] for name, tensor in tensors.items()}
                there = row - block.first
                yield self._row(entries[there]["id"], row, columns[there], features)

    def _row(
        self, id: str, row: int, columns: Mapping[str, Any], features: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        given = {table_name(name, self.names): value for name, value in columns.items()}
        return {"id": id, "row": row, **given, **features}

    def iter_shards(
        self, names: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """Yields ids and features [n, ...] shard by shard, for what does not fit into memory.

        Args:
            names: which features; default: all.

        Raises:
            KeyError: there are no such features.
        """
        for block, tensors in self._tensors(self.names if names is None else names):
            entries = self._reader.entries(block)
            yield [row["id"] for row in entries if row["status"] == "ok"], tensors

    def _tensors(self, names: Sequence[str]) -> Iterator[tuple[Block, dict[str, Tensor]]]:
        for name in names:
            self._check(name)
        for block in self._reader.computed_blocks:
            yield block, self._reader.tensors(block, names)[1]

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise KeyError(f"no features {name!r}; there are {', '.join(self.names)}")

    def _chosen(self, name: str | None, names: Sequence[str]) -> str:
        """Returns the name; where it is None the embedding, or the only one of `names`."""
        if name is None and _DEFAULT in names:
            return _DEFAULT
        if name is None and len(names) != 1:
            raise ValueError(f"name: wanted one of {', '.join(names or self.names)}, got None")
        name = names[0] if name is None else name
        self._check(name)
        return name

    def aligned(self, name: str | None = None) -> Tensor:
        """Returns features [all rows, ...]; a row without features is NaN.

        Args:
            name: of the features; default: the embedding, or the only ones.

        Raises:
            ValueError: the features are no floating-point numbers.
        """
        name = self._chosen(name, self.names)
        empty = self._reader.empty([name])[name]
        if not empty.is_floating_point():
            raise ValueError(f"{name}: {empty.dtype} has no NaN; use ds[{name!r}] and ds.row_ids")
        full = empty.new_full((self._reader.n_rows, *empty.shape[1:]), torch.nan)
        for block in self._reader.computed_blocks:
            rows, tensors = self._reader.tensors(block, [name])
            full[rows] = tensors[name]
        return full

    def to_numpy(self, name: str | None = None) -> np.ndarray:
        """Returns features [n, ...]; bf16, which NumPy lacks, as float32.

        Args:
            name: of the features; default: the embedding, or the only ones.
        """
        return numpy_array(self[self._chosen(name, self.names)])

    def to_pandas(self, errors: bool = False) -> pandas.DataFrame:
        """Returns a data frame: `id`, `row`, the carried columns, and features as arrays.

        Args:
            errors: all rows, with a column `error`; features of failed rows are None.
        """
        import pandas  # pyright: ignore[reportMissingImports]

        reader = self._reader
        rows = list(range(reader.n_rows)) if errors else self.row_ids.tolist()
        columns = self.columns
        if errors:
            columns = _by_name([row for block in reader.blocks for row in reader.columns(block)])
        values: dict[str, Any] = {"id": self.all_ids if errors else self.ids, "row": rows}
        values |= {utf8(table_name(name, self.names)): cells for name, cells in columns.items()}
        places = self.row_ids.tolist() if errors else range(len(self))
        for name in self.names:
            values[name] = np.empty(len(rows), dtype=object)
            for place, array in zip(places, self.to_numpy(name)):
                values[name][place] = array
        if errors:
            entries = itertools.chain.from_iterable(map(reader.entries, reader.blocks))
            values["error"] = [reason(entry) for entry in entries]
        for name, column in values.items():
            if name not in self.names:
                values[name] = [utf8(cell) for cell in column]
        return pandas.DataFrame(values)

    def to_arrow(self) -> pyarrow.Table:
        """Returns a table: `id`, `row`, the carried columns, and the features.

        Features are fixed-size lists, flattened (the field's metadata has the `shape`); bf16 and
        fp16 are float32. A column whose values differ in type is text.
        """
        return Tables(self._reader, self.names, errors=False).table()

    def errors(self) -> list[RowError]:
        """Returns the rows that failed."""
        return RowErrors(self._errors())

    def _errors(self) -> Iterator[RowError]:
        for block in self._reader.computed_blocks:
            yield from self._reader.errors(block)

    def search(
        self,
        query: str | Tensor | np.ndarray | Sequence[float],
        k: int = 10,
        name: str | None = None,
        metric: Metric = "cosine",
    ) -> Neighbours:
        """Finds the rows with the closest features, exactly, by products of matrices.

        One shard is held at a time, so features may be larger than memory. faiss is not used: the
        product was faster than its flat index, and needs no copy of the features in memory.

        Args:
            query: features [C], or [n, C] for several; or the id of a row, which is then not among
                its own neighbours.
            k: number of neighbours; fewer where there are fewer rows.
            name: of the features, which are vectors; may be left out where only one of them is.
            metric: "cosine", or "dot" for the dot product; the largest are the closest.

        Raises:
            ValueError: the query does not fit the features, or no row has its id.
        """
        vectors = [n for n, o in self.plan["outputs"].items() if len(o["shape"]) == 1]
        return search(self._reader, query, k, self._chosen(name, vectors), metric)

    def describe(self) -> str:
        """Returns a summary of the directory: plan, rows, failures and speed, as lines of text."""
        kinds = self._counts[1]
        lines = [f"{name:10}{text}" for name, text in self.facts()]
        lines += [f"  {kind:20} {n:,}" for kind, n in sorted(kinds.items())]
        for error in itertools.islice(self._errors(), _N_SHOWN):
            lines.append(f"  {error.id!r}: {error.kind}, {error.message}")
        if kinds.total() > _N_SHOWN:
            lines.append("  ...")
        return "\n".join(lines)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yields the facts of the summary, each with its name."""
        plan, model, pixels = self.plan, self.plan["model"], self.plan["preprocessing"]
        reader, (n_ok, kinds), log = self._reader, self._counts, _read_log(self.directory)
        outputs = (f"{name} {o['shape']} {o['dtype']}" for name, o in plan["outputs"].items())
        versions = (
            f"{name} {plan['versions'][name]}" for name in _VERSIONS if name in plan["versions"]
        )
        norms = [f"tokens {plan['norm']}"] if plan.get("norm") else []
        norms += ["vectors of length 1 (L2)"] if plan.get("normalize") else []
        yield "features", f"{self.directory}: {self._state(log)}"
        if log.reason and not self.complete:
            yield "reason", log.reason
        yield from self._damage()
        yield "model", f"{model['name']} ({model['class']}, weights {model['weights_sha256'][:12]})"
        resize = f"resize {pixels['resize']} {pixels['size']}, crop {pixels['crop_size']}"
        yield "pixels", f"{pixels['image_processor_type']}: {resize}"
        how = f"{plan['precision']} on {plan['device']} ({plan['runs']})"
        yield "run", f"{how}, batches of {plan['batch_size']}, {', '.join(versions)}"
        yield "outputs", ", ".join(outputs)
        if norms:
            yield "norm", ", ".join(norms)
        yield "format", f"{plan['format']}{', read only' * (plan['format'] != FORMAT)}"
        yield from self._history()
        shards = f"{len(reader.commits):,} of {len(reader.shards):,} shards"
        yield "rows", f"{n_ok + kinds.total():,} of {reader.n_rows:,}, in {shards}"
        yield "speed", "unknown" if log.speed is None else f"{log.speed:,.1f} images/s"
        yield "ok", f"{n_ok:,}"
        if lost := reader.generations[-1].unreadable if reader.generations else ():
            yield "not read", f"{len(lost):,} directories: {first_few(lost)}"
        yield "failed", f"{kinds.total():,}{', in finished shards' * (not self.complete)}"

    def _state(self, log: _Log) -> str:
        if self.complete:
            return "complete"
        if self.plan["format"] != FORMAT:
            return f"not finished; format {self.plan['format']} is only read, extract it again"
        if log.exit_code == _TOO_MANY_FAILED:
            return "not finished, too many images failed; mend them or allow more, then go on"
        return "not finished, the same command again goes on"

    def _damage(self) -> Iterator[tuple[str, str]]:
        """The fact about shards that were computed once, and are damaged or missing."""
        names = [
            path.name
            for shard in self._reader.missing
            if (path := self.directory / file_name("commit", shard.shard)).exists()
        ]
        if names:
            yield "damaged", f"{len(names):,} of the shards, cut or missing: {first_few(names)}"

    def _history(self) -> Iterator[tuple[str, str]]:
        """Facts about generations and columns."""
        reader = self._reader
        if len(reader.generations) > 1:
            texts = (f"{g.kind} of {sum(s.rows for s in g.shards):,}" for g in reader.generations)
            yield "history", f"{', '.join(texts)} rows"
        # of the first shard: reading all lists takes seconds
        rows = itertools.chain.from_iterable(map(reader.columns, reader.blocks[:1]))
        if names := dict.fromkeys(name for row in rows for name in row):
            yield "columns", ", ".join(names)


class _Log(NamedTuple):
    """A digest of run.jsonl.

    Attributes:
        speed: rows per second over all shards that are logged.
        reason: why the last run stopped, if it did.
        exit_code: of the last run, if it stopped with one of ours.
    """

    speed: float | None
    reason: str | None
    exit_code: int | None


def read_log(directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of run.jsonl that have their numbers; damaged ones are passed over."""
    numbers = {"start": ("time",), "shard": ("rows", "seconds")}
    for event in read_events(directory):
        values = [event.get(name) for name in numbers.get(str(event.get("event")), ())]
        # larger times are no dates
        if "event" in event and all(
            isinstance(value, (int, float)) and 0 <= value < 2**40 for value in values
        ):
            yield event


def _read_log(directory: Path) -> _Log:
    rows, seconds, last = 0, 0.0, {}
    for event in read_log(directory):
        if event["event"] == "shard":
            rows, seconds = rows + event["rows"], seconds + event["seconds"]
        elif event["event"] != "lost" and _time(event) >= _time(last):  # of several logs
            last = event  # a start has no reason
    reason = None if last.get("reason") is None else str(last["reason"])
    return _Log(rows / seconds if seconds else None, reason, last.get("exit_code"))


def _time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return time if isinstance(time, (int, float)) else 0.0


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns a list of values for every name that any row has; None where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def open_features(directory: str | os.PathLike[str]) -> Features:
    """Opens a features directory for reading.

    Args:
        directory: the output of `fastbb extract` or `fastbb.extract`, finished or not, of this or
            an earlier version.

    Raises:
        FileNotFoundError: it is no features directory.
        PlanMismatchError: it is damaged, or of a later version.
    """
    return Features(directory)
