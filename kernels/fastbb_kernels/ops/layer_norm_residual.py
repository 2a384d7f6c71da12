"""Layer norm added to a residual: the end of both halves of a Swin V2 block.

Algorithm: y = residual + layer_norm(x).
Bound: memory, 3 passes (read x and the residual, write y).
Source: Liu et al. 2022, section 3.2.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op

# a program holds whole rows in registers
MAX_CHANNELS = 8192


def layer_norm_residual(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + layer_norm(x)`.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        residual: [..., C], any strides.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(LayerNormResidual(x, norm_weight, norm_bias, residual, eps), impl)


class LayerNormResidual(NamedTuple):
    """A call of `layer_norm_residual`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    residual: Tensor
    eps: float

    def check(self) -> None:
        x = self.x
        if x.ndim == 0:
            raise ValueError("layer_norm_residual: x must be [..., C], got one number")
        for name, tensor in (("norm_weight", self.norm_weight), ("norm_bias", self.norm_bias)):
            if tensor.shape != x.shape[-1:]:
                raise ValueError(
                    f"layer_norm_residual: {name} must be {list(x.shape[-1:])} for x "
                    f"{list(x.shape)}, got {list(tensor.shape)}"
                )
        if self.residual.shape != x.shape:
            raise ValueError(
                f"layer_norm_residual: residual must be {list(x.shape)}, "
                f"got {list(self.residual.shape)}"
            )

    def eager(self) -> Tensor:
        x = self.x
        return self.residual + F.layer_norm(
            x, x.shape[-1:], self.norm_weight, self.norm_bias, self.eps
        )

    def unsupported(self) -> str | None:
        channels = self.x.shape[-1]
        if channels > MAX_CHANNELS:
            return f"needs at most {MAX_CHANNELS} channels, got {channels}"
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x, residual and parameters read once, y written once."""
        return self.x.element_size() * (3 * self.x.numel() + 2 * self.x.shape[-1])

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.x.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.layer_norm_residual import launch

        return launch(*self)


_op = Op("layer_norm_residual", LayerNormResidual)
