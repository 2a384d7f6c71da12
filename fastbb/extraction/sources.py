"""`Source`: the place of one image, with its id and the columns that travel with it."""

from __future__ import annotations

import datetime
import errno
import math
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePath
from typing import Any

# errors of missing files
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
# columns of lists that name or hold the image; the first one that is there counts
IMAGE_COLUMNS = ("path", "file_name", "filename", "image")
_N_SHOWN = 3
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# far below the recursion limit, which JSON encoders and dataclasses.asdict run into
_MAX_NESTING = 32


class InputError(ValueError):
    """An INPUT cannot be listed: it is missing, of an unknown kind, or without images."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image to read.

    Attributes:
        id: the name its features are stored under; a path with forward slashes.
        path: absolute path of the file, or of the archive that holds it.
        offset: place of the image in the archive: its first byte in a .tar, its local header in a
            .zip, its row in a .parquet file. None for a file of its own.
        n_bytes: length of the image in a .tar or, inflated, in a .zip.
        member: name of the image in a .zip.
        image_column: column of the image in a .parquet file.
        columns: what else is known about the image, as JSON values by name.
    """

    id: str
    path: str
    offset: int | None = None
    n_bytes: int | None = None
    member: str | None = None
    image_column: str | None = None
    columns: dict[str, Any] | None = None


def is_url(text: str) -> bool:
    """Returns whether `text` is a URL rather than a path."""
    return _URL.match(text) is not None


def redact(text: str) -> str:
    """Returns `text` without the parts of a URL that carry credentials: user, query, fragment."""
    if not is_url(text):
        return text
    scheme, _, rest = text.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def source_at(path: str | os.PathLike[str]) -> Source:
    """Returns the image at a path. A URL loses its credentials here, and reading refuses it."""
    text = os.fsdecode(path)
    if is_url(text):
        return Source(redact(text), redact(text))
    return Source(PurePath(text).as_posix(), os.path.abspath(text))


def first_few(texts: Sequence[str]) -> str:
    """Joins texts in one line; of many texts only the first ones."""
    return ", ".join([*texts[:_N_SHOWN], *(["..."] if len(texts) > _N_SHOWN else [])])


def first_repeated(names: Sequence[str]) -> str | None:
    """Returns the first name that is there twice; columns without a name are no matter."""
    return next((name for i, name in enumerate(names) if name and name in names[:i]), None)


def meant_column(names: Iterable[object]) -> str:
    """Returns a note about a column that names images but for its capital letters, or nothing."""
    meant = next((name for name in map(str, names) if name.lower() in IMAGE_COLUMNS), None)
    return f"; names are case-sensitive: wanted `{meant.lower()}`, got `{meant}`" if meant else ""


def json_value(value: object, depth: int = _MAX_NESTING) -> Any:
    """Returns a value of a column as JSON represents it.

    NaN and infinities become None, dates and times ISO strings, durations seconds, decimals and
    UUIDs strings.

    Raises:
        ValueError: the value has no such form, or is nested too deep.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == 0:
        raise ValueError(f"nested more than {_MAX_NESTING} levels deep")
    if isinstance(value, dict):
        return {str(name): json_value(item, depth - 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, depth - 1) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, uuid.UUID)):
        return str(value)
    raise ValueError(f"no JSON value: {type(value).__name__}")
