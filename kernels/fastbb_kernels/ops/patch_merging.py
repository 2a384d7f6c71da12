"""Swin's patch merging: 2x2 neighbours concatenated, normalized, reduced.

Algorithm: gather four pixels as one row of 4C, layer norm, GEMM without bias.
Bound: memory (read x once, write half as many elements).
Source: Liu et al. 2021, section 3.1; microsoft/Swin-Transformer `PatchMerging`.
"""

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op
from .layer_norm_linear import LayerNormLinear


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
    return _op(PatchMerging(x, norm_weight, norm_bias, weight, eps), impl)


class PatchMerging(NamedTuple):
    """A call of `patch_merging`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    eps: float

    def check(self) -> None:
        x, norm_weight, norm_bias, weight, _ = self
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

    def eager(self) -> Tensor:
        x, norm_weight, norm_bias, weight, eps = self
        B, H, W, C = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, C]
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # [B, h, w, 4C], column offset outermost
        return LayerNormLinear(x, norm_weight, norm_bias, weight, None, eps, None).eager()

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x and the parameters read once, y written once."""
        n_elements = sum(tensor.numel() for tensor in self[:4])
        return self.x.element_size() * (n_elements + math.prod(self._output_shape()))

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self._output_shape())

    def launch(self) -> Tensor:
        from ..triton_kernels.patch_merging import launch

        return launch(*self, self.empty_result())

    def _output_shape(self) -> tuple[int, int, int, int]:
        batch, height, width, _ = self.x.shape
        return batch, (height + 1) // 2, (width + 1) // 2, self.weight.shape[0]


_op = Op("patch_merging", PatchMerging)
