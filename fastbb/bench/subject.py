"""What a bench measures: a model, the ways to run it, and the truth about its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from fastbb_kernels.accuracy import (
    accuracy_problem,
    allowed_error,
    allowed_rel,
    max_error,
    max_magnitude,
)

# distinct images of a batch, which repeat; a prime, so that no code that takes rows by fours or
# eights meets the same ones again
N_IMAGES = 7


class SkippedError(Exception):
    """A way does not run a cell; the message says why."""


@dataclass(frozen=True)
class WaySpec:
    """A way to run a subject.

    Attributes:
        name: in tables.
        spec: of its runner: "module" (with `make_runner(spec)`), "device", and fields of its own.
        ours: whether fastbb runs.
        compiles: whether it converts or compiles, which `--budget` may drop.
        reason: why it cannot run here, or None.
    """

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False
    compiles: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Judged:
    """How far a result is from upstream in float64, see `results.Way`."""

    error: float | None
    allowed: float | None
    errors: dict[str, float]
    wrong: str | None
    note: str = ""


@dataclass(frozen=True)
class Truth:
    """What upstream computes for the images of a batch: the first seven, which repeat.

    Attributes:
        eager: by name, in the dtype of the cell.
        exact: by name, in float64.
        rel: largest error in fp32, relative to the largest exact magnitude.
    """

    eager: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    rel: float

    def judge(
        self, got: Mapping[str, Tensor], batch: int, skipped: Mapping[str, str] | None = None
    ) -> Judged:
        """Compares results by the accuracy rule.

        Args:
            got: by name, all images of the batch. Another floating dtype is converted first:
                engines may return fp32 for a bf16 model.
            batch: number of images.
            skipped: names that are not compared, each with the reason.
        """
        skipped = skipped or {}
        errors: dict[str, float] = {}
        problems, worst, allowed_there = [], -1.0, None
        for name, exact in self.exact.items():
            if name in skipped:
                continue
            eager, result = self.eager[name], got.get(name)
            if result is None:
                problems.append(f"{name} is missing")
                continue
            result = result.to(eager.device, eager.dtype)
            if exact.dim() and len(exact) == min(batch, N_IMAGES) < batch:
                eager, exact = (one[image_of_each(batch)] for one in (eager, exact))
            if result.shape != exact.shape:
                shapes = f"shape {list(result.shape)} instead of {list(exact.shape)}"
                problems.append(f"{name}: {shapes}")
                continue
            rel = allowed_rel(eager, exact, self.rel)
            if (problem := accuracy_problem(result, eager, exact, rel)) is not None:
                problems.append(f"{name}: {problem}")
            largest = max_magnitude(exact) or 1.0
            error = max_error(result, exact) / largest
            errors[name] = error if error == error else float("inf")
            allowed = allowed_error(eager, exact, rel) / largest
            share = errors[name] / allowed if allowed else float(errors[name] > 0)
            if share > worst:
                worst, allowed_there = share, allowed
        note = "; ".join(f"{name} is not compared: {why}" for name, why in skipped.items())
        largest_error = max(errors.values(), default=None)
        return Judged(largest_error, allowed_there, errors, "; ".join(problems) or None, note)


def image_of_each(batch: int) -> list[int]:
    """Index of the distinct image of each row of a batch."""
    return [row % N_IMAGES for row in range(batch)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
    except Exception as error:  # safetensors has errors of its own for a full disk
        raise OSError(f"cannot write {path}: {error}; is TMPDIR full?") from error


class Subject(Protocol):
    """A model to measure, at one size.

    Attributes:
        name: as it was asked for.
        kind: "backbone" or "host".
        size: (height, width) of the images.
        upstream: name of the way that the others are held to.
        stages: maps that are returned; of a host empty.
        params, macs, activations: see `results.Cell`.
        notes: sentences about it.
    """

    name: str
    kind: str
    size: tuple[int, int]
    upstream: str
    stages: tuple[str, ...]
    params: int | None
    macs: int | None
    activations: int | None
    notes: list[str]

    def ways(self, precision: str, batch: int, folder: Path) -> list[WaySpec]:
        """The ways to run it, upstream first; writes what their processes read into the folder."""
        ...

    def truth(self, precision: str, batch: int) -> Truth | None:
        """What upstream computes for the same input; None if nothing can be compared."""
        ...

    def skipped(self, way: str) -> Mapping[str, str]:
        """Maps that a way may compute otherwise, by name, with the reason."""
        ...
