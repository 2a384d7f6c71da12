"""Linear layer added to a residual: the end of both halves of a transformer block.

Algorithm: GEMM, bias and residual in one epilogue.
Bound: memory at Swin's widths (read x and the residual, write y).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches


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
    _check(x, weight, bias, residual)
    unsupported = linear_residual_unsupported(x, weight, bias, residual)
    if use_triton("linear_residual", impl, unsupported, x):
        run = _launch if launches_directly() else _linear_residual
        return run(x, weight, bias, residual)
    return linear_residual_eager(x, weight, bias, residual)


def linear_residual_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    return residual + F.linear(x, weight, bias)


def linear_residual_unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(x, weight=weight, bias=bias, residual=residual)


def linear_residual_n_bytes(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> int:
    """Bytes of a call: x, residual, weight and bias read once, y written once."""
    n_rows = x.numel() // max(x.shape[-1], 1)
    out_features, features = weight.shape
    n_elements = n_rows * (features + 2 * out_features) + out_features * features
    return x.element_size() * (n_elements + (0 if bias is None else out_features))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
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


@torch.library.custom_op("fastbb::linear_residual", mutates_args=())
def _linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return linear_residual_eager(x, weight, bias, residual).contiguous()


@_linear_residual.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return x.new_empty(residual.shape)


@launches(_linear_residual)
def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    from ..triton_kernels.linear_residual import launch

    return launch(x, weight, bias, residual)
