"""Names of features, and the form in which they are stored."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Norm = Literal["final", "none"]
# of the last stage, by the model's own library
TOKENS = ("cls", "patch_mean", "tokens")
FULL = ("embedding", *TOKENS, "projection")
FEATURES = (*FULL, "pooled", "maps")
_MAP, _LAYER = "maps.", "layer:"
VECTORS = ("embedding", "cls", "patch_mean", "projection", "pooled")


@dataclass(frozen=True)
class Wanted:
    """The features that are asked for.

    Attributes:
        names: in the order in which they are stored; "maps" stands for all requested stages.
        norm: of the tokens: "final" or "none"; None where no feature has it.
    """

    names: tuple[str, ...]
    norm: Norm | None

    @classmethod
    def parse(cls, features: str | Sequence[str], norm: str | None) -> Wanted:
        """Checks names of features.

        Raises:
            ValueError: there is none, or one of them is no name; or a norm that none of them has.
        """
        given = (features,) if isinstance(features, str) else tuple(features)
        unknown = [name for name in given if name not in FEATURES and not _names_a_part(name)]
        if unknown or not given:
            close = [c for name in unknown for c in difflib.get_close_matches(str(name), FEATURES)]
            raise ValueError(
                f"features: wanted some of {', '.join(FEATURES)}, {_MAP}<stage>, {_LAYER}<module>, "
                f"got {given!r}" + (f". Did you mean {', '.join(close)}?" if close else "")
            )
        named = [name for name in dict.fromkeys(given) if name not in FEATURES]
        maps = sorted(name for name in named if name.startswith(_MAP))
        layers = sorted(name for name in named if name.startswith(_LAYER))
        names = (*(name for name in FEATURES if name in given), *maps, *layers)
        if norm not in (None, "final", "none"):
            raise ValueError(f"norm: wanted final or none, got {norm!r}")
        if not set(TOKENS) & set(names):
            if norm is not None:
                raise ValueError(
                    f"norm: {norm!r} is for {', '.join(TOKENS)}, and none of them is asked for, "
                    f"got {', '.join(names)}"
                )
            return cls(names, None)
        return cls(names, "none" if norm == "none" else "final")

    @property
    def full(self) -> tuple[str, ...]:
        """The features that need the end of the model."""
        return tuple(name for name in self.names if name in FULL)

    @property
    def named_maps(self) -> tuple[str, ...]:
        """Stages that are named one by one."""
        return tuple(n.removeprefix(_MAP) for n in self.names if n.startswith(_MAP))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of modules."""
        return tuple(n.removeprefix(_LAYER) for n in self.names if n.startswith(_LAYER))

    @property
    def has_stages(self) -> bool:
        """Whether maps of stages are needed."""
        return bool({"pooled", "maps"} & set(self.names) or self.named_maps)

    @property
    def only_vectors(self) -> bool:
        """Whether all features are vectors, which images of any size have."""
        return set(self.names) <= set(VECTORS)

    @property
    def has_vectors(self) -> bool:
        """Whether one of the features is a vector, as far as the names say."""
        return bool(set(self.names) & set(VECTORS))


@dataclass(frozen=True)
class Storage:
    """The form in which features are stored.

    Attributes:
        precision: of the forward pass, which maps and tokens are stored in.
        normalize: divide vectors by their length.
        dtype: of all features; default: fp32 for vectors, the precision for others.
    """

    precision: torch.dtype
    normalize: bool = False
    dtype: torch.dtype | None = None

    def stored(self, feature: Tensor) -> Tensor:
        """Returns a feature [B, ...] as it is stored, on the CPU.

        With `dtype`, what is not finite before the cast becomes NaN, so infinite values are the
        cast's.
        """
        dtype = self.dtype or (torch.float32 if feature.ndim == 2 else self.precision)
        if feature.ndim == 2:
            feature = unit_length(feature.float()) if self.normalize else feature.float()
        if self.dtype is not None:
            feature = feature.masked_fill(feature.isinf(), math.nan)
        return feature.to(dtype).cpu().contiguous()


def unit_length(vectors: Tensor) -> Tensor:
    """Returns vectors [n, C] divided by their L2 norms; zeros stay zeros."""
    # by a power of two first, which rounds nothing: fp32 has no squares of 1e20 and 1e-25
    exponents = torch.frexp(vectors.abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126)
    return F.normalize(torch.ldexp(vectors, -exponents))


def _names_a_part(name: object) -> bool:
    """Whether a name is that of a stage's map or of a layer."""
    prefixes = (_MAP, _LAYER)
    return isinstance(name, str) and name.startswith(prefixes) and name not in prefixes
