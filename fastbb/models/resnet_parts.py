"""The parts that the forward of ResNets takes, and builders of them for the models of libraries.

Builders find and check layers once. Weights, eps and the settings of convolutions are read at every
call.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layers import ConvNorm, is_foldable
from .parts import Refused, activation_of


@dataclass(frozen=True)
class ResNetBlockParts:
    """A residual block.

    Attributes:
        pairs: two (basic) or three (bottleneck) convolutions, with ReLU between them.
        shortcut: convolution of the residual, or None.
        activation: name of the last activation.
        before: modules that run on the residual before the shortcut.
        blur: module before the last convolution, or None.
        attention: module between the last convolution and the residual, or None.
    """

    pairs: tuple[ConvNorm, ...]
    shortcut: ConvNorm | None
    activation: str
    before: tuple[nn.Module, ...] = ()
    blur: nn.Module | None = None
    attention: nn.Module | None = None

    def convolutions(self) -> tuple[ConvNorm, ...]:
        """All convolutions, the shortcut last."""
        return self.pairs if self.shortcut is None else (*self.pairs, self.shortcut)


class StemLayer(NamedTuple):
    """A convolution of the stem, with its norm and the name of its activation."""

    pair: ConvNorm
    activation: str | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.pair(x, self.activation)


@dataclass(frozen=True)
class ResNetParts:
    """A ResNet.

    Attributes:
        stem: layers before the pool; the modules themselves if the ops do not cover them.
        stages: blocks of each stage; the modules themselves if the ops do not cover them.
        pool: of the stem; None: 3x3 by stride 2, after a `StemLayer`.
        pools_stem_map: whether map 0 is after the pool (transformers) or before it (timm).
    """

    stem: tuple[StemLayer | nn.Module, ...]
    stages: tuple[tuple[ResNetBlockParts | nn.Module, ...], ...]
    pool: nn.Module | None = None
    pools_stem_map: bool = True


# --- the layers of other libraries


def transformers_block(block: Any) -> ResNetBlockParts:
    """Reads a ResNetBasicLayer, a ResNetBottleNeckLayer, or RT-DETR's.

    Raises:
        Refused: the ops do not cover the module. The other builders raise it too.
    """
    if not isinstance(block.layer[-1].activation, nn.Identity):
        raise Refused("it activates before the residual is added")
    parts: list[Any]
    parts = list(block.shortcut) if type(block.shortcut) is nn.Sequential else [block.shortcut]
    *before, last = parts  # RT-DETR may pool before the shortcut
    shortcut = None
    if not isinstance(last, nn.Identity):
        if not hasattr(last, "convolution"):
            raise Refused(f"its shortcut is a {type(last).__name__}")
        shortcut = ConvNorm(last.convolution, last.normalization)
    return _checked(
        ResNetBlockParts(
            tuple(ConvNorm(part.convolution, part.normalization) for part in block.layer),
            shortcut,
            activation_of(block.activation),
            tuple(before),
        ),
        [part.activation for part in block.layer[:-1]],
    )


def torchvision_block(block: Any) -> ResNetBlockParts:
    """Reads torchvision's BasicBlock or Bottleneck, also dilated and grouped ones."""
    shortcut: Any = block.downsample
    if shortcut is not None:
        if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
            raise Refused(f"its shortcut is a {type(shortcut).__name__}")
        conv, norm = shortcut
        shortcut = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked below
    numbers = (1, 2, 3) if hasattr(block, "conv3") else (1, 2)
    parts = ResNetBlockParts(_numbered(block, numbers), shortcut, activation_of(block.relu))
    return _checked(parts, [block.relu])


def timm_block(block: Any) -> ResNetBlockParts:
    """Reads timm's BasicBlock or Bottleneck.

    Channel attention, blur pools and the average pool before a shortcut run as timm's modules. The
    parts are for inference, where stochastic depth and drop block do nothing.
    """
    from timm.models.resnet import BasicBlock, Bottleneck

    if type(block) not in (BasicBlock, Bottleneck):
        raise Refused(f"it is a {type(block).__name__}")
    numbers = (1, 2) if type(block) is BasicBlock else (1, 2, 3)
    before: list[Any] = []
    shortcut: Any = block.downsample
    if shortcut is not None:
        if type(shortcut) is not nn.Sequential or len(shortcut) < 2:
            raise Refused(f"its shortcut is a {type(shortcut).__name__}")
        *before, conv, norm = shortcut
        shortcut = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked below
    *inner, last = (getattr(block, f"act{i}") for i in numbers)
    parts = ResNetBlockParts(
        _numbered(block, numbers),
        shortcut,
        activation_of(last),
        tuple(before),
        None if isinstance(block.aa, nn.Identity) else block.aa,
        block.se,
    )
    return _checked(parts, inner)


def _numbered(block: Any, numbers: tuple[int, ...]) -> tuple[ConvNorm, ...]:
    return tuple(ConvNorm(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers)


def _checked(parts: ResNetBlockParts, inner: list[nn.Module]) -> ResNetBlockParts:
    """Returns the parts of a block if its layers and inner activations are the usual ones."""
    if not all(map(is_plain, parts.convolutions())):
        raise Refused("it is not of convolutions and batch norms")
    if any(activation_of(act) != "relu" for act in inner):
        raise Refused("an activation between its convolutions is not ReLU")
    return parts


def transformers_parts(backbone: Any) -> ResNetParts:
    """Reads transformers' ResNetBackbone, or RT-DETR's with its deep stem."""
    stem, pool = backbone.embedder.embedder, backbone.embedder.pooler
    layers: list[Any] = list(stem) if isinstance(stem, nn.Sequential) else [stem]
    pairs = [ConvNorm(layer.convolution, layer.normalization) for layer in layers]
    if not all(map(is_plain, pairs)):
        raise Refused("its stem is not of convolutions and batch norms")
    if not pools_by_2(pool):
        raise Refused("its stem pools otherwise than a ResNet's")
    names = [activation_of(layer.activation) for layer in layers]
    return ResNetParts(
        tuple(map(StemLayer, pairs, names)),
        tuple(tuple(map(transformers_block, stage.layers)) for stage in backbone.encoder.stages),
    )


def timm_parts(features: nn.Module) -> ResNetParts:
    """Reads timm's features-only ResNet; blocks and stems that no op covers stay modules."""
    parts = dict(features.named_children())
    stem = [parts.pop(name, None) for name in ("conv1", "bn1", "act1", "maxpool")]
    if None in stem or not all(type(stage) is nn.Sequential for stage in parts.values()):
        raise Refused("it is no ResNet")
    conv, norm, act, pool = (part for part in stem if part is not None)
    pair = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked here
    stages = tuple(tuple(map(_timm_block, stage.children())) for stage in parts.values())
    if is_plain(pair) and type(act) is nn.ReLU and pools_by_2(pool):
        return ResNetParts((StemLayer(pair, "relu"),), stages, pools_stem_map=False)
    return ResNetParts((conv, norm, act), stages, pool, pools_stem_map=False)


def _timm_block(block: nn.Module) -> ResNetBlockParts | nn.Module:
    try:
        return timm_block(block)
    except Refused:
        return block


def pools_by_2(pool: nn.Module) -> bool:
    """Whether a module computes the pool of `stem_conv_bn_relu_pool`."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
        return False
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)


def is_plain(pair: ConvNorm) -> bool:
    """Whether it is exactly torch's convolution and a batch norm, frozen or not."""
    return type(pair.conv) is nn.Conv2d and is_foldable(pair.norm)
