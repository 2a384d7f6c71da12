"""Layer normalization followed by the gated half of a SwiGLU MLP.

Algorithm: normalize each row, multiply by both weights, multiply silu(gate) by up.
Bound: compute at the widths of large ViTs; neither product is stored.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op


def layer_norm_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `silu(gate(y)) * up(y)` with `y = layer_norm(x)`.

    The statistics are fp32. The kernel keeps fp32 from the products to the result, where eager
    PyTorch rounds both products and silu.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        gate_weight: [F, C].
        gate_bias: [F] or None.
        up_weight: [F, C].
        up_bias: [F] or None.
        eps: added to the variance.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., F], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = LayerNormSwiglu(
        x, norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias, eps
    )
    return _op(call, impl)


class LayerNormSwiglu(NamedTuple):
    """A call of `layer_norm_swiglu`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    eps: float

    def check(self) -> None:
        x, weight = self.x, self.gate_weight
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "layer_norm_swiglu: gate_weight must be [F, C] for x [..., C], "
                f"got gate_weight {list(weight.shape)} and x {list(x.shape)}"
            )
        out_features, features = weight.shape
        for name, tensor, shape in (
            ("norm_weight", self.norm_weight, [features]),
            ("norm_bias", self.norm_bias, [features]),
            ("gate_bias", self.gate_bias, [out_features]),
            ("up_weight", self.up_weight, [out_features, features]),
            ("up_bias", self.up_bias, [out_features]),
        ):
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(
                    f"layer_norm_swiglu: {name} must be {shape}, got {list(tensor.shape)}"
                )

    def eager(self) -> Tensor:
        x, norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias, eps = self
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return F.silu(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts x and the parameters read once, y written once."""
        out_features, features = self.gate_weight.shape
        n_rows = self.x.numel() // max(features, 1)
        n_biases = (self.gate_bias is not None) + (self.up_bias is not None)
        n_parameters = 2 * features + out_features * (2 * features + n_biases)
        return self.x.element_size() * (n_rows * (features + out_features) + n_parameters)

    def empty_result(self) -> Tensor:
        return self.x.new_empty(*self.x.shape[:-1], self.gate_weight.shape[0])

    def launch(self) -> Tensor:
        from ..triton_kernels.layer_norm_swiglu import launch

        return launch(*self)


_op = Op("layer_norm_swiglu", LayerNormSwiglu)
