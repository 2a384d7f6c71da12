"""ResNet (He et al. 2015), v1.5 and v1, by the semantics of transformers.

torchvision's and timm's plain ResNets compute the same maps, with other names and stem maps.
Upstream: transformers `models/resnet/modeling_resnet.py`.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS

from ..backbone.base import Backbone
from ..backbone.checkpoint import StateDict
from ..backbone.checkpointing import BlockRunner
from ..backbone.configuration import (
    BackboneConfig,
    check_boolean,
    check_choice,
    check_integer,
    check_integers,
    hierarchical_stage_names,
)
from ..backbone.registry import Family, TransformersModel, Upstream, register
from .layers import ConvNorm
from .parts import Activation, CalledModules, NativeModule, Refused, kept_parts, untouched
from .resnet_forward import resnet_maps
from .resnet_parts import ResNetBlockParts, ResNetParts, StemLayer, pools_by_2, timm_parts

REDUCTION = 4  # of the channels inside a bottleneck


class ResNetConfig(BackboneConfig):
    """Configuration of a ResNet backbone: transformers' fields and defaults.

    Args:
        num_channels: channels of the input.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage.
        depths: blocks per stage.
        layer_type: "basic" (ResNet-18, 34) or "bottleneck" (26, 50, 101, 152).
        hidden_act: activation of the stem and after each residual; ReLU is used inside blocks.
        downsample_in_first_stage: whether the first stage halves the map too.
        downsample_in_bottleneck: whether the first 1x1 convolution has the stride (v1), and not the
            3x3 (v1.5).
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
        if layer_type not in ("basic", "bottleneck"):  # the message is transformers'
            raise ValueError(f"layer_type={layer_type} is not one of basic,bottleneck")
        self.layer_type = layer_type
        self.hidden_act = check_choice("hidden_act", hidden_act, list(ACTIVATIONS))
        self.downsample_in_first_stage = check_boolean(
            "downsample_in_first_stage", downsample_in_first_stage
        )
        self.downsample_in_bottleneck = check_boolean(
            "downsample_in_bottleneck", downsample_in_bottleneck
        )
        self._set_stages(hierarchical_stage_names(len(self.depths)), out_features, out_indices)


class ResNetShortCut(NativeModule):
    """A convolution and its batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x))

    def pair(self) -> ConvNorm:
        """Reads the layers; raises `Refused` if one has to be called."""
        norm = untouched(self.normalization, nn.BatchNorm2d, nn.SyncBatchNorm)
        return ConvNorm(untouched(self.convolution, nn.Conv2d), norm)


class ResNetConvLayer(ResNetShortCut):
    """A convolution, its batch norm and its activation, if it has one."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str | None = "relu",
    ) -> None:
        super().__init__(inputs, outputs, kernel_size, stride)
        self.activation = nn.Identity() if activation is None else Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))

    def activation_name(self) -> str | None:
        """Reads the activation; raises `Refused` if it has to be called."""
        activation = untouched(self.activation, Activation, nn.Identity)
        return activation.name if isinstance(activation, Activation) else None


class ResNetLayer(NativeModule):
    """Basic or bottleneck residual block: adds `shortcut` to the convolutions of `layer`."""

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = Activation(config.hidden_act)
        reshapes = inputs != outputs or stride != 1
        self.shortcut = (
            ResNetShortCut(inputs, outputs, stride=stride) if reshapes else nn.Identity()
        )
        if config.layer_type == "basic":
            layers = [
                ResNetConvLayer(inputs, outputs, 3, stride),
                ResNetConvLayer(outputs, outputs, activation=None),
            ]
        else:
            inner = outputs // REDUCTION
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            layers = [
                ResNetConvLayer(inputs, inner, 1, first),
                ResNetConvLayer(inner, inner, 3, second),
                ResNetConvLayer(inner, outputs, 1, activation=None),
            ]
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shortcut(x)
        return self.activation(self.layer(x) + residual)

    def parts(self) -> ResNetBlockParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        found: Any = untouched(self.layer, nn.Sequential)
        layers: list[ResNetConvLayer] = [untouched(layer, ResNetConvLayer) for layer in found]
        if [layer.activation_name() for layer in layers] != [*["relu"] * (len(layers) - 1), None]:
            raise Refused("an activation between its convolutions is not ReLU")
        shortcut = untouched(self.shortcut, ResNetShortCut, nn.Identity)
        return ResNetBlockParts(
            tuple(layer.pair() for layer in layers),
            shortcut.pair() if isinstance(shortcut, ResNetShortCut) else None,
            untouched(self.activation, Activation).name,
        )


class ResNetEmbeddings(NativeModule):
    """The stem with its max pool."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, 7, stride=2, activation=config.hidden_act
        )
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooler(self.embedder(pixel_values))

    def parts(self) -> StemLayer:
        """Reads the layers; raises `Refused` if one has to be called."""
        layer = untouched(self.embedder, ResNetConvLayer)
        if not pools_by_2(untouched(self.pooler, nn.MaxPool2d)):
            raise Refused("its pool is another one")
        return StemLayer(layer.pair(), layer.activation_name())


class ResNetStage(NativeModule):
    """Residual blocks."""

    def __init__(self, config: ResNetConfig, stage: int) -> None:
        super().__init__()
        inputs = config.hidden_sizes[stage - 1] if stage else config.embedding_size
        outputs = config.hidden_sizes[stage]
        halves = stage > 0 or config.downsample_in_first_stage
        self.layers = nn.ModuleList(
            ResNetLayer(
                config, outputs if block else inputs, outputs, 2 if halves and not block else 1
            )
            for block in range(config.depths[stage])
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ResNetEncoder(NativeModule):
    """The stages."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            ResNetStage(config, stage) for stage in range(len(config.depths))
        )

    def forward(
        self, x: Tensor, wanted: Sequence[int], run_block: BlockRunner | None = None
    ) -> list[Tensor]:
        maps = {0: x}
        for index, stage in enumerate(self.stages[: max(wanted)], start=1):
            x = maps[index] = stage(x) if run_block is None else run_block(stage, x)
        return [maps[index] for index in wanted]


