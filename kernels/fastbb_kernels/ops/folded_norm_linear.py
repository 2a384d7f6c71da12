"""Layer normalization folded into the linear layer after it, for inference in bf16 and fp16.

Algorithm: W' is weight * norm_weight, less the mean of each row. Then layer_norm(x) @ weight.T is
rstd * (x @ W'.T - mean * sums) plus a constant of each column; sums are those of the rows of W' as
rounded, and about zero, so that a large mean of x cancels nothing. As no row is normalized before
the product, operands go from memory to the matrix units, and tiles are larger.
Bound: L2 at the widths of transformers (the operands of each tile).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate, check_activation
from .._dispatch import (
    Impl,
    architecture,
    chosen_impl,
    common_unsupported,
    is_plainly_eager,
    use_block,
)
from ..op import Op
from .layer_norm_linear import LayerNormLinear

# rows of so many stay on the chip in `layer_norm_linear`, which needs no copy of the weight
MOST_UNFOLDED_FEATURES = 256
_STEP = 32  # features of a step of the kernel
_MOST_COLUMNS = 256  # of a tile
_MOST_EXPONENT = 100  # `torch.ldexp` multiplies by a power of two in fp32


class FoldedNorm(NamedTuple):
    """A linear layer with a layer norm folded into it."""

    weight: Tensor  # [C_out, C] in the dtype of the layer
    sums: Tensor  # [C_out] fp32, of the rows of `weight`
    scale: Tensor  # [1] fp32, a power of two
    bias: Tensor  # [C_out] fp32


@torch.no_grad()
def fold_norm(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None
) -> FoldedNorm:
    """Folds the weight and bias of a layer norm into the linear layer after it.

    Computed in float64 and rounded once. The largest magnitude of the weight is scaled to between
    one half and one, so that small weights stay normal numbers of fp16.

    Args:
        norm_weight: [C].
        norm_bias: [C].
        weight: [C_out, C].
        bias: [C_out] or None.
    """
    exact = weight.double()
    folded = exact * norm_weight.double()
    folded -= folded.mean(1, keepdim=True)
    _, exponent = torch.frexp(folded.abs().amax())
    exponent = exponent.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    rounded = torch.ldexp(folded, -exponent).to(weight.dtype)
    offset = exact @ norm_bias.double()
    return FoldedNorm(
        rounded,
        rounded.double().sum(1).float(),
        torch.ldexp(torch.ones_like(offset[:1]), exponent).float(),
        (offset if bias is None else offset + bias.double()).float(),
    )


def folded_norm_linear(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(linear(layer_norm(x)))` with what `fold_norm` made of both layers.

    The statistics are fp32, and so is everything from the product to the result.

    Args:
        x: [..., C] floating point, any strides.
        weight: [C_out, C].
        sums: [C_out] fp32.
        scale: [1] fp32.
        bias: [C_out] fp32.
        eps: added to the variance.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C_out], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    return _op(FoldedNormLinear(x, weight, sums, scale, bias, eps, activation), impl)


def folds_norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
) -> bool:
    """Whether a call of `layer_norm_linear` had better run as `folded_norm_linear`.

    Raises:
        ValueError: as that op.
    """
    if is_plainly_eager(x, None) or x.shape[-1] <= MOST_UNFOLDED_FEATURES:
        return False
    if chosen_impl("layer_norm_linear", None) != chosen_impl(_op.name, None):
        return False  # somebody named the op that would not run
    tensors = (x, norm_weight, norm_bias, weight, bias)
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if dtypes not in ({torch.bfloat16}, {torch.float16}):
        return False
    LayerNormLinear(*tensors, eps, activation).check()
    # these vectors stand for those that they will be folded into
    vector = norm_bias if bias is None else bias
    call = FoldedNormLinear(x, weight, norm_weight, norm_bias, vector, eps, activation)
    return use_block(_op.name, None, call.unsupported(), x)


def run_folded(x: Tensor, folded: FoldedNorm, *, eps: float, activation: Activation) -> Tensor:
    """Runs the kernel of a call for which `folds_norm` was true."""
    return _op.kernel(FoldedNormLinear(x, *folded, eps, activation))


class FoldedNormLinear(NamedTuple):
    """A call of `folded_norm_linear`."""

    x: Tensor
    weight: Tensor
    sums: Tensor
    scale: Tensor
    bias: Tensor
    eps: float
    activation: Activation

    def check(self) -> None:
        x, weight = self.x, self.weight
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                "folded_norm_linear: weight must be [C_out, C] for x [..., C], "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        out_features = weight.shape[0]
        for name, size in (("sums", out_features), ("scale", 1), ("bias", out_features)):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (size,):
                raise ValueError(
                    f"folded_norm_linear: {name} must be [{size}], got {list(tensor.shape)}"
                )
        check_activation("folded_norm_linear", self.activation)

    def eager(self) -> Tensor:
        x, weight, sums, scale, bias, eps, activation = self
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight).to(wide)
        # zero unless the sums are others
        variance, mean = torch.var_mean(x.to(wide), -1, correction=0, keepdim=True)
        y += mean * (variance + eps).rsqrt() * (weight.to(wide).sum(1) - sums)
        return activate((y * scale + bias).to(x.dtype), activation)

    def unsupported(self) -> str | None:
        reason = common_unsupported(self, or_fp32=("sums", "scale", "bias"))
        if reason is not None:
            return reason
        out_features, features = self.weight.shape
        if features % _STEP:
            return f"needs a multiple of {_STEP} features, got {features}"
        if (out_features + _MOST_COLUMNS) * max(features, _MOST_COLUMNS) >= 2**31:
            return f"needs a weight of less than 2**31 elements, got {[out_features, features]}"
        # the interpreter has no limits
        if self.x.dtype == torch.float32 and architecture(self.x.device) is not None:
            return "needs fp16 or bf16: exact fp32 products are not bound by memory"
        return None

    def n_bytes(self) -> int:
        """Counts x and the parameters read once, y written once."""
        out_features, features = self.weight.shape
        n_rows = math.prod(self.x.shape[:-1])
        n_elements = n_rows * (features + out_features) + self.weight.numel()
        vectors = (self.sums, self.scale, self.bias)
        return self.x.element_size() * n_elements + sum(vector.nbytes for vector in vectors)

    def empty_result(self) -> Tensor:
        return self.x.new_empty(*self.x.shape[:-1], self.weight.shape[0])

    def launch(self) -> Tensor:
        from ..triton_kernels.folded_norm_linear import launch

        return launch(*self)


_op = Op("folded_norm_linear", FoldedNormLinear)
