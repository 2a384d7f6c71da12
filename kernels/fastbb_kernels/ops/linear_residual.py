"""Linear layer added to a residual: the end of both halves of a transformer block.

Algorithm: GEMM, bias and residual in one epilogue.
Bound: memory at Swin's widths (read x and the residual, write y).
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op


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
        x: [..., C] floating point, any strides.
        weight: [C_out, C].
        bias: [C_out] or None.
        residual: [..., C_out], any strides.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(LinearResidual(x, weight, bias, residual), impl)


class LinearResidual(NamedTuple):
    """A call of `linear_residual`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor

    def check(self) -> None:
        x, weight, bias, residual = self
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "linear_residual: weight must be [C_out, C] for x [..., C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_residual: bias must be [{weight.shape[0]}], got {list(bias.shape)}"
            )
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"linear_residual: residual must be {[*x.shape[:-1], weight.shape[0]]}, "
                f"got {list(residual.shape)}"
            )

    def eager(self) -> Tensor:
        return self.residual + F.linear(self.x, self.weight, self.bias)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x, residual, weight and bias read once, y written once."""
        n_rows = self.x.numel() // max(self.x.shape[-1], 1)
        out_features, features = self.weight.shape
        n_elements = n_rows * (features + 2 * out_features) + out_features * features
        return self.x.element_size() * (n_elements + (0 if self.bias is None else out_features))

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.residual.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.linear_residual import launch

        return launch(*self)


_op = Op("linear_residual", LinearResidual)
