"""Locks of a features directory: on the plan, on a share of the shards, or on everything.

They are ranges of the file `.lock`, as Linux's open file description locks: unlike `flock`, a file
has many of them, and other than POSIX locks they also exclude threads of one process. NFS passes
them on to other nodes. The end of a process frees its locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

# offsets in the file; a length of 0 reaches to the end of all offsets. Share i of n is n * 2^31 + i
_PLAN, _FIRST_SHARE = 0, 1
_N_SHIFT = 31
MAX_SHARES = 2**_N_SHIFT
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

    def take_share(self, i: int, n: int) -> bool:
        """Takes share i of n; returns False where another process holds it or one of another n."""
        of_n = n << _N_SHIFT
        return (
            self._take(of_n + i, 1)
            and not self._is_taken(_FIRST_SHARE, of_n - _FIRST_SHARE)
            and not self._is_taken(of_n + n, 0)
        )

    def take_plan(self, on_wait: Callable[[], None]) -> None:
        """Takes plan, generations and manifest, as soon as no other share holds them.

        Args:
            on_wait: called once before it waits.
        """
        waited = False
        while not self._take(_PLAN, 1):
            if not waited:
                on_wait()
                waited = True
            time.sleep(_POLL_S)

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

    def _is_taken(self, start: int, length: int) -> bool:
        found = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, length)
        return struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK

    def _call(self, command: int, kind: int, start: int, length: int) -> bytes:
        values = struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
        return fcntl.fcntl(self._file.fileno(), command, values)
