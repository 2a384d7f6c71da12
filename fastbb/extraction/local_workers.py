"""Workers that are processes of this machine."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from .pool import Ended
from .worker import Message, Start

# with the paths of this process: `-m` would put the working directory before the libraries
_START = "import sys; sys.path[:] = sys.argv[1:]; from fastbb.extraction.worker import main; main()"
_READ_BYTES = 1 << 16


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that has a session of its own, and those that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


class LocalWorker:
    """A process, in a session of its own: Ctrl-C reaches the command alone, which ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._read = b""

    def ask(self, request: Message) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which `Processes.wait` tells
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        kill_session(self._process)

    def fileno(self) -> int:
        """Of its answers, for `select`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def answers(self) -> list[Message | Ended]:
        """Returns the answers that are there; waits for the first bytes."""
        data = os.read(self.fileno(), _READ_BYTES)
        if not data:
            return [Ended(self._how_it_ended())]
        *lines, self._read = (self._read + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return f"process {self._process.pid} was killed (SIGKILL), perhaps for memory"
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"process {self._process.pid} ended {ended}"


class Processes:
    """A `Backend` of processes.

    Args:
        starts: how each begins.
    """

    def __init__(self, starts: Sequence[Start]) -> None:
        self.starts = starts
        self.min_ready = 1

    def start(self) -> LocalWorker:
        return LocalWorker()

    def wait(
        self, workers: Sequence[LocalWorker], timeout_s: float
    ) -> list[tuple[LocalWorker, Message | Ended]]:
        ready, _, _ = select.select(workers, [], [], timeout_s)
        return [(worker, answer) for worker in ready for answer in worker.answers()]

    def close(self) -> None:
        pass
