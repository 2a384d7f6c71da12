"""The last two convolutions of a bottleneck block: 3x3, then the 1x1 that expands, and residual.

Algorithm: y = activation(conv1x1(relu(conv3x3(x))) + residual), for some pixels at a time, so that
the map between the convolutions does not exist in memory. A 1x1 needs no neighbours of it.
Bound: memory at 64 channels (read x and the residual, write y), even with flops at 128.
"""

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._convolution import check_positive, check_shape, empty_output, output_shape
from .._dispatch import (
    Impl,
    architecture,
    chosen_impl,
    common_unsupported,
    launches_directly,
    use_block,
)
from ..launching import launches
from .conv1x1_bn_act import conv1x1_bn_act, conv1x1_bn_act_eager
from .conv3x3_bn_act import conv3x3_bn_act, conv3x3_bn_act_eager, conv3x3_bn_act_n_bytes


def bottleneck_tail(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = "relu",
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(expand(relu(conv3x3(x))) + residual)`, padded as `conv3x3_bn_act`.

    Weights and biases have the batch norms folded in (`fastbb.fold`). Where its own kernel does not
    run, the two ops `conv3x3_bn_act` and `conv1x1_bn_act` do, each by the same `impl`. "auto"
    leaves the call to those: cuDNN's and MIOpen's 3x3 were not measured to be slower.

    Args:
        x: [B, C, H, W] floating point, any strides; channels-last is not copied.
        weight: [C, C, 3, 3], any strides; channels-last is not copied.
        bias: [C].
        expand_weight: [C_out, C, 1, 1].
        expand_bias: [C_out].
        residual: [B, C_out, h, w], added before the activation.
        stride: of the 3x3 convolution, both ways.
        dilation: of the 3x3 convolution, both ways.
        activation: name of the last activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C_out, h, w], dtype of `x`, h = ceil(H / stride); channels-last from kernels.

    Raises:
        ValueError: shapes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = (x, weight, bias, expand_weight, expand_bias, residual)
    _check(*tensors, stride, dilation, activation)
    unsupported = bottleneck_tail_unsupported(
        *tensors, stride=stride, dilation=dilation, activation=activation
    )
    asked_for = chosen_impl("bottleneck_tail", impl) == "triton"
    if asked_for and use_block("bottleneck_tail", impl, unsupported, x):
        run = _launch if launches_directly() else _bottleneck_tail
        return run(*tensors, stride, dilation, activation)
    mid = conv3x3_bn_act(
        x, weight, bias, stride=stride, dilation=dilation, activation="relu", impl=impl
    )
    return conv1x1_bn_act(
        mid, expand_weight, expand_bias, residual=residual, activation=activation, impl=impl
    )


def bottleneck_tail_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = "relu",
) -> Tensor:
    mid = conv3x3_bn_act_eager(x, weight, bias, stride=stride, dilation=dilation, activation="relu")
    return conv1x1_bn_act_eager(
        mid, expand_weight, expand_bias, residual=residual, activation=activation
    )


def bottleneck_tail_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = "relu",
) -> str | None:
    """Why the op's own kernel cannot run this call, or None."""
    reason = common_unsupported(
        x,
        weight=weight,
        bias=bias,
        expand_weight=expand_weight,
        expand_bias=expand_bias,
        residual=residual,
    )
    if reason is not None:
        return reason
    out_channels, channels = expand_weight.shape[:2]
    if channels not in (64, 128) or out_channels % 64:
        return (
            "needs 64 or 128 channels and a multiple of 64 after the expansion, "
            f"got {channels} and {out_channels}"
        )
    # the interpreter runs anything
    if x.dtype == torch.float32 and architecture(x.device) is not None:
        return "needs fp16 or bf16: fp32 products are not bound by memory"
    return None


def bottleneck_tail_n_bytes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = "relu",
) -> int:
    """Bytes of a call: what is used of x, parameters and residual read once, y written once."""
    first = conv3x3_bn_act_n_bytes(x, weight, bias, stride=stride, dilation=dilation)
    mid = residual.numel() // max(expand_weight.shape[0], 1) * weight.shape[0]
    n_elements = expand_weight.numel() + expand_bias.numel() + 2 * residual.numel() - mid
    return first + x.element_size() * n_elements


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    stride: int,
    dilation: int,
    activation: Activation,
) -> None:
    C = x.shape[1] if x.ndim == 4 else 0
    if x.ndim != 4 or weight.shape != (C, C, 3, 3):
        raise ValueError(
            "bottleneck_tail: weight must be [C, C, 3, 3] for x [B, C, H, W], "
            f"got weight {list(weight.shape)} and x {list(x.shape)}"
        )
    if expand_weight.ndim != 4 or expand_weight.shape[1:] != (C, 1, 1):
        raise ValueError(
            f"bottleneck_tail: expand_weight must be [C_out, {C}, 1, 1], "
            f"got {list(expand_weight.shape)}"
        )
    check_positive("bottleneck_tail", stride=stride, dilation=dilation)
    for name, tensor, shape in (
        ("bias", bias, (C,)),
        ("expand_bias", expand_bias, expand_weight.shape[:1]),
        ("residual", residual, output_shape(x, expand_weight, stride)),
    ):
        check_shape("bottleneck_tail", name, tensor, shape)
    check_activation("bottleneck_tail", activation)


@torch.library.custom_op("fastbb::bottleneck_tail", mutates_args=())
def _bottleneck_tail(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
) -> Tensor:
    y = bottleneck_tail_eager(
        x,
        weight,
        bias,
        expand_weight,
        expand_bias,
        residual,
        stride=stride,
        dilation=dilation,
        activation=activation,
    )
    return empty_output(x, expand_weight, stride).copy_(y)


@_bottleneck_tail.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
) -> Tensor:
    return empty_output(x, expand_weight, stride)


@launches(_bottleneck_tail)
def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.bottleneck_tail import launch

    y = empty_output(x, expand_weight, stride)
    return launch(
        x,
        weight,
        bias,
        expand_weight,
        expand_bias,
        residual,
        stride,
        dilation,
        activation,
        y,
    )
