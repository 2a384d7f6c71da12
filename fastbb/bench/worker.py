"""One process of a bench, which runs one way; `processes.Worker` starts it.

The process reads commands from its standard input and writes one answer to each, both as a line of
JSON; whatever libraries print goes to stderr. It ends when its input does.

    {"do": "start", "spec": {...}}     builds the runner, runs it once, writes its outputs
    {"do": "warm", "max_s": 5}         calls until the times are stable, writes outputs once more
    {"do": "turn", "seconds": 0.5}     times calls; the peak of memory since the warm-up
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from fastbb_kernels.fp32_precision import fp32_products
from fastbb_kernels.heap import release_freed_memory

from ..engine.measuring import describe, synchronize
from .subject import SkippedError, write_tensors
from .timing import timed_calls, warm_up

_PAUSE_S = 0.02
_PEAK, _NOW = "VmHWM:", "VmRSS:"  # lines of /proc/self/status
_RESET_PEAK = "5"  # written to /proc/self/clear_refs, see proc_pid_clear_refs(5)


class Runner(Protocol):
    """What a worker runs. Its module has a function `make_runner(spec)` that returns it.

    The time of that function counts nowhere: it may fetch weights that `load` takes. fp32 products
    are in tf32 where the spec's "precision" says so.

    Attributes:
        note: what a reader of its numbers should know; known after `start`.
    """

    note: str

    def load(self) -> None:
        """Builds the model."""
        ...

    def start(self) -> Any:
        """Makes it ready: converts, compiles, measures; returns the result of a first call."""
        ...

    def run(self) -> Any:
        """One call, which is timed."""
        ...

    def outputs(self, result: Any) -> dict[str, Any]:
        """The tensors of a result that are compared with upstream's, by name."""
        ...

    def inside_s(self) -> float | None:
        """Seconds that calls spent inside replaced modules since the last question; of a host."""
        ...


class _Worker:
    """The commands of a worker."""

    def __init__(self) -> None:
        self.runner: Any = None
        self.device: Any = None
        self.imported_bytes = 0
        self.precision = ExitStack()  # as long as the process

    def start(self, command: Mapping[str, Any]) -> dict[str, Any]:
        spec = command["spec"]
        for name in spec.get("imports", ()):
            import_module(name)
        make_runner = import_module(spec["module"]).make_runner
        self.device = torch.device(spec["device"])
        if self.device.type == "cuda":
            torch.cuda.init()
        imported_s = time.time() - command["began"]
        self.imported_bytes = self._memory(_NOW)
        if self.device.type == "cuda":  # PyTorch's default for convolutions of fp32 is tf32 there
            products = "tf32" if spec.get("precision") == "tf32" else "ieee"
            self.precision.enter_context(fp32_products(products))
        self.runner = make_runner(spec)
        began = time.perf_counter()
        self.runner.load()
        loaded = time.perf_counter()
        result = self.runner.start()
        synchronize(self.device)
        started = time.perf_counter()
        if spec.get("outputs"):
            _write_outputs(Path(spec["outputs"]), self.runner.outputs(result))
        return {
            "import_s": imported_s,
            "load_s": loaded - began,
            "start_s": started - loaded,
            "note": self.runner.note,
        }

    def warm(self, command: Mapping[str, Any]) -> dict[str, Any]:
        taken = warm_up(self.runner.run, self.device, command["max_s"])
        if command.get("outputs"):  # of what is timed: graphs and compiled code run by now
            _write_outputs(Path(command["outputs"]), self.runner.outputs(self.runner.run()))
        _release(self.device)
        self._reset_peak()
        self.runner.inside_s()
        return {"seconds": taken}

    def turn(self, command: Mapping[str, Any]) -> dict[str, Any]:
        # threads of the way before spin for some milliseconds; passive waiting (OMP_WAIT_POLICY)
        # would slow PyTorch down, and no other engine
        time.sleep(_PAUSE_S)
        inside: list[float] = []

        def call() -> None:
            self.runner.run()
            if (seconds := self.runner.inside_s()) is not None:
                inside.append(seconds)

        taken = timed_calls(call, command["seconds"], self.device)
        answer = {
            "seconds": taken,
            "inside": inside[-len(taken) :] or None,
            "peak_bytes": self._peak(),
        }
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next way has the same GPU
        return answer

    def _peak(self) -> int:
        """Peak memory since the last reset: above imports on a CPU, the allocator's on a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, self._memory(_PEAK) - self.imported_bytes)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):  # some containers forbid it; the peak is then that of the start
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)

    def _memory(self, line: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        value = next((one for one in lines if one.startswith(line)), f"{line} 0")
        return int(value.split()[1]) * 1024  # the kernel's kB


def _release(device: Any) -> None:
    """Gives freed memory back, so that the peak is that of running alone."""
    release_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _write_outputs(path: Path, outputs: Mapping[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in outputs.items()}
    write_tensors(path, tensors)


def _answer(worker: _Worker, line: str) -> dict[str, Any]:
    """Runs a command; an error becomes an answer of its kind: "skip", "memory" or "error"."""
    command = json.loads(line)
    try:
        return getattr(worker, command["do"])(command)
    except SkippedError as error:
        return {"kind": "skip", "error": str(error)}
    except Exception as error:
        remedy = "; pip install 'fastbb[bench]'" if isinstance(error, ImportError) else ""
        kind = "memory" if _is_memory(error) else "error"
        return {"kind": kind, "error": describe(error) + remedy}


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)  # of torch's allocators, OpenVINO, ONNX Runtime
    return any(sign in text for sign in ("can't allocate memory", "out of memory", "bad_alloc"))


def _end_with(parent: int) -> None:
    """Ends this process when its parent has gone, also in the middle of a command."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between answers
    warnings.simplefilter("ignore")  # of exporters
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    worker = _Worker()
    with torch.no_grad():
        for line in sys.stdin:
            answers.write(json.dumps(_answer(worker, line)) + "\n")
            answers.flush()
