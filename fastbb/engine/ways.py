"""The ways in which one backbone can run: op by op, compiled, replayed as a CUDA graph."""

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastbb_kernels import Impl, use_impl
from fastbb_kernels._dispatch import gpu_unsupported, launches_directly

from ..backbone.base import Backbone
from ..weights.watch import ModuleStamp
from .compiled import compile_maps, in_chunks
from .cpu import KEPT_BYTES, even_part, has_arithmetic, largest_tensor
from .graphs import GraphPool
from .measuring import describe
from .trial import Run
from .truth import without_engine

GRAPH = " + CUDA graph"


class Way(NamedTuple):
    """One way to run one shape of input.

    Attributes:
        name: that builds it.
        run: from pixels to maps.
        is_baked: whether weights, layers and hooks are inside, as they were.
        why: what has to be said about it, "" if nothing.
        detail: of how it runs, "" if there is none.
    """

    name: str
    run: Run
    is_baked: bool = False
    why: str = ""
    detail: str = ""

    @property
    def runs(self) -> str:
        """What it is, for people."""
        return f"{self.name}, {self.detail}" if self.detail else self.name

    @property
    def mode(self) -> str:
        """The mode that computes the same: a graph replays what was recorded."""
        return self.name.removesuffix(GRAPH)


@dataclass
class _Compiled:
    """The artefacts of one mode.

    Attributes:
        run: for `at_once` images of `size`.
        at_once: images per call.
        size: height and width of the images.
    """

    run: Run
    at_once: int
    size: tuple[int, int]


