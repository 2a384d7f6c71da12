"""Inputs of an extraction: every INPUT becomes an ordered sequence of `Source` rows.

Only directories, lists and headers of archives are opened here; a file that is missing or no image
becomes a failed row later. A directory that cannot be read is passed over
and named. Archives are never unpacked, links are never followed, addresses are never fetched.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from ..images.formats import has_image_suffix

LIST_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
# errors of missing files
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_UNREADABLE = "unreadable directories"
_N_SHOWN = 3
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_ID_CHARS = 4096
_MAX_LINE_BYTES = 65536
_READ_BYTES = 2**20


class InputError(ValueError):
    """An INPUT cannot be listed: it is missing, of an unknown kind, or without images."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image to read.

    Attributes:
        id: the name its features are stored under; a path with forward slashes.
        path: absolute path of the file, or of the archive that holds it.
        offset: first byte of the image in the archive; None for a file of its own.
        n_bytes: length of the image in the archive; None for a file of its own.
    """

    id: str
    path: str
    offset: int | None = None
    n_bytes: int | None = None


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


def list_sources(
    inputs: Sequence[str | os.PathLike[str]],
    skipped: Counter[str],
    unreadable: list[str] | None = None,
) -> Iterator[Source]:
    """Yields the images of all inputs, in the order of the inputs.

    Directories and globs are sorted bytewise on the id, lists and archives keep their own order.
    A line of a .txt is a path as it stands: spaces at its ends and a leading # belong to the name.

    Args:
        inputs: directories, globs, images, lists (.txt, .csv, .jsonl, .parquet), .tar archives.
        skipped: gets the kinds of files that are skipped, with their number.
        unreadable: is filled with the directories that could not be read, each with the reason.

    Raises:
        InputError: an input cannot be listed, or two different images have the same id.
    """
    path_of_id: dict[str, tuple[str, int | None]] = {}
    unreadable = [] if unreadable is None else unreadable
    for given in inputs:
        empty, n_unreadable = True, len(unreadable)
        for source in _list_input(os.fspath(given), skipped, unreadable):
            empty = False
            if len(source.id) > _MAX_ID_CHARS or "\0" in source.id:
                raise InputError(
                    f"{_show(given)}: an id has at most {_MAX_ID_CHARS} characters and no NUL, "
                    f"got {len(source.id)} characters: {source.id[:80]!r}"
                )
            place = (source.path, source.offset)
            first = path_of_id.setdefault(source.id, place)
            if first != place:
                raise InputError(
                    f"two images would have the id {source.id!r}: {first[0]} and {source.path}; "
                    + _advice_on_ids(os.fspath(given))
                )
            yield source
        if empty:
            passed_over = ", ".join(
                f"{n} {what}" for what, n in sorted(skipped.items()) if what != _UNREADABLE
            )
            lost = unreadable[n_unreadable:]
            raise InputError(
                f"{_show(given)}: no images found"
                + (f"; cannot list {first_few(lost)}" if lost else "")
                + (f" (passed over: {passed_over}; a list can name them)" if passed_over else "")
            )


class Listing:
    """temporary"""

    def __init__(self, inputs, follow_symlinks=False):
        self.inputs, self.skipped, self.unreadable = inputs, Counter(), []
        self.archives = archive_states(inputs)

    def __iter__(self):
        return list_sources(self.inputs, self.skipped, self.unreadable)

    def passed_over(self):
        what = (f"{n:,} {what}" for what, n in sorted(self.skipped.items()))
        return f"passed over {', '.join(what)}" if self.skipped else ""


def archive_state(path):
    try:
        status = os.stat(path)
    except OSError:
        return {}
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def first_few(texts: Sequence[str]) -> str:
    """Joins texts in one line; of many texts only the first ones."""
    return ", ".join([*texts[:_N_SHOWN], *(["..."] if len(texts) > _N_SHOWN else [])])


def archive_states(inputs: Iterable[str]) -> dict[str, dict[str, int]]:
    """Returns size and modification time of the archives among the inputs, by absolute path.

    Rows of an archive are places in it, so they mean nothing in another one of the same name.
    """
    states = {}
    for path in map(os.path.abspath, inputs):
        if path.lower().endswith(".tar") and os.path.isfile(path):
            status = os.stat(path)
            states[path] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return states


def _advice_on_ids(given: str) -> str:
    suffix = Path(given).suffix.lower()
    if suffix == ".tar":
        return "rename one of them, or extract each archive into a features directory of its own"
    if suffix in LIST_SUFFIXES and suffix != ".txt":
        return "give every row an `id` of its own"
    return "give their common parent directory, or a .csv list with an `id` column"


def _list_input(given: str, skipped: Counter[str], unreadable: list[str]) -> Iterator[Source]:
    if is_url(given):
        raise InputError(
            f"{_show(given)}: addresses are not fetched; give a local path to the images"
        )
    path = os.path.abspath(given)
    suffix = Path(given).suffix.lower()
    try:
        is_directory = _is_directory(path)
    except OSError as error:
        if any(c in given for c in "*?["):
            return _glob(given, skipped, unreadable)
        raise InputError(f"{_show(given)}: {_reason(error)}") from error
    if is_directory:
        return _walk(path, skipped, unreadable)
    if suffix in LIST_SUFFIXES:
        return _read_list(path, suffix)
    if suffix == ".tar":
        return _read_tar(path, skipped)
    if suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar"):
        raise InputError(
            f"{_show(given)}: of archives only uncompressed .tar is read; unpack this one"
        )
    return iter([source_at(given)])


def _is_directory(path: str) -> bool:
    """Whether a path is a directory.

    Raises:
        OSError: nothing is there, or access is denied.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except ValueError as error:  # a NUL in the path
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error


