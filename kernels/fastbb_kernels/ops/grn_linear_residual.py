"""Global response normalization, a linear layer and a residual: the end of a ConvNeXt V2 block.

Algorithm: norms of the channels over the pixels of an image, then a GEMM that normalizes the pixels
that it loads, with bias and residual in the epilogue.
Bound: memory (read x twice and the residual, write y); the normalized x is never stored.
Source: Woo et al. 2023, section 3.2; transformers `ConvNextV2GRN`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op

# pixels whose squares one program adds up, at most so many parts
PART_PIXELS, MOST_PARTS = 256, 16


def grn_linear_residual(
    x: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + linear(grn(x))`.

    `grn(x) = grn_weight * (x * n) + grn_bias + x`, where n is the 2-norm of a channel over the
    pixels of its image, divided by the mean of these norms over the channels, plus eps. The kernel
    computes it in fp32 and rounds once.

    Args:
        x: [B, H, W, C] floating point, any strides.
        grn_weight: [C].
        grn_bias: [C].
        weight: [C_out, C].
        bias: [C_out] or None.
        residual: [B, H, W, C_out], any strides.
        eps: added to the mean of the norms.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, H, W, C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = GrnLinearResidual(x, grn_weight, grn_bias, weight, bias, residual, eps)
    return _op(call, impl)


class GrnLinearResidual(NamedTuple):
    """A call of `grn_linear_residual`."""

    x: Tensor
    grn_weight: Tensor
    grn_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    eps: float

    def check(self) -> None:
        x, grn_weight, grn_bias, weight, bias, residual, _ = self
        if x.ndim != 4 or weight.ndim != 2 or x.shape[3] != weight.shape[1]:
            raise ValueError(
                "grn_linear_residual: weight must be [C_out, C] for x [B, H, W, C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        out_features, features = weight.shape
        for name, tensor, shape in (
            ("grn_weight", grn_weight, [features]),
            ("grn_bias", grn_bias, [features]),
            ("bias", bias, [out_features]),
            ("residual", residual, [*x.shape[:3], out_features]),
        ):
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(
                    f"grn_linear_residual: {name} must be {shape}, got {list(tensor.shape)}"
                )

    def eager(self) -> Tensor:
        x, grn_weight, grn_bias, weight, bias, residual, eps = self
        x = global_response_norm(x, grn_weight, grn_bias, eps)
        return residual + F.linear(x, weight, bias)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x read twice, residual and parameters once, y written once, and the norms.

        The norms are fp32: sums of parts of the pixels and factors, both written and read.
        """
        read = (tensor for tensor in self[:6] if tensor is not None)
        n_elements = self.x.numel() + self.residual.numel() + sum(t.numel() for t in read)
        batch, height, width, features = self.x.shape
        n_sums = batch * features * (n_parts(height * width) + 1) if self.residual.numel() else 0
        return self.x.element_size() * n_elements + 2 * 4 * n_sums

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.residual.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.grn_linear_residual import launch

        return launch(*self)


def global_response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Computes `weight * (x * n) + bias + x` of maps [B, H, W, C], see `grn_linear_residual`."""
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    relative = norms / (norms.mean(dim=-1, keepdim=True) + eps)
    return weight * (x * relative) + bias + x


def n_parts(n_pixels: int) -> int:
    """Number of parts of the pixels of an image whose squares are added up apart."""
    return min(MOST_PARTS, -(-n_pixels // PART_PIXELS))


_op = Op("grn_linear_residual", GrnLinearResidual)
