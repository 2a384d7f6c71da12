"""A pretended GPU for the dry runs of `gpu.py`; it counts its calls.

Measuring code calls `torch.cuda`, the profiler and NVIDIA's programs as on a GPU. The replacements
here answer without a GPU. They have the real names and parameters, so that a misspelled call fails
as on a GPU. Times are those of the CPU and mean nothing.
"""

import inspect
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

CALLS: Counter[str] = Counter()
N_GPUS = 2
ARCHITECTURE = 90

_REAL_PROFILE = torch.profiler.profile
# name, start and end in us, whether it is an annotation of the user
_KERNELS = (
    ("pretended_gemm", 10, 40, False),
    ("pretended_norm", 30, 50, False),
    ("pretended_gemm", 60, 70, False),
    ("an annotation around them", 0, 100, True),
)


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        CALLS["Stream"] += 1

    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: "Event") -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None: ...


class Event:
    """An event that is recorded at once, on the clock of the CPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at_s: float | None = None
        self._is_timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        CALLS["Event.record"] += 1
        self._at_s = time.perf_counter()

    def query(self) -> bool:
        """Whether it is over: True for the first query only, so that callers get both answers."""
        CALLS["Event.query"] += 1
        return CALLS["Event.query"] == 1

    def synchronize(self) -> None:
        assert self._at_s is not None

    def elapsed_time(self, end_event: "Event") -> float:
        assert self._is_timed and end_event._is_timed
        assert self._at_s is not None and end_event._at_s is not None
        return 1e3 * (end_event._at_s - self._at_s)


class _Recorder(TorchDispatchMode):
    """Keeps every new tensor, so that a replay can restore it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made[id(result)] = result
        return result


class CUDAGraph:
    """A graph whose replay restores the memory that the capture left."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder = _Recorder()
        self._after: list[tuple[Tensor, Tensor]] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        CALLS["capture"] += 1
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        self._after = [(x, x.clone()) for x in self._recorder.made.values() if not x.is_meta]

    def replay(self) -> None:
        CALLS["CUDAGraph.replay"] += 1
        with torch.no_grad():
            for x, after in self._after:
                x.copy_(after)


@contextmanager
def _graph(
    cuda_graph: CUDAGraph,
    pool: Any = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    cuda_graph.capture_begin(pool, capture_error_mode)
    yield
    cuda_graph.capture_end()


class _Profile:
    """A profiler that always reports the same few kernels."""

    def __init__(self, **options: Any) -> None:
        CALLS["profile"] += 1
        inspect.signature(_REAL_PROFILE).bind(**options)
        assert ProfilerActivity.CUDA in options["activities"]

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def events(self) -> list[FunctionEvent]:
        return [
            FunctionEvent(
                index, name, 0, start, end, device_type=DeviceType.CUDA, is_user_annotation=noted
            )
            for index, (name, start, end, noted) in enumerate(_KERNELS)
        ]


def _sleep(cycles: int) -> None:
    CALLS["_sleep"] += 1


def _record_stream(x: Tensor, stream: Stream) -> None:
    assert isinstance(stream, Stream)


_CURRENT = Stream.__new__(Stream)
_PROPERTIES = SimpleNamespace(
    name="a pretended GPU",
    major=ARCHITECTURE // 10,
    minor=ARCHITECTURE % 10,
    total_memory=24 << 30,
    multi_processor_count=4,
    L2_cache_size=1 << 20,
)
_CUDA = {
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": _graph,
    "graph_pool_handle": lambda: (0, 0),
    "_sleep": _sleep,
    "stream": lambda stream: nullcontext(),
    "current_stream": lambda device=None: _CURRENT,
    "device": lambda device: nullcontext(),
    "device_count": lambda: N_GPUS,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "get_device_name": lambda device=None: _PROPERTIES.name,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1 << 20,
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Makes `torch.cuda` and the profiler answer like a GPU; tensors are on the CPU."""
    with ExitStack() as stack:
        for name, answer in _CUDA.items():
            # raises if torch has no such name
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", _Profile))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", _record_stream))
        yield


_NVIDIA_SMI = """
import sys
(query,) = [a for a in sys.argv[1:] if a.startswith("--query-gpu=")]
assert "--format=csv,noheader" in sys.argv
print(", ".join("24576 MiB" if n == "memory.total" else "1 of " + n
                for n in query.partition("=")[2].split(",")))
"""
# both accept only options of the real programs, run their command, and print the same output
_NCU = """
import argparse, subprocess, sys
from pathlib import Path
p = argparse.ArgumentParser(allow_abbrev=False)
p.add_argument("--set", choices=["basic", "detailed", "full"])
p.add_argument("--metrics")
p.add_argument("--export")
p.add_argument("--force-overwrite", action="store_true")
p.add_argument("--import", dest="read")
p.add_argument("--page", choices=["details", "raw", "source", "session"])
p.add_argument("--csv", action="store_true")
p.add_argument("--kernel-name")
p.add_argument("--launch-skip", type=int)
p.add_argument("--launch-count", type=int)
p.add_argument("command", nargs=argparse.REMAINDER)
o = p.parse_args()
names = {"Duration": ("us", "12.5"), "DRAM Throughput": ("%", "61.2"),
         "Registers Per Thread": ("register/thread", "128"), "Achieved Occupancy": ("%", "24.9")}
if o.metrics:
    names = {o.metrics: ("ns", "1,234")}
if o.read:
    assert Path(o.read).read_text() == "a report"
elif subprocess.run(o.command).returncode:
    sys.exit(1)
if o.export:
    Path(o.export).write_text("a report")
else:
    print("==PROF== Connected to process 1")
    print('"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"')
    for name, (unit, value) in names.items():
        print(f'"0","_pretended_fwd_kernel","a section","{name}","{unit}","{value}"')
"""
_SANITIZER = """
import argparse, subprocess, sys
p = argparse.ArgumentParser(allow_abbrev=False)
p.add_argument("--tool", choices=["memcheck", "racecheck"], required=True)
p.add_argument("--error-exitcode", type=int, required=True)
p.add_argument("--print-limit", type=int)
p.add_argument("command", nargs=argparse.REMAINDER)
o = p.parse_args()
print("========= COMPUTE-SANITIZER")
code = subprocess.run(o.command).returncode
summaries = {"memcheck": "ERROR SUMMARY: 0 errors",
             "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}
print("=========", summaries[o.tool])
sys.exit(code)
"""
_PROGRAMS = {"nvidia-smi": _NVIDIA_SMI, "ncu": _NCU, "compute-sanitizer": _SANITIZER}


@contextmanager
def pretended_programs() -> Iterator[None]:
    """Puts pretended programs of NVIDIA on PATH, for this process and its children."""
    with tempfile.TemporaryDirectory() as folder:
        for name, source in _PROGRAMS.items():
            program = Path(folder, name)
            # -S: no site-packages, whose import takes longer than the program
            program.write_text(f"#!{sys.executable} -S\n{source}")
            program.chmod(0o700)
        path = os.pathsep.join([folder, os.environ.get("PATH", "")])
        with mock.patch.dict(os.environ, PATH=path):
            yield