class Ways:
    """Builds runs of a backbone, and keeps what they share: artefacts, graphs, a copy in fp32."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._compiled: dict[str, _Compiled] = {}
        self._failed: dict[str, str] = {}
        self._bytes_per_pixel: float | None = None  # of the largest tensor of an image
        self._graphs: dict[str, GraphPool] = {}
        self._wide: tuple[Backbone, ModuleStamp] | None = None
        self._lock = threading.RLock()

    def build(self, name: str, pixel_values: Tensor) -> Way:
        """The way "eager", "triton", "compile" or "triton+compile", maybe with `GRAPH` behind it.

        Args:
            name: of the way.
            pixel_values: [B, C, H, W]; what is returned is for this shape.

        Raises:
            Exception: whatever a compiler or a capture raises.
        """
        base = name.removesuffix(GRAPH)
        if name != base:
            return self._graph(name, self.build(base, pixel_values))
        if name == "triton":
            why = gpu_unsupported(pixel_values.device) if pixel_values.is_cuda else None
            return Way(name, self.triton, why=why or "")
        return self._compile(name, pixel_values) if "compile" in name else self._eager(pixel_values)

    def eager(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """PyTorch's operations one by one, in fp32 where the CPU lacks the dtype."""
        backbone, dtype = self._arithmetic_backbone(), self._backbone.dtype
        with torch.no_grad(), use_impl("eager"):
            if backbone.dtype == dtype:
                return backbone.feature_maps(pixel_values)
            maps = backbone.feature_maps(pixel_values.to(backbone.dtype))
            return tuple(x.to(dtype) for x in maps)

    def triton(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Our kernels, where they passed their check, and eager elsewhere."""
        with torch.no_grad(), use_impl("auto"):
            return self._backbone.feature_maps(pixel_values)

    def is_compiled(self, name: str) -> bool:
        """Whether there are artefacts of a mode."""
        return name in self._compiled

    def has_artefact(self, name: str, pixel_values: Tensor) -> bool:
        """Whether this shape needs no other artefact than those that there are."""
        compiled = self._compiled.get(name)
        if compiled is None:
            return False
        return tuple(pixel_values.shape[2:]) == compiled.size

    def _eager(self, pixel_values: Tensor) -> Way:
        """Eager; on a CPU as many images at once as memory stays cheap for."""
        if on_gpu(pixel_values):
            return Way("eager", self.eager)
        run, why, details = self.eager, [], []
        if not has_arithmetic(self._backbone.dtype):
            details.append("in fp32")
            dtype = str(self._backbone.dtype).removeprefix("torch.")
            why.append(f"this CPU has no {dtype} arithmetic")
        at_once = self._at_once(pixel_values)
        if at_once < len(pixel_values):
            run = in_chunks(self.eager, at_once)
            details.append(f"{at_once} images at once")
            why.append(f"larger tensors than {KEPT_BYTES >> 20} MiB are slow to allocate")
        return Way("eager", run, why="; ".join(why), detail=", ".join(details))

    def _at_once(self, pixel_values: Tensor) -> int:
        """Images at once for which a CPU's memory stays cheap; measured for the first size."""
        batch, _, height, width = pixel_values.shape
        if batch < 2:
            return batch
        if self._bytes_per_pixel is None:
            n_bytes = largest_tensor(self.eager, pixel_values[:1])
            self._bytes_per_pixel = n_bytes / (height * width)
        return even_part(batch, self._bytes_per_pixel * height * width)

    def _compile(self, name: str, pixel_values: Tensor) -> Way:
        """What the artefacts of a mode do for this shape; the first shape seen is compiled for."""
        with self._lock:
            compiled = self._compiled.get(name)
            if compiled is None:
                if name in self._failed:  # it would take as long, and fail again
                    raise RuntimeError(self._failed[name])
                try:
                    compiled = self._compiled[name] = self._compile_first(name, pixel_values)
                except Exception as error:
                    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
                        self._failed[name] = describe(error)
                    raise
            size = pixel_values.shape[2], pixel_values.shape[3]
            if size == compiled.size:
                run = in_chunks(compiled.run, compiled.at_once, self.eager)
                return Way(name, run, True, detail=f"{compiled.at_once} images at once")
            own = "x".join(map(str, compiled.size))
            way = self._eager(pixel_values)
            return way._replace(why=f"{name} is for {own} images; other sizes run eager")

    def _compile_first(self, name: str, pixel_values: Tensor) -> _Compiled:
        backbone = self._arithmetic_backbone()
        pixels = pixel_values.to(backbone.dtype)
        at_once = len(pixels)
        if not on_gpu(pixels):
            at_once = self._at_once(pixel_values)
        run = compile_maps(backbone, pixels[:at_once], _impl_of(name))
        return _Compiled(self._in_own_dtype(run), at_once, (pixels.shape[2], pixels.shape[3]))

    def _graph(self, name: str, way: Way) -> Way:
        pool = self._graphs.setdefault(way.runs, GraphPool(way.run))
        return Way(name, pool, True, way.why, way.detail)

    def _arithmetic_backbone(self) -> Backbone:
        """The backbone, or where the CPU does not multiply in its dtype a copy in fp32."""
        backbone = self._backbone
        if backbone.device.type != "cpu" or launches_directly() or has_arithmetic(backbone.dtype):
            return backbone
        with self._lock:
            if self._wide is None or not self._wide[1].is_current():
                with torch.inference_mode(False):
                    wide = without_engine(backbone, copied=True).float()
                self._wide = wide, ModuleStamp(backbone)
            return self._wide[0]

    def _in_own_dtype(self, run: Run) -> Run:
        """A run of the arithmetic backbone with the dtype of the backbone outside."""
        dtype, inside = self._backbone.dtype, self._arithmetic_backbone().dtype
        if dtype == inside:
            return run
        return lambda pixel_values: tuple(x.to(dtype) for x in run(pixel_values.to(inside)))


def on_gpu(pixel_values: Tensor) -> bool:
    """Whether pixels are on a GPU, or on one that is pretended."""
    return pixel_values.is_cuda or launches_directly()


def _impl_of(name: str) -> Impl:
    return "auto" if name.startswith("triton") else "eager"