class ResNetBackbone(Backbone):
    """ResNet with transformers' parameter names.

    Stages: "stem" (after the max pool), "stage1", ... with channels `embedding_size` and
    `hidden_sizes`; strides 4, 4, 8, 16, 32.
    """

    config_class = ResNetConfig
    config: ResNetConfig
    has_attentions = False
    # frozen norms, as in DETR and related models, do not count batches
    optional_weights = ("*.num_batches_tracked",)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.embedding_size, *config.hidden_sizes]
        self.embedder = ResNetEmbeddings(config)
        self.encoder = ResNetEncoder(config)
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
        indices = [self.stage_names.index(name) for name in wanted]
        parts, _ = self._kept_parts()
        if parts is None:
            stem = self.embedder(pixel_values)
            maps = self.encoder(stem, indices, run_block=self.block_runner())
        else:
            maps = resnet_maps(parts, pixel_values, indices, run_block=self.block_runner())
        return dict(zip(wanted, maps))

    def called_modules(self) -> dict[str, str]:
        return self._kept_parts()[1].by_name(self)

    def _kept_parts(self) -> tuple[ResNetParts | None, CalledModules]:
        return kept_parts(self, self._parts, read=getattr(self.embedder, "pooler", None))

    def _parts(self, called: CalledModules) -> ResNetParts:
        """All layers except those that have to be called; see `kept_parts`."""
        stem, encoder = self.embedder, untouched(self.encoder, ResNetEncoder)
        first = called.read_or_call(lambda: untouched(stem, ResNetEmbeddings).parts(), stem)
        return ResNetParts(
            (first,),
            tuple(
                called.read_blocks(stage, "layers", ResNetStage, ResNetLayer)
                for stage in encoder.stages
            ),
            pool=None if isinstance(first, StemLayer) else _NO_POOL,
        )

    def init_optional_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = torch.tensor(0)


_NO_POOL = nn.Identity()  # a stem that is called pools by itself


def torchvision_resnet(state: StateDict) -> tuple[ResNetConfig, StateDict]:
    """Reads configuration and renamed tensors of torchvision's `resnet18` ... `resnet152`.

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
    if bottleneck:
        inner, per_group = state["layer1.0.conv2.weight"].shape[:2]
        if inner != per_group or inner * REDUCTION != state["layer1.0.conv3.weight"].shape[0]:
            raise ValueError(
                "these are the weights of a wide or grouped ResNet (wide_resnet50_2, "
                "resnext50_32x4d ...), which AutoBackbone.from_pretrained loads by timm's name"
            )
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


def timm_upstream(backbone: ResNetBackbone, size: tuple[int, int]) -> Upstream:
    """Builds timm's features-only ResNet with the weights of a backbone.

    Raises:
        ValueError: timm has no such ResNet.
    """
    import timm

    config = backbone.config
    stages = [backbone.stage_names.index(name) for name in backbone.out_features]
    if min(stages) < 1:
        raise ValueError("timm's ResNet has another map of the stem")
    usual = _torchvision_shape(config.layer_type, *config.depths)
    is_usual = all(getattr(config, name) == value for name, value in usual.items())
    v1 = config.downsample_in_bottleneck or config.downsample_in_first_stage
    if not is_usual or v1 or config.hidden_act != "relu":
        raise ValueError("timm's resnet18 to resnet152 have other widths, strides or activations")
    module = timm.create_model(
        "resnet50" if config.layer_type == "bottleneck" else "resnet18",
        features_only=True,
        out_indices=stages,
        in_chans=config.num_channels,
        layers=tuple(config.depths),
    )
    own = backbone.state_dict()
    module.load_state_dict({name: own[_from_torchvision(name)] for name in module.state_dict()})

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        return list(module(pixel_values))

    return Upstream(f"timm {timm.__version__}, ResNet", module.eval(), maps)


def _torchvision_shape(layer_type: str, *depths: int) -> dict[str, Any]:
    expansion = REDUCTION if layer_type == "bottleneck" else 1
    return {
        "layer_type": layer_type,
        "depths": list(depths),
        "embedding_size": 64,
        "hidden_sizes": [width * expansion for width in (64, 128, 256, 512)],
    }


register(
    Family(
        backbone=ResNetBackbone,
        configs=(ResNetConfig,),
        timm_parts=timm_parts,
        maps=resnet_maps,
        torchvision_models={
            "resnet18": _torchvision_shape("basic", 2, 2, 2, 2),
            "resnet34": _torchvision_shape("basic", 3, 4, 6, 3),
            "resnet50": _torchvision_shape("bottleneck", 3, 4, 6, 3),
            "resnet101": _torchvision_shape("bottleneck", 3, 4, 23, 3),
            "resnet152": _torchvision_shape("bottleneck", 3, 8, 36, 3),
        },
        from_torchvision=torchvision_resnet,
        upstream=lambda backbone: TransformersModel("transformers", "ResNet"),
        timm_upstream=timm_upstream,
    )
)
