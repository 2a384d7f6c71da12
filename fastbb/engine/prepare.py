"""What `Backbone.prepare` and `Backbone.explain` do."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbb_kernels._dispatch import gpu_unsupported, launches_directly

from ..backbone.base import Backbone
from .engine import Engine, notes_on
from .explanation import Explanation, Row
from .settings import DTYPES, Settings, Tools
from .truth import without_engine

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)


def prepare(
    backbone: AnyBackbone,
    mode: str = "auto",
    precision: str | None = None,
    example: Tensor | Sequence[int] | None = None,
    cuda_graph: bool | str = "auto",
    expected_images: int | None = None,
    tools: Tools | None = None,
) -> AnyBackbone:
    """See `Backbone.prepare`; `tools` replaces the clock, the cache and so on."""
    settings = Settings(mode, precision, cuda_graph, expected_images)  # type: ignore[arg-type]
    _check_device(backbone, settings)
    prepared = without_engine(backbone)
    if precision is not None and prepared.dtype != (dtype := DTYPES.get(precision, torch.float32)):
        with torch.inference_mode(False):
            prepared = without_engine(backbone, copied=True).to(dtype)
    prepared._engine = Engine(prepared, settings, tools)
    if example is not None:
        prepared._engine.prepare_for(example_pixels(prepared, example))
    return prepared


def explain(backbone: Backbone) -> Explanation:
    """What runs and why; for a backbone that is not prepared, what its ops do."""
    if backbone._engine is not None:
        return backbone._engine.explain()
    on_gpu = backbone.device.type == "cuda"
    problem = gpu_unsupported(backbone.device) if on_gpu else None
    runs = "triton" if on_gpu and problem is None else "eager"
    why = "each op by itself; prepare() decides for the whole backbone"
    why = why if problem is None else f"{problem}; {why}"
    title = f"{type(backbone).__name__} in {backbone.dtype} on {backbone.device}, not prepared"
    return Explanation(title, (Row("any", runs, why), *notes_on(backbone)))


def _check_device(backbone: Backbone, settings: Settings) -> None:
    if any(module.training for module in backbone.modules()):
        raise ValueError("prepare() is for inference, the backbone is training: call .eval() first")
    is_gpu = backbone.device.type == "cuda"
    if settings.mode.startswith("triton") and not (is_gpu or launches_directly()):
        raise ValueError(
            f"mode={settings.mode!r} needs a CUDA or ROCm device, the backbone is on "
            f"{backbone.device}; move it with .to('cuda'), or take mode='auto'"
        )
    if settings.precision == "tf32" and (not is_gpu or torch.version.hip):
        raise ValueError(
            f"precision='tf32' needs an NVIDIA GPU, the backbone is on {backbone.device}; "
            "take 'fp32'"
        )
    if settings.cuda_graph is True and not is_gpu:
        raise ValueError(
            f"cuda_graph=True needs a GPU, the backbone is on {backbone.device}; take 'auto'"
        )


def example_pixels(backbone: Backbone, example: Any) -> Tensor:
    """The example as checked pixels [B, C, H, W]; random ones for (batch, height, width)."""
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
