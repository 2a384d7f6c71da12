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
    """The names of a type, and its properties that no field of a configuration has.

    Attributes:
        upstream: name of transformers' classes; `<upstream>Model`.
        has_backbone: whether there is `<upstream>Backbone` too.
        root: path of the module around embeddings, layers and norm, with a dot, or "".
        embeddings: module of patches and tokens.
        patches: convolution of patches, in that module.
        patches_bias: whether that convolution has a bias.
        has_mask_token: whether there is a token of masked patches where the configuration has no
            `use_mask_token`.
        mask_token_ndim: number of dimensions of that token.
        key_bias: whether keys have a bias where queries and values have one.
        drop_path_grows: whether the rate of stochastic depth grows with depth.
        has_drop_path: whether layers have stochastic depth.
        drops_branches: whether the branches of a layer have dropout.
        cls_token: class token, or None.
        extra_tokens: tokens between class token and patches, or None.
        positions: absolute position embeddings, or None.
        extras_have_positions: whether the extra tokens have position embeddings too.
        antialias: whether interpolation of position embeddings reduces without aliasing.
        in_fp32: whether position embeddings are interpolated in fp32 whatever their dtype.
        rope: module of rotary position embeddings, or None.
        pre_norm: norm between the embedding and the first layer, or None.
        layers: list of layers.
        norm: norm after the last layer.
        attention: attention of a layer.
        proj: output projection of the attention.
        norms: two norms of a layer, before the attention and before the MLP.
        scales: two layer scales of a layer, or None.
        fc: first and second layer of an MLP that is not gated.
        activation: activation of an MLP that is not gated.
        files: regular expressions of names in files, with the names in memory.
        saved: regular expressions of names in memory, with those that transformers writes.
        keeps_prefix: whether tokens returned by `reshape_hidden_states=False` include those before
            the patches.
        file_prefix: prefix of all names in saved files, except that of a projection.
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
    activation: str = "activation_fn"
    files: tuple[tuple[str, str], ...] = ()
    saved: tuple[tuple[str, str], ...] = ()
    keeps_prefix: bool = True
    file_prefix: str = ""

    @property
    def first_weight(self) -> str:
        """A weight that every checkpoint has."""
        return f"{self.embeddings}.{self.patches}.weight"

    @property
    def encoder(self) -> str:
        """Path of the module around the layers, or "" if that is the root or the backbone."""
        outer = self.layers.rpartition(".")[0]
        return "" if f"{outer}." == self.root else outer


def _both_ways(*pairs: tuple[str, str]) -> dict[str, Any]:
    """The rules `files` and `saved` of names in files and in memory."""
    return {
        "files": tuple((re.escape(file), memory) for file, memory in pairs),
        "saved": tuple((re.escape(memory), file) for file, memory in reversed(pairs)),
    }


# names of a gated MLP, in all types: the gate; first layer, second layer, activation
GATE = "gate_proj"
GATED = ("up_proj", "down_proj", "act_fn")

# transformers 4's names, which 5 still writes
_ATTENTION = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
_LAYERS = (
    ("encoder.layer.", "layers."),
    *_ATTENTION,
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_BEIT = _both_ways(
    *_LAYERS,
    ("encoder.relative_position_bias.", "shared_position_bias."),
    ("attention.attention.relative_position_bias.", "relative_position_bias."),
)

_DINO_NORMS = ("norm1", "norm2")
_DINO_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")

_DINOV2: dict[str, Any] = {
    "has_mask_token": True,
    "mask_token_ndim": 2,
    "in_fp32": True,
    "layers": "encoder.layer",
    "norms": _DINO_NORMS,
    "scales": _DINO_SCALES,
    **_both_ways(*_ATTENTION, ("mlp.weights_out.", "mlp.down_proj.")),
}
_VIT: dict[str, Any] = {
    "has_backbone": False,
    "has_drop_path": False,
    "drops_branches": True,
    **_both_ways(*_LAYERS),
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
            *_BEIT["files"],
            # transformers 4's feature pyramid
            (r"(?<!fpn\.)\bfpn1\.0\.", "fpn.fpn1.conv_transpose1."),
            (r"(?<!fpn\.)\bfpn1\.1\.", "fpn.fpn1.normalization."),
            (r"(?<!fpn\.)\bfpn1\.3\.", "fpn.fpn1.conv_transpose2."),
            (r"(?<!fpn\.)\bfpn2\.0\.", "fpn.fpn2."),
        ),
        saved=_BEIT["saved"],
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
        files=((r"^layer\.", "model.layer."),),
        saved=((r"^model\.layer\.", "layer."),),
    ),
}

_WEIGHTS_IN = re.compile(r"(.*\.mlp\.)weights_in\.(weight|bias)")
# modules of a root, where a type has one
_INSIDE = ("embeddings.", "layers.", "layernorm.", "pooler.", "shared_position_bias.")


def in_memory(names: ViTNames, state: StateDict) -> StateDict:
    """Renames the tensors of a checkpoint to the names in memory, with any prefix.

    The fused first layer of a SwiGLU is split.
    """
    anchor = names.first_weight.removeprefix(names.root)
    outers = [name.removesuffix(anchor) for name in state if name.endswith(anchor)]

    def renamed(name: str) -> str:
        outer = max((o for o in outers if name.startswith(o)), key=len, default=None)
        if outer is None:
            return _substituted(name, names.files)
        inner = _substituted(name.removeprefix(outer), names.files)
        # transformers saves models and backbones without the root
        lacks_root = not outer.endswith(names.root) and inner.startswith(_INSIDE)
        return f"{outer}{names.root}{inner}" if lacks_root else f"{outer}{inner}"

    result: StateDict = {}
    for name, tensor in rename(state, renamed).items():
        fused = _WEIGHTS_IN.fullmatch(name)
        if fused is None:
            result[name] = tensor
        else:
            gate, up = tensor.chunk(2)
            result[f"{fused[1]}gate_proj.{fused[2]}"] = gate
            result[f"{fused[1]}up_proj.{fused[2]}"] = up
    return result


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
    owner = reduce(getattr, outer, owner)
    if value is None and name in owner._modules:
        delattr(owner, name)  # torch ignores weights of a module that is None
    setattr(owner, name, value)
