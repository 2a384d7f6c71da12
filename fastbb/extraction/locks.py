"""Locks of a features directory: on the plan, on single shards, or on everything.

They are ranges of the file `.lock`, as Linux's open file description locks: unlike `flock`, each
shard has one of its own without a file of its own, and other than POSIX locks they also exclude
threads of one process. NFS passes them on to other nodes. The end of a process frees its locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

# offsets in the file; a length of 0 reaches to the end of all offsets
_PLAN, _FIRST_SHARD = 0, 1
_NO_SHARD = 2**62  # only who holds everything holds it
_EVERYTHING = 0, 0
_FLOCK = "@hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid, padding
_POLL_S = 0.2


class DirectoryLock:
    """The open `.lock` of a features directory; `close` frees what it holds."""

    def __init__(self, directory: Path) -> None:
        self._file = open(directory / ".lock", "ab")  # noqa: SIM115 -- `close` closes it

    def close(self) -> None:
        """Frees all that is held."""
        self._file.close()

    def take_all(self) -> bool:
        """Takes everything, unless another process holds some of it; returns whether it did."""
        return self._take(*_EVERYTHING)

    def take_shard(self, number: int) -> bool:
        """Takes a shard; returns False where another process holds it."""
        return self._take(_FIRST_SHARD + number, 1)

    def take_plan(self, on_wait: Callable[[], None]) -> bool:
        """Takes plan, generations and manifest, as soon as no other process holds them.

        Args:
            on_wait: called once before it waits.

        Returns:
            False where another process holds everything, for which nobody should wait.
        """
        waited = False
        while not self._take(_PLAN, 1):
            if self._is_taken(_NO_SHARD):
                return False
            if not waited:
                on_wait()
                waited = True
            time.sleep(_POLL_S)
        return True

    def free_plan(self) -> None:
        """Lets other processes take plan, generations and manifest."""
        self._free(_PLAN, 1)

    def _take(self, start: int, length: int) -> bool:
        try:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, start, length)
        except BlockingIOError:
            return False
        return True

    def _free(self, start: int, length: int) -> None:
        self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, start, length)

    def _is_taken(self, start: int) -> bool:
        found = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, 1)
        return struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK

    def _call(self, command: int, kind: int, start: int, length: int) -> bytes:
        values = struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
        return fcntl.fcntl(self._file.fileno(), command, values)
