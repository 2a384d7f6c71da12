"""ResNet (He et al. 2015), v1.5 and v1, by the semantics of transformers.

torchvision's and timm's plain ResNets compute the same maps; only names and stems differ.
Upstream: transformers `models/resnet/modeling_resnet.py`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS

from ..backbone import Backbone
from ..checkpoint import StateDict, find_prefix, strip_prefix
from ..configuration import (
    BackboneConfig,
    check_boolean,
    check_choice,
    check_integer,
    check_integers,
    hierarchical_stage_names,
)
from ..layers import ConvNorm, check_untouched, is_plain_batch_norm
from ..registry import Family, StagesForward, register

REDUCTION = 4  # of the channels inside a bottleneck


class ResNetConfig(BackboneConfig):
    """Configuration of a ResNet backbone: transformers' fields and defaults.

    Args:
        num_channels: channels of the input.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage.
        depths: blocks per stage.
        layer_type: "basic" (ResNet-18, 34) or "bottleneck" (26, 50, 101, 152).
        hidden_act: activation of the stem and after each residual; inside blocks it is ReLU.
        downsample_in_first_stage: whether the first stage halves the map too.
        downsample_in_bottleneck: stride in the first 1x1 convolution (v1), not the 3x3 (v1.5).
        out_features: names of the stages to return.
        out_indices: indices of the stages to return: 0 is the stem, 1 the first stage.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "resnet"

    def __init__(
        self,
        *,
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "bottleneck",
        hidden_act: str = "relu",
        downsample_in_first_stage: bool = False,
        downsample_in_bottleneck: bool = False,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self.num_channels = check_integer("num_channels", num_channels)
        self.embedding_size = check_integer("embedding_size", embedding_size)
        self.depths = check_integers("depths", depths)
        self.hidden_sizes = check_integers("hidden_sizes", hidden_sizes, len(self.depths))
        self.layer_type = check_choice("layer_type", layer_type, ("basic", "bottleneck"))
        self.hidden_act = check_choice("hidden_act", hidden_act, list(ACTIVATIONS))
        self.downsample_in_first_stage = check_boolean(
            "downsample_in_first_stage", downsample_in_first_stage
        )
        self.downsample_in_bottleneck = check_boolean(
            "downsample_in_bottleneck", downsample_in_bottleneck
        )
        self._set_stages(hierarchical_stage_names(len(self.depths)), out_features, out_indices)


class _ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(outputs)

    @property
    def pair(self) -> ConvNorm:
        return ConvNorm(self.convolution, self.normalization)


class _Block(nn.Module):
    """Basic or bottleneck residual block: the convolutions of `layer`, then `shortcut` added."""

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        reshapes = inputs != outputs or stride != 1
        self.shortcut = _ConvNorm(inputs, outputs, 1, stride) if reshapes else nn.Identity()
        if config.layer_type == "basic":
            layers = [_ConvNorm(inputs, outputs, 3, stride), _ConvNorm(outputs, outputs)]
        else:
            inner = outputs // REDUCTION
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            layers = [
                _ConvNorm(inputs, inner, 1, first),
                _ConvNorm(inner, inner, 3, second),
                _ConvNorm(inner, outputs, 1),
            ]
        self.layer = nn.ModuleList(layers)

    def apply_to(self, x: Tensor, activation: str) -> Tensor:
        """[B, C, H, W] -> [B, C', h, w]."""
        pairs = [layer.pair for layer in self.layer if isinstance(layer, _ConvNorm)]
        shortcut = self.shortcut.pair if isinstance(self.shortcut, _ConvNorm) else None
        return residual_block(x, pairs, shortcut, activation)


def residual_block(
    x: Tensor,
    pairs: Sequence[ConvNorm],
    shortcut: ConvNorm | None,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Basic or bottleneck block: the convolutions with ReLU between them, then the residual.

    Args:
        x: [B, C, H, W].
        pairs: two (basic) or three (bottleneck) convolutions.
        shortcut: the convolution of the residual, or None.
        activation: name of the last activation.
        residual: [B, C_s, H_s, W_s] if it is not `x`.

    Returns:
        [B, C', h, w].
    """
    residual = x if residual is None else residual
    if len(pairs) == 3 and shortcut is None:
        first, second, last = pairs
        return second.tail(first(x, "relu"), last, residual, activation)
    *inner, last = pairs
    for pair in inner:
        x = pair(x, "relu")
    return last.end(x, residual, shortcut, activation)


class _Embedder(nn.Module):
    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.embedder = _ConvNorm(config.num_channels, config.embedding_size, 7, stride=2)


class _Stage(nn.Module):
    def __init__(self, config: ResNetConfig, stage: int) -> None:
        super().__init__()
        inputs = config.hidden_sizes[stage - 1] if stage else config.embedding_size
        outputs = config.hidden_sizes[stage]
        halves = stage > 0 or config.downsample_in_first_stage
        self.layers = nn.ModuleList(
            _Block(config, outputs if block else inputs, outputs, 2 if halves and not block else 1)
            for block in range(config.depths[stage])
        )


class _Encoder(nn.Module):
    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Stage(config, stage) for stage in range(len(config.depths)))


class ResNetBackbone(Backbone):
    """ResNet with transformers' parameter names.

    Stages: "stem" (after the max pool), "stage1", ... with channels `embedding_size` and
    `hidden_sizes`; strides 4, 4, 8, 16, 32.
    """

    config_class = ResNetConfig
    config: ResNetConfig
    has_attentions = False
    # frozen norms of DETR and its relatives do not count batches
    optional_weights = ("*.num_batches_tracked",)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        config = self.config  # ours, where transformers' came
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.embedding_size, *config.hidden_sizes]
        self.embedder = _Embedder(config)
        self.encoder = _Encoder(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        check_untouched(self)
        activation = self.config.hidden_act
        stages: dict[str, Tensor] = {}
        x = self.embedder.embedder.pair.stem(pixel_values, activation)
        for index, name in enumerate(self.stage_names):
            if index > 0:
                stage = self.encoder.stages[index - 1]
                assert isinstance(stage, _Stage)
                for block in stage.layers:
                    assert isinstance(block, _Block)
                    x = self.run_block(block.apply_to, x, activation)
            if name in wanted:
                stages[name] = x
            if name == wanted[-1]:
                break
        return stages

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: nn.Module
    ) -> tuple[StateDict, str, list[str]]:
        prefix = find_prefix(state, list(backbone.state_dict()), "ResNet")
        found, outside = strip_prefix(state, prefix)
        return found, prefix, outside

    def init_optional_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = torch.tensor(0)


def torchvision_resnet(state: StateDict) -> tuple[ResNetConfig, StateDict]:
    """Configuration and renamed tensors of a torchvision `resnet18` ... `resnet152` state dict.

    Raises:
        ValueError: the tensors are not those of such a model.
    """
    blocks = [re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name) for name in state]
    stages = sorted({int(match[1]) for match in blocks if match})
    if not stages or "conv1.weight" not in state:
        raise ValueError(
            "wanted the state dict of torchvision's resnet18, 34, 50, 101 or 152; "
            f"got tensors such as {sorted(state)[:5]}"
        )
    bottleneck = "layer1.0.conv3.weight" in state
    last = 3 if bottleneck else 2
    stem = state["conv1.weight"]
    config = ResNetConfig(
        num_channels=stem.shape[1],
        embedding_size=stem.shape[0],
        hidden_sizes=[state[f"layer{s}.0.conv{last}.weight"].shape[0] for s in stages],
        depths=[sum(m is not None and int(m[1]) == s for m in blocks) for s in stages],
        layer_type="bottleneck" if bottleneck else "basic",
    )
    return config, {
        _from_torchvision(name): tensor
        for name, tensor in state.items()
        if not name.startswith("fc.")
    }


def _from_torchvision(name: str) -> str:
    """transformers' name of a torchvision or timm tensor of a plain ResNet."""
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.(downsample\.|conv|bn)(\d)\.(.+)", name)
    if match is None:
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        return re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    stage, block, kind, index, parameter = match.groups()
    prefix = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if kind == "downsample.":
        part = "convolution" if index == "0" else "normalization"
        return f"{prefix}.shortcut.{part}.{parameter}"
    part = "convolution" if kind == "conv" else "normalization"
    return f"{prefix}.layer.{int(index) - 1}.{part}.{parameter}"


def timm_forward(features: nn.Module) -> StagesForward | None:
    """A forward over the parameters of timm's features-only ResNet; None if it is not one.

    A block or stem with parts that have no op of ours runs as timm's module.
    Stage 0 is the stem before the pool (stride 2), as timm counts.
    """
    parts = dict(features.named_children())
    stem = [parts.pop(name, None) for name in ("conv1", "bn1", "act1", "maxpool")]
    if None in stem or not all(type(stage) is nn.Sequential for stage in parts.values()):
        return None
    conv, norm, act, pool = (part for part in stem if part is not None)
    pair = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked here
    fused = _is_plain(pair) and type(act) is nn.ReLU and _pools_by_2(pool)
    stages = [[timm_block(block) for block in stage.children()] for stage in parts.values()]

    def forward(pixel_values: Tensor, indices: Sequence[int]) -> list[Tensor]:
        maps = {}
        pooled = fused and 0 not in indices
        if fused:
            x = pair.stem(pixel_values, "relu", pool=pooled)
        else:
            x = act(norm(conv(pixel_values)))
        if not pooled:
            maps[0] = x
            x = pool(x) if max(indices) else x
        for index, stage in enumerate(stages[: max(indices)], start=1):
            for block in stage:
                x = block(x)
            maps[index] = x
        return [maps[index] for index in indices]

    return forward


def timm_block(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """timm's residual block as calls of our ops; the block itself if they do not cover it.

    Channel attention, blur pools and the average pool before a shortcut run as timm's modules. In
    inference, where this is for, stochastic depth and drop block do nothing.
    """
    from timm.models.resnet import BasicBlock, Bottleneck

    if type(block) not in (BasicBlock, Bottleneck):
        return block
    parts: Any = block
    numbers = (1, 2) if type(block) is BasicBlock else (1, 2, 3)
    pairs = [ConvNorm(getattr(parts, f"conv{i}"), getattr(parts, f"bn{i}")) for i in numbers]
    acts = [getattr(parts, f"act{i}") for i in numbers]
    before, shortcut = _timm_shortcut(parts.downsample)
    covered = (
        all(type(act) is nn.ReLU for act in acts)
        and all(_is_plain(pair) for pair in pairs)
        and (parts.downsample is None or shortcut is not None)
    )
    if not covered:
        return block
    blur = None if isinstance(parts.aa, nn.Identity) else parts.aa

    def forward(x: Tensor) -> Tensor:
        residual = x
        for module in before:
            residual = module(residual)
        if blur is None and parts.se is None:
            return residual_block(x, pairs, shortcut, "relu", residual)
        *inner, last = pairs
        for pair in inner:
            x = pair(x, "relu")
        x = x if blur is None else blur(x)
        if parts.se is None:
            return last.end(x, residual, shortcut, "relu")
        x = parts.se(last(x))
        x += residual if shortcut is None else shortcut(residual)
        return F.relu_(x)

    return forward


def _timm_shortcut(downsample: nn.Module | None) -> tuple[list[nn.Module], ConvNorm | None]:
    """What runs before the convolution of a shortcut, and it with its norm, if it has these."""
    if type(downsample) is not nn.Sequential or len(downsample) < 2:
        return [], None
    *before, conv, norm = downsample
    pair = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked here
    return before, pair if _is_plain(pair) else None


def _pools_by_2(pool: nn.Module) -> bool:
    """Whether a pool is the one of `stem_conv_bn_relu_pool`."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
        return False
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)


def _is_plain(pair: ConvNorm) -> bool:
    return type(pair.conv) is nn.Conv2d and is_plain_batch_norm(pair.norm)


register(
    Family(
        backbone=ResNetBackbone,
        configs=(ResNetConfig,),
        timm_forward=timm_forward,
        torchvision_names=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        from_torchvision=torchvision_resnet,
    )
)
