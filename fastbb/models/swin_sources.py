"""Swin's weights elsewhere: transformers' files, torchvision's tensors, timm's modules."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastbb_kernels import WindowGeometry, patch_embed

from ..backbone.checkpoint import StateDict
from ..backbone.registry import StagesForward
from .swin_compute import SwinStage, block_weights, cuts_patches, swin_stage
from .swin_weights import PatchMergingWeights, SwinBlockSpec, SwinBlockWeights

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
    for old, new in _RENAMES:
        if f".{old}" in name:
            return name.replace(f".{old}", f".{new}")
    return name


def legacy_name(name: str) -> str:
    for old, new in _RENAMES:
        if f".{new}" in name:
            return name.replace(f".{new}", f".{old}")
    return name


def on_disk_name(name: str) -> str:
    # transformers drops the prefix of embeddings and encoder, and keeps that of the last norm
    return legacy_name(re.sub(r"^swin\.(?=embeddings|encoder)", "", name))


def stage_norm_name(name: str) -> str:
    # MaskFormer numbers its norms from the first stage
    return re.sub(
        r"^hidden_states_norms\.(\d+)", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}", name
    )


def torchvision_fields(state: StateDict) -> tuple[dict[str, Any], StateDict]:
    """Fields of the configuration and renamed tensors of torchvision's `swin_t`, `_s` or `_b`.

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
    """transformers' in-memory names of a torchvision tensor; several for a fused one."""
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
    module, parameter = inner.rsplit(".", 1)
    if module == "attn.qkv":
        return [
            (f"{prefix}.attention.{part}_proj.{parameter}", chunk)
            for part, chunk in zip("qkv", tensor.chunk(3))
        ]
    return [(f"{prefix}.{_TORCHVISION_BLOCK[module]}.{parameter}", tensor)]


def timm_forward(features: nn.Module) -> StagesForward | None:
    """A forward over the parameters of timm's features-only Swin; None if it is not a plain one.

    Windows and shifts are those of the size the model was built for, and the roll comes before the
    padding, as in timm. Stage 0 is the first stage.
    """
    from timm.layers.mlp import Mlp
    from timm.models.swin_transformer import (
        PatchMerging,
        SwinTransformerBlock,
        SwinTransformerStage,
        WindowAttention,
    )

    embed, *stages = features.children()
    if not stages or not all(type(stage) is SwinTransformerStage for stage in stages):
        return None
    proj, norm = getattr(embed, "proj", None), getattr(embed, "norm", None)
    blocks = [block for stage in stages for block in stage.blocks]  # type: ignore[union-attr]
    wanted: list[tuple[Any, type]] = [(proj, nn.Conv2d), (norm, nn.LayerNorm)]
    for block in blocks:
        parts = (type(block), type(block.attn), type(block.mlp))
        if parts != (SwinTransformerBlock, WindowAttention, Mlp):
            return None  # and may have none of the modules below
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        wanted += [(linear, nn.Linear) for linear in linears]
        wanted += [
            (block.norm1, nn.LayerNorm),
            (block.norm2, nn.LayerNorm),
            (block.mlp.act, nn.GELU),
        ]
    mergings = [s.downsample for s in stages if type(s.downsample) is PatchMerging]
    for merging in mergings:
        wanted += [(merging.norm, nn.LayerNorm), (merging.reduction, nn.Linear)]
    if any(type(module) is not expected for module, expected in wanted):
        return None
    if not cuts_patches(proj) or not all(map(_is_usual, blocks)):  # type: ignore[arg-type]  # seen
        return None

    def forward(pixel_values: Tensor, indices: Sequence[int]) -> list[Tensor]:
        assert isinstance(proj, nn.Conv2d) and isinstance(norm, nn.LayerNorm)
        patch = proj.kernel_size
        height, width = pixel_values.shape[2:]
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                "timm's Swin needs a height and width divisible by its patch of "
                f"{patch[0]}x{patch[1]} pixels, got {height}x{width}"
            )
        x = patch_embed(pixel_values, proj.weight, proj.bias, norm.weight, norm.bias, eps=norm.eps)
        maps = []
        for stage in stages[: max(indices) + 1]:
            x = swin_stage(x, _timm_stage(stage))
            maps.append(x.permute(0, 3, 1, 2))
        return [maps[index] for index in indices]

    return forward


def _is_usual(block: Any) -> bool:
    """Whether a block of timm scales its scores and activates as the ops do."""
    attn, act = block.attn, block.mlp.act
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    n_pairs = (block.window_size[0] * block.window_size[1]) ** 2
    return (
        isinstance(attn.scale, float)
        and attn.scale == head_dim**-0.5
        and act.approximate == "none"
        and attn.relative_position_index.numel() == n_pairs
    )


def _timm_stage(stage: Any) -> SwinStage:
    downsample = None
    if not isinstance(stage.downsample, nn.Identity):
        downsample = PatchMergingWeights.of(stage.downsample)
    blocks = []
    for block in stage.blocks:
        spec = SwinBlockSpec(
            num_heads=block.attn.num_heads,
            geometry=WindowGeometry(
                tuple(block.window_size), tuple(block.shift_size), roll_first=True
            ),
        )
        blocks.append((spec, partial(_timm_block_weights, block)))
    return SwinStage(downsample, blocks)


def _timm_block_weights(block: Any) -> SwinBlockWeights:
    attn, mlp = block.attn, block.mlp
    return block_weights(
        block,
        (block.norm1, block.norm2),
        (attn.qkv,),
        (attn.proj, mlp.fc1, mlp.fc2),
        attn.relative_position_bias_table,
        tuple(block.window_size),
        attn.relative_position_index,
    )