def _reason(error: OSError) -> str:
    number = errno.ENOENT if error.errno in ABSENT else error.errno
    return (os.strerror(number) if number else str(error)).lower()


def _walk(
    root: str,
    skipped: Counter[str],
    unreadable: list[str],
    wanted: Callable[[list[str], bool], bool] = lambda names, is_directory: True,
) -> Iterator[Source]:
    """Yields the images below a directory, bytewise sorted on the relative path.

    Args:
        root: absolute path of the directory.
        skipped: is filled with what was passed over.
        unreadable: is filled with the directories that could not be read.
        wanted: called with the parts of a relative path and whether it is a directory.
    """

    def pass_over(relative: str, error: OSError) -> None:
        skipped[_UNREADABLE] += 1
        path = os.path.normpath(os.path.join(root, relative))
        unreadable.append(f"{path!r}: {_reason(error)}")

    pending = [""]  # paths relative to root, next one last; directories end in a slash
    while pending:
        relative = pending.pop()
        if relative and not relative.endswith("/"):
            yield Source(relative, os.path.join(root, relative))
            continue
        children = []
        try:
            entries = list(os.scandir(os.path.join(root, relative)))
        except OSError as error:
            pass_over(relative, error)
            continue
        for entry in entries:
            child = relative + entry.name
            if entry.name.startswith("."):
                continue
            try:
                is_directory = entry.is_dir(follow_symlinks=False)
                is_link = entry.is_symlink()
            except OSError as error:
                if wanted(child.split("/"), True):
                    pass_over(child, error)
                continue
            if not wanted(child.split("/"), is_directory):
                continue
            if is_link:
                skipped["symbolic links"] += 1
            elif is_directory:
                children.append(child + "/")
            elif has_image_suffix(entry.name):
                children.append(child)
            else:
                skipped["files without an image suffix"] += 1
        # a directory sorts with its slash, which makes this depth-first order the bytewise one
        pending.extend(sorted(children, key=os.fsencode, reverse=True))


def _glob(pattern: str, skipped: Counter[str], unreadable: list[str]) -> Iterator[Source]:
    parts = PurePath(pattern).parts
    n_fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = os.path.abspath(os.path.join(*parts[:n_fixed]) if n_fixed else ".")
    try:
        reason = "" if _is_directory(root) else "not a directory"
    except OSError as error:
        reason = "no such directory" if error.errno in ABSENT else _reason(error)
    if reason:
        raise InputError(f"{pattern}: {reason}: {root}")

    def wanted(names: list[str], partial: bool) -> bool:
        return _matches(names, parts[n_fixed:], partial)

    return _walk(root, skipped, unreadable, wanted)


