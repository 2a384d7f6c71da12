"""Converted models on disk, kept from one process to the next."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 4 * 2**30
_NEW = ".new-"  # of folders that are being written
_WRITTEN_WITHIN_S = 3600  # an older one is of a process that was killed
_DIGESTS = "sha256.json"


class ModelFiles:
    """Folders with the files of a model, one for each key; those used last stay.

    No method raises because of the disk. A folder with broken files is removed, one that cannot be
    read is left alone, and a model that cannot be written is not kept.

    Args:
        directory: of the folders; made when it is needed.
        max_bytes: of all files; the folders used longest ago go. Larger models are not kept.

    Attributes:
        notes: why a folder was removed, not read or not kept, a sentence each.
    """

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self.directory, self._max_bytes = directory, max_bytes
        self.notes: list[str] = []

    def find(self, key: str) -> Path | None:
        """The folder of a key, if its files are as they were written, or None."""
        folder = self.directory / key
        try:
            if not folder.exists():
                return None
            if json.loads((folder / _DIGESTS).read_bytes()) != _digests(folder):
                raise ValueError("its files are not those that were written")
        except (FileNotFoundError, ValueError) as error:
            self.remove(key, str(error))
            return None
        except OSError as error:  # it may be whole
            self._note(f"{folder} cannot be read: {error.strerror or error}")
            return None
        with suppress(OSError):  # of another user, or read-only
            os.utime(folder)
        return folder

    def keep(self, key: str, write: Callable[[Path], None]) -> Path | None:
        """Keeps files under a key.

        Args:
            key: name of the folder.
            write: writes the files into a folder.

        Returns:
            The folder, maybe that of another process that kept the same, or None.
        """
        folder, is_ours = self.directory / key, True
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_NEW, dir=self.directory) as temporary:
                new = Path(temporary) / key
                new.mkdir()
                write(new)
                if _n_bytes(new) > self._max_bytes:
                    raise ValueError(f"larger than {self._max_bytes / 2**30:.3g} GiB")
                (new / _DIGESTS).write_text(json.dumps(_digests(new)))
                for file in new.iterdir():
                    _flush(file)
                _flush(new)
                try:
                    _rename(new, folder)
                except FileExistsError:
                    is_ours = False
        except Exception as error:  # OpenVINO raises its own errors where it cannot write
            reason = error.strerror if isinstance(error, OSError) else None
            self._note(f"not kept in {self.directory}: {reason or error}")
            return None
        try:
            self._make_room(folder)
        except OSError as error:
            self._note(f"{self.directory} may grow too large: {error.strerror or error}")
        return folder if is_ours else self.find(key)

    def remove(self, key: str, why: str) -> None:
        """Removes the folder of a key, with a note."""
        self._note(f"converted anew, {self.directory / key} is broken: {why}")
        _delete(self.directory / key)

    def _make_room(self, own: Path) -> None:
        entries = set(self.directory.iterdir()) - {own}
        entries = {entry for entry in entries if not _is_being_written(entry)}
        sizes = {entry: _n_bytes(entry) for entry in entries}
        excess = sum(sizes.values()) + _n_bytes(own) - self._max_bytes
        for entry in sorted(sizes, key=_time_of_use):
            if excess <= 0:
                return
            _delete(entry)
            excess -= sizes[entry] - _n_bytes(entry)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its name."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != _DIGESTS:
            digest = hashlib.sha256()
            with open(file, "rb") as stream:
                while part := stream.read(2**20):
                    digest.update(part)
            found[file.name] = digest.hexdigest()
    return found


def _rename(new: Path, folder: Path) -> None:
    """Renames a folder, or raises FileExistsError if there is one with files."""
    try:
        new.rename(folder)
    except OSError as error:
        if folder.is_dir():  # ENOTEMPTY or EEXIST
            raise FileExistsError(folder) from error
        raise


def _delete(folder: Path) -> None:
    with suppress(OSError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink()


def _is_being_written(entry: Path) -> bool:
    age = time.time() - _time_of_use(entry)
    return entry.name.startswith(_NEW) and age < _WRITTEN_WITHIN_S


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _n_bytes(entry: Path) -> int:
    total = 0
    with suppress(OSError):  # another process removed it
        total += sum(file.stat().st_size for file in entry.rglob("*"))
    return total


def _time_of_use(entry: Path) -> float:
    with suppress(OSError):
        return entry.stat().st_mtime
    return 0.0
