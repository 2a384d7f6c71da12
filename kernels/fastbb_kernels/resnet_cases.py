"""The calls of one forward of a ResNet, at the shapes of real models and of small variants.

Depthwise convolutions, which ResNets do not have, come from EfficientNet-B0 and MobileNetV3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .case import Case, Family, Random

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# channels for which `bottleneck_tail` has a kernel
TAIL_CHANNELS = (64, 128)


@dataclass(frozen=True)
class ResNetShape:
    """Parameters of the shapes of a ResNet: blocks per stage, inner channels of the first stage."""

    name: str
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    channels: int = 64


RESNETS = {
    shape.name: shape
    for shape in (
        ResNetShape("resnet18", "basic", (2, 2, 2, 2)),
        ResNetShape("resnet50", "bottleneck", (3, 4, 6, 3)),
        ResNetShape("resnet101", "bottleneck", (3, 4, 23, 3)),
    )
}


def resnet_cases(shape: ResNetShape, size: tuple[int, int], batch: int) -> Iterator[Case]:
    """Yields each distinct call of one forward of a ResNet (v1.5).

    Args:
        shape: the model.
        size: height and width of the image in pixels.
        batch: images.
    """
    pixels = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    prefix = f"{shape.name}-{pixels}-b{batch}"
    yield Case("stem_conv_bn_relu_pool", f"{prefix}-stem", _stem(batch, size, shape.channels))
    height, width = (_half(_half(side)) for side in size)
    inputs, expansion = shape.channels, 1 if shape.block == "basic" else 4
    for stage, depth in enumerate(shape.depths):
        where = f"{prefix}-stage{stage + 1}"
        inner = shape.channels << stage
        outputs = inner * expansion
        for block in range(min(depth, 2)):  # the others have the shapes of the second
            at = f"{where}-block{block + 1}"
            stride = 2 if stage and not block else 1
            before = (batch, inputs, height, width)
            height, width = (-(-side // stride) for side in (height, width))
            mid = (batch, inner, height, width)
            reshapes = inputs != outputs or stride > 1
            if shape.block == "basic":
                yield Case("conv3x3_bn_act", f"{at}-conv1", _conv(before, inner, 3, stride))
                if reshapes:
                    shortcut = _conv(before, outputs, 1, stride, activation=None)
                    yield Case("conv1x1_bn_act", f"{at}-shortcut", shortcut)
                yield Case("conv3x3_bn_act", f"{at}-conv2", _conv(mid, outputs, 3, residual=True))
            else:
                yield Case("conv1x1_bn_act", f"{at}-reduce", _conv(before, inner, 1))
                wide = (batch, inner, *before[2:])
                yield Case("conv3x3_bn_act", f"{at}-conv", _conv(wide, inner, 3, stride))
                if stride > 1:  # no map has that shape and could be cuDNN's residual
                    yield Case("bias_act", f"{at}-bias", _bias(mid))
                if reshapes:
                    yield Case("conv1x1_dual", f"{at}-dual", _dual(mid, before, outputs, stride))
                else:
                    expand = _conv(mid, outputs, 1, residual=True)
                    yield Case("conv1x1_bn_act", f"{at}-expand", expand)
                    if inner in TAIL_CHANNELS:
                        yield Case("bottleneck_tail", f"{at}-tail", _tail(mid, outputs))
            inputs = outputs


def stem_cases(size: tuple[int, int], batch: int, name: str) -> Iterator[Case]:
    """Yields further calls of a stem: on decoded photos (uint8), and without a pool."""
    yield Case("stem_conv_bn_relu_pool", f"{name}-photos", _stem(batch, size, 16, photos=True))
    yield Case("stem_conv_bn_relu_pool", f"{name}-no-pool", _stem(batch, size, 16, pool=False))


def epilogue_cases(name: str, x: tuple[int, int, int, int]) -> Iterator[Case]:
    """Yields further calls of `bias_act`: with a residual, and with other activations."""
    yield Case("bias_act", f"{name}-residual", _bias(x, residual=True))
    yield Case("bias_act", f"{name}-silu", _bias(x, activation="silu"))


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution of a mobile network: channels, side of the map, kernel, stride."""

    channels: int
    side: int
    kernel: int
    stride: int
    activation: str


# of EfficientNet-B0 and MobileNetV3-Large: the first, the widest, each kernel size and stride
MOBILE = (
    Depthwise(32, 112, 3, 1, "silu"),
    Depthwise(96, 112, 3, 2, "silu"),
    Depthwise(144, 56, 5, 2, "silu"),
    Depthwise(480, 14, 5, 1, "silu"),
    Depthwise(1152, 7, 5, 1, "silu"),
    Depthwise(200, 14, 3, 1, "hardswish"),
    Depthwise(64, 112, 3, 2, "relu"),
)


