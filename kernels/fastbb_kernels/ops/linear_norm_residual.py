"""Linear layer, layer norm and residual: the end of both halves of a Swin V2 block.

Algorithm: y = residual + layer_norm(linear(x)). A program computes whole rows of the linear layer,
so that the product is normalized before it is stored.
Bound: memory at Swin's widths (read x and the residual, write y); with more channels than the
registers of a program hold, the product is stored, and `layer_norm_residual` reads it.
Source: Liu et al. 2022, section 3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Architecture, Impl, architecture, common_unsupported
from ..op import Op
from .layer_norm_residual import LayerNormResidual, layer_norm_residual

# most channels that compile without spilling registers
_MOST_CHANNELS: dict[Architecture, int] = {
    80: 384,
    86: 384,
    89: 384,
    90: 384,
    100: 384,
    120: 384,
    "gfx90a": 384,
    "gfx942": 384,
}
# with fewer, most multiprocessors have nothing to do, and the parts have more programs
_ENOUGH_ROWS = 64 * 32
# with more channels a program has 64 rows, and reads the weight so often that one with more
# features than channels takes longer from L2 than the product takes to be stored and read again
_MOST_CHANNELS_OF_DEEP_WEIGHTS = 192


def linear_norm_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + layer_norm(linear(x))`.

    If the kernel of this op cannot run, PyTorch's linear layer and `layer_norm_residual` run, the
    latter with the same `impl`. "auto" also takes these two on a GPU for less than 2048 rows, and
    for more than 192 channels of more features.

    Args:
        x: [..., C] floating point, any strides.
        weight: [C_out, C].
        bias: [C_out] or None.
        norm_weight: [C_out].
        norm_bias: [C_out].
        residual: [..., C_out], any strides.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = LinearNormResidual(x, weight, bias, norm_weight, norm_bias, residual, eps)
    call.check()
    if _op.takes(call, impl):
        return _op.kernel(call)
    y = F.linear(x, weight, bias)
    return layer_norm_residual(y, norm_weight, norm_bias, residual, eps=eps, impl=impl)


class LinearNormResidual(NamedTuple):
    """A call of `linear_norm_residual`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    residual: Tensor
    eps: float

    def check(self) -> None:
        x, weight = self.x, self.weight
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "linear_norm_residual: weight must be [C_out, C] for x [..., C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        for name in ("bias", "norm_weight", "norm_bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != weight.shape[:1]:
                raise ValueError(
                    f"linear_norm_residual: {name} must be [{weight.shape[0]}], "
                    f"got {list(tensor.shape)}"
                )
        if self.residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                "linear_norm_residual: residual must be "
                f"{[*x.shape[:-1], weight.shape[0]]}, got {list(self.residual.shape)}"
            )

    def eager(self) -> Tensor:
        y = F.linear(self.x, self.weight, self.bias)
        norm = self.norm_weight, self.norm_bias
        return LayerNormResidual(y, *norm, self.residual, self.eps).eager()

    def unsupported(self) -> str | None:
        reason = common_unsupported(self)
        if reason is not None:
            return reason
        channels, features = self.weight.shape
        if channels % 32 or features % 32:
            return f"needs multiples of 32 channels, got {features} and {channels}"
        arch = architecture(self.x.device)
        if arch is None:  # the interpreter has no limits
            return None
        if self.x.dtype == torch.float32:
            return "needs fp16 or bf16: fp32 products spill registers, and are not bound by memory"
        most = _MOST_CHANNELS.get(arch, 0)
        if channels > most:
            return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
        return None

    def pays(self) -> bool:
        """Whether the kernel is expected to be faster than those of the separate ops."""
        if architecture(self.x.device) is None:
            return True
        channels, features = self.weight.shape
        if features > channels > _MOST_CHANNELS_OF_DEEP_WEIGHTS:
            return False
        return self.residual.numel() >= _ENOUGH_ROWS * channels

    def n_bytes(self) -> int:
        """Counts x, residual and parameters read once, y written once."""
        read = (tensor for tensor in self[:6] if isinstance(tensor, Tensor))
        n_elements = self.residual.numel() + sum(tensor.numel() for tensor in read)
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.residual.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.linear_norm_residual import launch

        return launch(*self)


_op = Op("linear_norm_residual", LinearNormResidual, is_block=True)
