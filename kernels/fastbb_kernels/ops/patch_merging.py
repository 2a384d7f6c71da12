"""Swin's patch merging: 2x2 neighbours concatenated, normalized, reduced.

Algorithm: gather four pixels as one row of 4C, layer norm, GEMM without bias.
Bound: memory (read x once, write half as many elements).
Source: Liu et al. 2021, section 3.1; microsoft/Swin-Transformer `PatchMerging`.
"""

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, eager_only
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
        x: [B, H, W, C] floating point.
        norm_weight: [4C], in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
        norm_bias: [4C].
        weight: [C_out, 4C].
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), C_out], dtype of `x`.
    """
    eager_only("patch_merging", impl)
    return patch_merging_eager(x, norm_weight, norm_bias, weight, eps=eps)


def patch_merging_eager(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    B, H, W, C = x.shape
    if H % 2 or W % 2:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, C]
    x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # [B, h, w, 4C], column offset outermost
    return layer_norm_linear_eager(x, norm_weight, norm_bias, weight, None, eps=eps)
