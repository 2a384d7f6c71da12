"""Names of Swin's weights in transformers' files, and in torchvision's and timm's models."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.checkpoint import StateDict
from ..backbone.registry import Upstream

# names on disk (transformers 4.x, and 5.x when saving) -> names in memory (5.x)
_RENAMES = (
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    (
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def in_memory_name(name: str) -> str:
    """The name in memory of a tensor with any of transformers' names."""
    for old, new in _RENAMES:
        if f".{old}" in name:
            return name.replace(f".{old}", f".{new}")
    return name


def legacy_name(name: str) -> str:
    """The name on disk, apart from the prefix, of a tensor with a name in memory."""
    for old, new in _RENAMES:
        if f".{new}" in name:
            return name.replace(f".{new}", f".{old}")
    return name


def on_disk_name(name: str) -> str:
    """The name that transformers writes for a tensor with a name in memory."""
    # transformers removes the prefix of embeddings and encoder, and keeps that of the last norm
    return legacy_name(re.sub(r"^swin\.(?=embeddings|encoder)", "", name))


def stage_norm_name(name: str) -> str:
    """The name by stage of a norm that MaskFormer numbers from the first stage."""
    return re.sub(
        r"^hidden_states_norms\.(\d+)", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}", name
    )


def torchvision_fields(state: StateDict) -> tuple[dict[str, Any], StateDict]:
    """Reads configuration fields and renamed tensors of torchvision's `swin_t`, `_s` or `_b`.

    Raises:
        ValueError: the tensors are not those of such a model.
    """
    blocks = [re.fullmatch(r"features\.(\d+)\.(\d+)\.norm1\.weight", name) for name in state]
    stages = sorted({int(match[1]) for match in blocks if match})
    depths = [sum(bool(m) and int(m[1]) == stage for m in blocks if m) for stage in stages]
    if not stages or any("cpb_mlp" in name for name in state):
        raise ValueError(
            "wanted the state dict of torchvision's swin_t, swin_s or swin_b (Swin v1); "
            f"got tensors such as {sorted(state)[:5]}"
        )
    tables = [state[f"features.{stage}.0.attn.relative_position_bias_table"] for stage in stages]
    patch = state["features.0.0.weight"]
    config = {
        "patch_size": list(patch.shape[2:]),
        "num_channels": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (int(tables[0].shape[0] ** 0.5) + 1) // 2,
        "mlp_ratio": state["features.1.0.mlp.0.weight"].shape[0] / patch.shape[0],
        "qkv_bias": "features.1.0.attn.qkv.bias" in state,
    }
    renamed: StateDict = {}
    for name, tensor in state.items():
        if not name.startswith("head."):
            renamed.update(_from_torchvision(name, tensor))
    return config, renamed


