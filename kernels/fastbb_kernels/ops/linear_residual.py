"""Linear layer added to a residual: the end of both halves of a transformer block.

Algorithm: GEMM, bias and residual in one epilogue.
Bound: memory at Swin's widths (read x and the residual, write y).
"""

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, eager_only


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + linear(x)`.

    Args:
        x: [..., C] floating point.
        weight: [C_out, C].
        bias: [C_out] or None.
        residual: [..., C_out].
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.
    """
    eager_only("linear_residual", impl)
    return linear_residual_eager(x, weight, bias, residual)


def linear_residual_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    return residual + F.linear(x, weight, bias)
