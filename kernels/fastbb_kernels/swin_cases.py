"""The calls of one forward of a Swin, at the shapes of real models and of small variants."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._window_geometry import WindowGeometry
from .case import Case, Family, Random, folded_norm_linear
from .ops.folded_norm_linear import MOST_UNFOLDED_FEATURES

# with more channels or larger windows the separate ops run
BLOCK_CHANNELS, BLOCK_WINDOW = 256, 8


@dataclass(frozen=True)
class SwinShape:
    """Parameters of the shapes of a Swin: channels, blocks and heads per stage, patch size."""

    name: str
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    patch: int = 4


SWINS = {
    shape.name: shape
    for shape in (
        SwinShape("swin_t", 96, (2, 2, 6, 2), (3, 6, 12, 24)),
        SwinShape("swin_s", 96, (2, 2, 18, 2), (3, 6, 12, 24)),
        SwinShape("swin_b", 128, (2, 2, 18, 2), (4, 8, 16, 32)),
        SwinShape("swin_l", 192, (2, 2, 18, 2), (6, 12, 24, 48)),
    )
}

# tokens per side of a window, by image size
WINDOWS = {(224, 224): 7, (384, 384): 12, (800, 1088): 7}


def swin_cases(shape: SwinShape, size: tuple[int, int], window: int, batch: int) -> Iterator[Case]:
    """Yields each distinct call of one forward of a Swin, with transformers' semantics.

    Args:
        shape: the model.
        size: height and width of the image in pixels.
        window: tokens per side of a window.
        batch: images.
    """
    pixels = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    prefix = f"{shape.name}-{pixels}-b{batch}"
    channels = shape.embed_dim
    height, width = (-(-side // shape.patch) for side in size)
    yield Case("patch_embed", f"{prefix}-stem", _patch_embed((batch, 3, *size), shape))
    yield Case("layer_norm_nchw", f"{prefix}-stem-norm", _nchw((batch, height, width, channels)))
    for stage, heads in enumerate(shape.num_heads):
        where = f"{prefix}-stage{stage + 1}"
        if stage > 0:
            merged = (batch, height, width, channels)
            yield Case("patch_merging", f"{where}-merge", _merging(merged))
            height, width, channels = -(-height // 2), -(-width // 2), 2 * channels
        tokens = (batch, height, width, channels)
        yield Case("layer_norm_linear", f"{where}-qkv", _norm_linear(tokens, 3, None))
        if channels > MOST_UNFOLDED_FEATURES:
            qkv = folded_norm_linear(tokens, 3 * channels, None)
            yield Case("folded_norm_linear", f"{where}-qkv-folded", qkv)
            fc1 = folded_norm_linear(tokens, 4 * channels, "gelu")
            yield Case("folded_norm_linear", f"{where}-fc1-folded", fc1)
        yield Case("linear_residual", f"{where}-proj", linear_residual(tokens, 1))
        yield Case("layer_norm_linear", f"{where}-fc1", _norm_linear(tokens, 4, "gelu"))
        yield Case("linear_residual", f"{where}-fc2", linear_residual(tokens, 4))
        has_blocks = channels <= BLOCK_CHANNELS
        if has_blocks:
            yield Case("mlp_block", f"{where}-mlp", mlp_block(tokens))
        for suffix, shift in (("", 0), ("-shifted", window // 2))[: shape.depths[stage]]:
            geometry = WindowGeometry((window, window), (shift, shift))
            attention = window_attention(tokens, heads, geometry)
            yield Case("window_attention", f"{where}-attention{suffix}", attention)
            if has_blocks and window <= BLOCK_WINDOW:
                block = attention_block(tokens, heads, geometry)
                yield Case("swin_attention_block", f"{where}-block{suffix}", block)
        yield Case("layer_norm_nchw", f"{where}-norm", _nchw(tokens))


_Shape = tuple[int, int, int, int]
_Make = Callable[[Random], dict[str, Any]]


def _patch_embed(pixels: _Shape, shape: SwinShape) -> _Make:
    def make(random: Random) -> dict[str, Any]:
        return {
            "pixel_values": random.normal(*pixels),
            "weight": random.weight(shape.embed_dim, pixels[1], shape.patch, shape.patch),
            "bias": random.normal(shape.embed_dim),
            **random.norm(shape.embed_dim),
            "ceil_mode": True,
        }

    return make


def _nchw(tokens: _Shape) -> _Make:
    def make(random: Random) -> dict[str, Any]:
        norm = random.norm(tokens[-1])
        return {
            "x": random.normal(*tokens, mean=0.5),
            "weight": norm["norm_weight"],
            "bias": norm["norm_bias"],
        }

    return make


def _merging(tokens: _Shape) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(4 * channels),
            "weight": random.weight(2 * channels, 4 * channels),
        }

    return make


def _norm_linear(tokens: _Shape, ratio: int, activation: str | None) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            "weight": random.weight(ratio * channels, channels),
            "bias": random.normal(ratio * channels),
            "activation": activation,
        }

    return make


def linear_residual(tokens: _Shape, ratio: int) -> _Make:
    *rows, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*rows, ratio * channels),
            "weight": random.weight(channels, ratio * channels),
            "bias": random.normal(channels),
            "residual": random.normal(*tokens),
        }

    return make


def window_attention(tokens: _Shape, heads: int, geometry: WindowGeometry) -> _Make:
    *rows, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "qkv": random.normal(*rows, 3 * channels),
            "bias": _position_bias(random, heads, geometry),
            "qkv_pad": random.normal(3 * channels),
            "num_heads": heads,
            "geometry": geometry,
        }

    return make


def attention_block(tokens: _Shape, heads: int, geometry: WindowGeometry) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            "qkv_weight": random.weight(3 * channels, channels),
            "qkv_bias": random.normal(3 * channels),
            "bias": _position_bias(random, heads, geometry),
            "proj_weight": random.weight(channels, channels),
            "proj_bias": random.normal(channels),
            "num_heads": heads,
            "geometry": geometry,
        }

    return make


def mlp_block(tokens: _Shape) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            **random.mlp(channels),
            "activation": "gelu",
        }

    return make


def _position_bias(random: Random, heads: int, geometry: WindowGeometry) -> Tensor:
    """Makes a bias [heads, N, P], with columns padded as in the models."""
    n_tokens = math.prod(geometry.window)
    return random.normal(heads, n_tokens, -(-n_tokens // 16) * 16)


def _model_cases(model: str, size: tuple[int, int], batch: int) -> Iterator[Case]:
    return swin_cases(SWINS[model], size, WINDOWS[size], batch)


def _small_cases() -> Iterator[Case]:
    # whole windows; padded windows and odd maps to merge; window 12; a map below the window
    yield from swin_cases(SwinShape("whole", 32, (2, 2), (1, 2)), (56, 56), 7, 1)
    yield from swin_cases(SwinShape("padded", 32, (2, 2), (2, 1)), (37, 50), 7, 2)
    yield from swin_cases(SwinShape("window12", 32, (2,), (1,)), (48, 60), 12, 1)
    yield from swin_cases(SwinShape("below", 32, (2,), (2,)), (14, 21), 7, 3)


FAMILY = Family(
    small=_small_cases,
    models=tuple(SWINS),
    model_cases=_model_cases,
    checked_models=("swin_t", "swin_b"),
)
