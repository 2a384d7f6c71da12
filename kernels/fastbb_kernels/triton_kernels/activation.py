"""The activations of `fastbb_kernels.ACTIVATIONS`, for the epilogues of kernels."""

import triton
import triton.language as tl

_SQRT_1_OVER_2 = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Applies the activation named `ACTIVATION` to fp32 `x` of any shape; None changes nothing."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_1_OVER_2))
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 * u)
        x = x * tl.sigmoid((x + 0.044715 * x * x * x) * _SQRT_8_OVER_PI)
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # keeps NaN, unlike a maximum
    elif ACTIVATION == "silu" or ACTIVATION == "swish":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(ACTIVATION is None, "no such activation")
    return x
