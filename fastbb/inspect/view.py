"""`fastbb view`: the feature maps of image files as a picture."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..auto import AutoBackbone
from ..backbone.base import Backbone
from ..extraction.decode import MAX_RESIZED_PIXELS, ImageError, decode, read_bytes
from ..extraction.layout import OutputError
from ..extraction.sources import source_at
from ..images.processor import AutoImageProcessor, ImageProcessor
from .contact_sheet import contact_sheet

# sizes of `view`: a map at a stride of 4 fills a tile; a multiple of the usual deepest stride
_LONG_EDGE_PX = 448
_STRIDE_PX = 32
_MAX_LIKE_STAGES = 4


def view(
    image_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    stages: Sequence[str | int] | None = None,
) -> Path:
    """Writes the contact sheet of image files, a row for each.

    Args:
        image_paths: a picture or several, in formats that extraction reads, within its limits.
        model: argument of `AutoBackbone.from_pretrained`.
        out_path: file to write; its suffix decides the format, missing directories are made.
        size: (H, W) in pixels that the model sees. Default: the image's own shape with a longest
            edge of 448, or what a smaller image has, but not less than the model's own size; the
            model's own size if it takes no other.
        stages: names or indices, as `out_indices` counts. Default: all after the stem; of more
            than four maps of one shape, as a ViT has, four that are evenly spread, the last one
            included.

    Returns:
        The path that was written.

    Raises:
        ValueError: there is no picture, or one cannot be read, the model does not run at this
            size, it has no such stage, or pictures are not written with this suffix.
        OutputError: the file cannot be written.
    """
    is_one = isinstance(image_paths, (str, bytes, os.PathLike))
    paths = [Path(os.fsdecode(path)) for path in ([image_paths] if is_one else image_paths)]
    if not paths:
        raise ValueError("image_paths: wanted at least one image, got none")
    out_path = Path(out_path)
    if Image.registered_extensions().get(out_path.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"out_path: wanted a name that ends in .png, .jpg or another suffix of a picture, got "
            f"{str(out_path)!r}"
        )
    if size is not None and size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"size: wanted at most {MAX_RESIZED_PIXELS:,} pixels (4096x4096), got "
            f"{size[0]}x{size[1]}; give a smaller size (--size HxW)"
        )
    if out_path.exists() and any(out_path.samefile(path) for path in paths if path.exists()):
        raise ValueError(f"out_path: {str(out_path)!r} is one of the images, give another name")
    opened = [_opened(path) for path in paths]
    backbone = _with_maps(model)
    backbone.out_features = _named_stages(backbone, stages)
    processor = AutoImageProcessor.from_pretrained(model)
    images, maps = [], []
    for image in opened:
        seen, found = _seen_by(backbone, processor, processor.rgb_from_file(image), size)
        images.append(seen)
        maps.append(found)
    shown = list(range(len(backbone.out_features)))
    if stages is None:
        shown = _unlike([m.shape for m in maps[0]])
    what = paths[0].name if len(paths) == 1 else f"{len(paths)} images"
    sheet = contact_sheet(
        images,
        [[found[i] for found in maps] for i in shown],
        [backbone.out_features[i] for i in shown],
        title=f"{what} · {Path(model).name}",
        labels=[path.name for path in paths] if len(paths) > 1 else (),
    )
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out_path)
    except OSError as error:
        raise OutputError(f"cannot write {out_path}: {error.strerror or error}") from error
    return out_path


def _with_maps(model: str | os.PathLike[str]) -> Backbone:
    """Loads a backbone whose maps are [B, C, h, w], which a depth model's own are not."""
    backbone = AutoBackbone.from_pretrained(model)
    if getattr(backbone.config, "reshape_hidden_states", True):
        return backbone
    return AutoBackbone.from_pretrained(model, reshape_hidden_states=True)


def _opened(path: Path) -> Image.Image:
    try:
        return decode(read_bytes(source_at(path)))
    except ImageError as error:
        raise ValueError(f"{path}: {error}") from error


def _named_stages(backbone: Backbone, stages: Sequence[str | int] | None) -> list[str]:
    names = list(backbone.stage_names)
    if stages is None:
        return [name for name in names if name != "stem"]
    found = set()
    for stage in stages:
        try:
            found.add(stage if stage in names else names[int(stage)])
        except (ValueError, IndexError):
            raise ValueError(
                f"stages: wanted some of {', '.join(names)}, or their indices from 0 to "
                f"{len(names) - 1}, got {stage!r}"
            ) from None
    if not found:
        raise ValueError(f"stages: wanted at least one of {', '.join(names)}, got none")
    return [name for name in names if name in found]


def _unlike(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the maps to show: at most four, evenly spread, of consecutive ones of a shape."""
    shown = []
    for _, run in groupby(range(len(shapes)), key=lambda i: tuple(shapes[i])):
        like = list(run)
        n = min(len(like), _MAX_LIKE_STAGES)
        shown += [like[(i + 1) * len(like) // n - 1] for i in range(n)]
    return shown


def _seen_by(
    backbone: Backbone,
    processor: ImageProcessor,
    image: Image.Image,
    size: tuple[int, int] | None,
) -> tuple[Image.Image, list[Tensor]]:
    """The image as the model sees it, and its maps [C, h, w]."""
    spec = replace(
        processor.spec,
        resize=None,
        size=None,
        crop_pct=None,
        crop_size=None,
        do_pad=False,
        pad_size=None,
    )
    as_it_is = ImageProcessor(spec)

    def run(size: tuple[int, int]) -> tuple[Image.Image, list[Tensor]]:
        seen = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        pixel_values = as_it_is.process(seen)[None]
        try:
            with torch.no_grad():
                maps = backbone(pixel_values.to(backbone.dtype)).feature_maps
        except (AssertionError, RuntimeError, ValueError) as error:
            advice = f"; some models take one size only, try size {own[0]}x{own[1]}"
            raise _RefusedSizeError(
                f"the model does not run at {size[0]}x{size[1]} ({error})"
                + (advice if size != own else "")
            ) from error
        return seen, [one[0] for one in maps]

    own = processor.output_size or backbone.default_size
    if size is not None:
        return run(size)
    try:
        return run(_view_size(image, processor.output_size))
    except _RefusedSizeError:
        at_own_size = run(own)
    # what sizes have to be divided by: a patch
    stride = round(own[0] / at_own_size[1][-1].shape[-2])
    try:
        return run(_view_size(image, own, stride))
    except _RefusedSizeError:
        return at_own_size


class _RefusedSizeError(ValueError):
    """The model does not run at a size."""


def _view_size(
    image: Image.Image, model_size: tuple[int, int] | None, stride: int = _STRIDE_PX
) -> tuple[int, int]:
    longest = min(_LONG_EDGE_PX, max(*image.size, *(model_size or (0, 0))))
    scale = longest / max(image.size)
    width, height = (max(1, round(edge * scale / stride)) * stride for edge in image.size)
    return height, width
