"""`fastbb bench --accelerate`: models of other libraries as they are and accelerated."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels.accuracy import FP32_REL_FOLDED, max_error, max_magnitude
from fastbb_kernels.fp32_precision import fp32_products

from ..engine.measuring import describe
from ..engine.settings import torch_dtype
from ..engine.ways import compiles
from ..hosts.accelerate import AccelerateReport, restore
from .host_models import (
    ACCELERATED,
    AS_IS,
    RecordedOutputs,
    accelerated,
    build_host,
    default_size,
    located,
    make_inputs,
    named_outputs,
    outermost,
)
from .subject import N_IMAGES, SkippedError, Truth, WaySpec
from .traffic import Traffic, count_host

_SAFE = "accelerate() itself compares every module that it replaces in float64"
_N_NAMES = 3  # in notes
# errors of a deep model in low precision, in units of the largest value; more is a jump
_MOST_ROUNDINGS = 32
_TF32_EPS = 2.0**-10


class HostSubject:
    """A model of another library, which `accelerate` takes; see `subject.Subject`.

    Args:
        name: see `host_models.WANTED`.
        size: (height, width) of the images; default: the model's own, or a usual one.
        random_weights: draws the weights, the same ones every time, and loads none.
        modes: of `accelerate`.
        device: that runs.

    Raises:
        ValueError: there is no such model, or it takes no images.
        OSError: its weights or its configuration cannot be had.
    """

    kind = "host"
    upstream = AS_IS
    stages: tuple[str, ...] = ()
    macs: int | None = None
    activations: int | None = None

    def __init__(
        self,
        name: str,
        size: tuple[int, int] | None = None,
        *,
        random_weights: bool = False,
        modes: Sequence[str] = ("auto",),
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self._modes = name, tuple(modes)
        self._module = build_host(name, random_weights)
        self.size = size or default_size(self._module)
        make_inputs(self._module, 1, self.size)  # raises where it takes no images
        self.params: int | None = sum(parameter.numel() for parameter in self._module.parameters())
        self.notes: list[str] = []  # of the last truth
        self._device = torch.device(device)
        self._spec: dict[str, Any] = {
            "module": __name__,
            "imports": _imports(self._module, name.partition(":")[0]),
            "device": str(device),
            "host": name,
            "random_weights": random_weights,
            "size": list(self.size),
            "inside": _replaced_modules(self._module),
        }

    def ways(self, precision: str, batch: int, folder: Path) -> list[WaySpec]:
        """The model as it is, and accelerated; both watch the modules that are replaced."""
        spec = {**self._spec, "precision": precision, "batch": batch}
        ours = [
            WaySpec(
                ACCELERATED if mode == "auto" else f"{ACCELERATED} {mode}",
                {**spec, "mode": mode},
                ours=True,
                compiles=compiles(mode),
            )
            for mode in self._modes
        ]
        return [WaySpec(AS_IS, {**spec, "mode": None}), *ours]

    def skipped(self, way: str) -> Mapping[str, str]:
        return {}

    def truth(self, precision: str, batch: int) -> Truth | None:
        """What the model returns as it is, or None; `notes` then say what is not compared, and why.

        Outputs that jump with a rounding, such as the boxes of the best scores, say nothing about
        another way to compute them, nor do those that depend on them. What the replaced modules
        return is compared in their place, which the rest of the model gets.
        """
        self.notes = []
        try:
            runs = self._runs(precision, batch)
        except Exception as error:  # whatever the model raises for this precision
            self.notes.append(f"nothing is compared: it raises {located(error)}; {_SAFE}")
            return None
        found = [runs.steady(part) for part in (_OUTPUTS, _INSIDE)]
        causes = runs.causes(_OUTPUTS)
        part = _OUTPUTS
        if not found[_OUTPUTS] or causes:  # other outputs may depend on the same choices
            part = _INSIDE if found[_INSIDE] else _OUTPUTS
            why = "; ".join(f"outputs that {cause}: {_listed(n)}" for cause, n in causes.items())
            why = why or "it returns no floating tensors"
            if not found[part]:
                self.notes.append(f"nothing is compared: {why}; {_SAFE}")
                return None
            instead = "what the replaced modules return is" if part == _INSIDE else "others are"
            self.notes.append(f"{why}: {instead} compared instead; {_SAFE}")
        names = found[part]
        return Truth(
            {name: runs.eager[part][name] for name in names},
            {name: runs.exact[part][name] for name in names},
            FP32_REL_FOLDED,
        )

    def _runs(self, precision: str, batch: int) -> _Runs:
        """Runs the model as it is, for `truth`."""
        dtype = torch_dtype(precision)
        inputs = make_inputs(self._module, batch, self.size)
        images = inputs.pixels.to(self._device, dtype)
        pixels = images[:N_IMAGES]  # others repeat these

        def run(dtype: torch.dtype, pixels: Tensor) -> _Tensors:
            module = copy.deepcopy(self._module).to(self._device, dtype)
            with RecordedOutputs(module, self._spec["inside"]) as inside:
                outputs = named_outputs(inputs.call(module, pixels.to(dtype)))
            return tuple({n: one.cpu() for n, one in part.items()} for part in (outputs, inside))

        signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(0))
        near = pixels * (1 + torch.finfo(dtype).eps * (2 * signs - 1).to(pixels))
        with torch.no_grad():
            with fp32_products("tf32" if precision == "tf32" else "ieee"):
                eager, rounded = run(dtype, pixels), run(dtype, near)
                whole = eager if len(pixels) == batch else run(dtype, images)
            exact = run(torch.float64, pixels)
        torch.cuda.empty_cache()  # for the processes of the ways; does nothing without a GPU
        return _Runs(precision, batch, eager, rounded, whole, exact)

    def traffic(self, batch: int) -> Traffic:
        """Launches of the replaced modules on a GPU by way."""
        title = f"replaced modules of {self.name}, {self.size[0]}x{self.size[1]}, batch {batch}"
        return Traffic(title, batch, self.size, count_host(self._module, batch, self.size))


_OUTPUTS, _INSIDE = 0, 1  # what the model returns, and its replaced modules, by name
_Tensors = tuple[dict[str, Tensor], ...]


@dataclass(frozen=True)
class _Runs:
    """Results of a model as it is, for the images of a batch that are checked.

    Attributes:
        precision: see `Cell`.
        batch: images of a batch.
        eager: in the dtype of the precision.
        rounded: the same, of images that differ by a rounding.
        whole: the same, of all images of the batch.
        exact: in float64.
    """

    precision: str
    batch: int
    eager: _Tensors
    rounded: _Tensors
    whole: _Tensors
    exact: _Tensors

    def steady(self, part: int) -> list[str]:
        """Names of the tensors that another way has to reproduce."""
        return [name for name in self.exact[part] if self._cause(part, name) is None]

    def causes(self, part: int) -> dict[str, list[str]]:
        """Names of the others by the reason, in words after "that"."""
        found: dict[str, list[str]] = {}
        for name in self.exact[part]:
            if (cause := self._cause(part, name)) is not None:
                found.setdefault(cause, []).append(name)
        return found

    def _cause(self, part: int, name: str) -> str | None:
        exact = self.exact[part][name]
        if exact.dtype != torch.float64:
            return "are never in float64"
        if not all(self._is_near(one[part].get(name), exact) for one in (self.eager, self.rounded)):
            return "jump with a rounding"
        n_images, whole = min(self.batch, N_IMAGES), self.whole[part].get(name)
        if n_images == self.batch:
            return None
        by_image = exact.dim() and len(exact) == n_images
        if not by_image or whole is None or not whole.dim() or len(whole) != self.batch:
            return "have no row for each image"
        is_near = self._is_near(whole[:n_images], exact)
        return None if is_near else "mix images of a batch"

    def _is_near(self, found: Tensor | None, exact: Tensor) -> bool:
        """Whether upstream's result is as near to the exact one as roundings alone leave it."""
        if found is None or found.shape != exact.shape:
            return False
        tf32 = self.precision == "tf32"
        eps = _TF32_EPS if tf32 else torch.finfo(torch_dtype(self.precision)).eps
        allowed = max(FP32_REL_FOLDED, _MOST_ROUNDINGS * eps)
        return max_error(found, exact) <= allowed * max_magnitude(exact)


