"""The stem of a ResNet: 7x7 convolution of stride 2, batch norm, activation, max pool.

Algorithm: an implicit GEMM over pixels, and maxima of its rows; no map before the pool is stored.
Bound: memory (read the pixels, write the pooled map), if the convolution runs on matrix units.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, check_activation
from .._convolution import check_shape, empty_output, finish, output_shape
from .._dispatch import Impl, common_unsupported
from ..op import Op

# a program holds the weights of all channels in registers
MAX_IN_CHANNELS = 4


def stem_conv_bn_relu_pool(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: Activation = "relu",
    pool: bool = True,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `max_pool2d(activation(conv2d(pixel_values)))`, a ResNet's stem.

    The convolution has stride 2 and padding 3, and the batch norm folded in (`fastbb.fold`); the
    pool has a window of 3x3, stride 2 and padding 1.

    Args:
        pixel_values: [B, C_in, H, W], any strides: floating point, or uint8, which is normalized,
            `(x / 255 - mean) / std`, and rounded to the dtype of `weight`.
        weight: [C, C_in, 7, 7], any strides.
        bias: [C].
        mean: of each channel, for uint8.
        std: of each channel, for uint8.
        activation: name of the activation, or None.
        pool: False leaves the pool out.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, C, h, w], dtype of `weight`; h = (H - 1) // 2 + 1, and with the pool once more;
        channels-last from kernels.

    Raises:
        ValueError: shapes that do not fit together, no such activation, or a mean and std that are
            missing or not wanted.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = StemConvBnReluPool(pixel_values, weight, bias, mean, std, activation, pool)
    return _op(call, impl)


class StemConvBnReluPool(NamedTuple):
    """A call of `stem_conv_bn_relu_pool`."""

    pixel_values: Tensor
    weight: Tensor
    bias: Tensor
    mean: Sequence[float] | None
    std: Sequence[float] | None
    activation: Activation
    pool: bool

    def check(self) -> None:
        pixel_values, weight, bias, mean, std, activation, _ = self
        channels = pixel_values.shape[1] if pixel_values.ndim == 4 else None
        if weight.ndim != 4 or weight.shape[1:] != (channels, 7, 7):
            raise ValueError(
                "stem_conv_bn_relu_pool: weight must be [C, C_in, 7, 7] for pixel_values "
                f"[B, C_in, H, W], got weight {list(weight.shape)} and pixel_values "
                f"{list(pixel_values.shape)}"
            )
        if 0 in pixel_values.shape[1:]:
            raise ValueError(
                "stem_conv_bn_relu_pool: pixel_values must have channels and pixels, "
                f"got {list(pixel_values.shape)}"
            )
        check_shape("stem_conv_bn_relu_pool", "bias", bias, weight.shape[:1])
        for name, values in (("mean", mean), ("std", std)):
            if pixel_values.dtype == torch.uint8:
                if values is None or len(values) != channels:
                    raise ValueError(
                        f"stem_conv_bn_relu_pool: {name} must have {channels} numbers for uint8 "
                        f"pixel_values, got {values}"
                    )
            elif values is not None:
                raise ValueError(
                    f"stem_conv_bn_relu_pool: {name} must be None for pixel_values in "
                    f"{pixel_values.dtype}, which are normalized, got {values}"
                )
        if std is not None and 0 in std:
            raise ValueError(f"stem_conv_bn_relu_pool: std must not contain 0, got {list(std)}")
        check_activation("stem_conv_bn_relu_pool", activation)

    def eager(self) -> Tensor:
        x, weight, bias, mean, std, activation, pool = self
        if mean is not None and std is not None:
            exact = torch.promote_types(x.dtype, torch.float32)
            mean_, std_ = (x.new_tensor(v, dtype=exact).view(-1, 1, 1) for v in (mean, std))
            x = ((x.to(exact) / 255 - mean_) / std_).to(weight.dtype)
        y = finish(F.conv2d(x, weight, bias, stride=2, padding=3), activation)
        return F.max_pool2d(y, 3, stride=2, padding=1) if pool else y

    def unsupported(self) -> str | None:
        pixel_values, weight = self.pixel_values, self.weight
        if pixel_values.shape[1] > MAX_IN_CHANNELS:
            return (
                f"needs at most {MAX_IN_CHANNELS} channels of pixels, got {pixel_values.shape[1]}"
            )
        if pixel_values.dtype != torch.uint8:
            return common_unsupported(self)
        if pixel_values.device != weight.device:
            return f"needs all tensors on {pixel_values.device}, got weight on {weight.device}"
        return common_unsupported(self, first=1)

    def n_bytes(self) -> int:
        """Counts all pixels and the parameters read once, y written once."""
        n_results = math.prod(output_shape(self.pixel_values, self.weight, self._stride()))
        n_elements = self.weight.numel() + self.bias.numel() + n_results
        return self.pixel_values.nbytes + self.weight.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return empty_output(self.pixel_values, self.weight, self._stride())

    def launch(self) -> Tensor:
        from ..triton_kernels.stem_conv_bn_relu_pool import launch

        return launch(*self, self.empty_result())

    def _stride(self) -> int:
        return 4 if self.pool else 2


_op = Op("stem_conv_bn_relu_pool", StemConvBnReluPool)
