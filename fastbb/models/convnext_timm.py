"""timm's ConvNeXt: its layers for the forward, and its model with the weights of a backbone."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.registry import Upstream
from .convnext_parts import (
    DINOV3_NAMES,
    TRANSFORMERS_NAMES,
    Before,
    ConvNextBlockParts,
    ConvNextParts,
    ConvNextStageParts,
    read_block,
    read_patches,
)
from .parts import Refused

_TIMM_EPS = 1e-6


def timm_block(block: Any) -> ConvNextBlockParts:
    """Reads timm's ConvNeXtBlock.

    Raises:
        Refused: the ops do not cover the module.
    """
    mlp = block.mlp
    if type(block.shortcut) is not nn.Identity:
        raise Refused("its shortcut is not the identity")
    if type(getattr(mlp, "norm", nn.Identity())) is not nn.Identity:
        raise Refused("its MLP has a norm")
    return read_block(
        block,
        (block.conv_dw, block.norm, mlp.fc1, mlp.fc2),
        activation=mlp.act,
        grn=getattr(mlp, "grn", None),
        scale_name=None if block.gamma is None else "gamma",
    )


def timm_parts(features: nn.Module) -> ConvNextParts:
    """Reads timm's features-only ConvNeXt; layers that no op covers stay modules."""
    from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage

    children: list[Any] = list(features.children())
    stages = [child for child in children if type(child) is ConvNeXtStage]
    stem = children[: len(children) - len(stages)]
    if not stages or children[len(stem) :] != stages:
        raise Refused("it is no ConvNeXt")

    def block(module: nn.Module) -> ConvNextBlockParts | nn.Module:
        try:
            return timm_block(module) if type(module) is ConvNeXtBlock else module
        except Refused:
            return module

    return ConvNextParts(
        _before(*stem),
        tuple(
            ConvNextStageParts(_before(*_layers(stage)), tuple(map(block, stage.blocks)))
            for stage in stages
        ),
        has_stem=False,
    )


def _layers(stage: Any) -> list[nn.Module]:
    """The norm and the convolution before the blocks of a stage, if it has them."""
    downsample = stage.downsample
    if type(downsample) is nn.Identity:
        return []
    return list(downsample) if type(downsample) is nn.Sequential else [downsample]


def _before(*layers: nn.Module) -> Before:
    try:
        return read_patches(*layers) if len(layers) == 2 else layers
    except Refused:
        return layers


def timm_upstream(backbone: Any, size: tuple[int, int]) -> Upstream:
    """Builds timm's features-only ConvNeXt with the weights of a backbone.

    timm leaves out the norms of the maps; they are computed after its forward.

    Raises:
        ValueError: timm has no such ConvNeXt.
    """
    import timm

    config, names = backbone.config, backbone.out_features
    stages = [backbone.stage_names.index(name) - 1 for name in names]
    if not stages or min(stages) < 0:
        raise ValueError("timm's ConvNeXt has no map of the stem")
    eps = next(m.eps for m in backbone.modules() if isinstance(m, nn.LayerNorm))
    patch = getattr(config, "patch_size", 4)
    if len(config.depths) != 4 or eps != _TIMM_EPS or not isinstance(patch, int):
        raise ValueError("timm has no ConvNeXt with this number of stages, eps or patch")
    own = backbone.state_dict()
    scaled = any(name.endswith(_SCALES) for name in own)
    options: dict[str, Any] = {"ls_init_value": 1.0} if scaled else {}
    module = timm.create_model(
        "convnextv2_tiny",  # whose default is no layer scale
        features_only=True,
        out_indices=stages,
        in_chans=config.num_channels,
        patch_size=patch,
        depths=tuple(config.depths),
        dims=tuple(config.hidden_sizes[:4]),
        act_layer=config.hidden_act,
        use_grn=any(".grn." in name for name in own),
        **options,
    )
    ours = {_timm_name(name): tensor for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(ours[name].view(tensor.shape))
    norms = [backbone.hidden_states_norms[n] for n in names if n in backbone.hidden_states_norms]
    model = nn.ModuleDict({"timm": module, "norms": nn.ModuleList(copy.deepcopy(norms))})

    def maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
        found = model["timm"](pixel_values)
        return [norm(x) for norm, x in zip(model["norms"], found)] if norms else found

    return Upstream(f"timm {timm.__version__}, ConvNeXt", model.eval(), maps)


_SCALES = (TRANSFORMERS_NAMES.scale, f".{DINOV3_NAMES.scale}")
_IN_BLOCK = {
    ours: timm
    for names in (TRANSFORMERS_NAMES, DINOV3_NAMES)
    for ours, timm in zip(names, ("conv_dw", "norm", "mlp.fc1", "mlp.act", "mlp.fc2", "gamma"))
} | {"grn": "mlp.grn"}


def _timm_name(name: str) -> str:
    """The name in timm's features-only model of a tensor by transformers' name."""
    match = re.fullmatch(r"(?:encoder|model)\.stages\.(\d+)\.layers\.(\d+)\.(\w+)(.*)", name)
    if match is not None:
        stage, block, layer, parameter = match.groups()
        return f"stages_{stage}.blocks.{block}.{_IN_BLOCK[layer]}{parameter}"
    name = re.sub(r"^embeddings\.patch_embeddings", "stem_0", name)
    name = re.sub(r"^embeddings\.layernorm", "stem_1", name)
    name = re.sub(r"^model\.stages\.0\.downsample_layers\.", "stem_", name)
    return re.sub(
        r"^(?:encoder|model)\.stages\.(\d+)\.downsampl\w+\.", r"stages_\1.downsample.", name
    )
