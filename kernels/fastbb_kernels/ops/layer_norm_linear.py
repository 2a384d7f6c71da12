"""Layer normalization followed by a linear layer, with an optional activation.

Algorithm: normalize each row, multiply by the weight, add the bias, activate.
Bound: memory at Swin's widths (read x, write y); the normalized x is never stored.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate, check_activation
from .._dispatch import Impl, common_unsupported
from ..op import Op


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(linear(layer_norm(x)))`.

    The statistics are fp32. The kernel keeps fp32 from the product to the result, where eager
    PyTorch rounds before the activation.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        weight: [C_out, C].
        bias: [C_out] or None.
        eps: added to the variance.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(LayerNormLinear(x, norm_weight, norm_bias, weight, bias, eps, activation), impl)


class LayerNormLinear(NamedTuple):
    """A call of `layer_norm_linear`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float
    activation: Activation

    def check(self) -> None:
        x, norm_weight, norm_bias, weight, bias, _, activation = self
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "layer_norm_linear: weight must be [C_out, C] for x [..., C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        out_features, features = weight.shape
        for name, tensor, size in (
            ("norm_weight", norm_weight, features),
            ("norm_bias", norm_bias, features),
            ("bias", bias, out_features),
        ):
            if tensor is not None and tensor.shape != (size,):
                raise ValueError(
                    f"layer_norm_linear: {name} must be [{size}], got {list(tensor.shape)}"
                )
        check_activation("layer_norm_linear", activation)

    def eager(self) -> Tensor:
        x, norm_weight, norm_bias, weight, bias, eps, activation = self
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return activate(F.linear(x, weight, bias), activation)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x and the parameters read once, y written once."""
        out_features, features = self.weight.shape
        n_rows = self.x.numel() // max(features, 1)
        n_elements = n_rows * (features + out_features) + self.weight.numel() + 2 * features
        return self.x.element_size() * (n_elements + (0 if self.bias is None else out_features))

    def empty_result(self) -> Tensor:
        return self.x.new_empty(*self.x.shape[:-1], self.weight.shape[0])

    def library(self) -> Tensor:
        return self.eager()

    def library_sizes(self) -> tuple[int, int, int, int, bool, Activation, torch.dtype]:
        out_features, features = self.weight.shape
        n_rows = math.prod(self.x.shape[:-1])
        return n_rows, features, out_features, 1, False, self.activation, self.x.dtype

    def launch(self) -> Tensor:
        from ..triton_kernels.layer_norm_linear import launch

        return launch(*self)


_op = Op("layer_norm_linear", LayerNormLinear)