def mobile_cases(shapes: tuple[Depthwise, ...], batch: int, name: str = "mobile") -> Iterator[Case]:
    """Yields the depthwise calls of mobile networks."""
    for shape in shapes:
        call = f"{shape.channels}x{shape.side}-k{shape.kernel}-s{shape.stride}"
        x = (batch, shape.channels, shape.side, shape.side)
        make = _conv(
            x,
            shape.channels,
            shape.kernel,
            shape.stride,
            activation=shape.activation,
            depthwise=True,
        )
        yield Case("depthwise_conv_bn_act", f"{name}-224-b{batch}-{call}", make)


_Shape = tuple[int, int, int, int]
_Make = Callable[[Random], dict[str, Any]]


def _half(side: int) -> int:
    return (side + 1) // 2


def _map(random: Random, shape: _Shape) -> Tensor:
    return random.normal(*shape).to(memory_format=torch.channels_last)


def _weight(random: Random, *shape: int) -> Tensor:
    weight = random.weight(*shape)
    if shape[1] == 1:  # depthwise, in the memory format of `fastbb.fold`
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return weight.to(memory_format=torch.channels_last)


def _stem(
    batch: int, size: tuple[int, int], channels: int, photos: bool = False, pool: bool = True
) -> _Make:
    def make(random: Random) -> dict[str, Any]:
        arguments = {
            "pixel_values": random.normal(batch, 3, *size),
            "weight": _weight(random, channels, 3, 7, 7),
            "bias": random.normal(channels),
            "pool": pool,
        }
        if photos:
            pixels = random.pixels(batch, *size, 3).permute(0, 3, 1, 2)
            arguments |= {"pixel_values": pixels, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        return arguments

    return make


def _conv(
    x: _Shape,
    outputs: int,
    kernel: int,
    stride: int = 1,
    residual: bool = False,
    activation: str | None = "relu",
    depthwise: bool = False,
) -> _Make:
    batch, inputs, height, width = x
    y = (batch, outputs, -(-height // stride), -(-width // stride))

    def make(random: Random) -> dict[str, Any]:
        arguments = {
            "x": _map(random, x),
            "weight": _weight(random, outputs, 1 if depthwise else inputs, kernel, kernel),
            "bias": random.normal(outputs),
            "stride": stride,
            "activation": activation,
        }
        return {**arguments, "residual": _map(random, y)} if residual else arguments

    return make


def _bias(x: _Shape, residual: bool = False, activation: str | None = "relu") -> _Make:
    def make(random: Random) -> dict[str, Any]:
        arguments = {
            "x": _map(random, x),
            "bias": random.normal(x[1]),
            "activation": activation,
        }
        return {**arguments, "residual": _map(random, x)} if residual else arguments

    return make


def _dual(x: _Shape, shortcut: _Shape, outputs: int, stride: int) -> _Make:
    def make(random: Random) -> dict[str, Any]:
        return {
            "x": _map(random, x),
            "weight": _weight(random, outputs, x[1], 1, 1),
            "shortcut": _map(random, shortcut),
            "shortcut_weight": _weight(random, outputs, shortcut[1], 1, 1),
            "bias": random.normal(outputs),
            "stride": stride,
            "activation": "relu",
        }

    return make


def _tail(x: _Shape, outputs: int) -> _Make:
    batch, channels, height, width = x

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": _map(random, x),
            "weight": _weight(random, channels, channels, 3, 3),
            "bias": random.normal(channels),
            "expand_weight": _weight(random, outputs, channels, 1, 1),
            "expand_bias": random.normal(outputs),
            "residual": _map(random, (batch, outputs, height, width)),
        }

    return make


def _model_cases(model: str, size: tuple[int, int], batch: int) -> Iterator[Case]:
    return resnet_cases(RESNETS[model], size, batch)


def _more_checked() -> Iterator[Case]:
    # a 3x3 with a residual and a strided 1x1, which ResNet-50 does not have
    yield from _model_cases("resnet18", (224, 224), 64)
    yield from epilogue_cases("resnet50-224-b64-stage1", (64, 64, 56, 56))
    yield from mobile_cases(MOBILE, 64)


def _small_cases() -> Iterator[Case]:
    # odd maps at every stride; bottleneck tails of a width with a kernel
    yield from resnet_cases(ResNetShape("basic", "basic", (2, 1), 16), (37, 50), 2)
    yield from resnet_cases(ResNetShape("bottleneck", "bottleneck", (2, 2), 16), (45, 38), 2)
    yield from resnet_cases(ResNetShape("tail", "bottleneck", (2,), 64), (29, 26), 1)
    yield from stem_cases((19, 25), 2, "small")
    yield from epilogue_cases("small", (2, 24, 7, 5))
    mobile = (Depthwise(24, 9, 3, 1, "silu"), Depthwise(40, 11, 5, 2, "hardswish"))
    yield from mobile_cases(mobile, 2, "small")


FAMILY = Family(
    small=_small_cases,
    models=tuple(RESNETS),
    model_cases=_model_cases,
    checked_models=("resnet50",),
    more_checked=_more_checked,
    more_real=lambda batch: mobile_cases(MOBILE, batch),
)
