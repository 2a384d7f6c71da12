"""The calls of one forward of a Swin V2, at the shapes of real models and of small variants."""

from collections.abc import Callable, Iterator
from typing import Any

from ._window_geometry import WindowGeometry
from .case import Case, Family, Random
from .swin_cases import (
    BLOCK_CHANNELS,
    BLOCK_WINDOW,
    SWINS,
    SwinShape,
    attention_block,
    linear_residual,
    mlp_block,
    window_attention,
)

# the models of Swin have the same channels, blocks and heads; head dimensions are 32 too
SIZE, WINDOW, LARGE_WINDOW = 256, 8, 16
# with more, the product is stored before its norm
MOST_NORMED_CHANNELS = 384


def swinv2_cases(shape: SwinShape, size: int, window: int, batch: int) -> Iterator[Case]:
    """Yields each distinct call that Swin does not have, with transformers' semantics.

    Args:
        shape: the model.
        size: height and width of the image in pixels.
        window: tokens per side of a window.
        batch: images.
    """
    prefix = f"{shape.name.replace('swin', 'swinv2')}-{size}-w{window}-b{batch}"
    side, channels = -(-size // shape.patch), shape.embed_dim
    for stage, heads in enumerate(shape.num_heads):
        where = f"{prefix}-stage{stage + 1}"
        if stage > 0:
            side, channels = -(-side // 2), 2 * channels
        tokens = (batch, side, side, channels)
        yield from _attention_cases(where, tokens, heads, min(window, side))
        if channels <= MOST_NORMED_CHANNELS:
            for name, ratio in (("proj", 1), ("fc2", 4)):
                linear = _linear_norm_residual(tokens, ratio)
                yield Case("linear_norm_residual", f"{where}-{name}", linear)
        else:
            yield Case("layer_norm_residual", f"{where}-norm", _layer_norm_residual(tokens))
        yield Case("conv1x1_bn_act", f"{where}-fc1", _linear_act(tokens))
        if channels <= BLOCK_CHANNELS:
            yield Case("mlp_block", f"{where}-mlp", _with_post_norm(mlp_block(tokens)))


_Shape = tuple[int, int, int, int]
_Make = Callable[[Random], dict[str, Any]]


def _attention_cases(where: str, tokens: _Shape, heads: int, window: int) -> Iterator[Case]:
    shifts = (("", 0), ("-shifted", window // 2))
    for suffix, shift in shifts if tokens[1] > window else shifts[:1]:
        geometry = WindowGeometry((window, window), (shift, shift))
        attention = _with_cosines(window_attention(tokens, heads, geometry), heads)
        yield Case("window_attention", f"{where}-attention{suffix}", attention)
        if tokens[-1] <= BLOCK_CHANNELS and window <= BLOCK_WINDOW:
            block = _with_cosines(attention_block(tokens, heads, geometry), heads)
            block = _with_post_norm(block)
            yield Case("swin_attention_block", f"{where}-block{suffix}", block)


def _with_cosines(swins: _Make, heads: int) -> _Make:
    """Makes the arguments of Swin's attention by cosines."""

    def make(random: Random) -> dict[str, Any]:
        logit_scale = random.normal(heads, std=2.0, mean=10.0)
        return {**swins(random), "logit_scale": logit_scale, "mask_value": -200.0}

    return make


def _with_post_norm(swins: _Make) -> _Make:
    """Makes the arguments of a block of Swin with the norm after its layers."""
    return lambda random: {**swins(random), "post_norm": True}


def _linear_norm_residual(tokens: _Shape, ratio: int) -> _Make:
    swins = linear_residual(tokens, ratio)
    return lambda random: {**swins(random), **random.norm(tokens[-1])}


def _layer_norm_residual(tokens: _Shape) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens, mean=0.5),
            **random.norm(channels),
            "residual": random.normal(*tokens),
        }

    return make


def _linear_act(tokens: _Shape) -> _Make:
    batch, height, width, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(1, batch * height * width, 1, channels).permute(0, 3, 1, 2),
            "weight": random.weight(4 * channels, channels, 1, 1),
            "bias": random.normal(4 * channels),
            "activation": "gelu",
        }

    return make


def _more_checked() -> Iterator[Case]:
    tiny = SWINS["swin_t"]
    yield from swinv2_cases(tiny, SIZE, WINDOW, 64)
    large = swinv2_cases(tiny, SIZE, LARGE_WINDOW, 64)
    yield from (case for case in large if case.op == "window_attention")


def _more_real(batch: int) -> Iterator[Case]:
    for shape in SWINS.values():
        yield from swinv2_cases(shape, SIZE, WINDOW, batch)


def _small_cases() -> Iterator[Case]:
    # whole windows; padded windows; window 16; a map that is one window
    yield from swinv2_cases(SwinShape("swin-whole", 32, (2, 2), (1, 2)), 64, 8, 1)
    yield from swinv2_cases(SwinShape("swin-padded", 32, (2, 2), (2, 1)), 52, 8, 2)
    yield from swinv2_cases(SwinShape("swin-wide", 32, (2,), (1,)), 80, 16, 1)
    # channels that are three pieces; rows over a tile
    yield Case("linear_norm_residual", "three-pieces", _linear_norm_residual((1, 7, 11, 96), 2))
    yield Case("layer_norm_residual", "odd", _layer_norm_residual((2, 3, 5, 40)))


FAMILY = Family(small=_small_cases, more_checked=_more_checked, more_real=_more_real)
