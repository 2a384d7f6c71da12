"""Arrow tables of a features directory: `id`, `row`, the carried columns, features, `error`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .layout import canonical_json
from .reading import Reader, numpy_array, reason, table_name, utf8

if TYPE_CHECKING:
    import pyarrow

_BATCH_BYTES = 64 * 2**20
_INT64 = range(-(2**63), 2**63)


class Tables:
    """The rows of a features directory as batches of Arrow.

    A carried column is bool, int64, float64 or text where all its values are, and text in any other
    case: values that are no strings are JSON there.

    Args:
        reader: of the directory.
        names: of the features.
        errors: all rows, with a column `error`, and features as lists that are null where a row has
            none; else the rows that are ok, and features as fixed-size lists.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, reader: Reader, names: Sequence[str], errors: bool) -> None:
        import pyarrow

        self._arrow, self._reader, self._errors = pyarrow, reader, errors
        self._features = {name: reader.plan["outputs"][name] for name in names}
        self._kinds = _column_kinds(reader)
        self.schema = self._schema()

    def table(self) -> pyarrow.Table:
        """Returns all batches as a table."""
        return self._arrow.Table.from_batches(self.batches(), self.schema)

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """Yields the rows in order, in batches of bounded size."""
        n_bytes = sum(
            math.prod(output["shape"]) * getattr(torch, output["dtype"]).itemsize
            for output in self._features.values()
        )
        n_rows = max(1, _BATCH_BYTES // max(n_bytes, 1))
        for block in self._reader.blocks:
            entries, columns = self._reader.entries(block), self._reader.columns(block)
            rows, tensors = self._reader.tensors(block, list(self._features))
            for first in range(0, len(entries), n_rows):
                last = min(first + n_rows, len(entries))
                bounds = torch.tensor([block.first + first, block.first + last])
                start, stop = torch.searchsorted(rows, bounds).tolist()
                if self._errors or start < stop:
                    yield self._batch(
                        entries[first:last],
                        columns[first:last],
                        {name: tensor[start:stop] for name, tensor in tensors.items()},
                    )

    def _schema(self) -> pyarrow.Schema:
        pa = self._arrow
        types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
        fields = [pa.field("id", pa.string()), pa.field("row", pa.int64())]
        fields += [
            pa.field(utf8(table_name(name, self._features)), types[kind])
            for name, kind in self._kinds.items()
        ]
        for name, output in self._features.items():
            dtype = pa.from_numpy_dtype(_array(self._reader.empty([name])[name]).dtype)
            size = -1 if self._errors else math.prod(output["shape"])
            shape = {"shape": json.dumps(output["shape"])}
            fields.append(pa.field(name, pa.list_(dtype, size), metadata=shape))
        if self._errors:
            fields.append(pa.field("error", pa.string()))
        plan = self._reader.plan
        about = {"model": plan["model"]["name"], "plan_sha256": self._reader.plan_sha256}
        return pa.schema(fields, metadata={"fastbb": canonical_json(about).rstrip()})

    def _batch(
        self,
        entries: list[dict[str, Any]],
        columns: list[dict[str, Any]],
        tensors: Mapping[str, Tensor],
    ) -> pyarrow.RecordBatch:
        pa = self._arrow
        ok = np.array([entry["status"] == "ok" for entry in entries])
        if not self._errors:
            entries = list(itertools.compress(entries, ok))
            columns = list(itertools.compress(columns, ok))
        arrays: list[Any] = [
            [utf8(entry["id"]) for entry in entries],
            [entry["row"] for entry in entries],
        ]
        for name, kind in self._kinds.items():
            arrays.append([_value(row.get(name), kind) for row in columns])
        for name, output in self._features.items():
            values, size = pa.array(_array(tensors[name]).reshape(-1)), math.prod(output["shape"])
            if self._errors:
                ends = np.concatenate([[0], ok.cumsum() * size]).astype(np.int32)
                mask = pa.array(~ok) if not ok.all() else None
                arrays.append(pa.ListArray.from_arrays(ends, values, mask=mask))
            else:
                arrays.append(pa.FixedSizeListArray.from_arrays(values, size))
        if self._errors:
            arrays.append([_value(reason(entry), "text") for entry in entries])
        given = [
            array if isinstance(array, pa.Array) else pa.array(array, field.type)
            for array, field in zip(arrays, self.schema)
        ]
        return pa.RecordBatch.from_arrays(given, schema=self.schema)


def _array(tensor: Tensor) -> np.ndarray:
    """Returns the values in a type that every reader of parquet has: bf16 and fp16 as float32."""
    return numpy_array(tensor.float() if tensor.dtype is torch.float16 else tensor)


def _column_kinds(reader: Reader) -> dict[str, str]:
    """Returns the type of every carried column: "bool", "int", "float" or "text"."""
    kinds: dict[str, set[str]] = {}
    for block in reader.blocks:
        for row in reader.columns(block):
            for name, value in row.items():
                found = kinds.setdefault(name, set())
                if value is not None:
                    found.add(_kind(value))
    return {name: _common(found) for name, found in kinds.items()}


def _common(kinds: set[str]) -> str:
    if kinds <= {"int", "long"} and kinds:
        return "int"
    if kinds == {"int", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else "text"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if value not in _INT64:
            return "text"
        return "int" if float(value) == value else "long"
    return "float" if isinstance(value, float) else "text"


def _value(value: Any, kind: str) -> Any:
    if value is None or kind != "text":
        return value
    return utf8(value) if isinstance(value, str) else json.dumps(utf8(value))
