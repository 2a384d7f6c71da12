"""The modules of a native ConvNeXt, with transformers' names of layers and parameters.

`convnext_maps` computes from their parameters. The forwards of the modules are plain PyTorch, one
call per layer: they run wherever hooks must see the calls, or adapters (LoRA) and other layers were
put inside, in inference and training. All take and return maps [B, C, H, W].
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbb_kernels.ops.grn_linear_residual import global_response_norm

from ..backbone.checkpointing import BlockRunner
from .convnext_forward import run_before
from .convnext_parts import (
    DINOV3_NAMES,
    TRANSFORMERS_GRN_EPS,
    TRANSFORMERS_NAMES,
    Before,
    ConvNextBlockParts,
    ConvNextStageParts,
    LayerNames,
    PatchParts,
    check_block,
)
from .layers import DropPath, MapLayerNorm, cuts_patches
from .parts import Activation, CalledModules, NativeModule, Refused, untouched


class ConvNextGRN(NativeModule):
    """Global response normalization of maps [B, H, W, F]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, features))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        return global_response_norm(x, self.weight, self.bias, TRANSFORMERS_GRN_EPS)


class ConvNextLayer(NativeModule):
    """A block: depthwise convolution, norm, MLP, layer scale, residual.

    Args:
        channels: of the map.
        eps: of the norm.
        activation: of the MLP.
        scale: initial layer scale, or None for no layer scale.
        drop_rate: of stochastic depth.
        has_grn: whether the MLP has a global response normalization.
    """

    names: ClassVar[LayerNames] = TRANSFORMERS_NAMES

    def __init__(
        self,
        channels: int,
        eps: float,
        activation: str,
        scale: float | None,
        drop_rate: float,
        has_grn: bool,
    ) -> None:
        super().__init__()
        names, hidden = self.names, 4 * channels
        conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.add_module(names.conv, conv)
        self.add_module(names.norm, nn.LayerNorm(channels, eps=eps))
        self.add_module(names.fc1, nn.Linear(channels, hidden))
        self.add_module(names.act, Activation(activation))
        self.grn = ConvNextGRN(hidden) if has_grn else None
        self.add_module(names.fc2, nn.Linear(hidden, channels))
        parameter = None if scale is None else nn.Parameter(torch.full((channels,), scale))
        self.register_parameter(names.scale, parameter)
        self.drop_path = DropPath(drop_rate) if drop_rate > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, fc1, act, fc2, scale = (getattr(self, name) for name in self.names)
        y = act(fc1(norm(conv(x).permute(0, 2, 3, 1))))
        y = fc2(y if self.grn is None else self.grn(y))
        y = y if scale is None else scale * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def parts(self) -> ConvNextBlockParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        names = self.names
        act = untouched(getattr(self, names.act), Activation)
        return check_block(
            ConvNextBlockParts(
                owner=self,
                conv=untouched(getattr(self, names.conv), nn.Conv2d),
                norm=untouched(getattr(self, names.norm), nn.LayerNorm),
                fc1=untouched(getattr(self, names.fc1), nn.Linear),
                fc2=untouched(getattr(self, names.fc2), nn.Linear),
                activation=act.name,
                grn=None if self.grn is None else untouched(self.grn, ConvNextGRN),
                scale_name=None if getattr(self, names.scale) is None else names.scale,
                drop_path=untouched(self.drop_path, DropPath, nn.Identity),
            )
        )


class DINOv3ConvNextLayer(ConvNextLayer):
    """A block with the names of DINOv3's."""

    names = DINOV3_NAMES


class ConvNextStage(NativeModule):
    """A stage: norm and convolution that halve the map, then blocks.

    Args:
        before: layers before the blocks.
        blocks: of the stage.
    """

    before_name: ClassVar[str] = "downsampling_layer"

    def __init__(self, before: Sequence[nn.Module], blocks: Sequence[ConvNextLayer]) -> None:
        super().__init__()
        self.add_module(self.before_name, nn.ModuleList(before))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = run_before(tuple(getattr(self, self.before_name)), x)
        for layer in self.layers:
            x = layer(x)
        return x


class DINOv3ConvNextStage(ConvNextStage):
    """A stage with the names of DINOv3's; the first has the stem inside."""

    before_name = "downsample_layers"


class ConvNextEmbeddings(NativeModule):
    """The stem: a convolution of patches and a norm."""

    def __init__(self, n_pixel_channels: int, channels: int, patch: Any, eps: float) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(n_pixel_channels, channels, patch, stride=patch)
        self.layernorm = MapLayerNorm(channels, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return run_before((self.patch_embeddings, self.layernorm), pixel_values)

    def parts(self) -> PatchParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        return patch_parts(self.patch_embeddings, self.layernorm)


class ConvNextEncoder(NativeModule):
    """The stages."""

    def __init__(self, stages: Sequence[ConvNextStage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self, x: Tensor, wanted: Sequence[int], run_block: BlockRunner | None = None
    ) -> list[Tensor]:
        maps = {0: x}
        for index, stage in enumerate(self.stages[: max(wanted)], start=1):
            x = maps[index] = stage(x) if run_block is None else run_block(stage, x)
        return [maps[index] for index in wanted]


def read_stem(embeddings: nn.Module, called: CalledModules) -> Before:
    """Reads the stem; `called` gets it if it has to be called."""
    read = called.read_or_call(
        lambda: untouched(embeddings, ConvNextEmbeddings).parts(),  # type: ignore[arg-type]
        embeddings,
    )
    return read if isinstance(read, PatchParts) else (read,)


def read_stage(stage: Any, called: CalledModules) -> ConvNextStageParts:
    """Reads a stage, except modules that have to be called; `called` gets these."""
    blocks = called.read_blocks(stage, "layers", ConvNextStage, ConvNextLayer)
    if blocks == (stage,):  # it calls what is before its blocks
        return ConvNextStageParts((), blocks)
    before = getattr(stage, stage.before_name)
    if not len(before):
        return ConvNextStageParts((), blocks)
    read = called.read_or_call(lambda: patch_parts(*before), before)
    return ConvNextStageParts(read if isinstance(read, PatchParts) else tuple(read), blocks)


def patch_parts(first: nn.Module, second: nn.Module) -> PatchParts:
    """Reads a convolution of patches and a norm, in either order, of a native backbone.

    Raises:
        Refused: one has to be called.
    """
    norm_first = not isinstance(first, nn.Conv2d)
    norm, conv = (first, second) if norm_first else (second, first)
    found = untouched(conv, nn.Conv2d)
    if not isinstance(found, nn.Conv2d) or not cuts_patches(found):
        raise Refused("its convolution does not cut patches")
    found_norm = untouched(norm, MapLayerNorm)
    assert isinstance(found_norm, nn.LayerNorm)
    return PatchParts(found, found_norm, norm_first)
