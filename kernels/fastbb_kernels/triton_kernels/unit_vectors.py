"""Lengths of vectors on the chip, for cosines."""

import triton
import triton.language as tl

SHORTEST = tl.constexpr(1e-12)  # as in `F.normalize`


@triton.jit
def inverse_lengths(x, axis: tl.constexpr):
    """Returns fp32 factors that make unit vectors of those along an axis, as `F.normalize` does."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, axis), SHORTEST * SHORTEST))
