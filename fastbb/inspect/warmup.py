"""Compiles what a model will launch before it is needed: `fastbb warmup`."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from triton import knobs
from triton.runtime.cache import FileCacheManager

from fastbb_kernels import use_impl
from fastbb_kernels._dispatch import Architecture, KernelWarning
from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.launching import configured_as_on
from fastbb_kernels.machine import Machine
from fastbb_kernels.precompiling import Compiled, Job, compile_jobs, n_cores, recording_jobs
from fastbb_kernels.supported_gpus import gpu_problem, named

from ..auto import AutoBackbone
from ..backbone.base import Backbone
from ..engine.explanation import table
from ..engine.interruption import check_interrupted
from ..engine.measuring import describe
from ..engine.prepare import example_pixels
from ..engine.settings import DTYPES
from ..extraction.layout import OutputError
from .facts import directory_state
from .loading import config_without_weights

BATCHES = (1, 8, 64)

# told how many jobs there are; what it returns is told of each that has ended
Progress = Callable[[int], Callable[[Compiled], None]]


@dataclass(frozen=True)
class Warmth:
    """Outcome of a warm-up: binaries that were compiled, batches that ran.

    Attributes:
        arch: what was compiled for.
        compiled: what came of each binary.
        seconds: that compiling took.
        n_workers: processes that compiled.
        forwards: batches that ran on the device, each with seconds and what is wrong, or None;
            empty where nothing ran.
    """

    arch: Architecture
    compiled: tuple[Compiled, ...]
    seconds: float
    n_workers: int
    forwards: tuple[tuple[int, float, str | None], ...]

    @property
    def problems(self) -> list[str]:
        """Sentences on what did not compile or run."""
        failed = [f"{c.kernel}: {c.problem}" for c in self.compiled if c.problem is not None]
        wrong = [f"batch {batch}: {problem}" for batch, _, problem in self.forwards if problem]
        return list(dict.fromkeys(failed + wrong))

    def __repr__(self) -> str:
        ran = [
            f"batch {batch}: one forward pass, checks included, in {seconds:.2f} s"
            for batch, seconds, problem in self.forwards
            if problem is None
        ]
        label = f"sm_{self.arch}" if isinstance(self.arch, int) else self.arch
        if self.arch not in ARCHITECTURES:
            nothing = f"nothing was compiled for {label} in advance: its first runs do"
            return "\n".join([nothing, *ran, *self.problems])
        if not self.compiled:
            return f"nothing to compile for {label}: the model launches none of fastbb's kernels"
        names = sorted({c.kernel for c in self.compiled})
        counts = [str(sum(c.kernel == name for c in self.compiled)) for name in names]
        seconds = [f"{self._seconds(name):.1f}" for name in names]
        rows = table([("kernel", "binaries", "seconds"), *zip(names, counts, seconds)])
        good = [c for c in self.compiled if c.problem is None]
        n_cached = sum(c.cached for c in good)
        n_failed = len(self.compiled) - len(good)
        failed = f", {n_failed} failed" if n_failed else ""
        processes = f"{self.n_workers} process{'es' if self.n_workers > 1 else ''}"
        total = (
            f"{label}: {len(self.compiled)} binaries, {len(good) - n_cached} compiled and "
            f"{n_cached} from the cache{failed}, in {self.seconds:.1f} s by {processes}"
        )
        return "\n".join([rows, total, *ran, *self.problems])

    def _seconds(self, name: str) -> float:
        return sum(c.seconds for c in self.compiled if c.kernel == name)


def warm_up(
    name: str,
    batches: Sequence[int] = BATCHES,
    size: tuple[int, int] | None = None,
    precision: str = "bf16",
    arch: Architecture | None = None,
    n_workers: int | None = None,
    out_indices: Sequence[int] | None = None,
    progress: Progress = lambda n_jobs: lambda compiled: None,
) -> Warmth:
    """Compiles what a model launches into Triton's cache, in parallel; then runs it on the GPU.

    Weights are random, and none are downloaded. On the GPU each batch runs once, so that its
    kernels are checked there as at any first launch, and that is remembered.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        batches: images per forward pass.
        size: height and width of the images; default: the model's own.
        precision: "fp32", "bf16" or "fp16".
        arch: compiles for this one and runs nothing; default: the GPU's.
        n_workers: processes that compile; default: the cores that this one may use.
        out_indices: of the maps; default: the model's own.
        progress: see `Progress`.

    Raises:
        OSError: there is no such model.
        ValueError: an argument is invalid, or there is neither a GPU nor `arch`.
        OutputError: Triton's cache cannot be written.
    """
    device = None
    if arch is None:
        device, arch = gpu_here()
    config = config_without_weights(name, out_indices)
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(config, dtype=DTYPES[precision]).eval()
    size = size or backbone.default_size
    jobs: list[Job] = []
    if arch in ARCHITECTURES:  # its relatives have other binaries, and no pretended GPU
        if knobs.runtime.interpret:
            raise ValueError("TRITON_INTERPRET has kernels interpreted, not compiled: unset it")
        try:
            with nullcontext() if device is None else configured_as_on(device):
                jobs = launched_by(backbone, batches, size, arch)
        except (ValueError, RuntimeError) as error:  # more than 2^63 bytes, or than 2^31 programs
            asked_for = f"{max(batches)} images of {size[0]}x{size[1]} pixels"
            raise ValueError(f"no GPU runs {asked_for} at once: {describe(error)}") from error
    if jobs:
        _check_cache()
    n_workers = max(1, min(n_workers or n_cores(), len(jobs)))
    started = time.perf_counter()
    compiled = tuple(_reported(compile_jobs(jobs, arch, n_workers), progress(len(jobs))))
    seconds = time.perf_counter() - started
    forwards: tuple[tuple[int, float, str | None], ...] = ()
    if device is not None and (jobs or arch not in ARCHITECTURES):
        backbone = AutoBackbone.from_config(config, dtype=DTYPES[precision]).eval().to(device)
        forwards = tuple(forward(backbone, (batch, *size)) for batch in sorted(set(batches)))
    return Warmth(arch, compiled, seconds, n_workers, forwards)


def _check_cache() -> None:
    """Raises OutputError if Triton's cache cannot be written: every kernel would fail by it."""
    if knobs.cache.manager_class not in (None, FileCacheManager):
        return
    path = knobs.cache.dir
    if (problem := directory_state(path)["problem"]) is not None:
        raise OutputError(
            f"cannot write Triton's cache {path}: {problem}; make it writable, or set "
            "TRITON_CACHE_DIR to a directory that is"
        )


