"""A backbone as the subject of a bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbb_kernels.fp32_precision import fp32_products

from ..backbone.registry import Upstream
from ..engine.settings import torch_dtype
from ..engine.ways import compiles
from ..inspect.loading import load_backbone
from ..inspect.upstream import run_upstream, upstream_of
from ..inspect.verify import random_images
from .counts import count
from .subject import N_IMAGES, Truth, WaySpec, image_of_each, write_tensors
from .ways import (
    LIBRARIES,
    TITLES,
    engine_problem,
    library_of,
    other_upstream,
)

_MODULE = "fastbb.bench.ways"
# transformers and fastbb import it at first use; memory counts from after that
_IMPORTS = ["torch._dynamo"]
_ENGINE = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime",)}


class BackboneSubject:
    """A backbone, at one size of images. See `subject.Subject`.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        folder: for its files.
        device: that runs it.
        size: (height, width) of the images; default: the model's own.
        out_indices: of the maps; default: the model's own.
        random_weights: loads no weights and draws them.
        modes: of `prepare`, which are measured.
        against: libraries and engines to compare with.

    Raises:
        OSError: there is no such model, or it cannot be had.
        ValueError: an argument does not fit.
    """

    kind = "backbone"

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        device: torch.device,
        size: tuple[int, int] | None = None,
        out_indices: Sequence[int] | None = None,
        random_weights: bool = False,
        modes: Sequence[str] = ("auto",),
        against: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._device, self._modes, self._against = device, tuple(modes), tuple(against)
        cpu = torch.device("cpu")
        self._backbone = load_backbone(name, out_indices, torch.float32, cpu, random_weights)
        self.size = size or self._backbone.default_size
        self.stages = tuple(self._backbone.out_features)
        self._directory = folder / "model"
        try:
            self._backbone.save_pretrained(self._directory)
        except Exception as error:  # safetensors has errors of its own for a full disk
            raise OSError(f"cannot write {folder}: {error}; is TMPDIR full?") from error
        self._upstream, why_own = upstream_of(self._backbone)
        self._library = library_of(self._upstream)
        modules = {library: [library] for library in LIBRARIES}
        modules[self._library] = [type(self._upstream.module).__module__]
        self._modules = modules
        self.upstream = f"{self._library} eager"
        self.notes: list[str] = (
            [] if why_own is None else [f"upstream is our own plain PyTorch: {why_own}"]
        )
        self._others: dict[str, Upstream | str] = {}
        for library in (one for one in LIBRARIES if one in against and one != self._library):
            try:
                self._others[library] = other_upstream(self._backbone, library, self.size)
            except ValueError as error:
                self._others[library] = str(error)
        # what is timed: timm builds no stages after the last selected one
        measured, self._measured = self._upstream, "upstream"
        if self._library == "timm":
            with suppress(ValueError):
                measured = other_upstream(self._backbone, "timm", self.size)
                self._measured = "timm"
        self.params: int | None
        self.params, self.macs, self.activations = count(
            measured.maps,
            measured.module,
            self.size,
            self._backbone.config.num_channels,
        )
        self._try_input()

    def _try_input(self) -> None:
        """Runs an image, so that a size that the model does not take is known at once."""
        with torch.no_grad():
            self._backbone(random_images(self._backbone, self.size, 1))

    def ways(self, precision: str, batch: int, folder: Path) -> list[WaySpec]:
        pixels = folder / "pixels.safetensors"
        write_tensors(pixels, {"pixels": self._images(batch)[image_of_each(batch)]})
        common = {
            "module": _MODULE,
            "device": str(self._device),
            "model": str(self._directory),
            "precision": precision,
            "pixels": str(pixels),
            "stages": list(self.stages),
        }
        compiled = "compile" in self._against
        found: list[WaySpec] = []

        def add(library: str, engine: str, name: str, **fields: Any) -> None:
            used = self._measured if library == self._library else library
            spec = {**common, "library": used, "engine": engine}
            spec["imports"] = [*_IMPORTS, *self._modules.get(library, ()), *_ENGINE.get(engine, ())]
            found.append(WaySpec(name, spec, compiles=engine != "eager", **fields))

        add(self._library, "eager", self.upstream)
        if compiled:
            add(self._library, "compile", f"{self._library} compiled")
        for library, other in self._others.items():
            reason = other if isinstance(other, str) else self._incomparable(other)
            add(library, "eager", f"{library} eager", reason=reason)
            if compiled and reason is None:
                add(library, "compile", f"{library} compiled")
        for engine, title in TITLES.items():
            if engine in self._against:
                reason = engine_problem(engine, precision, self._device)
                add(self._library, engine, title, reason=reason)
        for mode in self._modes:
            spec = {**common, "library": "fastbb", "engine": mode, "imports": _IMPORTS}
            found.append(WaySpec(f"fastbb {mode}", spec, ours=True, compiles=compiles(mode)))
        return found

    @torch.no_grad()
    def truth(self, precision: str, batch: int) -> Truth:
        dtype = torch_dtype(precision)
        pixels = self._images(batch).to(self._device, dtype)
        with fp32_products("tf32" if precision == "tf32" else "ieee"):
            eager = run_upstream(self._upstream, pixels)
        exact = run_upstream(self._upstream, pixels.double())
        found = Truth(self._named(eager), self._named(exact), self._backbone.exactness)
        if self._device.type == "cuda":
            del eager, exact, pixels
            torch.cuda.empty_cache()  # the ways have the same GPU
        return found

    def skipped(self, way: str) -> Mapping[str, str]:
        other = self._others.get(way.partition(" ")[0])
        return other.other_maps if isinstance(other, Upstream) else {}

    def _incomparable(self, other: Upstream) -> str | None:
        """Why no map of another library can be compared, or None."""
        if all(stage in other.other_maps for stage in self.stages):
            return f"no map can be compared: {other.other_maps[self.stages[0]]}"
        return None

    def _named(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {stage: one.cpu() for stage, one in zip(self.stages, maps)}

    def _images(self, batch: int) -> Tensor:
        """The distinct images of a batch, in fp32 on the CPU; bf16 holds them exactly."""
        n_images = min(batch, N_IMAGES)
        return random_images(self._backbone, self.size, n_images).bfloat16().float()