def _matches(names: Sequence[str], patterns: Sequence[str], partial: bool) -> bool:
    """Whether the names match, or, if `partial`, whether names below them could match."""
    if not names:
        return partial or all(pattern == "**" for pattern in patterns)
    if not patterns:
        return False
    if patterns[0] == "**":
        return _matches(names, patterns[1:], partial) or _matches(names[1:], patterns, partial)
    return fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:], partial)


def _read_tar(path: str, skipped: Counter[str]) -> Iterator[Source]:
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                # it would keep every header in memory (the attribute is missing in the stubs)
                archive.members.clear()  # type: ignore[attr-defined]
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse():
                    skipped["members that are no plain file"] += not member.isdir()
                elif not has_image_suffix(name) or PurePath(name).name.startswith("."):
                    skipped["files without an image suffix"] += 1
                else:
                    yield Source(name, path, member.offset_data, member.size)
            _check_end(path, archive)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a complete, uncompressed tar archive: {error}") from error


def _check_end(path: str, archive: tarfile.TarFile) -> None:
    """Raises InputError unless only zeros follow: tarfile also stops at a damaged header."""
    file, start = archive.fileobj, archive.offset
    assert file is not None
    file.seek(start)
    data = file.read(tarfile.BLOCKSIZE)
    is_end = len(data) == tarfile.BLOCKSIZE
    while is_end and data:
        is_end = not any(data)
        data = file.read(_READ_BYTES)
    if not is_end:
        raise InputError(
            f"{path}: not a complete, uncompressed tar archive: damaged or cut off at byte {start}"
        )


def _read_list(path: str, suffix: str) -> Iterator[Source]:
    """Yields the images named in a list; relative paths start at the list's directory."""
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    records = readers.get(suffix, _read_parquet)(path)
    for n, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(f"{path}: row {n} is no object with a `path`, got {record!r:.80}")
        image = record.get("path", record.get("file_name"))
        if not isinstance(image, str) or not image:
            raise InputError(
                f"{path}: row {n} has no text in the column `path` (or `file_name`), "
                f"got {image!r:.80}; columns: {', '.join(map(str, record))}"
            )
        name = record.get("id")
        shown = redact(image if name in (None, "") else str(name))
        if is_url(image):
            yield Source(shown, redact(image))
        else:
            yield Source(shown, os.path.normpath(os.path.join(os.path.dirname(path), image)))


def _read_lines(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for n in range(1, 1 << 62):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _MAX_LINE_BYTES:
                raise InputError(f"{path}: line {n} is longer than {_MAX_LINE_BYTES} bytes")
            text = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line)
            if text := text.rstrip("\r\n"):
                yield text


def _read_txt(path: str) -> Iterator[dict[str, str]]:
    return ({"path": line} for line in _read_lines(path))


def _read_csv(path: str) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            # strict: a quote that is never closed would take the rest of the file for one cell
            for n, record in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in record:  # where DictReader puts them
                    raise InputError(
                        f"{path}: row {n} has more cells than the header has columns; put cells "
                        f"that hold a comma in quotes: {record!r:.200}"
                    )
                yield record
        except csv.Error as error:
            raise InputError(f"{path}: not readable as CSV: {error}") from error


def _read_jsonl(path: str) -> Iterator[object]:
    for n, line in enumerate(_read_lines(path), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: row {n} is not JSON: {error}") from error


def _read_parquet(path: str) -> Iterable[dict[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path}: .parquet lists need pyarrow; pip install 'fastbb[parquet]'"
        ) from error
    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in ("path", "file_name", "id") if name in table.schema.names]
        if not columns:
            raise InputError(
                f"{path}: no column `path` (or `file_name`); columns: "
                f"{', '.join(table.schema.names)}"
            )
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise InputError(f"{path}: not readable as Parquet: {error}") from error


def _show(given: str | os.PathLike[str]) -> str:
    return redact(os.fspath(given))
