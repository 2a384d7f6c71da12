"""Swin's patch merging: 2x2 neighbours concatenated, normalized, reduced.

Algorithm: gather four pixels as one row of 4C, layer norm, GEMM without bias.
Bound: memory (read x once, write half as many elements).
Source: Liu et al. 2021, section 3.1; microsoft/Swin-Transformer `PatchMerging`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported, launches_directly, use_triton
from ..launching import launches
from .layer_norm_linear import layer_norm_linear_eager


def patch_merging(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Halves the map: odd sizes are padded with zeros at the bottom and right.

    Args:
        x: [B, H, W, C] floating point, any strides.
        norm_weight: [4C], in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
        norm_bias: [4C].
        weight: [C_out, 4C].
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = x, norm_weight, norm_bias, weight
    _check(*tensors)
    if use_triton("patch_merging", impl, patch_merging_unsupported(*tensors, eps=eps), x):
        run = _launch if launches_directly() else _patch_merging
        return run(*tensors, eps)
    return patch_merging_eager(*tensors, eps=eps)


def patch_merging_eager(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    B, H, W, C = x.shape
    if H % 2 or W % 2:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, C]
    x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # [B, h, w, 4C], column offset outermost
    return layer_norm_linear_eager(x, norm_weight, norm_bias, weight, None, eps=eps)


def patch_merging_unsupported(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> str | None:
    """Why Triton cannot run this call, or None."""
    return common_unsupported(x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight)


def patch_merging_n_bytes(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> int:
    """Bytes of a call: x and the parameters read once, y written once."""
    n_elements = x.numel() + norm_weight.numel() + norm_bias.numel() + weight.numel()
    return x.element_size() * (n_elements + math.prod(_output_shape(x, weight)))


def _output_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    batch, height, width, _ = x.shape
    return batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0]


def _check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"patch_merging: x must be [B, H, W, C], got {list(x.shape)}")
    features = 4 * x.shape[3]
    if weight.ndim != 2 or weight.shape[1] != features:
        raise ValueError(
            f"patch_merging: weight must be [C_out, {features}] for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor.shape != (features,):
            raise ValueError(
                f"patch_merging: {name} must be [{features}] for x {list(x.shape)}, "
                f"got {list(tensor.shape)}"
            )


@torch.library.custom_op("fastbb::patch_merging", mutates_args=())
def _patch_merging(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> Tensor:
    return patch_merging_eager(x, norm_weight, norm_bias, weight, eps=eps).contiguous()


@_patch_merging.register_fake
def _(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(_output_shape(x, weight))


@launches(_patch_merging)
def _launch(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> Tensor:
    from ..triton_kernels.patch_merging import launch

    return launch(x, norm_weight, norm_bias, weight, eps, x.new_empty(_output_shape(x, weight)))
