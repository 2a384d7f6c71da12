"""Lists of images: text, CSV, JSON lines, Parquet. All columns of a row travel with its image."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .parquet import ParquetTable
from .sources import (
    IMAGE_COLUMNS,
    InputError,
    Source,
    first_repeated,
    is_url,
    json_value,
    meant_column,
    redact,
)

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
_MAX_LINE_BYTES = 65536
_MAX_JSON_BYTES = 2**20


def list_images(path: str, prefix: str, skipped: Counter[str]) -> Iterator[Source]:
    """Yields the images of a list; relative paths start at the list's directory.

    Args:
        path: absolute path of the list.
        prefix: what the ids start with.
        skipped: gets the number of columns without JSON values.

    Raises:
        InputError: the list cannot be read, or a row names no image.
    """
    with _reading(path):
        if Path(path).suffix.lower() == ".parquet":
            table = ParquetTable(path, skipped)
            if table.image_column is not None:
                yield from _embedded_images(table, path, prefix)
                return
            records = table.records()
        else:
            records = _records(path)
        for n, record in enumerate(records, start=1):
            yield _source(path, prefix, n, record)


def read_metadata(path: str) -> dict[str, dict[str, Any]] | None:
    """Reads the columns of a metadata file of the `imagefolder` convention, by path of the image.

    Returns:
        The columns; None if the file has no column `file_name`.
    """
    columns: dict[str, dict[str, Any]] = {}
    with _reading(path):
        with open(path, "rb") as file:  # another file of this name may be no list at all
            if b"file_name" not in file.read(_MAX_JSON_BYTES).lstrip().partition(b"\n")[0]:
                return None
        for n, record in enumerate(_records(path), start=1):
            if not isinstance(record, dict) or "file_name" not in record:
                if n == 1:
                    return None
                raise InputError(f"{path}: row {n} has no `file_name`, got {record!r:.80}")
            name = posixpath.normpath(str(record.pop("file_name")))
            if name in columns:
                raise InputError(
                    f"{path}: {name!r} is in two rows; give the file itself as the input, then "
                    "every row is an image"
                )
            columns[name] = _columns(path, n, record)
    return columns


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _records(path: str) -> Iterator[Any]:
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        return _read_txt(path)
    return _read_jsonl(path) if suffix == ".jsonl" else _read_csv(path, suffix)


def _source(path: str, prefix: str, n: int, record: object) -> Source:
    if not isinstance(record, dict):
        raise InputError(f"{path}: row {n} is no object with a `path`, got {record!r:.80}")
    column = next((name for name in IMAGE_COLUMNS if name in record), None)
    image = record.get(column)
    if isinstance(image, dict):  # as `datasets` writes it
        image = image.get("path")
    if not isinstance(image, str) or not image:
        meant = meant_column(record) if column is None else ""
        raise InputError(
            f"{path}: row {n} has no text in the column `path` (or `file_name`, `filename`, "
            f"`image`), got {image!r:.80}{meant}; columns: {', '.join(map(str, record))}"
        )
    id = _id_of(record)
    # an id leaves the path among the columns, so that the file is found again
    is_path = isinstance(record[column], str) and not is_url(image)
    left_out = {"id"} if is_path and id not in ("", image) else {column, "id"}
    columns = {name: value for name, value in record.items() if name not in left_out}
    if columns:
        columns = _columns(path, n, columns)
    shown = prefix + redact(id or image)
    if is_url(image):
        return Source(shown, redact(image), columns=columns or None)
    place = os.path.normpath(os.path.join(os.path.dirname(path), image))
    return Source(shown, place, columns=columns or None)


def _embedded_images(table: ParquetTable, path: str, prefix: str) -> Iterator[Source]:
    """Yields the images whose bytes lie in a Parquet file.

    The id is the column `id`, else the path that is stored with the bytes where no other row of the
    file has the same, else `<file>/<row>`.
    """
    image_column = table.image_column
    assert image_column is not None
    ambiguous: set[str] | None = None
    # in a set, the prefix names the file already
    fallback = prefix or os.path.basename(path) + "/"
    for n, record in enumerate(table.records()):
        name, image = _id_of(record), record.pop(image_column, None)
        record.pop("id", None)
        if not name and image and image["path"]:
            if ambiguous is None:
                ambiguous = table.repeated_paths()
            name = "" if image["path"] in ambiguous else image["path"]
        shown = prefix + redact(name) if name else f"{fallback}{n:08}"
        yield Source(shown, path, n, image_column=image_column, columns=record or None)


def _id_of(record: dict[str, Any]) -> str:
    name = record.get("id")
    return "" if name is None else str(name)


def _columns(path: str, n: int, record: dict[str, Any]) -> dict[str, Any]:
    try:
        return json_value(record)
    except ValueError as error:
        raise InputError(f"{path}: row {n}: {error}") from error


def _read_lines(path: str, max_bytes: int = _MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, without their ends, and their numbers."""
    with open(path, "rb") as file:
        for n in range(1, 1 << 62):
            line = file.readline(max_bytes + 1)
            if not line:
                return
            if n == 1:
                _check_utf8(path, line)
            if len(line) > max_bytes:
                raise InputError(f"{path}: line {n} is longer than {max_bytes} bytes")
            text = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line)
            if text.strip():
                yield n, text.rstrip("\r\n")


def _check_utf8(path: str, start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: not UTF-8 but UTF-16; save it as UTF-8")


def _read_txt(path: str) -> Iterator[dict[str, str]]:
    for _, line in _read_lines(path):
        is_comment = line.lstrip().startswith("#")
        if is_comment and "\0" not in line:
            is_comment = not os.path.lexists(os.path.join(os.path.dirname(path), line))
        if not is_comment:
            yield {"path": line}


def _read_csv(path: str, suffix: str) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = next((line for line in file if line.strip()), "")
        _check_utf8(path, header[:2].encode("utf-8", "surrogateescape"))
        delimiter = "\t" if suffix == ".tsv" else _delimiter(header[:_MAX_LINE_BYTES])
        lines = itertools.chain([header], file)
        try:
            # strict: a quote that is never closed would take the rest of the file for one cell
            reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
            if twice := first_repeated(reader.fieldnames or ()):
                raise InputError(f"{path}: two columns have the name {twice!r}")
            for n, record in enumerate(reader, start=1):
                if None in record:  # where DictReader puts them
                    raise InputError(
                        f"{path}: row {n} has more cells than the header has columns; put cells "
                        f"that hold a {delimiter!r} in quotes: {record!r:.200}"
                    )
                yield record
        except csv.Error as error:
            raise InputError(f"{path}: not readable as CSV: {error}") from error


def _delimiter(header: str) -> str:
    """Returns the first delimiter under which a header has a column of images, else the comma."""
    for delimiter in (",", ";", "\t"):
        if set(IMAGE_COLUMNS).intersection(next(csv.reader([header], delimiter=delimiter), ())):
            return delimiter
    return ","


def _read_jsonl(path: str) -> Iterator[object]:
    for n, (_, line) in enumerate(_read_lines(path, _MAX_JSON_BYTES), start=1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: row {n} is not JSON: {error}") from error
