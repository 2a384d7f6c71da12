"""Export of a features directory to files that other programs read.

An export is written beside its place and renamed, so that a killed one leaves the old files or
none. Memory holds one shard at a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from torch import Tensor

from .layout import canonical_json, sync_directory, synced, writing
from .outputs import unit_length
from .reading import Reader, numpy_array, table_name, utf8
from .tables import Tables

ExportFormat = Literal["parquet", "npy", "faiss"]
IndexMetric = Literal["cosine", "dot", "l2"]
_MANIFEST = "export.json"  # in a directory: format, features and names of the other files
_PART_ROWS = 8192
_NO_FILE_NAME = r"[^\w.-]"


@dataclass(frozen=True)
class ExportReport:
    """The outcome of an export.

    Attributes:
        path: the file or directory that was written.
        rows: number of rows in it.
        ok: rows that have features.
        failed: rows that have none; a parquet file has them too.
        missing: rows that are not computed yet, as the extraction is not finished.
        n_bytes: size of the files.
    """

    path: Path
    rows: int
    ok: int
    failed: int
    missing: int
    n_bytes: int

    def __repr__(self) -> str:
        parts = [f"{self.ok:,} with features"]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        parts += [f"{self.missing:,} not computed yet"] if self.missing else []
        left_out = "" if self.rows > self.ok or len(parts) == 1 else "; only the first are in it"
        return f"{self.path}: {self.n_bytes / 1e6:,.1f} MB, rows: {', '.join(parts)}{left_out}"


def export_features(
    directory: str | os.PathLike[str],
    to: ExportFormat,
    out: str | os.PathLike[str] | None = None,
    *,
    features: str | Sequence[str] | None = None,
    metric: IndexMetric | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes features to files that other programs read; values are those that are stored.

    "parquet": one file of all rows: `id`, `row`, the carried columns, a list of floats per feature,
    `error`. Features and `error` are null in turn. Maps are flattened, the field's metadata has
    their `shape`; bf16 and fp16 are float32.

    "npy": a directory of `<feature>.npy` [n, ...] of the rows that have features (bf16 as float32),
    `rows.jsonl`, line by line the `id`, `row` and columns of the same rows, and `export.json`, the
    list of these files, by which a later export knows what it may replace.

    "faiss": a directory of `<feature>.faiss`, a flat (exact) index of the rows that have features,
    and the same `rows.jsonl` and `export.json`.

    Args:
        directory: of the features; an unfinished one is exported as far as it goes.
        to: "parquet", "npy" or "faiss".
        out: the file or directory to write; default: beside the features directory, with the ending
            ".parquet", "-npy" or "-faiss".
        features: which features; default: all.
        metric: of a faiss index, else None: "cosine" (inner product of normalised vectors; the
            default), "dot" (inner product) or "l2".
        overwrite: replace an earlier export.

    Raises:
        ValueError: an argument is not what is wanted, something is at `out`, or pyarrow, which
            parquet needs, is not installed.
        OutputError: `out` cannot be written.
    """
    if to not in get_args(ExportFormat):
        raise ValueError(f"to: wanted {', '.join(get_args(ExportFormat))}, got {to!r}")
    if metric is not None and metric not in get_args(IndexMetric):
        raise ValueError(f"metric: wanted {', '.join(get_args(IndexMetric))}, got {metric!r}")
    if metric is not None and to != "faiss":
        raise ValueError(f"metric: only a faiss index has one, got {metric!r} with {to!r}")
    reader = Reader(directory)
    outputs = reader.plan["outputs"]
    given = outputs if features is None else [features] if isinstance(features, str) else features
    names = list(dict.fromkeys(given))
    if not names:
        raise ValueError(f"features: wanted at least one of {', '.join(outputs)}, got none")
    for name in names:
        if name not in outputs:
            raise ValueError(f"features: no {name!r}; there are {', '.join(outputs)}")
        if to == "faiss" and len(outputs[name]["shape"]) != 1:
            raise ValueError(
                f"features: an index holds vectors, got {name} of shape {outputs[name]['shape']}; "
                "choose others with features (--features)"
            )
    place = reader.directory.resolve()
    ending = ".parquet" if to == "parquet" else f"-{to}"
    path = place.with_name(place.name + ending) if out is None else Path(out)
    check_outside(path, place)
    if to == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("to: parquet needs pyarrow; pip install 'fastbb[parquet]'")
    if os.path.lexists(path) and not (overwrite and _is_export(path, to)):
        why = (
            "is no earlier export" if overwrite else "is replaced only with overwrite (--overwrite)"
        )
        raise ValueError(f"out: {path} is there, and {why}; give another place")
    with _replacing(path) as temporary:
        if to == "parquet":
            with synced(temporary) as file:
                _write_parquet(reader, names, file)
        else:
            temporary.mkdir()
            with synced(temporary / "rows.jsonl") as file:
                _write_rows(reader, names, file)
            for name in names:
                with synced(temporary / f"{re.sub(_NO_FILE_NAME, '_', name)}.{to}") as file:
                    if to == "npy":
                        _write_npy(reader, name, file)
                    else:
                        _write_index(reader, name, file, metric or "cosine")
            about = {"format": to, "features": names, "files": sorted(os.listdir(temporary))}
            with synced(temporary / _MANIFEST) as file:
                file.write(canonical_json(about))
    n_ok, kinds = reader.counts()
    files = [path] if path.is_file() else sorted(path.iterdir())
    return ExportReport(
        path,
        reader.n_rows if to == "parquet" else n_ok,
        n_ok,
        kinds.total(),
        reader.n_rows - n_ok - kinds.total(),
        sum(file.stat().st_size for file in files),
    )


