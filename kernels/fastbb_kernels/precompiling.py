"""Compiles kernels before they are needed, in several processes, into Triton's cache.

The launches of some code are recorded on meta tensors, and each distinct binary becomes a job for a
worker: the kernel, the shapes of its tensors and its other arguments, as JSON. A worker launches
the kernel on a pretended GPU, so that Triton itself makes the key by which the device finds the
binary. Workers are new processes, not forks, so that they hold no CUDA state.
"""

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from ._dispatch import Architecture
from .architectures import find_architecture
from .pretend_gpu import fake_gpu
from .recorder import describe, replaced_run

_MAX_PROBLEM_CHARACTERS = 500


@dataclass(frozen=True)
class Job:
    """A binary to compile.

    Attributes:
        kernel: name of its op.
        request: the message to a worker.
    """

    kernel: str
    request: str


@dataclass(frozen=True)
class Compiled:
    """Result of a job.

    Attributes:
        kernel: name of the op.
        seconds: duration of the compilation.
        cached: whether the binary was in the cache already.
        problem: a sentence that says why there is no binary, or None.
    """

    kernel: str
    seconds: float
    cached: bool = False
    problem: str | None = None


@contextmanager
def recording_jobs(arch: Architecture) -> Iterator[dict[str, Job]]:
    """Records the binaries that the launches of the block need; compiles and runs nothing.

    Args:
        arch: an architecture as in `fake_gpu`.

    Yields:
        jobs by a key that identifies the binary, added as the block runs.

    Raises:
        ValueError: no such architecture.
    """
    architecture = find_architecture(arch)
    jobs: dict[str, Job] = {}

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = describe(fn, args, kwargs, grid, architecture)
        if launch.specialization not in jobs:
            request = [fn.fn.__module__, launch.name, launch.grid, _encoded(args), _encoded(kwargs)]
            name = launch.name.removeprefix("_").removesuffix("_fwd_kernel")
            jobs[launch.specialization] = Job(name, json.dumps(request))

    with replaced_run(architecture, run):
        yield jobs


def compile_jobs(jobs: Sequence[Job], arch: Architecture, n_workers: int) -> Iterator[Compiled]:
    """Compiles jobs in `n_workers` processes; yields their results in the order in which they end.

    If a worker dies, its job has that as its problem, and a new worker replaces it. All workers end
    when the iteration ends, also by an exception.
    """
    waiting = deque(jobs)
    workers: list[_Worker] = []

    def hand_out(selector: selectors.BaseSelector) -> None:
        if waiting:
            free = next((worker for worker in workers if worker.job is None), None)
            if free is None:
                free = _Worker(arch)
                workers.append(free)
            free.start(waiting.popleft())
            selector.register(free.output, selectors.EVENT_READ, free)

    try:
        with selectors.DefaultSelector() as selector:
            for _ in range(n_workers):
                hand_out(selector)
            while selector.get_map():
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    selector.unregister(worker.output)
                    compiled = worker.finish()
                    if worker.has_died:
                        workers.remove(worker)
                        worker.end()
                    hand_out(selector)
                    yield compiled
    finally:
        for worker in workers:
            worker.end()


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that compiles jobs one after the other."""

    def __init__(self, arch: Architecture) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({arch!r})"
        )
        # in a new session: Ctrl-C at a terminal reaches only us, and `end` also ends its children
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self.job: Job | None = None
        self.has_died = False
        self._started = 0.0

    def start(self, job: Job) -> None:
        """Sends a job to the process; `output` becomes readable when the job is done."""
        self.job, self._started = job, time.perf_counter()
        with suppress(BrokenPipeError):  # `finish` finds out from the output that it died
            self._input.write(f"{job.request}\n")
            self._input.flush()

    def finish(self) -> Compiled:
        """Returns the result of the job; call it once `output` is readable."""
        job, self.job = self.job, None
        assert job is not None
        reply = self.output.readline()
        if reply.endswith("\n"):
            return Compiled(job.kernel, **json.loads(reply))
        self.has_died = True
        seconds = time.perf_counter() - self._started
        code = self._process.wait()
        how = f"by signal {-code}, {_signal_name(-code)}" if code < 0 else f"with exit code {code}"
        return Compiled(job.kernel, seconds, problem=f"the process that compiled it ended {how}")

    def end(self) -> None:
        """Ends the process and its children."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._input.close()
        self.output.close()


def serve(arch: Architecture) -> None:
    """Runs a worker: reads a request per line, compiles it, and answers with a line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to stderr, not among the replies
    hits: list[bool] = []

    def listener(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listener
    with fake_gpu(arch):
        for line in sys.stdin:
            hits.clear()
            started, problem = time.perf_counter(), None
            try:
                _launch(json.loads(line))
            except Exception as error:  # any error of a compiler is the result
                problem = _problem(error)
            reply = {
                "seconds": time.perf_counter() - started,
                "cached": bool(hits) and all(hits),
                "problem": problem,
            }
            print(json.dumps(reply), file=replies, flush=True)


def _problem(error: Exception) -> str:
    """Formats an error on one line, causes first: they say why, the later ones where."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(error) if root is error else f"{root} ({error})"
    return " ".join(text.split())[:_MAX_PROBLEM_CHARACTERS]


def _launch(request: Sequence[Any]) -> None:
    module, name, grid, args, kwargs = request
    kernel = getattr(importlib.import_module(module), name)
    kernel[tuple(grid)](*_decoded(args), **_decoded(kwargs))


def _encoded(value: Any) -> Any:
    """Converts a kernel's argument to JSON: of a tensor, the properties that Triton looks at."""
    if isinstance(value, Tensor):
        layout = [list(value.shape), list(value.stride()), int(value.storage_offset())]
        return {"tensor": [*layout, str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, Mapping):
        return {"mapping": {key: _encoded(item) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be handed to a worker")


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decoded(item) for item in content)
    if kind == "mapping":
        return {key: _decoded(item) for key, item in content.items()}
    shape, stride, offset, dtype = content
    # Triton decides by the address whether loads may be wide; a meta tensor's is its offset
    return torch.empty(0, dtype=getattr(torch, dtype), device="meta").as_strided(
        shape, stride, offset
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
