"""One row per type of ViT: names of its attributes in transformers and of its weights in files."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn

from ..backbone.checkpoint import StateDict, rename


@dataclass(frozen=True)
class ViTNames:
    """The names of a type, and how its embedding works.

    Attributes:
        upstream: name of transformers' classes; `<upstream>Model`.
        has_backbone: whether there is `<upstream>Backbone` too.
        root: path of the module around embeddings, layers and norm, with a dot, or "".
        embeddings: module of patches and tokens.
        patches: convolution of patches, in it.
        patches_bias: whether it has a bias.
        has_mask_token: whether there is a token of masked patches, if no field says so.
        mask_token_ndim: number of its dimensions.
        key_bias: whether keys have a bias where queries and values have one.
        drop_path_grows: whether the rate of stochastic depth grows with depth.
        has_drop_path: whether layers have stochastic depth.
        drops_branches: whether the branches of a layer have dropout.
        cls_token: class token, or None.
        extra_tokens: tokens between class token and patches, or None.
        positions: absolute position embeddings, or None.
        extras_have_positions: whether those tokens have position embeddings too.
        antialias: whether interpolation of position embeddings reduces without aliasing.
        in_fp32: whether position embeddings are interpolated in fp32 whatever their dtype.
        rope: module of rotary position embeddings, or None.
        pre_norm: norm before the layers, or None.
        layers: list of layers.
        norm: final norm.
        attention: attention of a layer.
        proj: its output projection.
        norms: of a layer, before attention and MLP.
        scales: layer scales, or None.
        fc: first and second layer of the MLP; of a gated one too.
        gate: layer of a gated MLP.
        gated_fc: other two layers of a gated MLP.
        activation: of the MLP.
        gated_activation: of the gate.
        files: regular expressions of names in files, with the names in memory.
        saved: regular expressions of names in memory, with those that transformers writes.
        keeps_prefix: whether returned tokens, which are no maps, include those before the patches.
        file_prefix: of all names that it writes, except that of a projection.
    """

    upstream: str
    has_backbone: bool = True
    root: str = ""
    embeddings: str = "embeddings"
    patches: str = "patch_embeddings.projection"
    patches_bias: bool = True
    has_mask_token: bool = False
    mask_token_ndim: int = 3
    key_bias: bool = True
    drop_path_grows: bool = False
    has_drop_path: bool = True
    drops_branches: bool = False
    cls_token: str | None = "cls_token"
    extra_tokens: str | None = None
    positions: str | None = "position_embeddings"
    extras_have_positions: bool = False
    antialias: bool = False
    in_fp32: bool = False
    rope: str | None = None
    pre_norm: str | None = None
    layers: str = "layers"
    norm: str = "layernorm"
    attention: str = "attention"
    proj: str = "o_proj"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    scales: tuple[str, str] | None = None
    fc: tuple[str, str] = ("fc1", "fc2")
    gate: str = "gate_proj"
    gated_fc: tuple[str, str] = ("up_proj", "down_proj")
    activation: str = "activation_fn"
    gated_activation: str = "act_fn"
    files: tuple[tuple[str, str], ...] = ()
    saved: tuple[tuple[str, str], ...] = ()
    keeps_prefix: bool = True
    file_prefix: str = ""

    @property
    def encoder(self) -> str:
        """Path of the module around the layers, or "" if that is the root or the backbone."""
        outer = self.layers.rpartition(".")[0]
        return "" if f"{outer}." == self.root else outer


# transformers 4's names of attention and MLP, which 5 still writes
_ATTENTION = (
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)
_SAVED_ATTENTION = (
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
)
_MLP = ((r"intermediate\.dense\.", "mlp.fc1."), (r"output\.dense\.", "mlp.fc2."))
_SAVED_MLP = ((r"mlp\.fc1\.", "intermediate.dense."), (r"mlp\.fc2\.", "output.dense."))
_LAYERS, _SAVED_LAYERS = (r"encoder\.layer\.", "layers."), (r"\blayers\.", "encoder.layer.")

_DINO_NORMS = ("norm1", "norm2")
_DINO_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")

_DINOV2: dict[str, Any] = {
    "has_mask_token": True,
    "mask_token_ndim": 2,
    "in_fp32": True,
    "layers": "encoder.layer",
    "norms": _DINO_NORMS,
    "scales": _DINO_SCALES,
    "files": (*_ATTENTION, (r"mlp\.weights_out\.", "mlp.down_proj.")),
    "saved": (*_SAVED_ATTENTION, (r"mlp\.down_proj\.", "mlp.weights_out.")),
}
_VIT: dict[str, Any] = {
    "has_backbone": False,
    "has_drop_path": False,
    "drops_branches": True,
    "files": (_LAYERS, *_ATTENTION, *_MLP),
    "saved": (_SAVED_LAYERS, *_SAVED_ATTENTION, *_SAVED_MLP),
}
_TOWER: dict[str, Any] = {
    "has_backbone": False,
    "has_drop_path": False,
    "file_prefix": "vision_model.",
    "patches": "patch_embedding",
    "positions": "position_embedding.weight",
    "layers": "encoder.layers",
    "norm": "post_layernorm",
    "attention": "self_attn",
    "proj": "out_proj",
    "norms": ("layer_norm1", "layer_norm2"),
}

NAMES = {
    "dinov2": ViTNames("Dinov2", **_DINOV2),
    "dinov2_with_registers": ViTNames(
        "Dinov2WithRegisters", extra_tokens="register_tokens", antialias=True, **_DINOV2
    ),
    "vit": ViTNames("ViT", **_VIT),
    "deit": ViTNames("DeiT", extra_tokens="distillation_token", extras_have_positions=True, **_VIT),
    "clip_vision_model": ViTNames(
        "CLIPVision",
        patches_bias=False,
        cls_token="class_embedding",
        pre_norm="pre_layrnorm",
        **_TOWER,
    ),
    "siglip_vision_model": ViTNames("SiglipVision", cls_token=None, **_TOWER),
    "beit": ViTNames(
        "Beit",
        root="beit.",
        embeddings="beit.embeddings",
        key_bias=False,
        drop_path_grows=True,
        drops_branches=True,
        layers="beit.layers",
        norm="beit.layernorm",
        scales=("lambda_1", "lambda_2"),
        files=(
            *_VIT["files"],
            (r"encoder\.relative_position_bias\.", "shared_position_bias."),
            (r"attention\.attention\.relative_position_bias\.", "relative_position_bias."),
            # transformers 4's feature pyramid
            (r"(?<!fpn\.)\bfpn1\.0\.", "fpn.fpn1.conv_transpose1."),
            (r"(?<!fpn\.)\bfpn1\.1\.", "fpn.fpn1.normalization."),
            (r"(?<!fpn\.)\bfpn1\.3\.", "fpn.fpn1.conv_transpose2."),
            (r"(?<!fpn\.)\bfpn2\.0\.", "fpn.fpn2."),
        ),
        saved=(
            (
                r"layers\.(\d+)\.relative_position_bias\.",
                r"layers.\1.attention.attention.relative_position_bias.",
            ),
            (r"shared_position_bias\.", "encoder.relative_position_bias."),
            *_VIT["saved"],
        ),
    ),
    "dinov3_vit": ViTNames(
        "DINOv3ViT",
        patches="patch_embeddings",
        extra_tokens="register_tokens",
        positions=None,
        rope="rope_embeddings",
        keeps_prefix=False,
        has_mask_token=True,
        layers="model.layer",
        norm="norm",
        norms=_DINO_NORMS,
        scales=_DINO_SCALES,
        fc=("up_proj", "down_proj"),
        activation="act_fn",
        files=((r"(?<!model\.)\blayer\.", "model.layer."),),
        saved=((r"^model\.layer\.", "layer."),),
    ),
}

_WEIGHTS_IN = re.compile(r"(.*\.mlp\.)weights_in\.(weight|bias)")


def in_memory(names: ViTNames, state: StateDict) -> StateDict:
    """Renames the tensors of a checkpoint to the names in memory, with any prefix.

    The fused first layer of a SwiGLU is split.
    """
    result: StateDict = {}
    for name, tensor in rename(state, lambda name: _substituted(name, names.files)).items():
        fused = _WEIGHTS_IN.fullmatch(name)
        if fused is None:
            result[name] = tensor
        else:
            gate, up = tensor.chunk(2)
            result[f"{fused[1]}gate_proj.{fused[2]}"] = gate
            result[f"{fused[1]}up_proj.{fused[2]}"] = up
    return _with_root(names, result) if names.root else result


_INSIDE = ("embeddings.", "layers.", "layernorm.", "pooler.", "shared_position_bias.")


def _with_root(names: ViTNames, state: StateDict) -> StateDict:
    """Adds the root, without which transformers saves models and backbones, to names in memory."""
    anchor = f"embeddings.{names.cls_token}"
    outside = [name.removesuffix(anchor) for name in state if name.endswith(anchor)]
    if len(outside) != 1 or outside[0].endswith(names.root):
        return state
    (outer,) = outside

    def rooted(name: str) -> str:
        inner = name.removeprefix(outer)
        is_inside = name.startswith(outer) and inner.startswith(_INSIDE)
        return f"{outer}{names.root}{inner}" if is_inside else name

    return rename(state, rooted)


def in_files(names: ViTNames, state: StateDict) -> StateDict:
    """Renames tensors with names in memory to those that transformers writes."""
    result: StateDict = {}
    for name, tensor in state.items():
        if ".mlp.gate_proj." in name and _writes_fused(names):
            up = state[name.replace(".gate_proj.", ".up_proj.")]
            result[name.replace(".gate_proj.", ".weights_in.")] = torch.cat([tensor, up])
        elif not (".mlp.up_proj." in name and _writes_fused(names)):
            result[_substituted(name, names.saved)] = tensor
    prefix = names.file_prefix
    return rename(result, lambda n: n if n.startswith("visual_projection.") else prefix + n)


def _writes_fused(names: ViTNames) -> bool:
    return any("weights_out" in new for _, new in names.saved)


def _substituted(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def part(owner: Any, path: str) -> Any:
    """The attribute of an attribute ... of a module, by its path with dots."""
    return reduce(getattr, path.split("."), owner)


def put(owner: nn.Module, path: str, value: nn.Module | nn.Parameter | None) -> None:
    """Sets the attribute of an attribute ... of a module, by its path with dots."""
    *outer, name = path.split(".")
    setattr(reduce(getattr, outer, owner), name, value)
