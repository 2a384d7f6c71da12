"""Calls of one forward of a ConvNeXt, at the shapes of real models and of small variants.

Its stem, its layer norms and the first layers of its MLPs launch binaries of Swin's: `swin_cases`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .case import Case, Family, Random

# with more channels the separate ops run
BLOCK_CHANNELS = 384
WHOLE_BLOCK_CHANNELS = 256


@dataclass(frozen=True)
class ConvNextShape:
    """Parameters of the shapes of a ConvNeXt: channels per stage, patch size, kernel size, V2."""

    name: str
    channels: tuple[int, ...]
    has_grn: bool = False
    patch: int = 4
    kernel_size: int = 7


CONVNEXTS = {
    shape.name: shape
    for shape in (
        ConvNextShape("convnext_t", (96, 192, 384, 768)),
        ConvNextShape("convnext_b", (128, 256, 512, 1024)),
        ConvNextShape("convnextv2_t", (96, 192, 384, 768), has_grn=True),
    )
}


def convnext_cases(shape: ConvNextShape, size: tuple[int, int], batch: int) -> Iterator[Case]:
    """Yields the distinct calls of one forward of a ConvNeXt that launch binaries of their own.

    Args:
        shape: the model.
        size: height and width of the image in pixels.
        batch: images.
    """
    pixels = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    prefix = f"{shape.name}-{pixels}-b{batch}"
    before = (batch, *size, 3)
    for stage, channels in enumerate(shape.channels):
        where = f"{prefix}-stage{stage + 1}"
        patch = 2 if stage else shape.patch
        if stage:
            yield Case("patch_embed", f"{where}-patches", _patches(before, channels))
        tokens = (batch, before[1] // patch, before[2] // patch, channels)
        yield Case("depthwise_conv_bn_act", f"{where}-conv", _conv(tokens, shape.kernel_size))
        if shape.has_grn:
            yield Case("grn_linear_residual", f"{where}-fc2", _grn_linear(tokens))
        else:
            yield Case("linear_residual", f"{where}-fc2", _linear_residual(tokens))
        if not shape.has_grn and channels <= BLOCK_CHANNELS:
            yield Case("mlp_block", f"{where}-mlp", _mlp_block(tokens))
        if not shape.has_grn and channels <= WHOLE_BLOCK_CHANNELS:
            yield Case("convnext_block", f"{where}-block", _block(tokens, shape.kernel_size))
        before = tokens


_Shape = tuple[int, int, int, int]
_Make = Callable[[Random], dict[str, Any]]


def _patches(pixels: _Shape, channels: int) -> _Make:
    def make(random: Random) -> dict[str, Any]:
        weight = random.weight(channels, pixels[-1], 2, 2)
        return {
            "pixel_values": random.normal(*pixels).permute(0, 3, 1, 2),
            "weight": weight.contiguous(memory_format=torch.channels_last),
            "bias": random.normal(channels),
            "norm_weight": None,
            "norm_bias": None,
        }

    return make


def _conv(tokens: _Shape, kernel_size: int) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens).permute(0, 3, 1, 2),
            "weight": random.weight(channels, 1, kernel_size, kernel_size),
            "bias": random.normal(channels),
        }

    return make


def _block(tokens: _Shape, kernel_size: int) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        conv = _conv(tokens, kernel_size)(random)
        return {
            "x": conv["x"],
            "conv_weight": conv["weight"],
            "conv_bias": conv["bias"],
            **random.norm(channels),
            **random.mlp(channels),
            "scale": random.normal(channels),
        }

    return make


def _linear_residual(tokens: _Shape) -> _Make:
    *rows, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*rows, 4 * channels),
            "weight": random.weight(channels, 4 * channels),
            "bias": random.normal(channels),
            "residual": random.normal(*tokens),
            "scale": random.normal(channels),
        }

    return make


def _grn_linear(tokens: _Shape) -> _Make:
    *rows, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*rows, 4 * channels),
            "grn_weight": random.normal(4 * channels),
            "grn_bias": random.normal(4 * channels),
            "weight": random.weight(channels, 4 * channels),
            "bias": random.normal(channels),
            "residual": random.normal(*tokens),
        }

    return make


def _mlp_block(tokens: _Shape) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            **random.mlp(channels),
            "residual": random.normal(*tokens),
            "scale": random.normal(channels),
            "eps": 1e-6,
            "activation": "gelu",
        }

    return make


def _model_cases(model: str, size: tuple[int, int], batch: int) -> Iterator[Case]:
    return convnext_cases(CONVNEXTS[model], size, batch)


def _small_cases() -> Iterator[Case]:
    # odd maps, pixels beyond the last patch, several images in a tile
    yield from convnext_cases(ConvNextShape("small", (32, 64)), (38, 29), 2)
    yield from convnext_cases(ConvNextShape("small_v2", (16, 24), has_grn=True), (29, 22), 2)


FAMILY = Family(
    small=_small_cases,
    models=tuple(CONVNEXTS),
    model_cases=_model_cases,
    checked_models=("convnext_t", "convnextv2_t"),
)
