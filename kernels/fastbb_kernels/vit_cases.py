"""The calls of one forward of a ViT, at the shapes of real models and of small variants."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .case import REAL_INPUTS, Case, Family, Random, folded_norm_linear
from .ops.folded_norm_linear import MOST_UNFOLDED_FEATURES


@dataclass(frozen=True)
class ViTShape:
    """Parameters of the shapes of a ViT.

    Attributes:
        name: of the model.
        channels: of a token.
        heads: of attention.
        patch: side of a patch in pixels.
        n_prefix: class and register tokens.
        hidden: channels between the layers of the MLP; default: four times those of a token.
        activation: of the MLP; "swiglu" is a gated one.
        rotates: whether q and k are rotated (DINOv3).
        layer_scale: whether the halves of a block are scaled.
    """

    name: str
    channels: int
    heads: int
    patch: int = 14
    n_prefix: int = 1
    hidden: int | None = None
    activation: str = "gelu"
    rotates: bool = False
    layer_scale: bool = True


VITS = {
    shape.name: shape
    for shape in (
        ViTShape("dinov2_s", 384, 6),
        ViTShape("dinov2_b", 768, 12),
        ViTShape("dinov2_g", 1536, 24, hidden=4096, activation="swiglu"),
        ViTShape("dinov3_s", 384, 6, patch=16, n_prefix=5, rotates=True),
        ViTShape("dinov3_b", 768, 12, patch=16, n_prefix=5, rotates=True),
        ViTShape("clip_b", 768, 12, patch=16, activation="quick_gelu", layer_scale=False),
    )
}


def vit_cases(shape: ViTShape, size: tuple[int, int], batch: int) -> Iterator[Case]:
    """Yields each distinct call of one block of a ViT.

    Args:
        shape: the model.
        size: height and width of the image in pixels.
        batch: images.
    """
    pixels = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    prefix = f"{shape.name}-{pixels}-b{batch}"
    n_tokens = shape.n_prefix + (size[0] // shape.patch) * (size[1] // shape.patch)
    tokens = batch, n_tokens, shape.channels
    hidden = shape.hidden or 4 * shape.channels
    if shape.rotates:
        yield Case("rope_qkv", f"{prefix}-qkv", _rope_qkv(tokens, shape))
    else:
        qkv = _norm_linear(tokens, 3 * shape.channels, None)
        yield Case("layer_norm_linear", f"{prefix}-qkv", qkv)
        if shape.channels > MOST_UNFOLDED_FEATURES:
            qkv = folded_norm_linear(tokens, 3 * shape.channels, None)
            yield Case("folded_norm_linear", f"{prefix}-qkv-folded", qkv)
    proj = _linear_residual(tokens, shape.channels, shape.layer_scale)
    yield Case("linear_residual", f"{prefix}-proj", proj)
    if shape.activation == "swiglu":
        yield Case("layer_norm_swiglu", f"{prefix}-gate", _swiglu(tokens, hidden))
    else:
        fc1 = _norm_linear(tokens, hidden, shape.activation)
        yield Case("layer_norm_linear", f"{prefix}-fc1", fc1)
        if shape.channels > MOST_UNFOLDED_FEATURES:
            fc1 = folded_norm_linear(tokens, hidden, shape.activation)
            yield Case("folded_norm_linear", f"{prefix}-fc1-folded", fc1)
    fc2 = _linear_residual(tokens, hidden, shape.layer_scale)
    yield Case("linear_residual", f"{prefix}-fc2", fc2)


_Tokens = tuple[int, int, int]
_Make = Callable[[Random], dict[str, Any]]


def _rope_qkv(tokens: _Tokens, shape: ViTShape) -> _Make:
    _, n_tokens, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        # the angles of both halves of a head's channels are equal; random ones show more
        table = n_tokens - shape.n_prefix, channels // shape.heads
        angles = random.normal(*table, std=2.0).float()
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            "weight": random.weight(3 * channels, channels),
            "bias": random.normal(3 * channels),
            "cos": angles.cos().to(random.dtype),
            "sin": angles.sin().to(random.dtype),
            "num_heads": shape.heads,
            "n_prefix": shape.n_prefix,
        }

    return make


def _norm_linear(tokens: _Tokens, out_features: int, activation: str | None) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            "weight": random.weight(out_features, channels),
            "bias": random.normal(out_features),
            "activation": activation,
        }

    return make


def _swiglu(tokens: _Tokens, hidden: int) -> _Make:
    channels = tokens[-1]

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*tokens),
            **random.norm(channels),
            "gate_weight": random.weight(hidden, channels),
            "gate_bias": random.normal(hidden),
            "up_weight": random.weight(hidden, channels),
            "up_bias": random.normal(hidden),
        }

    return make


def _linear_residual(tokens: _Tokens, features: int, layer_scale: bool) -> _Make:
    *rows, channels = tokens

    def make(random: Random) -> dict[str, Any]:
        return {
            "x": random.normal(*rows, features),
            "weight": random.weight(channels, features),
            "bias": random.normal(channels),
            "residual": random.normal(*tokens),
            "scale": random.normal(channels) if layer_scale else None,
        }

    return make


def _model_cases(model: str, size: tuple[int, int], batch: int) -> Iterator[Case]:
    return vit_cases(VITS[model], size, batch)


def _more_checked() -> Iterator[Case]:
    size, batches = REAL_INPUTS[0]
    for model in ("dinov2_g", "clip_b"):
        yield from vit_cases(VITS[model], size, batches[0])
    # the tiles of few rows
    few = vit_cases(VITS["dinov3_b"], size, batches[-1])
    yield from (case for case in few if case.op == "rope_qkv")


def _small_cases() -> Iterator[Case]:
    yield from vit_cases(ViTShape("rotated", 48, 3, n_prefix=5, rotates=True), (42, 70), 2)
    yield from vit_cases(ViTShape("gated", 32, 1, hidden=72, activation="swiglu"), (28, 42), 3)
    clip = ViTShape("quick", 32, 2, activation="quick_gelu", layer_scale=False)
    yield from vit_cases(clip, (28, 28), 2)
    # two tiles of rows and of columns
    yield Case("folded_norm_linear", "wide", folded_norm_linear((2, 75, 288), 160, "gelu"))
    yield Case("folded_norm_linear", "plain", folded_norm_linear((3, 64), 40, None))


FAMILY = Family(
    small=_small_cases,
    models=tuple(VITS),
    model_cases=_model_cases,
    checked_models=("dinov3_b",),
    more_checked=_more_checked,
)
