"""Archives, .tar and .zip: their images are located and never extracted.

Members that follow each other and have the same key belong together, as in WebDataset: `.json`,
`.txt` and `.cls` beside an image are columns of its row. The key is the path up to the first dot of
the file name.
"""

from __future__ import annotations

import itertools
import json
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..images.formats import has_image_suffix
from .decode import ImageError, read_bytes
from .sources import InputError, Source, json_value

ARCHIVE_SUFFIXES = (".tar", ".zip")
# by suffix, the command that makes a .tar of a compressed one
COMPRESSED_SUFFIXES = {
    ".gz": "gunzip -k",
    ".tgz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
    ".7z": "",
    ".rar": "",
}
_SIDECARS = ("json", "txt", "cls")
_NUMBER = re.compile("-?(0|[1-9][0-9]{0,17})")  # of int64; others, as 007, stay texts
_MAX_SIDECAR_BYTES = 2**20
_READ_BYTES = 2**20


def list_archive(path: str, prefix: str, skipped: Counter[str]) -> Iterator[Source]:
    """Yields the images of an archive in its order.

    Args:
        path: absolute path of the archive.
        prefix: what the ids start with; the names of the members follow.
        skipped: gets the kinds of members that are passed over, with their number.

    Raises:
        InputError: it is no complete archive.
    """
    list_members = _list_tar if Path(path).suffix.lower() == ".tar" else _list_zip
    members = list_members(path, prefix, skipped)
    for key, group in itertools.groupby(members, lambda member: _key(member.id[len(prefix) :])):
        images: list[Source] = []
        others: list[Source] = []
        for member in group:
            if member.id.startswith(".", member.id.rfind("/") + 1):
                skipped["hidden files"] += 1
            else:
                (images if has_image_suffix(member.id) else others).append(member)
        if images and others:
            yield from _with_columns(images, others, key, len(prefix), skipped)
        elif images:
            yield from images
        elif others:
            skipped["files without an image suffix"] += len(others)


def _key(name: str) -> str:
    dot = name.find(".", name.rfind("/") + 1)
    return name if dot < 0 else name[:dot]


def _with_columns(
    images: list[Source], others: list[Source], key: str, n_prefix: int, skipped: Counter[str]
) -> Iterator[Source]:
    texts: dict[str, bytes] = {}
    for member in others:
        suffix = member.id[n_prefix + len(key) + 1 :].lower()
        if suffix not in _SIDECARS:
            skipped["files without an image suffix"] += 1
            continue
        try:
            assert member.n_bytes is not None
            if member.n_bytes > _MAX_SIDECAR_BYTES:
                raise ValueError("too long")
            texts[suffix] = read_bytes(member) if member.n_bytes else b""
        except (ImageError, ValueError):
            skipped["unreadable sidecars"] += 1
    columns: dict[str, Any] = {}
    if "json" in texts:
        try:
            content = json_value(json.loads(texts["json"]))
            columns |= content if isinstance(content, dict) else {"json": content}
        except (ValueError, RecursionError):
            skipped["unreadable sidecars"] += 1
    if "txt" in texts:
        columns["txt"] = _text(texts["txt"]).rstrip("\r\n")
    if "cls" in texts:
        columns["cls"] = _label(_text(texts["cls"]).strip())
    columns["__key__"] = key
    for image in images:
        yield replace(image, columns=columns)


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")


def _label(text: str) -> int | str:
    return int(text) if _NUMBER.fullmatch(text) else text


def _list_tar(path: str, prefix: str, skipped: Counter[str]) -> Iterator[Source]:
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                # it would keep every header in memory (the attribute is missing in the stubs)
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse():
                    name = prefix + member.name.removeprefix("./")
                    yield Source(name, path, member.offset_data, member.size)
                elif not member.isdir():
                    skipped["members that are no plain file"] += 1
            _check_end(archive)
    # the last ones: headers that are nested without end, or have numbers that are none or too large
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        RecursionError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:
        text = str(error) or type(error).__name__
        raise InputError(f"{path}: not a complete, uncompressed tar archive: {text}") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError unless only zeros follow: tarfile also stops at a damaged header."""
    file, start = archive.fileobj, archive.offset
    assert file is not None
    file.seek(start)
    data = file.read(tarfile.BLOCKSIZE)
    is_end = len(data) == tarfile.BLOCKSIZE
    while is_end and data:
        is_end = not any(data)
        data = file.read(_READ_BYTES)
    if not is_end:
        raise tarfile.ReadError(f"damaged or cut off at byte {start}")


def _list_zip(path: str, prefix: str, skipped: Counter[str]) -> Iterator[Source]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # NotImplementedError: of a version that Python does not know; ValueError: damaged names
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a complete zip archive: {error}") from error
    for member in members:
        mode = member.external_attr >> 16
        if member.is_dir():
            continue
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            skipped["members that are no plain file"] += 1
            continue
        name = prefix + member.filename.removeprefix("./")
        yield Source(name, path, member.header_offset, member.file_size, member.orig_filename)