def check_outside(path: Path, directory: Path) -> None:
    """Raises ValueError if a path to write is a features directory or inside of it."""
    place, features = path.resolve(), directory.resolve()
    if features in (place, *place.parents):
        raise ValueError(f"out: wanted a place outside of the features directory, got {path}")


def _is_export(path: Path, to: ExportFormat) -> bool:
    """Returns whether there is an earlier export, which may be replaced."""
    if to != "parquet":
        try:
            files = json.loads((path / _MANIFEST).read_bytes())["files"]
            found = sorted(entry.name for entry in path.iterdir() if entry.is_file())
            return found == sorted([*files, _MANIFEST]) == sorted(os.listdir(path))
        except (OSError, ValueError, KeyError, TypeError):
            return False
    import pyarrow
    import pyarrow.parquet

    try:
        return b"fastbb" in (pyarrow.parquet.read_schema(path).metadata or {})
    except (OSError, pyarrow.ArrowInvalid):
        return False


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a place beside `path`; at the end, what is there takes the place of `path`."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside = path.with_name(f"{temporary.name}.old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield temporary
            if temporary.is_dir():
                sync_directory(temporary)
                if path.exists():  # a directory is replaced only if it is empty
                    os.rename(path, aside)
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise
        finally:
            for left in (temporary, aside):
                _remove(left)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed exports to the same place left."""
    for entry in path.parent.iterdir():
        match = re.fullmatch(rf"{re.escape(path.name)}\.tmp-(\d+)(\.old)?", entry.name)
        if match and not _runs(int(match[1])):
            _remove(entry)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return process != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_parquet(reader: Reader, names: Sequence[str], file: BinaryIO) -> None:
    from pyarrow import parquet

    tables = Tables(reader, names, errors=True)
    texts = [field.name for field in tables.schema if field.name not in names]
    # numbers of features hardly repeat, so that neither a dictionary nor compression pays
    compression = {f"{name}.list.element": "NONE" for name in names}
    options: dict[str, Any] = {
        "compression": compression | dict.fromkeys(texts, "ZSTD"),
        "use_dictionary": texts,
        "write_statistics": texts,
    }
    with parquet.ParquetWriter(file, tables.schema, **options) as writer:
        for batch in tables.batches():
            writer.write_batch(batch)


def _write_rows(reader: Reader, names: Sequence[str], file: BinaryIO) -> None:
    for block in reader.computed_blocks:
        for entry, columns in zip(reader.entries(block), reader.columns(block)):
            if entry["status"] == "ok":
                values = {table_name(name, names): value for name, value in columns.items()}
                row = {"id": entry["id"], "row": entry["row"], **values}
                file.write(canonical_json(utf8(row)))


def _write_npy(reader: Reader, name: str, file: BinaryIO) -> None:
    empty = numpy_array(reader.empty([name])[name])
    shape = (reader.counts()[0], *empty.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(empty.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
    for features in _parts(reader, name):
        file.write(numpy_array(features).data)


def _write_index(reader: Reader, name: str, file: BinaryIO, metric: IndexMetric) -> None:
    n_rows, width = reader.counts()[0], reader.plan["outputs"][name]["shape"][0]
    file.write(_index_header(n_rows, width, metric))
    for features in _parts(reader, name):
        features = features.float()
        if metric == "cosine":
            features = unit_length(features)
        file.write(features.numpy().data)


def _parts(reader: Reader, name: str) -> Iterator[Tensor]:
    for block in reader.computed_blocks:
        yield from reader.tensors(block, [name])[1][name].split(_PART_ROWS)


def _index_header(n_rows: int, width: int, metric: IndexMetric) -> bytes:
    """Returns what stands before the vectors, in fp32, in the file of a flat index.

    The file is written here, as `faiss.write_index` takes all vectors in memory.
    """
    kind, number = (b"IxF2", 1) if metric == "l2" else (b"IxFI", 0)
    unused = 2**20
    fields = struct.pack("<iqqq?i", width, n_rows, unused, unused, True, number)
    return kind + fields + struct.pack("<Q", n_rows * width)