def gpu_here() -> tuple[torch.device, Architecture]:
    """The current GPU and its architecture.

    Raises:
        ValueError: there is none, or kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise ValueError("no GPU here to compile for: name one by --arch, such as --arch 90")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = named(Machine.of(device).capability)
    problem = gpu_problem(arch)
    if problem is not None:
        raise ValueError(f"there is nothing to compile for this GPU: {problem}")
    return device, arch


def launched_by(
    backbone: Backbone, batches: Iterable[int], size: tuple[int, int], arch: Architecture
) -> list[Job]:
    """The binaries that forward passes need on an architecture, each once.

    Args:
        backbone: on the meta device.
        batches: images per forward pass.
        size: height and width of the images.
        arch: what they run on.
    """
    channels, dtype = backbone.config.num_channels, backbone.dtype
    with torch.no_grad(), use_impl("auto"), recording_jobs(arch) as jobs:
        for batch in sorted(set(batches)):
            pixels = torch.empty(batch, channels, *size, dtype=dtype, device="meta")
            backbone.feature_maps(backbone._checked(pixels))
    return list(jobs.values())


def forward(backbone: Backbone, shape: tuple[int, int, int]) -> tuple[int, float, str | None]:
    """Runs a forward pass where the backbone is: its batch, its seconds, what is wrong or None."""
    started = time.perf_counter()
    problem = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        try:
            with torch.no_grad(), use_impl("auto"):
                maps = backbone.feature_maps(example_pixels(backbone, shape))
            if maps[0].is_cuda:
                torch.cuda.synchronize(maps[0].device)
        except Exception as error:  # of one batch; others may have the memory
            problem = describe(error)
    off = [str(warning.message) for warning in caught if warning.category is KernelWarning]
    return shape[0], time.perf_counter() - started, problem or "; ".join(off) or None


def _reported(
    results: Iterator[Compiled], report: Callable[[Compiled], None]
) -> Iterator[Compiled]:
    for compiled in results:
        check_interrupted()
        report(compiled)
        yield compiled
