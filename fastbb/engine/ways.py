"""Ways to run a computation: op by op, compiled, by OpenVINO, replayed as a CUDA graph."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbb_kernels import Impl, use_impl
from fastbb_kernels._dispatch import gpu_unsupported, launches_on
from fastbb_kernels.heap import KEPT_BYTES, release_freed_memory

from ..weights.derived import forget_derived
from ..weights.watch import ModuleStamp
from .compiled import compile_maps, in_chunks
from .computation import Computation, device_of, dtype_of
from .cpu import even_part, has_arithmetic
from .graphs import GraphPool
from .memory import tensor_memory
from .openvino import OPENVINO, model_files, openvino_maps
from .trial import Run
from .truth import Truth

GRAPH = " + CUDA graph"


class Way(NamedTuple):
    """One way to run one shape of input.

    Attributes:
        name: name by which it is built.
        run: computes maps from pixels.
        is_baked: whether it contains weights, layers and hooks of the time it was made.
        why: a note for reports, "" if there is none.
        detail: how it runs, "" if there is nothing to say.
    """

    name: str
    run: Run
    is_baked: bool = False
    why: str = ""
    detail: str = ""

    @property
    def runs(self) -> str:
        """Name of the way that runs, for reports."""
        return f"{self.name}, {self.detail}" if self.detail else self.name

    @property
    def mode(self) -> str:
        """The mode that computes the same values: for a graph, the recorded mode."""
        return self.name.removesuffix(GRAPH)


@dataclass
class _Artefact:
    """The compiled forward of one mode, for one size of images.

    Attributes:
        run: for `at_once` images of `size`.
        at_once: images per call; None: any.
        size: height and width of the images.
        found: whether it was made by an earlier process.
    """

    run: Run
    at_once: int | None
    size: tuple[int, int]
    found: bool = False


class Ways:
    """Builds runs of a computation, and keeps what they share: artefacts, graphs, a copy in fp32.

    Args:
        computation: to run.
        compiling: around the building of a way that takes seconds, for pixels of a shape; see
            `CompileCost.compiling`.
    """

    def __init__(
        self,
        computation: Computation,
        compiling: Callable[[str, Tensor], AbstractContextManager[Callable[[], None]]] = (
            lambda name, pixels: nullcontext(lambda: None)
        ),
    ) -> None:
        self._computation, self._compiling = computation, compiling
        self._artefacts: dict[str, _Artefact] = {}
        self._files = model_files()
        self._failed: dict[str, Exception] = {}
        self._bytes_per_pixel: float | None = None  # of the largest tensor of an image
        self._graphs: dict[str, GraphPool] = {}
        self._wide: tuple[Computation, ModuleStamp] | None = None
        self._lock = threading.RLock()

    def build(
        self, name: str, pixel_values: Tensor, truth: Callable[[], Truth] | None = None
    ) -> Way:
        """The way "eager", "triton", "compile", "triton+compile" or "openvino".

        `GRAPH` may stand behind the first four.

        Args:
            name: of the way.
            pixel_values: [B, C, H, W]; the way is for this shape.
            truth: of these pixels, if it is known.

        Raises:
            Exception: any error of a compiler or a capture.
        """
        base = name.removesuffix(GRAPH)
        if name != base:
            return self._graph(name, self.build(base, pixel_values, truth))
        if name == "triton":
            why = gpu_unsupported(pixel_values.device) if pixel_values.is_cuda else None
            return Way(name, self.triton, why=why or "")
        if not compiles(name):
            return self._eager(pixel_values)
        return self._compile(name, pixel_values, truth or (lambda: self._truth(pixel_values)))

    def eager(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Builds eager PyTorch, in fp32 if the CPU lacks arithmetic in the dtype."""
        with torch.no_grad(), use_impl("eager"):
            inside = self._arithmetic_computation()
            if inside is self._computation:
                return inside.feature_maps(pixel_values)
            dtype = dtype_of(self._computation.module)
            maps = inside.feature_maps(pixel_values.to(dtype_of(inside.module)))
            return tuple(x.to(dtype) for x in maps)

    def triton(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Builds a run with our kernels that passed their check, and eager ops."""
        with torch.no_grad(), use_impl("auto"):
            return self._computation.feature_maps(pixel_values)

    def has_artefact(self, name: str | None = None) -> bool:
        """Whether a mode was compiled; any mode for None."""
        return bool(self._artefacts) if name is None else name in self._artefacts

    def free_derived(self) -> None:
        """Frees what eager derived from the weights, and gives its memory back."""
        for module in (self._computation.module, *self.copies):
            forget_derived(module)
        release_freed_memory()

    def drop_losers(self, winner: str) -> None:
        """Frees what was compiled for other ways than the winner of a measurement."""
        with self._lock:
            kept = winner.removesuffix(GRAPH)
            losers = self._artefacts.keys() - {kept}
            self._artefacts = {k: v for k, v in self._artefacts.items() if k == kept}
        if losers:
            release_freed_memory()

    @property
    def notes(self) -> list[str]:
        """Why converted models were not kept, or not used."""
        return self._files.notes

    @property
    def copies(self) -> list[nn.Module]:
        """Copies of the module in a dtype that the CPU multiplies in."""
        return [] if self._wide is None else [self._wide[0].module]

    def _eager(self, pixel_values: Tensor) -> Way:
        """Builds eager PyTorch; a CPU runs as many images at once as memory stays cheap for."""
        if on_gpu(pixel_values):
            return Way("eager", self.eager)
        run, why, details = self.eager, [], []
        dtype = dtype_of(self._computation.module)
        if not has_arithmetic(dtype):
            details.append("in fp32")
            why.append(f"this CPU has no {str(dtype).removeprefix('torch.')} arithmetic")
        at_once = self._at_once(pixel_values)
        if at_once < len(pixel_values):
            run = in_chunks(self.eager, at_once)
            details.append(f"{at_once} images at once")
            why.append(f"larger tensors than {KEPT_BYTES >> 20} MiB are slow to allocate")
        return Way("eager", run, why="; ".join(why), detail=", ".join(details))

    def _at_once(self, pixel_values: Tensor) -> int:
        """Images at once for which a CPU's memory stays cheap, measured for the first size."""
        batch, _, height, width = pixel_values.shape
        if batch < 2:
            return batch
        if self._bytes_per_pixel is None:
            n_bytes = tensor_memory(self.eager, pixel_values[:1]).largest
            self._bytes_per_pixel = n_bytes / (height * width)
        return even_part(batch, self._bytes_per_pixel * height * width)

    def _truth(self, pixel_values: Tensor) -> Truth:
        return Truth.of(self._computation, pixel_values)

    def _compile(self, name: str, pixel_values: Tensor, truth: Callable[[], Truth]) -> Way:
        """The artefact of a mode for images of its size; other sizes run op by op.

        One artefact for every size was slower than that for most sizes (0.85 to 1.3 times eager,
        Swin-T and ResNet-50 on an AVX-512 CPU), and a second one for each takes minutes.
        """
        with self._lock:
            artefact = self._artefacts.get(name)
            if artefact is None:
                if name in self._failed:  # another try would take as long and fail again
                    raise self._failed[name]
                try:
                    expected = self._expected(truth) if name == OPENVINO else None
                    with self._compiling(name, pixel_values) as record:
                        artefact = self._compile_first(name, pixel_values, expected)
                        if not artefact.found:
                            record()
                    self._artefacts[name] = artefact
                except Exception as error:
                    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
                        self._failed[name] = error.with_traceback(None)
                    raise
            if artefact.size == tuple(pixel_values.shape[2:]):
                if artefact.at_once is None:
                    return Way(name, artefact.run, True)
                run = in_chunks(artefact.run, artefact.at_once, self.eager)
                return Way(name, run, True, detail=f"{artefact.at_once} images at once")
            way = self.build("triton" if name.startswith("triton") else "eager", pixel_values)
            own = "x".join(map(str, artefact.size))
            verb = "converted" if name == OPENVINO else "compiled"
            why = f"{name} was {verb} for {own} images, other sizes run op by op"
            return way._replace(why="; ".join(filter(None, (why, way.why))))

    def _expected(self, truth: Callable[[], Truth]) -> Truth:
        """The truth, of which only the maps are kept, so that its memory is free to convert in."""
        expected = truth()
        self.free_derived()
        return expected

    def _compile_first(self, name: str, pixel_values: Tensor, expected: Truth | None) -> _Artefact:
        if expected is not None:
            run, at_once, found = openvino_maps(
                self._computation, pixel_values, self._files, expected.problem
            )
            return _Artefact(run, at_once, (pixel_values.shape[2], pixel_values.shape[3]), found)
        computation = self._arithmetic_computation()
        pixels = pixel_values.to(dtype_of(computation.module))
        at_once = len(pixels)
        if not on_gpu(pixels):
            at_once = self._at_once(pixel_values)
        impl: Impl = "auto" if name.startswith("triton") else "eager"
        run = compile_maps(computation, pixels[:at_once], impl)
        return _Artefact(self._in_own_dtype(run), at_once, (pixels.shape[2], pixels.shape[3]))

    def _graph(self, name: str, way: Way) -> Way:
        pool = self._graphs.setdefault(way.runs, GraphPool(way.run))
        return Way(name, pool, True, way.why, way.detail)

    def _arithmetic_computation(self) -> Computation:
        """Returns the computation, or a copy in fp32 if the CPU has no arithmetic in its dtype."""
        own = self._computation
        device = device_of(own.module)
        if device.type != "cpu" or launches_on(device) or has_arithmetic(dtype_of(own.module)):
            return own
        with self._lock:
            if self._wide is None or not self._wide[1].is_current():
                with torch.inference_mode(False):
                    wide = own.copied()
                    wide.module.float()
                self._wide = wide, ModuleStamp(own.module)
            return self._wide[0]

    def _in_own_dtype(self, run: Run) -> Run:
        """Wraps a run, so that its maps have the dtype of the weights."""
        dtype = dtype_of(self._computation.module)
        inside = dtype_of(self._arithmetic_computation().module)
        if dtype == inside:
            return run
        return lambda pixel_values: tuple(x.to(dtype) for x in run(pixel_values.to(inside)))


def compiles(name: str) -> bool:
    """Whether a way takes seconds to build, by a compiler or a converter."""
    return "compile" in name or name == OPENVINO


def bakes(name: str) -> bool:
    """Whether a way contains the weights of the time it was made."""
    return name not in ("eager", "triton")


def on_gpu(pixel_values: Tensor) -> bool:
    """Whether pixels are on a GPU or a pretended GPU."""
    return launches_on(pixel_values.device)
