"""The last two convolutions of a bottleneck block: 3x3, then the 1x1 that expands, and residual.

Algorithm: y = activation(conv1x1(relu(conv3x3(x))) + residual), for some pixels at a time. The map
between the convolutions is never stored: a 1x1 convolution needs no neighbouring pixels of it.
Bound: memory at 64 channels (read x and the residual, write y); memory and flops at 128.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._convolution import check_positive, check_shape, empty_output, output_shape
from .._dispatch import Impl, architecture, chosen_impl, common_unsupported
from ..op import Op
from .conv1x1_bn_act import Conv1x1BnAct, conv1x1_bn_act
from .conv3x3_bn_act import Conv3x3BnAct, conv3x3_bn_act


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

    Weights and biases have the batch norms folded in (`fastbb.fold`). If the kernel of this op
    cannot run, the ops `conv3x3_bn_act` and `conv1x1_bn_act` run, with the same `impl`. "auto"
    always takes these two ops: no measurement has shown that cuDNN's or MIOpen's 3x3 is slower.

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
    call = BottleneckTail(
        *(x, weight, bias, expand_weight, expand_bias, residual), stride, dilation, activation
    )
    call.check()
    if chosen_impl("bottleneck_tail", impl) == "triton" and _op.takes(call, impl):
        return _op.kernel(call)
    mid = conv3x3_bn_act(
        x, weight, bias, stride=stride, dilation=dilation, activation="relu", impl=impl
    )
    return conv1x1_bn_act(
        mid, expand_weight, expand_bias, residual=residual, activation=activation, impl=impl
    )


class BottleneckTail(NamedTuple):
    """A call of `bottleneck_tail`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    residual: Tensor
    stride: int
    dilation: int
    activation: Activation

    def check(self) -> None:
        x, weight, expand_weight = self.x, self.weight, self.expand_weight
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
        check_positive("bottleneck_tail", stride=self.stride, dilation=self.dilation)
        for name, tensor, shape in (
            ("bias", self.bias, (C,)),
            ("expand_bias", self.expand_bias, expand_weight.shape[:1]),
            ("residual", self.residual, output_shape(x, expand_weight, self.stride)),
        ):
            check_shape("bottleneck_tail", name, tensor, shape)
        check_activation("bottleneck_tail", self.activation)

    def eager(self) -> Tensor:
        mid = self._first().eager()
        return Conv1x1BnAct(
            mid, self.expand_weight, self.expand_bias, 1, self.residual, self.activation
        ).eager()

    def unsupported(self) -> str | None:
        reason = common_unsupported(self)
        if reason is not None:
            return reason
        out_channels, channels = self.expand_weight.shape[:2]
        if channels not in (64, 128) or out_channels % 64:
            return (
                "needs 64 or 128 channels and a multiple of 64 after the expansion, "
                f"got {channels} and {out_channels}"
            )
        # the interpreter has no limits
        if self.x.dtype == torch.float32 and architecture(self.x.device) is not None:
            return "needs fp16 or bf16: fp32 products are not bound by memory"
        return None

    def n_bytes(self) -> int:
        """Counts the used pixels of x, parameters and residual read once, y written once."""
        mid = self.residual.numel() // max(self.expand_weight.shape[0], 1) * self.weight.shape[0]
        n_elements = self.expand_weight.numel() + self.expand_bias.numel()
        n_elements += 2 * self.residual.numel() - mid
        return self._first().n_bytes() + self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.expand_weight, self.stride)

    def launch(self) -> Tensor:
        from ..triton_kernels.bottleneck_tail import launch

        return launch(*self, self.empty_result())

    def _first(self) -> Conv3x3BnAct:
        return Conv3x3BnAct(
            self.x, self.weight, self.bias, self.stride, self.dilation, None, "relu"
        )


_op = Op("bottleneck_tail", BottleneckTail, is_block=True)
