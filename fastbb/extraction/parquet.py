"""Parquet files as lists, with paths of images or, as `datasets` writes them, their bytes.

A listing reads no bytes of images. Decoding reads them a few rows at a time, in a stream over the
column of the images, so that a row group of any size costs little memory.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .sources import IMAGE_COLUMNS, InputError, first_repeated, json_value, meant_column

_DROPPED = "columns without JSON values"
_LISTED_ROWS = 4096
# without them, Arrow reads the columns of a whole row group at once
_STREAMED: dict[str, Any] = {"buffer_size": 2**20, "pre_buffer": False}
# rows that are kept, as threads ask for them slightly out of order
_KEPT_ROWS = 64
_BATCH_BYTES = 2**22
_MAX_TABLES = 2


class ParquetTable:
    """A Parquet file to list.

    Args:
        path: absolute path of the file.
        skipped: gets the number of columns without JSON values.

    Attributes:
        image_column: the column that holds bytes of images; None if images are named by their path.

    Raises:
        InputError: the file cannot be read, or has no column of images.
    """

    def __init__(self, path: str, skipped: Counter[str]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise InputError(
                f"{path}: .parquet lists need pyarrow; pip install 'fastbb[parquet]'"
            ) from error
        self._path, self._skipped, self._arrow = path, skipped, pyarrow
        with self._reading():
            self._file = parquet.ParquetFile(path, **_STREAMED)
            self._read_schema(self._file.schema_arrow)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns the errors that Arrow raises for damaged files into an InputError."""
        try:
            yield
        except InputError:
            raise
        except (self._arrow.ArrowException, ValueError, TypeError, OSError) as error:
            raise InputError(f"{self._path}: not readable as Parquet: {error}") from error

    def _read_schema(self, schema: Any) -> None:
        """Chooses the columns."""
        path = self._path
        if twice := first_repeated(schema.names):
            raise InputError(f"{path}: two columns have the name {twice!r}")
        self._label_names, image_features = _described_features(schema.metadata)
        candidates = [name for name in (*IMAGE_COLUMNS, *image_features) if name in schema.names]
        types = {field.name: field.type for field in schema}
        with_bytes = [name for name in candidates if self._holds_images(types[name])]
        self.image_column = with_bytes[0] if with_bytes else None
        if not set(candidates).intersection(IMAGE_COLUMNS) and not with_bytes:
            raise InputError(
                f"{path}: no column `path` (or `file_name`, `filename`, `image`)"
                f"{meant_column(schema.names)}; columns: {', '.join(schema.names)}"
            )
        self._columns = [n for n in schema.names if n != self.image_column]
        dropped = [n for n in self._columns if not self._has_json_values(types[n])]
        self._columns = [n for n in self._columns if n not in dropped]
        self._path_leaf = ""
        if self.image_column is not None and self._arrow.types.is_struct(types[self.image_column]):
            fields = {field.name: field.type for field in types[self.image_column]}
            if "path" in fields:
                self._path_leaf = f"{self.image_column}.path"
                if not self._is_text(fields["path"]):
                    raise InputError(
                        f"{path}: column {self._path_leaf}: wanted texts, got {fields['path']}"
                    )
        if dropped:
            self._skipped[_DROPPED] += len(dropped)

    def _is_text(self, type: Any) -> bool:
        types = self._arrow.types
        if types.is_dictionary(type):
            return self._is_text(type.value_type)
        views = types.is_string_view(type) or types.is_null(type)
        return types.is_string(type) or types.is_large_string(type) or views

    def _is_bytes(self, type: Any) -> bool:
        types = self._arrow.types
        return types.is_binary(type) or types.is_large_binary(type) or types.is_binary_view(type)

    def _holds_images(self, type: Any) -> bool:
        if self._arrow.types.is_struct(type):
            return any(field.name == "bytes" and self._is_bytes(field.type) for field in type)
        return self._is_bytes(type)

    def _has_json_values(self, type: Any) -> bool:
        types = self._arrow.types
        if types.is_struct(type):
            return all(self._has_json_values(field.type) for field in type)
        if types.is_map(type):
            return self._has_json_values(type.key_type) and self._has_json_values(type.item_type)
        if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
            return self._has_json_values(type.value_type)
        if types.is_dictionary(type):
            return self._has_json_values(type.value_type)
        is_extension = isinstance(type, self._arrow.BaseExtensionType)
        is_binary = self._is_bytes(type) or types.is_fixed_size_binary(type)
        return not (is_extension or is_binary or types.is_nested(type))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the rows as JSON values, without the bytes of images, with the names of labels."""
        wanted = [*self._columns, *([self._path_leaf] if self._path_leaf else [])]
        failed: set[str] = set()
        with self._reading():
            for batch in self._file.iter_batches(_LISTED_ROWS, columns=wanted):
                cells = {
                    name: self._values(name, batch.column(i), failed)
                    for i, name in enumerate(batch.schema.names)
                }
                for name, names in self._label_names.items():
                    if name in cells and f"{name}_name" not in cells:
                        cells[f"{name}_name"] = [_label_name(names, n) for n in cells[name]]
                for row in range(batch.num_rows):
                    yield {name: values[row] for name, values in cells.items()}
        if failed:
            self._skipped[_DROPPED] += len(failed)

    def _values(self, name: str, column: Any, failed: set[str]) -> list[Any]:
        try:
            if (type := self._python_type(column.type)) != column.type:
                column = column.cast(type, safe=False)
            return [json_value(value) for value in column.to_pylist()]
        # a year 20000, an unknown time zone
        except (ValueError, OverflowError, LookupError, self._arrow.ArrowException):
            failed.add(name)
            return [None] * len(column)

    def _python_type(self, type: Any) -> Any:
        """Returns the type with times in microseconds, as Python's are, and without fp16."""
        pa, types = self._arrow, self._arrow.types
        if types.is_timestamp(type) and type.unit == "ns":
            return pa.timestamp("us", type.tz)
        if types.is_duration(type) and type.unit == "ns":
            return pa.duration("us")
        if types.is_float16(type):
            return pa.float32()
        if types.is_struct(type):
            return pa.struct([self._python_field(field) for field in type])
        if types.is_map(type):
            return pa.map_(self._python_type(type.key_type), self._python_type(type.item_type))
        if types.is_list(type):
            return pa.list_(self._python_field(type.value_field))
        if types.is_large_list(type):
            return pa.large_list(self._python_field(type.value_field))
        if types.is_fixed_size_list(type):
            return pa.list_(self._python_field(type.value_field), type.list_size)
        if types.is_dictionary(type):
            value_type = self._python_type(type.value_type)
            return type if value_type == type.value_type else value_type
        return type

    def _python_field(self, field: Any) -> Any:
        return field.with_type(self._python_type(field.type))

    def repeated_paths(self) -> set[str]:
        """Returns the paths that several rows have beside the bytes of their images."""
        seen: set[str] = set()
        repeated: set[str] = set()
        with self._reading():
            for batch in self._file.iter_batches(columns=[self._path_leaf]):
                for image in batch.column(0).to_pylist():
                    path = image and image["path"]
                    (repeated if path in seen else seen).add(path)
        return repeated


