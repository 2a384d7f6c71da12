"""Layer normalization of a channels-last map that leaves as NCHW.

Algorithm: normalize over C; the NCHW shape is a view with channels-last strides.
Bound: memory, 2 passes (read x, write y).
"""

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, eager_only


def layer_norm_nchw(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, impl: Impl | None = None
) -> Tensor:
    """Normalizes over the channels of an NHWC map.

    Args:
        x: [B, H, W, C] floating point.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W], dtype of `x`; strides may be channels-last.
    """
    eager_only("layer_norm_nchw", impl)
    return layer_norm_nchw_eager(x, weight, bias, eps=eps)


def layer_norm_nchw_eager(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)
