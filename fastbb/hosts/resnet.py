"""Residual blocks inside models of transformers, timm and torchvision."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from ..models.layers import ConvNorm
from ..models.resnet_compute import is_plain, pools_by_2, residual_block, timm_block
from ..weights.folding import activation_name
from .region import TransformersRegion, check_parts
from .replacement import Fast, HowToRun, Refused


class _ResNetBlock(Fast):
    """Two (basic) or three (bottleneck) convolutions and a shortcut."""

    reads_settings = True

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        pairs, inner, before, shortcut, last = self.parts(module)
        if not all(map(is_plain, [*pairs, *([] if shortcut is None else [shortcut])])):
            raise Refused("it is not of convolutions and batch norms")
        if any(activation_name(act) != "relu" for act in inner):
            raise Refused("an activation between its convolutions is not ReLU")
        activation = activation_name(last)
        if activation is None:
            raise Refused(f"its activation is a {type(last).__name__}")
        self._pairs, self._before, self._shortcut = pairs, before, shortcut
        self._activation = activation

    def parts(
        self, block: Any
    ) -> tuple[list[ConvNorm], list[nn.Module], list[nn.Module], ConvNorm | None, nn.Module]:
        """Convolutions, activations between them, what runs before the shortcut, it, the last."""
        raise NotImplementedError

    def likeness(self) -> Hashable:
        convs = [*self._pairs, *([] if self._shortcut is None else [self._shortcut])]
        return type(self).__name__, *((p.conv.weight.shape, p.conv.stride) for p in convs)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for module in self._before:
            residual = module(residual)
        return residual_block(x, self._pairs, self._shortcut, self._activation, residual)


class TransformersResNetBlock(_ResNetBlock):
    """ResNetBasicLayer, ResNetBottleNeckLayer, and RT-DETR's, which may pool before a shortcut."""

    def parts(self, block: Any) -> Any:
        pairs = [ConvNorm(part.convolution, part.normalization) for part in block.layer]
        inner = [part.activation for part in block.layer[:-1]]
        if not isinstance(block.layer[-1].activation, nn.Identity):
            raise Refused("it activates before the residual is added")
        parts = list(block.shortcut) if type(block.shortcut) is nn.Sequential else [block.shortcut]
        last: Any
        *before, last = parts
        if isinstance(last, nn.Identity):
            return pairs, inner, before, None, block.activation
        if not hasattr(last, "convolution"):
            raise Refused(f"its shortcut is a {type(last).__name__}")
        return (
            pairs,
            inner,
            before,
            ConvNorm(last.convolution, last.normalization),
            block.activation,
        )


class TransformersResNet(TransformersRegion):
    """ResNetBackbone, and RT-DETR's with its deep stem."""

    reads_settings = True

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        host: Any = module
        stem, pool = host.embedder.embedder, host.embedder.pooler
        parts: list[Any] = list(stem) if isinstance(stem, nn.Sequential) else [stem]
        self._stem = [ConvNorm(part.convolution, part.normalization) for part in parts]
        if not all(map(is_plain, self._stem)):
            raise Refused("its stem is not of convolutions and batch norms")
        if not pools_by_2(pool):
            raise Refused("its stem pools otherwise than a ResNet's")
        self._activations = [activation_name(part.activation) for part in parts]
        if None in self._activations:
            raise Refused(f"the activation of its stem is a {type(parts[0].activation).__name__}")
        stages = host.encoder.stages
        self._stages = [[TransformersResNetBlock(x, how) for x in stage.layers] for stage in stages]

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        names, wanted = list(self.module.stage_names), list(self.module.out_features)
        x = pixel_values
        for pair, activation in zip(self._stem[:-1], self._activations):
            x = pair(x, activation)
        x = self._stem[-1].stem(x, self._activations[-1])
        maps = []
        for index, name in enumerate(names):
            for block in self._stages[index - 1] if index > 0 else ():
                x = block.forward(x)
            if name in wanted:
                maps.append(x)
            if name == wanted[-1]:
                break
        return tuple(maps)


class TorchvisionResNetBlock(_ResNetBlock):
    """BasicBlock and Bottleneck, dilated and grouped ones too."""

    def parts(self, block: Any) -> Any:
        numbers = (1, 2, 3) if hasattr(block, "conv3") else (1, 2)
        pairs = [ConvNorm(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers]
        if block.downsample is None:
            return pairs, [block.relu], [], None, block.relu
        if type(block.downsample) is not nn.Sequential or len(block.downsample) != 2:
            raise Refused(f"its shortcut is a {type(block.downsample).__name__}")
        shortcut: Any = list(block.downsample)
        return pairs, [block.relu], [], ConvNorm(*shortcut), block.relu


class TimmResNetBlock(Fast):
    """BasicBlock and Bottleneck of timm, with their attention and blur pools."""

    reads_settings = True

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        forward = timm_block(module)
        if forward is module:
            raise Refused("it has parts without an op of ours")
        self._forward: Callable[[Tensor], Tensor] = forward

    def likeness(self) -> Hashable:
        return type(self).__name__, *(p.shape for p in self.module.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)


_TRANSFORMERS, _TIMM = "transformers.models", "timm.models.resnet"
_TORCHVISION = "torchvision.models.resnet"
REPLACED: dict[str, type[Fast]] = {
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBackbone": TransformersResNet,
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBackbone": TransformersResNet,
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBasicLayer": TransformersResNetBlock,
    f"{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBottleNeckLayer": TransformersResNetBlock,
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBasicLayer": (
        TransformersResNetBlock
    ),
    f"{_TRANSFORMERS}.rt_detr.modeling_rt_detr_resnet.RTDetrResNetBottleNeckLayer": (
        TransformersResNetBlock
    ),
    f"{_TIMM}.BasicBlock": TimmResNetBlock,
    f"{_TIMM}.Bottleneck": TimmResNetBlock,
    f"{_TORCHVISION}.BasicBlock": TorchvisionResNetBlock,
    f"{_TORCHVISION}.Bottleneck": TorchvisionResNetBlock,
}
