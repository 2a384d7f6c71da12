"""The stem of a ResNet: 7x7 convolution of stride 2, batch norm, activation, max pool.

Algorithm: an implicit GEMM over pixels; maxima of its rows, so that no map before the pool exists.
Bound: memory (read the pixels, write the pooled map), if the convolution runs on matrix units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import ACTIVATIONS, Activation, activate
from .._dispatch import Impl, common_unsupported, launches_directly, use_triton

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
    _check(pixel_values, weight, bias, mean, std, activation)
    unsupported = stem_conv_bn_relu_pool_unsupported(
        pixel_values, weight, bias, mean=mean, std=std, activation=activation, pool=pool
    )
    if use_triton("stem_conv_bn_relu_pool", impl, unsupported):
        run = _launch if launches_directly() else _stem_conv_bn_relu_pool
        return run(pixel_values, weight, bias, mean, std, activation, pool)
    return stem_conv_bn_relu_pool_eager(
        pixel_values, weight, bias, mean=mean, std=std, activation=activation, pool=pool
    )


def stem_conv_bn_relu_pool_eager(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: Activation = "relu",
    pool: bool = True,
) -> Tensor:
    if mean is not None and std is not None:
        exact = torch.promote_types(pixel_values.dtype, torch.float32)
        mean_, std_ = (pixel_values.new_tensor(v, dtype=exact).view(-1, 1, 1) for v in (mean, std))
        pixel_values = ((pixel_values.to(exact) / 255 - mean_) / std_).to(weight.dtype)
    y = F.conv2d(pixel_values, weight, bias, stride=2, padding=3)
    # y is ours: in place saves an allocation, and autograd does not keep the value
    y = F.relu_(y) if activation == "relu" else activate(y, activation)
    return F.max_pool2d(y, 3, stride=2, padding=1) if pool else y


def stem_conv_bn_relu_pool_unsupported(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: Activation = "relu",
    pool: bool = True,
) -> str | None:
    """Why Triton cannot run this call, or None."""
    if pixel_values.shape[1] > MAX_IN_CHANNELS:
        return f"needs at most {MAX_IN_CHANNELS} channels of pixels, got {pixel_values.shape[1]}"
    if pixel_values.dtype != torch.uint8:
        return common_unsupported(pixel_values, weight=weight, bias=bias)
    if pixel_values.device != weight.device:
        return f"needs all tensors on {pixel_values.device}, got weight on {weight.device}"
    return common_unsupported(weight, bias=bias)


def stem_conv_bn_relu_pool_n_bytes(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: Activation = "relu",
    pool: bool = True,
) -> int:
    """Bytes of a call: pixels, all of which are used, and parameters read once, y written once."""
    n_elements = weight.numel() + bias.numel() + _empty(pixel_values, weight, pool, "meta").numel()
    return pixel_values.nbytes + weight.element_size() * n_elements


def _check(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: Activation,
) -> None:
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
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"stem_conv_bn_relu_pool: bias must be [{weight.shape[0]}], got {list(bias.shape)}"
        )
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
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"stem_conv_bn_relu_pool: activation must be None or one of {sorted(ACTIVATIONS)}, "
            f"got {activation!r}"
        )


def _empty(
    pixel_values: Tensor, weight: Tensor, pool: bool, device: torch.device | str | None = None
) -> Tensor:
    """The result's memory: the strides of channels-last even where sizes are 1."""
    sizes = pixel_values.shape[2:]
    for _ in range(2 if pool else 1):
        sizes = [(size - 1) // 2 + 1 for size in sizes]
    return torch.empty(
        (pixel_values.shape[0], weight.shape[0], *sizes),
        dtype=weight.dtype,
        device=device or weight.device,
        memory_format=torch.channels_last,
    )


@torch.library.custom_op("fastbb::stem_conv_bn_relu_pool", mutates_args=())
def _stem_conv_bn_relu_pool(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: str | None,
    pool: bool,
) -> Tensor:
    y = stem_conv_bn_relu_pool_eager(
        pixel_values, weight, bias, mean=mean, std=std, activation=activation, pool=pool
    )
    return _empty(pixel_values, weight, pool).copy_(y)


@_stem_conv_bn_relu_pool.register_fake
def _(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: str | None,
    pool: bool,
) -> Tensor:
    return _empty(pixel_values, weight, pool)


@_stem_conv_bn_relu_pool.register_kernel("cuda")
def _launch(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: str | None,
    pool: bool,
) -> Tensor:
    from ..triton_kernels.stem_conv_bn_relu_pool import launch

    y = _empty(pixel_values, weight, pool)
    return launch(pixel_values, weight, bias, mean, std, activation, pool, y)