def _imports(module: nn.Module, own: str) -> list[str]:
    """Modules of libraries that a model needs, so that their memory is not counted as its own.

    Args:
        module: the model.
        own: module of a function that builds it, which only the working directory may have.
    """
    here = ("", os.getcwd())
    elsewhere = [path for path in sys.path if path not in here]

    def is_library(name: str) -> bool:
        root = name.partition(".")[0]
        if name not in sys.modules or root == own.partition(".")[0]:
            return False
        return PathFinder.find_spec(root, elsewhere) is not None

    # libraries import dynamo at first use
    names = {type(one).__module__ for one in module.modules()}
    return ["torch._dynamo", *sorted(filter(is_library, names))]


def _replaced_modules(module: nn.Module) -> list[str]:
    """Names of the outermost modules that `accelerate` replaces, "" for the model itself."""
    report = accelerated(module)
    restore(module)
    return outermost(report.accelerated)


def make_runner(spec: Mapping[str, Any]) -> HostRunner:
    """Makes the runner of a host.

    Args:
        spec: "host", "random_weights", "size", "batch", "precision", "device", "inside" (names of
            the modules that are timed) and "mode" of `accelerate`, None for the model as it is.
    """
    return HostRunner(spec)


class HostRunner:
    """Runs a host as it is or accelerated; see `worker.Runner`."""

    note = ""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec

    def load(self) -> None:
        spec = self._spec
        dtype, device = torch_dtype(spec["precision"]), torch.device(spec["device"])
        self._module = build_host(spec["host"], spec["random_weights"]).to(device, dtype)
        self._inputs = make_inputs(self._module, spec["batch"], tuple(spec["size"]))
        self._pixels = self._inputs.pixels.to(device, dtype)
        # a GPU works on while its host has left the module
        names = spec["inside"] if device.type == "cpu" else []
        self._inside = Inside(self._module, names) if names else None

    def start(self) -> Any:
        report = None
        if self._spec["mode"] is not None:
            report = accelerated(self._module, self._spec["mode"])
        try:
            with RecordedOutputs(self._module, self._spec["inside"]) as self._inner:
                result = self.run()
        except Exception as error:
            self._check_upstream(error)
            raise
        if report is not None:
            self.note = summary(report)
        return result

    def run(self) -> Any:
        return self._inputs.call(self._module, self._pixels)

    def outputs(self, result: Any) -> dict[str, Tensor]:
        inner, self._inner = self._inner, None
        if inner is None:  # after the first call: once more, with what the modules return
            with RecordedOutputs(self._module, self._spec["inside"]) as inner:
                result = self.run()
        return {**inner, **named_outputs(result)}

    def inside_s(self) -> float | None:
        return None if self._inside is None else self._inside.taken()

    def _check_upstream(self, error: Exception) -> None:
        """Raises SkippedError if the model as it is does not run this either."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return
        restore(self._module)
        try:
            self.run()
        except (torch.OutOfMemoryError, MemoryError):
            return
        except Exception as upstreams:
            precision = self._spec["precision"]
            raise SkippedError(
                f"the model itself does not run in {precision}: {describe(upstreams)}"
            ) from error


class Inside:
    """Seconds spent inside some modules of a model, none of which is inside another."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._seconds = 0.0
        self._starts: list[float] = []
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def taken(self) -> float:
        """Seconds since the last question."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _enter(self, *_: Any) -> None:
        self._starts.append(time.perf_counter())

    def _leave(self, *_: Any) -> None:
        start = self._starts.pop()
        if not self._starts:  # a module that calls itself counts once
            self._seconds += time.perf_counter() - start


def summary(report: AccelerateReport) -> str:
    """Modules that fastbb runs, and why others are left to upstream, in a sentence."""
    rows = report.rows()
    if not rows:
        return "there is no backbone that fastbb makes faster"
    ours = outermost([name for name, _, runs, _ in rows if runs.startswith("fastbb")])
    ours = [name or "the whole model" for name in ours]
    left = Counter(why for _, _, runs, why in rows if runs == "upstream")
    said = [f"fastbb runs {_listed(ours)}" if ours else "nothing runs by fastbb"]
    for why, n in left.most_common(1):
        said.append(f"{n} {'module' if n == 1 else 'modules'} by upstream: {why}")
    return "; ".join(said)


def _listed(names: Sequence[str]) -> str:
    shown, more = ", ".join(names[:_N_NAMES]), len(names) - _N_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
