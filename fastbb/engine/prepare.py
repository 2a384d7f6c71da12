"""`Backbone.prepare` and `Backbone.explain`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbb_kernels._dispatch import gpu_unsupported

from ..backbone.base import Backbone
from .computation import AnyBackbone, BackboneMaps, in_precision, without_engine
from .copies import copies_note
from .engine import Engine, notes_on
from .explanation import Explanation, Row
from .settings import Settings, Tools


def prepare(
    backbone: AnyBackbone,
    mode: str = "auto",
    precision: str | None = None,
    example: Tensor | Sequence[int] | None = None,
    cuda_graph: bool | str = "auto",
    expected_images: int | None = None,
    tools: Tools | None = None,
) -> AnyBackbone:
    """Prepares a backbone, see `Backbone.prepare`; `tools` replaces clock, cache and progress."""
    settings = Settings(mode, precision, cuda_graph, expected_images)  # type: ignore[arg-type]
    if any(module.training for module in backbone.modules()):
        raise ValueError("prepare() is for inference, the backbone is training: call .eval() first")
    settings.check_device(backbone.device, "backbone")
    own = BackboneMaps(without_engine(backbone))
    maps = in_precision(own, precision)
    prepared: Any = maps.module
    prepared._engine = Engine(maps, settings, tools, is_converted=maps is not own)
    if example is not None:
        prepared._engine.prepare_for(example_pixels(prepared, example))
    return prepared


def explain(backbone: Backbone) -> Explanation:
    """Explains the way that runs; for an unprepared backbone, how its ops run."""
    if backbone._engine is not None:
        return backbone._engine.explain()
    on_gpu = backbone.device.type == "cuda"
    problem = gpu_unsupported(backbone.device) if on_gpu else None
    runs = "triton" if on_gpu and problem is None else "eager"
    why = "each op by itself; prepare() decides for the whole backbone"
    why = why if problem is None else f"{problem}; {why}"
    title = f"{type(backbone).__name__} in {backbone.dtype} on {backbone.device}, not prepared"
    rows = (Row("any", runs, why), *notes_on(backbone))
    return Explanation(title, rows, copies_note([backbone]))


def example_pixels(backbone: Backbone, example: Any) -> Tensor:
    """Returns the example as checked pixels [B, C, H, W]; random for (batch, height, width)."""
    if isinstance(example, Tensor):
        pixels = example.to(backbone.device, backbone.dtype)
    else:
        is_shape = isinstance(example, Sequence) and not isinstance(example, str)
        shape: tuple[Any, ...] = tuple(example) if is_shape else ()
        if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise ValueError(
                "example must be pixels [B, C, H, W] or three numbers (batch, height, width), "
                f"got {example!r}"
            )
        batch, height, width = shape
        generator = torch.Generator().manual_seed(0)
        channels = backbone.config.num_channels
        pixels = torch.randn(batch, channels, height, width, generator=generator, device="cpu")
        pixels = pixels.to(backbone.device, backbone.dtype)
    return backbone._checked(pixels)
