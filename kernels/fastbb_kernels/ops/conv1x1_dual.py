"""Sum of two 1x1 convolutions with the batch norms folded in, then an activation.

Algorithm: two GEMMs into one accumulator, over the pixels of channels-last maps.
Bound: memory (read both maps, write y); the second product is never written.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation
from .._convolution import check_convolution, check_shape, empty_output, finish
from .._dispatch import Impl, common_unsupported
from ..op import Op


def conv1x1_dual(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    activation: Activation = None,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `activation(conv2d(x, weight) + conv2d(shortcut, shortcut_weight, stride) + bias)`.

    This ends the first block of a residual stage: its last convolution and the projection of its
    input. The batch norms are folded into weights and bias (`fastbb.fold`). The kernel works on
    channels-last memory and copies maps that are not; it keeps fp32 from the products to the
    result, where eager PyTorch rounds each product.

    Args:
        x: [B, C_in, h, w] floating point, any strides.
        weight: [C, C_in, 1, 1].
        shortcut: [B, C_s, H, W] with h = ceil(H / stride) and w likewise, any strides.
        shortcut_weight: [C, C_s, 1, 1].
        bias: [C], the sum of both.
        stride: of the shortcut's convolution, in both directions.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `x`; the kernel's is channels-last.

    Raises:
        ValueError: shapes that do not fit together, no stride or an unknown activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = Conv1x1Dual(x, weight, shortcut, shortcut_weight, bias, stride, activation)
    return _op(call, impl)


class Conv1x1Dual(NamedTuple):
    """A call of `conv1x1_dual`."""

    x: Tensor
    weight: Tensor
    shortcut: Tensor
    shortcut_weight: Tensor
    bias: Tensor
    stride: int
    activation: Activation

    def check(self) -> None:
        x, weight, shortcut, shortcut_weight, bias, stride, activation = self
        check_convolution("conv1x1_dual", 1, x, weight, bias, stride, 1, None, activation)
        batch, _, height, width = x.shape
        if (
            shortcut.ndim != 4
            or shortcut.shape[0] != batch
            or -(-shortcut.shape[2] // stride) != height
            or -(-shortcut.shape[3] // stride) != width
        ):
            raise ValueError(
                f"conv1x1_dual: shortcut must be [{batch}, C_s, H, W] with ceil(H / {stride}) = "
                f"{height} and ceil(W / {stride}) = {width}, got {list(shortcut.shape)}"
            )
        projection = (weight.shape[0], shortcut.shape[1], 1, 1)
        check_shape("conv1x1_dual", "shortcut_weight", shortcut_weight, projection)

    def eager(self) -> Tensor:
        y = F.conv2d(self.x, self.weight, self.bias)
        projected = F.conv2d(self.shortcut, self.shortcut_weight, stride=self.stride)
        return finish(y, self.activation, projected)

    def unsupported(self) -> str | None:
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts the used pixels of both maps and the parameters read once, y written once."""
        batch, channels, height, width = self.x.shape
        maps = channels + self.shortcut.shape[1] + self.weight.shape[0]
        parameters = self.weight.numel() + self.shortcut_weight.numel() + self.bias.numel()
        return self.x.element_size() * (batch * height * width * maps + parameters)

    def empty_result(self) -> Tensor:
        return empty_output(self.x, self.weight)

    def launch(self) -> Tensor:
        from ..triton_kernels.conv1x1_dual import launch

        return launch(*self, self.empty_result())


_op = Op("conv1x1_dual", Conv1x1Dual)
