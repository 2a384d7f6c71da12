"""Linear layer added to a residual: the end of both halves of a transformer block.

Algorithm: GEMM, bias, layer scale and residual in one epilogue.
Bound: memory at Swin's widths (read x and the residual, write y).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + scale * linear(x)`.

    Args:
        x: [..., C] floating point, any strides.
        weight: [C_out, C].
        bias: [C_out] or None.
        residual: [..., C_out], any strides.
        scale: layer scale [C_out]; None: 1.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(LinearResidual(x, weight, bias, residual, scale), impl)


class LinearResidual(NamedTuple):
    """A call of `linear_residual`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    scale: Tensor | None = None

    def check(self) -> None:
        x, weight, bias, residual, scale = self
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "linear_residual: weight must be [C_out, C] for x [..., C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        for name, tensor in (("bias", bias), ("scale", scale)):
            if tensor is not None and tensor.shape != weight.shape[:1]:
                raise ValueError(
                    f"linear_residual: {name} must be [{weight.shape[0]}], got {list(tensor.shape)}"
                )
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"linear_residual: residual must be {[*x.shape[:-1], weight.shape[0]]}, "
                f"got {list(residual.shape)}"
            )

    def eager(self) -> Tensor:
        y = F.linear(self.x, self.weight, self.bias)
        return self.residual + (y if self.scale is None else self.scale * y)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x, residual and parameters read once, y written once."""
        n_rows = self.x.numel() // max(self.x.shape[-1], 1)
        out_features, features = self.weight.shape
        n_vectors = (self.bias is not None) + (self.scale is not None)
        n_elements = n_rows * (features + 2 * out_features) + out_features * (features + n_vectors)
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.residual.shape)

    def library(self) -> Tensor:
        y = F.linear(self.x, self.weight, self.bias)
        if self.scale is None:
            return y.add_(self.residual)
        return torch.addcmul(self.residual, y, self.scale, out=y)

    def library_sizes(self) -> tuple[int, int, int, int, bool, None, torch.dtype]:
        out_features, features = self.weight.shape
        n_rows = math.prod(self.x.shape[:-1])
        return n_rows, features, out_features, 1, True, None, self.x.dtype

    def launch(self) -> Tensor:
        from ..triton_kernels.linear_residual import launch

        return launch(*self)


_op = Op("linear_residual", LinearResidual)
