"""Patch embedding: a convolution whose stride is its kernel, then layer norm, NHWC out.

Algorithm: every patch is one row of a GEMM.
Bound: memory (read the pixels, write the tokens).
"""

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, eager_only


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Embeds non-overlapping patches; pixels beyond the last whole patch are dropped.

    Args:
        pixel_values: [B, C_in, H, W] floating point.
        weight: [C, C_in, p, q] with patches of p x q pixels.
        bias: [C] or None.
        norm_weight: [C], or None for no normalization.
        norm_bias: [C] or None.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, H // p, W // q, C], dtype of `pixel_values`.
    """
    eager_only("patch_embed", impl)
    return patch_embed_eager(pixel_values, weight, bias, norm_weight, norm_bias, eps=eps)


def patch_embed_eager(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    x = F.conv2d(pixel_values, weight, bias, stride=weight.shape[2:]).permute(0, 2, 3, 1)
    if norm_weight is None:
        return x
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
