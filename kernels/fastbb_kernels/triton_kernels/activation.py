"""The activations of `fastbb_kernels.ACTIVATIONS`, for the epilogues of kernels."""
# pyright: reportOperatorIssue=false, reportReturnType=false
# the functions of libdevice have no bodies, so that they seem to return nothing

import triton
import triton.language as tl
from triton.language.extra import libdevice

_SQRT_1_OVER_2 = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
# (1 + erf(x / sqrt(2))) / 2 is near sigmoid(-x * (A + B * x**2 + C * x**4)), fitted for the least
# absolute error of GELU: 2.6e-5, at 0.56
_GELU_A = tl.constexpr(-1.5950157403854661)
_GELU_B = tl.constexpr(-0.07401131208135976)
_GELU_C = tl.constexpr(0.0007030362042770262)
# of x**2; beyond it GELU is x or 0 within the error, and the polynomial would turn round
_GELU_LIMIT = tl.constexpr(25.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Applies the activation named `ACTIVATION` to fp32 `x` of any shape; None changes nothing.

    GELU takes some 33 instructions by erf. For results in a lower precision an approximation is
    taken, whose absolute error, 2.6e-5, is 0.03 units in the last place of fp16 at one.

    Args:
        x: fp32.
        ACTIVATION: name.
        dtype: to which the result will be rounded.
    """
    if ACTIVATION == "gelu" and (dtype == tl.bfloat16 or dtype == tl.float16):
        square = tl.minimum(x * x, _GELU_LIMIT)
        # in this order no register spills
        exponent = x * _GELU_A + x * square * (_GELU_B + square * _GELU_C)
        # one instruction of the special function unit each, off by some 2**-21
        x = libdevice.fast_dividef(x, 1.0 + libdevice.fast_expf(exponent))
    elif ACTIVATION == "gelu":
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
