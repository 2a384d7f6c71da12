"""Converted models on disk, kept from one process to the next."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 4 * 2**30
_DIGESTS = "sha256.json"


class ModelFiles:
    """Folders with the files of a model, one for each key; those used last stay.

    No method raises because of the disk. A folder with broken files is removed, and a model that
    cannot be written is not kept.

    Args:
        directory: of the folders; made when it is needed.
        max_bytes: of all files; the folders used longest ago go.

    Attributes:
        notes: why a folder was removed or not kept, a sentence each.
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
        except (OSError, ValueError) as error:
            self.remove(key, str(error))
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
        folder = self.directory / key
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.directory) as temporary:
                new = Path(temporary) / key
                new.mkdir()
                write(new)
                (new / _DIGESTS).write_text(json.dumps(_digests(new)))
                for file in new.iterdir():
                    _flush(file)
                _flush(new)
                with suppress(FileExistsError):
                    _rename(new, folder)
            self._make_room(folder)
        except Exception as error:  # OpenVINO raises its own errors where it cannot write
            reason = error.strerror if isinstance(error, OSError) else None
            self._note(f"not kept in {self.directory}: {reason or error}")
            return None
        return self.find(key)

    def remove(self, key: str, why: str) -> None:
        """Removes the folder of a key, with a note."""
        self._note(f"converted anew, {self.directory / key} is broken: {why}")
        _delete(self.directory / key)

    def _make_room(self, own: Path) -> None:
        sizes = {entry: _n_bytes(entry) for entry in self.directory.iterdir()}
        excess = sum(sizes.values()) - self._max_bytes
        for entry in sorted(sizes.keys() - {own}, key=_time_of_use):
            if excess <= 0:
                return
            _delete(entry)
            excess -= sizes[entry]

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
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with suppress(OSError):
            folder.unlink()


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
