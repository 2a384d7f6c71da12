"""A whole ConvNeXt block: depthwise convolution, norm, MLP, layer scale, residual.

Algorithm: y = x + scale * fc2(activation(fc1(layer_norm(depthwise_conv(x))))) for some pixels at a
time; neither the convolved map nor the hidden one is stored.
Bound: instructions. They are those of the separate ops without the second one's loads; the map
crosses DRAM twice (read x, write y) instead of five times.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._convolution import check_shape, empty_output
from .._dispatch import Architecture, Impl, architecture, common_unsupported
from ..op import Op
from .depthwise_conv_bn_act import DepthwiseConvBnAct, depthwise_conv_bn_act
from .layer_norm_linear import layer_norm_linear
from .mlp_block import MlpBlock, mlp_block

# the kernel unrolls a column of taps; larger ones are not checked for spills
_TRITON_KERNEL_SIZES = (3, 5, 7)
# vertically adjacent pixels of a strip, for which a load serves several taps
STRIP_ROWS = 4

# most channels that compile without spilling registers
_MOST_CHANNELS: dict[Architecture, int] = {
    80: 192,
    86: 192,
    89: 192,
    90: 256,
    100: 256,
    120: 192,
    "gfx90a": 256,
    "gfx942": 256,
}
# about one program per multiprocessor; the separate convolution has more programs
_MANY_PIXELS = 64 * 128
# most rows of strips, per row of the map: the MLP computes those below the map too
_MOST_ROWS = 1.1


def convnext_block(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: Activation = "gelu",
    norm_linear: Callable[..., Tensor] = layer_norm_linear,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `x + scale * fc2(activation(fc1(layer_norm(conv2d(x)))))`.

    Zeros pad the map of the depthwise convolution, so that it keeps its size. The layer norm is
    over the channels. If the kernel of this op cannot run, the ops `depthwise_conv_bn_act` and
    `mlp_block` run, with the same `impl`. "auto" also takes these two on a GPU for less than 8192
    pixels, and for heights far below a multiple of 4, where they have less to compute.

    Args:
        x: [B, C, H, W] floating point, any strides; copied unless it is channels-last.
        conv_weight: [C, 1, k, k], k odd, any strides; copied unless C is its fastest axis, as in
            `conv_weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)`.
        conv_bias: [C].
        norm_weight: [C].
        norm_bias: [C].
        fc1_weight: [F, C].
        fc1_bias: [F] or None.
        fc2_weight: [C, F].
        fc2_bias: [C] or None.
        scale: layer scale [C], or None.
        eps: added to the variance.
        activation: name of the activation, or None.
        norm_linear: as of `mlp_block`.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, H, W], dtype of `x`. The kernel's is channels-last.

    Raises:
        ValueError: shapes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = ConvNextBlock(
        *(x, conv_weight, conv_bias, norm_weight, norm_bias, fc1_weight, fc1_bias),
        *(fc2_weight, fc2_bias, scale, eps, activation),
    )
    call.check()
    if _op.takes(call, impl):
        return _op.kernel(call)
    y = depthwise_conv_bn_act(x, conv_weight, conv_bias, impl=impl).permute(0, 2, 3, 1)
    y = mlp_block(
        *(y, *call[3:9]),
        residual=x.permute(0, 2, 3, 1),
        scale=scale,
        eps=eps,
        activation=activation,
        norm_linear=norm_linear,
        impl=impl,
    )
    return y.permute(0, 3, 1, 2)


class ConvNextBlock(NamedTuple):
    """A call of `convnext_block`."""

    x: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    scale: Tensor | None
    eps: float
    activation: Activation

    def check(self) -> None:
        x, conv_weight, fc1_weight = self.x, self.conv_weight, self.fc1_weight
        if (
            x.ndim != 4
            or conv_weight.ndim != 4
            or conv_weight.shape[:2] != (x.shape[1], 1)
            or conv_weight.shape[2] != conv_weight.shape[3]
            or conv_weight.shape[2] % 2 == 0
        ):
            raise ValueError(
                "convnext_block: conv_weight must be [C, 1, k, k], k odd, for x [B, C, H, W], "
                f"got conv_weight {list(conv_weight.shape)} and x {list(x.shape)}"
            )
        C = x.shape[1]
        if fc1_weight.ndim != 2 or fc1_weight.shape[1] != C:
            raise ValueError(
                f"convnext_block: fc1_weight must be [F, C] for x {list(x.shape)}, "
                f"got {list(fc1_weight.shape)}"
            )
        F = fc1_weight.shape[0]
        shapes: dict[str, tuple[Tensor | None, list[int]]] = {
            "conv_bias": (self.conv_bias, [C]),
            "norm_weight": (self.norm_weight, [C]),
            "norm_bias": (self.norm_bias, [C]),
            "fc1_bias": (self.fc1_bias, [F]),
            "fc2_weight": (self.fc2_weight, [C, F]),
            "fc2_bias": (self.fc2_bias, [C]),
            "scale": (self.scale, [C]),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None:
                check_shape("convnext_block", name, tensor, shape)
        if x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f"convnext_block: x must have pixels, got {x.shape[2]}x{x.shape[3]}")
        check_activation("convnext_block", self.activation)

    def eager(self) -> Tensor:
        y = DepthwiseConvBnAct(self.x, self.conv_weight, self.conv_bias, 1, 1, None).eager()
        before = y.permute(0, 2, 3, 1), *self[3:9]
        call = MlpBlock(*before, self.x.permute(0, 2, 3, 1), *self[9:])
        return call.eager().permute(0, 3, 1, 2)

    def unsupported(self) -> str | None:
        if self.conv_weight.shape[2] not in _TRITON_KERNEL_SIZES:
            return f"needs k in {_TRITON_KERNEL_SIZES}, got {self.conv_weight.shape[2]}"
        reason = common_unsupported(self)
        if reason is not None:
            return reason
        hidden, channels = self.fc1_weight.shape
        if channels % 32 or hidden % 32:
            return (
                "needs a multiple of 32 channels and of 32 hidden channels, "
                f"got {channels} and {hidden}"
            )
        arch = architecture(self.x.device)
        if arch is None:  # the interpreter has no limits
            return None
        if self.x.dtype == torch.float32:
            return "needs fp16 or bf16: fp32 products spill registers"
        most = _MOST_CHANNELS.get(arch, 0)
        if channels > most:
            return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
        return None

    def pays(self) -> bool:
        """Whether the kernel is expected to be faster than those of the separate ops."""
        if architecture(self.x.device) is None:  # in the interpreter it always runs
            return True
        batch, _, height, width = self.x.shape
        is_full = -height % STRIP_ROWS <= (_MOST_ROWS - 1) * height
        return is_full and batch * height * width >= _MANY_PIXELS

    def n_bytes(self) -> int:
        """Counts x and parameters read once, y written once."""
        read = (tensor for tensor in self[:10] if tensor is not None)
        n_elements = self.x.numel() + sum(tensor.numel() for tensor in read)
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.conv_weight)

    def launch(self) -> Tensor:
        from ..triton_kernels.convnext_block import launch

        return launch(*self, self.empty_result())


_op = Op("convnext_block", ConvNextBlock, is_block=True)
