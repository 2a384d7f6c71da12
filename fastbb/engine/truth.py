"""Reference of results: plain PyTorch in float64, compared by the accuracy rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbb_kernels import use_impl
from fastbb_kernels.accuracy import accuracy_problem, allowed_rel
from fastbb_kernels.heap import release_freed_memory

from ..weights.folded_model import unfold
from .computation import Computation

N_CHECKED = 2  # images at each end of a batch


@dataclass(frozen=True)
class Truth:
    """The maps of some images of a batch.

    Attributes:
        eager: maps of plain PyTorch in the requested precision.
        exact: maps in float64.
        rows: indices of these images in the batch; the last image is among them.
        rel: `Computation.exactness`.
    """

    eager: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    rows: list[int]
    rel: float

    @classmethod
    @torch.no_grad()
    def of(cls, computation: Computation, pixel_values: Tensor) -> "Truth":
        """Computes the maps of the first and last images of a batch [B, C, H, W]."""
        batch = len(pixel_values)
        rows = sorted({*range(batch)[:N_CHECKED], *range(batch)[-N_CHECKED:]})
        pixels = pixel_values[rows]
        with use_impl("eager"):
            exact = _exact(computation, pixels)
            if pixels.device.type == "cpu":
                release_freed_memory()
            eager = computation.feature_maps(pixels)
        return cls(eager, exact, rows, computation.exactness)

    def problem(self, maps: Sequence[Tensor]) -> str | None:
        """Returns the reason why the maps of the whole batch are wrong, or None."""
        if len(maps) != len(self.exact):
            return f"{len(maps)} maps, eager {len(self.exact)}"
        for index, (got, eager, exact) in enumerate(zip(maps, self.eager, self.exact)):
            if got.device != eager.device or got.ndim != eager.ndim:
                return f"map {index} is {list(got.shape)} on {got.device}"
            if len(got) != self.rows[-1] + 1:
                return f"map {index} is of {len(got)} images"
            rel = allowed_rel(eager, exact, self.rel)
            problem = accuracy_problem(got[self.rows], eager, exact, rel)
            if problem is None and eager.isfinite().all() and not got.isfinite().all():
                problem = "a value is NaN or infinite"
            if problem is not None:
                return f"map {index} is wrong: {problem}"
        return None


# what is derived from a weight of inference mode is not cached, so the copy leaves nothing behind
@torch.inference_mode()
def _exact(computation: Computation, pixels: Tensor) -> tuple[Tensor, ...]:
    """Maps in float64, of a copy whose memory is free again afterwards."""
    wide = computation.copied()
    try:
        wide.module.double()
        return wide.feature_maps(pixels.double())
    finally:
        unfold(wide.module)  # forwards that are bound on it would keep the copy alive
