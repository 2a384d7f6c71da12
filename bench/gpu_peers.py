"""Models of `gpu.py`, as transformers, timm and fastbb build them.

All take the same random weights, with transformers' names, and return the maps of the selected
stages.
"""

from dataclasses import dataclass
from typing import Any

import torch
from gpu_measure import PRECISIONS
from torch import Tensor, nn

from fastbb import AutoBackbone, BackboneOutput, ResNetConfig, SwinConfig
from fastbb.backbone.registry import Upstream, family_of

StateDict = dict[str, Tensor]
STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass(frozen=True)
class Model:
    """An architecture, as each library names it.

    Attributes:
        title: in tables.
        family: "swin" or "resnet".
        config: fields of transformers' configuration and ours.
    """

    title: str
    family: str
    config: dict[str, Any]


_SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
MODELS = {
    "swin_t": Model("Swin-T", "swin", {}),
    "resnet50": Model("ResNet-50", "resnet", {}),
    "swin_b": Model("Swin-B", "swin", _SWIN_B),
}
_TINY_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_TINY_RESNET = [1, 1]
TINY_MODELS = {
    "swin_t": Model("", "swin", _TINY_SWIN),
    "resnet50": Model("", "resnet", {"depths": _TINY_RESNET, "hidden_sizes": [256, 512]}),
}
TINY_MODELS["swin_b"] = TINY_MODELS["swin_t"]


@dataclass(frozen=True)
class Cell:
    """A model, a precision and a batch, which all columns run.

    Attributes:
        name: of the model, a key of `MODELS`.
        dtype: a precision, a key of `PRECISIONS`.
        batch: images per call.
        size: height and width of the images, pixels.
        tiny: whether to run a miniature of the model, in a dry run.
        stages: those with returned maps.
    """

    name: str
    dtype: str
    batch: int
    size: int
    tiny: bool = False
    stages: tuple[str, ...] = STAGES

    @property
    def model(self) -> Model:
        return (TINY_MODELS if self.tiny else MODELS)[self.name]

    @property
    def torch_dtype(self) -> torch.dtype:
        return PRECISIONS[self.dtype]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}, batch {self.batch}"


def random_weights(cell: Cell) -> StateDict:
    """Makes seeded fp32 weights with unit gain; no bias is zero and no norm is the identity."""
    generator = torch.Generator().manual_seed(0)
    state = fastbb_model(cell).state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and not name.endswith("bias_table"):
            std = tensor[0].numel() ** -0.5
        elif name.endswith(("running_var", ".weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            continue
        else:
            std = 0.3
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return state


def transformers_model(cell: Cell) -> Any:
    import transformers

    config = {"swin": transformers.SwinConfig, "resnet": transformers.ResNetConfig}
    config = config[cell.model.family](out_features=list(cell.stages), **cell.model.config)
    return transformers.AutoBackbone.from_config(config).eval()


class FeatureMaps(nn.Module):
    """The maps of a backbone as a tuple, which every exporter understands."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(pixels).feature_maps)


def load_timm(cell: Cell, state: StateDict) -> nn.Module:
    """timm's model with these weights; it returns transformers' maps, except one window's."""
    backbone = fastbb_model(cell)
    backbone.load_state_dict(state)
    find = family_of(cell.model.family)[0].timm_upstream
    assert find is not None
    return FeatureMaps(_Called(find(backbone, (cell.size, cell.size)))).to(cell.torch_dtype)


class _Called(nn.Module):
    """A model of `timm_upstream` as a backbone."""

    def __init__(self, upstream: Upstream) -> None:
        super().__init__()
        self.model, self._maps = upstream.module, upstream.maps

    def forward(self, pixels: Tensor) -> BackboneOutput:
        return BackboneOutput(feature_maps=tuple(self._maps(self.model, pixels)))


def fastbb_model(cell: Cell) -> Any:
    config = {"swin": SwinConfig, "resnet": ResNetConfig}[cell.model.family]
    config = config(out_features=list(cell.stages), **cell.model.config)
    return AutoBackbone.from_config(config).eval()
