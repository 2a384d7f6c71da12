"""Worker processes of a bench, seen from the process that asks them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from ..engine.interruption import check_interrupted
from ..extraction.local_workers import kill_session

_POLL_S = 0.5
# with the paths of this process: `-m` would put the working directory before the libraries
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastbb.bench.worker import main; main()"
)


class WorkerError(Exception):
    """A worker did not do what it was asked for.

    Attributes:
        kind: "skip" (the way does not run this), "memory", "timeout" or "error".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A process that runs one way of a cell; see `worker` for its commands.

    Its caches of compilers and of fastbb's measurements are new and empty. It is in a session of
    its own: Ctrl-C reaches this process alone, which ends it by `close`.

    Args:
        folder: for its caches and its log; one for each worker.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log.txt"
        caches = {}
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR"):
            (folder / name.lower()).mkdir()
            caches[name] = str(folder / name.lower())
        # these would move with XDG_CACHE_HOME; what is to be downloaded is there by now
        torch_home = os.path.dirname(torch.hub.get_dir())
        kept = {"HF_HOME": HF_HOME, "TORCH_HOME": torch_home, "HF_HUB_OFFLINE": "1"}
        self._began = time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **caches, **kept},
                start_new_session=True,
            )

    def start(self, spec: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Has the worker build its runner; see `ask`."""
        return self.ask("start", timeout_s, spec=spec, began=self._began)

    def ask(self, do: str, timeout_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns its answer.

        Raises:
            WorkerError: the answer is an error, the process has died, or time is up.
            Interrupted: a signal came.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        line = b""
        while not line.endswith(b"\n"):
            check_interrupted()
            left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
            if left <= 0:
                raise WorkerError("timeout", f"took longer than {timeout_s:.0f} s")
            if select.select([self._process.stdout], [], [], left)[0]:
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died()
                line += chunk
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["kind"], answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process, and those that it started."""
        kill_session(self._process)

    def _died(self) -> WorkerError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return WorkerError("memory", "its process was killed (SIGKILL), perhaps for memory")
        lines = self._log.read_text(errors="replace").strip().splitlines()
        why = f": {lines[-1][:200]}" if lines else ""
        ended = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return WorkerError("error", f"its process ended {ended}{why}")
