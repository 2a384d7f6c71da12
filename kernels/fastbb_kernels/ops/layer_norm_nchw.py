"""Layer normalization of a channels-last map; the result has the shape NCHW.

Algorithm: normalize over C; the NCHW shape is a view with channels-last strides.
Bound: memory, 2 passes (read x, write y).
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op

# a program holds whole rows in registers
MAX_CHANNELS = 8192


def layer_norm_nchw(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, impl: Impl | None = None
) -> Tensor:
    """Normalizes over the channels of an NHWC map.

    Args:
        x: [B, H, W, C] floating point, any strides.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W] in channels-last memory format, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(LayerNormNchw(x, weight, bias, eps), impl)


class LayerNormNchw(NamedTuple):
    """A call of `layer_norm_nchw`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def check(self) -> None:
        x = self.x
        if x.ndim != 4:
            raise ValueError(f"layer_norm_nchw: x must be [B, H, W, C], got {list(x.shape)}")
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor.shape != x.shape[-1:]:
                raise ValueError(
                    f"layer_norm_nchw: {name} must be {list(x.shape[-1:])} for x {list(x.shape)}, "
                    f"got {list(tensor.shape)}"
                )

    def eager(self) -> Tensor:
        x, weight, bias, eps = self
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)

    def unsupported(self) -> str | None:
        if self.x.shape[-1] > MAX_CHANNELS:
            return f"needs at most {MAX_CHANNELS} channels, got {self.x.shape[-1]}"
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x, weight and bias read once, y written once."""
        n_elements = 2 * self.x.numel() + self.weight.numel() + self.bias.numel()
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.x.shape).permute(0, 3, 1, 2)

    def launch(self) -> Tensor:
        from ..triton_kernels.layer_norm_nchw import launch

        return launch(*self)


_op = Op("layer_norm_nchw", LayerNormNchw)
