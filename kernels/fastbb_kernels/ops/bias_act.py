"""Bias, residual and activation after a convolution that a library computes.

Algorithm: one pass over the map.
Bound: memory (read x and the residual, write y).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._convolution import check_shape, finish
from .._dispatch import Impl, common_unsupported
from ..op import Op


def bias_act(
    x: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(x + bias + residual)`.

    The kernel keeps fp32 between x and the result, where eager PyTorch rounds after each addition.

    Args:
        x: [B, C, H, W] floating point, any strides; channels-last is not copied.
        bias: [C], dtype of `x`.
        residual: [B, C, H, W], dtype of `x`, or None.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W], dtype of `x`; channels-last from the kernel.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(BiasAct(x, bias, residual, activation), impl)


class BiasAct(NamedTuple):
    """A call of `bias_act`."""

    x: Tensor
    bias: Tensor
    residual: Tensor | None
    activation: Activation

    def check(self) -> None:
        x, bias, residual, activation = self
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"bias_act: x must be [B, C, H, W] floating point, got {list(x.shape)} {x.dtype}"
            )
        check_shape("bias_act", "bias", bias, x.shape[1:2])
        if residual is not None:
            check_shape("bias_act", "residual", residual, x.shape)
        for name, tensor in (("bias", bias), ("residual", residual)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise ValueError(f"bias_act: {name} must be {x.dtype} as x, got {tensor.dtype}")
        check_activation("bias_act", activation)

    def eager(self) -> Tensor:
        return finish(self.x + self.bias[:, None, None], self.activation, self.residual)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """x, bias and residual read once, y written once."""
        x, maps = self.x, 2 if self.residual is None else 3
        return x.element_size() * (maps * x.numel() + (self.bias.numel() if x.numel() else 0))

    def empty_result(self) -> Tensor:
        return torch.empty(
            self.x.shape,
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last,
        )

    def launch(self) -> Tensor:
        from ..triton_kernels.bias_act import launch

        return launch(*self, self.empty_result())


_op = Op("bias_act", BiasAct)
