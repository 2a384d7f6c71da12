"""`Listing`: the inputs of an extraction as one ordered sequence of `Source` rows.

Only directories, lists and headers of archives are opened here; a file that is missing or no image
becomes a failed row later. A directory that cannot be read is passed over and named. Archives are
never unpacked, addresses are never fetched, links are followed only on demand.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from ..images.formats import has_image_suffix
from .archives import ARCHIVE_SUFFIXES, COMPRESSED_SUFFIXES, list_archive
from .lists import LIST_SUFFIXES, list_images, read_metadata
from .sources import ABSENT, InputError, Source, first_few, is_url, redact, source_at

_MAX_ID_CHARS = 4096
_MAX_EXPANDED = 1_000_000
_BRACES = re.compile(r"\{([0-9]+\.\.[0-9]+|[^{},]*(?:,[^{},]*)+)\}")
_SET_SUFFIXES = (*ARCHIVE_SUFFIXES, ".parquet")
_STREAMS = (".txt", ".jsonl")  # lists that a pipe may be
_COMPRESSED_ARCHIVE = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|7z|rar)$", re.IGNORECASE)
_WILDCARDS = re.compile(r"[*?[]")
_METADATA = ("metadata.csv", "metadata.jsonl")
_UNREADABLE = "unreadable directories"
# what is passed over: the singular of each kind, and an advice
_KINDS = {
    "symbolic links": ("symbolic link", "--follow-symlinks follows them"),
    "symbolic link loops": ("symbolic link loop", ""),
    "files without an image suffix": ("file without an image suffix", ""),
    "hidden files": ("hidden file", ""),
    "hidden folders": ("hidden folder", ""),
    "archives": ("archive", "name them as inputs"),
    "Parquet files": ("Parquet file", "name them as inputs"),
    "compressed archives": ("compressed archive", "unpack them"),
    "archives and Parquet files that are no plain file": (
        "archive or Parquet file that is no plain file",
        "",
    ),
    "members that are no plain file": ("member that is no plain file", ""),
    "unreadable sidecars": ("unreadable sidecar", ""),
    "columns without JSON values": ("column without JSON values", ""),
    "metadata rows without an image": ("metadata row without an image", ""),
    _UNREADABLE: ("unreadable directory", ""),
}


class Listing:
    """The images of all inputs, in the order of the inputs.

    Directories and globs are sorted bytewise on the id, lists and archives keep their own order.
    A directory or glob without images is a set of its archives (.tar, .zip) or else of its .parquet
    files; the ids of a set, as those of a brace pattern, start with the path of the file.

    Args:
        inputs: directories, globs, brace patterns, images, lists (.txt, .csv, .tsv, .jsonl,
            .parquet) and archives (.tar, .zip).
        follow_symlinks: follow links below directories, except those that lead back to a directory
            above them. An input that is itself a link is always followed.

    Attributes:
        skipped: number of what was passed over, by kind; complete after an iteration, as the rest.
        unreadable: the directories that could not be read, each with the reason.
        archives: size and modification time (see `archive_state`) of every archive that holds
            images, by absolute path. Rows are places in it, so they mean nothing in another one.

    Raises:
        InputError: in an iteration; an input cannot be listed, or two different images have the
            same id.
    """

    def __init__(
        self, inputs: Sequence[str | os.PathLike[str]], follow_symlinks: bool = False
    ) -> None:
        self.inputs = [os.fspath(given) for given in inputs]
        self.follow_symlinks = follow_symlinks
        self.skipped: Counter[str] = Counter()
        self.unreadable: list[str] = []
        self.archives: dict[str, dict[str, int]] = {}

    def __iter__(self) -> Iterator[Source]:
        for found in (self.skipped, self.unreadable, self.archives):
            found.clear()
        place_of_id: dict[str, tuple[str, int | None]] = {}
        for given in self.inputs:
            is_empty, n_unreadable, before = True, len(self.unreadable), Counter(self.skipped)
            for source in self._list_input(given):
                is_empty = False
                _check_id(given, source, place_of_id)
                if source.offset is not None and source.path not in self.archives:
                    self.archives[source.path] = archive_state(source.path)
                yield source
            if is_empty:
                lost = self.unreadable[n_unreadable:]
                passed_over = _passed_over(self.skipped - before, but=_UNREADABLE)
                raise InputError(
                    f"{redact(given)}: no images found"
                    + (f"; cannot list {first_few(lost)}" if lost else "")
                    + (f"; {passed_over}; a list can name files" if passed_over else "")
                )

    def passed_over(self) -> str:
        """Counts what was passed over and why, in one line; empty if nothing was."""
        return _passed_over(self.skipped)

    def _list_input(self, given: str) -> Iterator[Source]:
        if is_url(given):
            raise InputError(
                f"{redact(given)}: addresses are not fetched; give a local path to the images"
            )
        path = os.path.abspath(given)
        try:
            is_directory = _is_directory(path)
        except OSError as error:
            if _BRACES.search(given):
                return self._list_braces(given)
            if _WILDCARDS.search(given):
                return self._list_glob(given)
            raise InputError(f"{given}: {_reason(error)}") from error
        return self._list_directory(path) if is_directory else self._list_file(path, given)

    def _list_file(self, path: str, given: str, name: str = "") -> Iterator[Source]:
        """Lists an archive, a list or an image.

        Args:
            path: absolute path.
            given: the path as it was given.
            name: its name in a set.
        """
        suffix, prefix = _suffix(path), name and name + "/"
        is_list = suffix in (*ARCHIVE_SUFFIXES, *LIST_SUFFIXES) and suffix not in _STREAMS
        if is_list and _is_special(path):
            raise InputError(f"{given}: not a regular file")
        if suffix in ARCHIVE_SUFFIXES:
            return list_archive(path, prefix, self.skipped)
        if suffix in LIST_SUFFIXES:
            return list_images(path, prefix, self.skipped)
        if suffix in COMPRESSED_SUFFIXES:
            tool = COMPRESSED_SUFFIXES[suffix]
            raise InputError(
                f"{given}: single images cannot be read out of a compressed archive, as it has no "
                "random access; unpack it, or pack it again as an uncompressed .tar or a .zip"
                + (f" ({tool} {given})" if tool else "")
            )
        return iter([Source(name, path) if name else source_at(given)])

    def _list_braces(self, given: str) -> Iterator[Source]:
        # ids start where the fixed directory ends, as those of a glob
        n_fixed = given.rfind("/", 0, given.index("{")) + 1
        paths = _expand_braces(given)
        missing = [p for p in paths if not (_WILDCARDS.search(p) or os.path.exists(p))]
        if missing:
            raise InputError(
                f"{given}: {len(missing):,} of the {len(paths):,} files of this pattern do not "
                f"exist: {first_few(missing)}"
            )
        for given_path in paths:
            path, name = os.path.abspath(given_path), given_path[n_fixed:]
            if os.path.isdir(path):
                yield from self._list_directory(path, name.rstrip("/") + "/")
            elif os.path.exists(path):
                yield from self._list_file(path, given_path, name)
            else:
                fixed = _WILDCARDS.split(name)[0]
                yield from self._list_glob(given_path, fixed[: fixed.rfind("/") + 1])

    def _list_glob(self, pattern: str, prefix: str = "") -> Iterator[Source]:
        parts = PurePath(pattern).parts
        n_fixed = next(i for i, part in enumerate(parts) if _WILDCARDS.search(part))
        root = os.path.abspath(os.path.join(*parts[:n_fixed]) if n_fixed else ".")
        try:
            reason = "" if _is_directory(root) else "not a directory"
        except OSError as error:
            reason = "no such directory" if error.errno in ABSENT else _reason(error)
        if reason:
            raise InputError(f"{pattern}: {reason}: {root}")

        def wanted(names: list[str], partial: bool) -> bool:
            return _matches(names, parts[n_fixed:], partial)

        return self._list_tree(root, wanted, prefix)

    def _list_directory(self, root: str, prefix: str = "") -> Iterator[Source]:
        """Lists a directory; the columns of a metadata file at its root travel with the images."""
        for metadata in _METADATA:
            path = os.path.join(root, metadata)
            if os.path.isfile(path) and (self.follow_symlinks or not os.path.islink(path)):
                columns = read_metadata(path)
                if columns is not None:

                    def wanted(names: list[str], _: bool, metadata: str = metadata) -> bool:
                        return names != [metadata]

                    return self._list_tree(root, wanted, prefix, columns)
        return self._list_tree(root, prefix=prefix)

    def _list_tree(
        self,
        root: str,
        wanted: Callable[[list[str], bool], bool] | None = None,
        prefix: str = "",
        columns: Mapping[str, dict[str, Any]] | None = None,
    ) -> Iterator[Source]:
        """Lists the images below a directory, or else its archives, or else its Parquet files.

        Args:
            root: absolute path of the directory.
            wanted: called with the parts of a relative path and whether it is a directory; else
                everything is wanted.
            prefix: what the ids start with.
            columns: of the images, by relative path.
        """
        columns = columns or {}
        n_with_columns, has_images = 0, False
        archives: list[str] = []
        tables: list[str] = []
        for relative in self._walk(root, wanted):
            lower = relative.lower()
            if lower.endswith(ARCHIVE_SUFFIXES):
                archives.append(relative)
            elif lower.endswith(".parquet"):
                tables.append(relative)
            else:
                has_images = True
                known = columns.get(relative)
                n_with_columns += known is not None
                path = os.path.join(root, relative)
                yield Source(prefix + relative, path, columns=known or None)
        self._pass_over("metadata rows without an image", len(columns) - n_with_columns)
        if has_images:
            self._pass_over("archives", len(archives))
            self._pass_over("Parquet files", len(tables))
            return
        if archives:
            self._pass_over("Parquet files", len(tables))
        for relative in archives or tables:
            path = os.path.join(root, relative)
            yield from self._list_file(path, path, prefix + relative)

    def _pass_over(self, kind: str, n: int = 1) -> None:
        if n:
            self.skipped[kind] += n

    def _walk(self, root: str, wanted: Callable[[list[str], bool], bool] | None) -> Iterator[str]:
        """Yields paths of images, archives and Parquet files, bytewise sorted, relative to root."""

        def cannot_read(relative: str, error: OSError) -> None:
            if error.errno == errno.ELOOP:
                self._pass_over("symbolic link loops")
                return
            self._pass_over(_UNREADABLE)
            path = os.path.normpath(os.path.join(root, relative))
            self.unreadable.append(f"{path!r}: {_reason(error)}")

        # next one last, with device and inode of the directories above; directories end in a slash
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while pending:
            relative, above = pending.pop()
            if relative and not relative.endswith("/"):
                yield relative
                continue
            directory = os.path.join(root, relative)
            try:
                if self.follow_symlinks:
                    status = os.stat(directory)
                    if (status.st_dev, status.st_ino) in above:
                        self._pass_over("symbolic link loops")
                        continue
                    above += ((status.st_dev, status.st_ino),)
                entries = list(os.scandir(directory))
            except OSError as error:
                cannot_read(relative, error)
                continue
            children = []
            for entry in entries:
                child = relative + entry.name
                is_hidden = entry.name.startswith(".")
                try:
                    follows = self.follow_symlinks and not is_hidden
                    is_directory = entry.is_dir(follow_symlinks=follows)
                    is_link = entry.is_symlink()
                except OSError as error:
                    if not is_hidden and (wanted is None or wanted(child.split("/"), True)):
                        cannot_read(child, error)
                    continue
                if wanted is not None and not wanted(child.split("/"), is_directory):
                    continue
                if is_hidden:
                    self._pass_over("hidden folders" if is_directory else "hidden files")
                elif is_link and not self.follow_symlinks:
                    self._pass_over("symbolic links")
                elif is_directory:
                    children.append(child + "/")
                elif _suffix(entry.name) in _SET_SUFFIXES and _is_special(entry.path):
                    # a pipe would block the listing
                    self._pass_over("archives and Parquet files that are no plain file")
                elif has_image_suffix(entry.name) or _suffix(entry.name) in _SET_SUFFIXES:
                    children.append(child)
                else:
                    is_archive = _COMPRESSED_ARCHIVE.search(entry.name)
                    kind = "compressed archives" if is_archive else "files without an image suffix"
                    self._pass_over(kind)
            # a directory sorts with its slash, which makes this depth-first order the bytewise one
            children.sort(key=os.fsencode, reverse=True)
            pending.extend((child, above) for child in children)


def archive_state(path: str) -> dict[str, int]:
    """Returns size and modification time of an archive."""
    status = os.stat(path)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_special(path: str) -> bool:
    """Returns whether a path is a pipe, a device or another thing that is no regular file."""
    return os.path.exists(path) and not os.path.isfile(path)


def _passed_over(skipped: Counter[str], but: str = "") -> str:
    counts = []
    for kind, (singular, advice) in _KINDS.items():
        n = 0 if kind == but else skipped[kind]
        if n == 1:
            advice = advice.replace("them as inputs", "it as an input").replace("them", "it")
        if n:
            name = singular if n == 1 else kind
            counts.append(f"{n:,} {name}" + (f" ({advice})" if advice else ""))
    return f"passed over: {', '.join(counts)}" if counts else ""


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _check_id(given: str, source: Source, place_of_id: dict[str, tuple[str, int | None]]) -> None:
    if len(source.id) > _MAX_ID_CHARS or "\0" in source.id:
        raise InputError(
            f"{redact(given)}: an id has at most {_MAX_ID_CHARS} characters and no NUL, "
            f"got {len(source.id)} characters: {source.id[:80]!r}"
        )
    place = (source.path, source.offset)
    first = place_of_id.setdefault(source.id, place)
    if first != place:
        raise InputError(
            f"two images would have the id {source.id!r}: {first[0]} and {source.path}; "
            + _advice_on_ids(given, source, first[0] == source.path)
        )


def _advice_on_ids(given: str, source: Source, is_same_file: bool) -> str:
    suffix = _suffix(given)
    if source.offset is not None and not is_same_file:
        return (
            "give their common parent directory, a glob in quotes or a brace pattern: then ids "
            "start with the names of the archives"
        )
    if suffix in LIST_SUFFIXES and suffix != ".txt":
        return "give every row an `id` of its own"
    if source.offset is not None:
        return "rename one of them"
    return "give their common parent directory, or a .csv list with an `id` column"


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


def _matches(names: Sequence[str], patterns: Sequence[str], partial: bool) -> bool:
    """Whether the names match, or, if `partial`, whether names below them could match."""
    if not names:
        return partial or all(pattern == "**" for pattern in patterns)
    if not patterns:
        return False
    if patterns[0] == "**":
        return _matches(names, patterns[1:], partial) or _matches(names[1:], patterns, partial)
    return fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:], partial)


def _expand_braces(pattern: str) -> list[str]:
    """Expands `{a,b}` and `{00..12}` as a shell does."""
    choices: list[list[str]] = []
    for i, part in enumerate(_BRACES.split(pattern)):
        if i % 2 == 0:
            choices.append([part])
        elif "," in part:
            choices.append(part.split(","))
        else:
            first, last = part.split("..")
            step = 1 if int(first) <= int(last) else -1
            is_padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
            width = max(len(first), len(last)) if is_padded else 0
            numbers = range(int(first), int(last) + step, step)[: _MAX_EXPANDED + 1]
            choices.append([f"{n:0{width}}" for n in numbers])
    if math.prod(map(len, choices)) > _MAX_EXPANDED:
        raise InputError(f"{pattern}: a brace pattern names at most {_MAX_EXPANDED:,} files")
    return ["".join(parts) for parts in itertools.product(*choices)]
