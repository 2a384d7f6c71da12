"""Results of checks and measurements, kept from one process to the next as JSON.

A lost result is made again. A result is never incomplete, and never that of another machine.
"""

import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .machine import Machine

_FORMAT = 1
_MAX_BYTES = 16 * 2**20
_LOCK_TIMEOUT_S = 2.0

_Sections = dict[str, dict[str, Any]]


class ResultCache:
    """Results of one machine, by section and key, in one JSON file.

    No method raises because of the file. A file that cannot be read is ignored and, if possible,
    replaced; results that cannot be written are kept in this process.

    Attributes:
        machine: the machine of the results.
        path: of the file.
        notes: why a file was ignored or could not be written, a sentence each.
    """

    def __init__(self, machine: Machine, directory: Path | None = None) -> None:
        """Reads the results in the file.

        Args:
            machine: the machine of the results.
            directory: of the files of all machines; default: `fastbb` in the user's cache.
        """
        self.machine = machine
        self.path = (user_cache() if directory is None else directory) / f"{machine.key}.json"
        self.notes: list[str] = []
        self._lock = threading.RLock()
        self._unwritten: _Sections = {}
        self._results = self._read()

    def get(self, section: str, key: str) -> Any | None:
        """Returns the result, a value of JSON, or None."""
        with self._lock:
            return self._results.get(section, {}).get(key)

    def items(self, section: str) -> dict[str, Any]:
        """Returns the results of a section by their keys."""
        with self._lock:
            return dict(self._results.get(section, {}))

    def put(self, section: str, key: str, value: Any) -> None:
        """Keeps a result, also in the file if that can be written.

        Args:
            section: of the result.
            key: of the result.
            value: anything that JSON can hold.

        Raises:
            TypeError: JSON cannot hold the value.
        """
        new = {section: {key: json.loads(json.dumps(value))}}
        with self._lock:
            self._results = _merged(self._results, new)
            self._unwritten = _merged(self._unwritten, new)
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _locked(self.path.with_suffix(".lock")):
                    # another process may have written the file since we read it
                    self._results = _merged(self._results, self._read(), self._unwritten)
                    self._write()
                self._unwritten = {}
            except OSError as error:
                reason = error.strerror or error  # without the name of a temporary file
                self._note(f"results are not kept: {self.path} cannot be written: {reason}")

    def _read(self) -> _Sections:
        """Reads the results of this machine from the file."""
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a file")
            if status.st_size > _MAX_BYTES:
                raise ValueError(f"it has {status.st_size} bytes, wanted at most {_MAX_BYTES}")
            return self._sections(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:  # ValueError: also what is not JSON
            self._note(f"ignored {self.path}: {error}")
            return {}

    def _sections(self, content: Any) -> _Sections:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"it is not a cache of format {_FORMAT}")
        if content.get("machine") != asdict(self.machine):
            raise ValueError("it holds the results of another machine or version")
        sections = content.get("results")
        if not isinstance(sections, dict) or not all(
            isinstance(s, dict) for s in sections.values()
        ):
            raise ValueError("its results are not sections of results")
        return sections

    def _write(self) -> None:
        content = {"format": _FORMAT, "machine": asdict(self.machine), "results": self._results}
        file, name = tempfile.mkstemp(".tmp", f".{self.machine.key}-", self.path.parent)
        try:
            with open(file, "w") as stream:
                json.dump(content, stream, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def user_cache() -> Path:
    """Returns `fastbb` in the user's cache directory, by the XDG Base Directory Specification."""
    wanted = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(wanted):
        wanted = os.path.expanduser("~/.cache")
    # a user without a home: writing below the null device fails, and a note will report that
    return Path(wanted if os.path.isabs(wanted) else os.devnull) / "fastbb"


def _merged(*all_sections: _Sections) -> _Sections:
    """Merges results; of several with one key, the last one is taken."""
    merged: _Sections = {}
    for sections in all_sections:
        for section, results in sections.items():
            merged[section] = {**merged.get(section, {}), **results}
    return merged


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks out other processes if the file system can; waits for them for a limited time."""
    try:
        import fcntl
    except ImportError:  # not on Windows: a result may be lost there
        yield
        return
    with open(path, "a") as stream:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # this file system has no locks
                break
        yield