_TORCHVISION_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "attn": "attention.relative_position_bias",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def _from_torchvision(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A torchvision tensor by transformers' names in memory; fused ones are split."""
    if not name.startswith("features."):
        return [(re.sub(r"^norm\.", "swin.layernorm.", name), tensor)]
    _, first, rest = name.split(".", 2)
    index = int(first)
    if index == 0:
        part, parameter = rest.split(".")
        module = "patch_embeddings.projection" if part == "0" else "norm"
        return [(f"swin.embeddings.{module}.{parameter}", tensor)]
    if index % 2 == 0:
        return [(f"swin.encoder.layers.{index // 2 - 1}.downsample.{rest}", tensor)]
    block, inner = rest.split(".", 1)
    prefix = f"swin.encoder.layers.{index // 2}.blocks.{block}"
    return _in_block(prefix, inner, tensor, _TORCHVISION_BLOCK)


def _in_block(
    prefix: str, name: str, tensor: Tensor, names: Mapping[str, str]
) -> list[tuple[str, Tensor]]:
    """A tensor of a block by transformers' names; fused queries, keys and values are split."""
    module, parameter = name.rsplit(".", 1)
    if module == "attn.qkv":
        return [
            (f"{prefix}.attention.{part}_proj.{parameter}", chunk)
            for part, chunk in zip("qkv", tensor.chunk(3))
        ]
    return [(f"{prefix}.{names[module]}.{parameter}", tensor)]


def torchvision_upstream(backbone: Any) -> Upstream:
    """Builds torchvision's SwinTransformer with the weights of a backbone of its semantics.

    Raises:
        ValueError: torchvision has no such Swin.
        ImportError: torchvision is not installed.
    """
    import torchvision
    from torchvision.models.swin_transformer import SwinTransformer

    config = backbone.config
    patch = config.patch_size
    module = SwinTransformer(
        patch_size=[patch, patch] if isinstance(patch, int) else list(patch),
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=[config.window_size, config.window_size],
        mlp_ratio=config.mlp_ratio,
        num_classes=1,
    )
    # copies our tensors through the renamed views of theirs
    own, (_, views) = backbone.state_dict(), torchvision_fields(module.state_dict())
    with torch.no_grad():
        for name, view in views.items():
            if not name.endswith("relative_position_index"):
                view.copy_(own.pop(name))
    if own or config.layer_norm_eps != _TORCHVISION_EPS or config.hidden_act != "gelu":
        raise ValueError("torchvision has no such Swin")
    selected = backbone.out_indices

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        found, x = [], pixel_values
        assert isinstance(module.features, nn.Sequential)
        for i, layer in enumerate(module.features):
            x = layer(x)
            if i % 2 or i == 0:  # the others only merge patches
                found.append(x.permute(0, 3, 1, 2))
        return [found[index] for index in selected]

    return Upstream(f"torchvision {torchvision.__version__}, SwinTransformer", module.eval(), maps)


_TORCHVISION_EPS = 1e-5


_TIMM_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn": "attention.relative_position_bias",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _from_timm(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of timm's features-only Swin by transformers' names in memory; qkv is split."""
    first, rest = name.split(".", 1)
    if first == "patch_embed":
        return [
            (f"swin.embeddings.{rest.replace('proj.', 'patch_embeddings.projection.')}", tensor)
        ]
    stage = int(first.removeprefix("layers_"))
    if rest.startswith("downsample."):  # transformers merges patches at the end of a stage
        return [(f"swin.encoder.layers.{stage - 1}.{rest}", tensor)]
    _, block, inner = rest.split(".", 2)
    prefix = f"swin.encoder.layers.{stage}.blocks.{block}"
    return _in_block(prefix, inner, tensor, _TIMM_BLOCK)


def timm_upstream(backbone: Any, size: tuple[int, int]) -> Upstream:
    """Builds timm's features-only Swin with the weights of a backbone, for images of one size.

    timm leaves out the norms of the maps; they are computed after its forward.

    Raises:
        ValueError: timm has no such Swin, or pads other maps at this size.
    """
    import timm

    config = backbone.config
    names = backbone.out_features
    stages = [backbone.stage_names.index(name) - 1 for name in names]
    if config.model_type != "swin" or min(stages) < 0:
        raise ValueError("timm's Swin has no map of the stem")
    plain = config.layer_norm_eps == _TIMM_EPS and config.hidden_act == "gelu"
    if not plain or config.use_absolute_embeddings:
        raise ValueError("timm has no Swin with this activation, eps or absolute embeddings")
    patch = config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else patch
    sides = sorted(n // p for n, p in zip(size, patch))
    smallest = config.window_size << max(stages)
    if any(n % (p * smallest) for n, p in zip(size, patch)):
        multiple = [p * smallest for p in patch]
        raise ValueError(
            "timm pads a map that windows do not divide otherwise than transformers; take a size "
            f"that is a multiple of {multiple[0]}x{multiple[1]}"
        )
    module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        out_indices=stages,
        img_size=size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
    )
    own = backbone.state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            for ours, view in _from_timm(name, tensor):
                if not ours.endswith("relative_position_index"):
                    view.copy_(own[ours])
    norms = copy.deepcopy([backbone.hidden_states_norms[name] for name in names])
    model = nn.ModuleDict({"timm": module, "norms": nn.ModuleList(norms)})

    def maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
        found = zip(model["timm"](pixel_values), model["norms"])
        return [norm(x).permute(0, 3, 1, 2) for x, norm in found]

    why = "timm does not shift the windows of a map that is one window"
    one_window = sides[0] // config.window_size
    others = {name: why for name, stage in zip(names, stages) if one_window >> stage <= 1}
    return Upstream(f"timm {timm.__version__}, SwinTransformer", model.eval(), maps, others)


_TIMM_EPS = 1e-5
