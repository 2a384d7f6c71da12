"""Layer normalization followed by the linear layer of q, k and v, and by rotary position embedding.

Algorithm: normalize each row, multiply by the weight, rotate q and k of the patch tokens.
Bound: memory at small widths, compute at large ones; q and k are written once, already rotated.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op


def rope_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    n_prefix: int,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Computes q, k and v of layer-normalized tokens, with rotary position embedding.

    `q * cos + rotate_half(q) * sin` for the tokens from `n_prefix` on, and the same for k; the
    tokens before (class and register tokens) and v are not rotated. `rotate_half` maps the halves
    (a, b) of a head's channels to (-b, a), as in DINOv3. The statistics are fp32. The kernel keeps
    fp32 from the product to the result, where eager PyTorch rounds after each step.

    Args:
        x: [B, N, C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        weight: [3 * num_heads * head_dim, C], the rows of q, then of k, then of v.
        bias: [3 * num_heads * head_dim] or None.
        cos: [N - n_prefix, head_dim], in fp32 or in the dtype of `x`.
        sin: as `cos`.
        num_heads: attention heads.
        n_prefix: number of tokens before the patch tokens.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, N, 3, num_heads, head_dim], contiguous, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = RopeQkv(x, norm_weight, norm_bias, weight, bias, cos, sin, num_heads, n_prefix, eps)
    return _op(call, impl)


class RopeQkv(NamedTuple):
    """A call of `rope_qkv`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    cos: Tensor
    sin: Tensor
    num_heads: int
    n_prefix: int
    eps: float

    def check(self) -> None:
        x, weight, num_heads, n_prefix = self.x, self.weight, self.num_heads, self.n_prefix
        if weight.ndim != 2 or x.ndim != 3 or x.shape[2] != weight.shape[1]:
            raise ValueError(
                "rope_qkv: weight must be [3 * num_heads * head_dim, C] for x [B, N, C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        out_features, features = weight.shape
        # the halves of a head's channels are rotated, hence 6
        if num_heads < 1 or out_features % (6 * num_heads):
            raise ValueError(
                "rope_qkv: weight must have 3 * num_heads * head_dim rows with an even head_dim, "
                f"got {out_features} rows and num_heads {num_heads}"
            )
        if not 0 <= n_prefix <= x.shape[1]:
            raise ValueError(
                f"rope_qkv: n_prefix must be from 0 to {x.shape[1]}, the number of tokens, "
                f"got {n_prefix}"
            )
        table = [x.shape[1] - n_prefix, out_features // (3 * num_heads)]
        for name, tensor, shape in (
            ("norm_weight", self.norm_weight, [features]),
            ("norm_bias", self.norm_bias, [features]),
            ("bias", self.bias, [out_features]),
            ("cos", self.cos, table),
            ("sin", self.sin, table),
        ):
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"rope_qkv: {name} must be {shape}, got {list(tensor.shape)}")

    def eager(self) -> Tensor:
        x, norm_weight, norm_bias, weight, bias, cos, sin, num_heads, n_prefix, eps = self
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1))
        rotate_(qkv, cos, sin)
        return qkv

    def unsupported(self) -> str | None:
        return common_unsupported(self, or_fp32=("cos", "sin"))

    def n_bytes(self) -> int:
        """Counts x, the parameters, cos and sin read once, the result written once."""
        out_features, features = self.weight.shape
        n_rows = self.x.shape[0] * self.x.shape[1]
        n_parameters = out_features * (features + (self.bias is not None)) + 2 * features
        n_elements = n_rows * (features + out_features) + n_parameters
        return self.x.element_size() * n_elements + self.cos.nbytes + self.sin.nbytes

    def empty_result(self) -> Tensor:
        head_dim = self.weight.shape[0] // (3 * self.num_heads)
        return self.x.new_empty(*self.x.shape[:2], 3, self.num_heads, head_dim)

    def launch(self) -> Tensor:
        from ..triton_kernels.rope_qkv import launch

        return launch(*self)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the queries and keys of the patches in place; v and prefix tokens are not copied.

    Args:
        qkv: [B, N, 3, num_heads, head_dim].
        cos: [n_patches, head_dim], as `sin`; the patches are the last tokens.
        sin: of the angles.
    """
    patches = qkv[:, qkv.shape[1] - cos.shape[0] :, :2]
    half = patches.shape[-1] // 2
    first, second = patches[..., :half], patches[..., half:]
    (cos_1, cos_2), (sin_1, sin_2) = (t[:, None, None].chunk(2, -1) for t in (cos, sin))
    turned, returned = first * sin_2, second * sin_1
    if turned.dtype == qkv.dtype:
        first.mul_(cos_1).sub_(returned)
        second.mul_(cos_2).add_(turned)
    else:  # a table in fp32 is rounded once
        patches.copy_(torch.cat((first * cos_1 - returned, second * cos_2 + turned), -1))


_op = Op("rope_qkv", RopeQkv)
