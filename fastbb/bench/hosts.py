"""`fastbb bench --accelerate`: models of other libraries as they are and accelerated."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels.accuracy import FP32_REL_FOLDED, max_error, max_magnitude
from fastbb_kernels.fp32_precision import fp32_products
from fastbb_kernels.recorder import record_launches

from ..engine.measuring import describe
from ..hosts.accelerate import AccelerateReport, AccelerateWarning, accelerate, restore
from .host_models import (
    RecordedOutputs,
    build_host,
    default_size,
    make_inputs,
    named_outputs,
    on_meta,
)
from .launches import Launch, count_kernels, count_launches
from .subject import SkippedError, Truth, WaySpec, rows_to_check, torch_dtype
from .traffic import Counts, Traffic

AS_IS, ACCELERATED = "upstream", "fastbb.accelerate"
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
            "imports": [type(self._module).__module__.partition(".")[0]],
            "device": str(device),
            "host": name,
            "random_weights": random_weights,
            "size": list(self.size),
            "inside": _replaced_modules(self._module),
        }
        if ":" in name:
            self._spec["imports"] = []  # its module may be in the working directory

    def ways(self, precision: str, batch: int, folder: Path) -> list[WaySpec]:
        """The model as it is, and accelerated; both watch the modules that are replaced."""
        spec = {**self._spec, "precision": precision, "batch": batch}
        ours = [
            WaySpec(
                ACCELERATED if mode == "auto" else f"{ACCELERATED} {mode}",
                {**spec, "mode": mode},
                ours=True,
                compiles="compile" in mode,
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
        dtype, rows = torch_dtype(precision), rows_to_check(batch)
        inputs = make_inputs(self._module, batch, self.size)
        pixels = inputs.pixels.to(self._device, dtype)[rows]

        def run(dtype: torch.dtype, pixels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            module = copy.deepcopy(self._module).to(self._device, dtype)
            with RecordedOutputs(module, self._spec["inside"]) as inside:
                return named_outputs(inputs.call(module, pixels.to(dtype))), inside

        signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(0))
        near = pixels * (1 + torch.finfo(dtype).eps * (2 * signs - 1).to(pixels))
        try:
            with torch.no_grad():
                with fp32_products("tf32") if precision == "tf32" else nullcontext():
                    eager, rounded = run(dtype, pixels), run(dtype, near)
                exact = run(torch.float64, pixels)
        except Exception as error:
            self.notes.append(
                f"outputs are not compared, since it raises {describe(error)}; {_SAFE}"
            )
            return None

        def steady(part: int) -> list[str]:
            return [
                name
                for name, found in exact[part].items()
                if (len(rows) == batch or (found.dim() and len(found) == len(rows)))
                and all(_is_near(one[part].get(name), found, precision) for one in (eager, rounded))
            ]

        compared = [(0, name) for name in steady(0)]
        if left := [name for name in exact[0] if (0, name) not in compared]:
            # others may depend on the same choices
            compared = [(1, name) for name in steady(1)] or compared
            self.notes.append(
                f"{_listed(left)} of the outputs jump with a rounding, mix images, or are never in "
                f"float64: what the replaced modules return is compared instead; {_SAFE}"
            )
        if not compared:
            return None
        return Truth(
            {name: eager[part][name] for part, name in compared},
            {name: exact[part][name] for part, name in compared},
            FP32_REL_FOLDED,
        )

    def traffic(self, batch: int) -> Traffic:
        """Launches of the replaced modules on a GPU by way."""
        title = f"{self.name}, {self.size[0]}x{self.size[1]}, batch {batch}"
        return Traffic(title, batch, self.size, count_host(self._module, batch, self.size))


def _is_near(found: Tensor | None, exact: Tensor, precision: str) -> bool:
    """Whether upstream's result is as near to the exact one as roundings alone leave it."""
    if found is None or found.shape != exact.shape or exact.dtype != torch.float64:
        return False
    eps = _TF32_EPS if precision == "tf32" else torch.finfo(torch_dtype(precision)).eps
    allowed = max(FP32_REL_FOLDED, _MOST_ROUNDINGS * eps)
    return max_error(found, exact) <= allowed * max_magnitude(exact)


def _replaced_modules(module: nn.Module) -> list[str]:
    """Names of the outermost modules that `accelerate` replaces, "" for the model itself."""
    report = _accelerated(module)
    restore(module)
    return outermost(report.accelerated)


def _accelerated(module: nn.Module, mode: str = "auto") -> AccelerateReport:
    with warnings.catch_warnings():  # the note says what it found
        warnings.simplefilter("ignore", AccelerateWarning)
        return accelerate(module, mode=mode)


def outermost(names: Sequence[str]) -> list[str]:
    """Names of modules without those inside another one of them."""

    def is_inside(name: str, outer: str) -> bool:
        return name != outer and (not outer or name.startswith(f"{outer}."))

    return [name for name in names if not any(is_inside(name, outer) for outer in names)]


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
            report = _accelerated(self._module, self._spec["mode"])
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
        inner, self._inner = self._inner, {}
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


@torch.no_grad()
def count_host(module: nn.Module, batch: int, size: tuple[int, int]) -> Counts:
    """Counts the launches of the modules that `accelerate` replaces on an H100, in bf16.

    The model runs once on its device, to see with what it calls these modules; they are counted on
    the meta device, without the rest of the model.

    Args:
        module: as it is.
        batch: images.
        size: (height, width) of the images, pixels.
    """
    try:
        theirs, ours = (_copied_to_meta(module) for _ in range(2))
        with record_launches():
            names = outermost(_accelerated(ours).accelerated)
        if not names:
            return {ACCELERATED: "accelerate() replaces nothing in it"}
        calls = _calls_of(module, names, batch, size)
        return {
            AS_IS: _count_calls(theirs, calls, count_launches),
            ACCELERATED: _count_calls(ours, calls, count_kernels),
        }
    except Exception as error:  # an op that the count does not know, or code that needs values
        return {ACCELERATED: describe(error)}


def _copied_to_meta(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta", torch.bfloat16)


_Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # name of a module, and its arguments


def _calls_of(
    module: nn.Module, names: Sequence[str], batch: int, size: tuple[int, int]
) -> list[_Call]:
    """The calls of modules in a forward pass, with arguments on the meta device."""
    calls: list[_Call] = []

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, *(on_meta(values, torch.bfloat16) for values in (args, kwargs))))

        return module.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(name) for name in names]
    try:
        make_inputs(module, batch, size).call(module)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _count_calls(module: nn.Module, calls: Sequence[_Call], count: Any) -> list[Launch]:
    weights = [*module.parameters(), *module.buffers()]

    def run() -> None:
        for name, args, kwargs in calls:
            module.get_submodule(name)(*args, **kwargs)

    with record_launches():
        run()  # computes values that are made once per set of weights
    with count(weights) as launches:
        run()
    return launches