def _described_features(metadata: dict[bytes, bytes] | None) -> tuple[dict[str, Any], list[str]]:
    """Returns the label names by column, and the columns of images, as `datasets` notes them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {n: f for n, f in features.items() if isinstance(f, dict) and "_type" in f}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}, []
    labels = {n: f.get("names") for n, f in kinds.items() if f["_type"] == "ClassLabel"}
    names = {n: labels[n] for n in labels if isinstance(labels[n], list)}
    return names, [n for n, f in kinds.items() if f["_type"] == "Image"]


def _label_name(names: list[Any], label: Any) -> str | None:
    is_known = isinstance(label, int) and 0 <= label < len(names)
    return str(names[label]) if is_known else None


class _Cells:
    """A column of images, read in a stream; asking for rows nearly in order is fast."""

    def __init__(self, path: str, column: str) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, **_STREAMED)
        self._column = column
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._first_rows = list(itertools.accumulate((g.num_rows for g in groups), initial=0))
        n_bytes = sum(
            group.column(i).total_uncompressed_size
            for group in groups
            for i in range(group.num_columns)
            if f"{group.column(i).path_in_schema}.".startswith(f"{column}.")
        )
        row_bytes = n_bytes // max(metadata.num_rows, 1) + 1
        self._batch_rows = max(1, min(_BATCH_BYTES // row_bytes, _KEPT_ROWS // 2))
        self._kept: deque[tuple[int, Any]] = deque()
        self._batches: Iterator[Any] = iter(())
        self._next_row = sys.maxsize

    def __getitem__(self, row: int) -> Any:
        for first, cells in self._kept:
            if first <= row < first + len(cells):
                return cells[row - first].as_py()
        group = bisect.bisect_right(self._first_rows, row) - 1
        if not 0 <= group < len(self._first_rows) - 1:
            raise IndexError(f"row {row} of {self._first_rows[-1]}")
        start = self._first_rows[group]
        # the end of a group is not left while threads still ask for rows of it
        if not max(min(start, row - _KEPT_ROWS), 0) <= self._next_row <= row:
            groups = range(group, len(self._first_rows) - 1)
            self._batches = self._file.iter_batches(
                self._batch_rows, row_groups=groups, columns=[self._column], use_threads=False
            )
            self._next_row = start
        while self._next_row <= row:
            cells = next(self._batches).column(0)
            self._kept.append((self._next_row, cells))
            self._next_row += len(cells)
            while len(self._kept) > 1 and sum(len(c) for _, c in self._kept) > _KEPT_ROWS:
                self._kept.popleft()
        first, cells = self._kept[-1]
        return cells[row - first].as_py()


_tables: dict[tuple[str | int, ...], _Cells] = {}
_lock = threading.Lock()


def read_cell(path: str, column: str, row: int) -> tuple[bytes | None, str | None]:
    """Returns the bytes of an image in a Parquet file, and the path stored with them.

    Threads share the rows that were read; the last files stay open.
    """
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (path, column, *identity)
    with _lock:
        # taken out, so that a file is opened anew after an error, and the last used one is last
        cells = _tables.pop(key, None) or _Cells(path, column)
        cell = cells[row]
        _tables[key] = cells
        if len(_tables) > _MAX_TABLES:
            del _tables[next(iter(_tables))]
    return (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
