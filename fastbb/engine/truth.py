"""What a result is held to, and the one rule by which."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastbb_kernels import use_impl
from fastbb_kernels.accuracy import (
    FP32_REL,
    FP32_REL_FOLDED,
    accuracy_problem,
    max_error,
    max_magnitude,
)

from ..backbone.base import Backbone
from ..models.timm import TimmBackbone

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)

N_CHECKED = 2  # images at each end of a batch


def fp32_rel(backbone: Backbone) -> float:
    """What is allowed in fp32, relative to the largest value of a map."""
    arbitrary = isinstance(backbone, TimmBackbone) and backbone.native_forward() is None
    return FP32_REL_FOLDED if arbitrary else FP32_REL


def allowed_rel(eager: Tensor, exact: Tensor, rel: float) -> float:
    """`rel`, or twice what fp32 itself loses: of chaotic models, and in TF32, that is more."""
    largest = max_magnitude(exact)
    if eager.dtype != torch.float32 or not largest:
        return rel
    lost = max_error(eager, exact) / largest
    return rel if lost <= rel else 2 * lost


def without_engine(backbone: AnyBackbone, copied: bool = False) -> AnyBackbone:
    """The same backbone, unprepared: its modules and parameters, or copies of them."""
    other = copy.copy(backbone)
    other.config = copy.copy(backbone.config)
    other._engine = None
    return copy.deepcopy(other) if copied else other


@dataclass(frozen=True)
class Truth:
    """The maps of some images of a batch, and of how many images.

    Attributes:
        eager: plain PyTorch's in the precision that is wanted.
        exact: in float64.
        rows: which images these are.
        rel: what is allowed in fp32, see `fp32_rel`.
    """

    eager: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    rows: list[int]
    rel: float

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, pixel_values: Tensor) -> "Truth":
        """Computes it for the first and the last images of a batch [B, C, H, W]."""
        batch = len(pixel_values)
        rows = sorted({*range(batch)[:N_CHECKED], *range(batch)[-N_CHECKED:]})
        pixels = pixel_values[rows]
        exact = without_engine(backbone, copied=True).double()
        with use_impl("eager"):
            return cls(
                backbone.feature_maps(pixels),
                exact.feature_maps(pixels.double()),
                rows,
                fp32_rel(backbone),
            )

    def problem(self, maps: Sequence[Tensor]) -> str | None:
        """Why the maps of the whole batch are not accepted, or None."""
        if len(maps) != len(self.exact):
            return f"{len(maps)} maps, eager {len(self.exact)}"
        for index, (got, eager, exact) in enumerate(zip(maps, self.eager, self.exact)):
            if got.device != eager.device or got.ndim != eager.ndim:
                return f"map {index} is {list(got.shape)} on {got.device}"
            if len(got) != self.rows[-1] + 1:  # the last image always is among them
                return f"map {index} is of {len(got)} images"
            rel = allowed_rel(eager, exact, self.rel)
            problem = accuracy_problem(got[self.rows], eager, exact, rel)
            if problem is None and eager.isfinite().all() and not got.isfinite().all():
                problem = "a value is NaN or infinite"
            if problem is not None:
                return f"map {index} is wrong: {problem}"
        return None
