"""Contact sheets: an image beside a picture of each of a backbone's feature maps.

The channels of a feature map are projected on the map's three main directions (PCA), which become
lightness and two opposed pairs of hues; a cell of the map is a square of the picture.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..auto import AutoBackbone
from ..extraction.decode import MAX_RESIZED_PIXELS, ImageError, decode, read_bytes
from ..extraction.sources import source_at
from ..images.processor import AutoImageProcessor, ImageProcessor

_PAPER = (22, 24, 29)
_INK = (235, 237, 240)
_FAINT_INK = (142, 148, 160)
_GAP_PX = 14
_MARGIN_PX = 32
_TITLE_PX = 22
_LABEL_PX = 18
_MAX_COLUMNS = 6

# sizes of `view`: a map at a stride of 4 fills a tile; a multiple of the usual deepest stride
_LONG_EDGE_PX = 448
_STRIDE_PX = 32


def contact_sheet(
    images: Image.Image | Sequence[Image.Image],
    feature_maps: Sequence[torch.Tensor],
    stage_names: Sequence[str],
    *,
    title: str = "",
) -> Image.Image:
    """Draws one row per image: the image, then a picture of each of its feature maps.

    More than five maps go on below, under captions of their own.

    Colours are comparable within a column: all images of it share directions and scale. Each
    direction points to where the images are lighter, redder and yellower, so the sheet does not
    depend on the arbitrary signs of PCA.

    Args:
        images: one image or B of them, all of one size.
        feature_maps: per stage [B, C, h, w], any floating-point dtype, any device.
        stage_names: the caption of each map.
        title: a line above everything.

    Returns:
        RGB image, 1,800 pixels wide for four stages of one image.

    Raises:
        ValueError: counts or sizes that do not match, or a map that is not finite.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    _check(images, feature_maps, stage_names)
    images = [image.convert("RGB") for image in images]
    width, height = images[0].size
    longest = min(336, max(64, 1120 // len(images)))
    tile = (
        max(1, round(width * longest / max(width, height))),
        max(1, round(height * longest / max(width, height))),
    )

    columns = [[image.resize(tile, Image.Resampling.LANCZOS) for image in images]]
    captions = [("image", f"{height} x {width}")]
    for name, maps in zip(stage_names, feature_maps):
        columns.append([p.resize(tile, Image.Resampling.NEAREST) for p in _pictures(maps, images)])
        captions.append((name, str(list(maps.shape[1:]))))
    return _lay_out(columns, captions, tile, title)


def view(
    image_path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
) -> Path:
    """Writes the contact sheet of one image file, all stages after the stem.

    Args:
        image_path: a picture in a format that extraction reads, within its limits.
        model: argument of `AutoBackbone.from_pretrained`.
        out_path: file to write; its suffix decides the format.
        size: (H, W) in pixels that the model sees. Default: the image's own shape with a longest
            edge of 448, or what a smaller image has, but not less than the model's own size.

    Returns:
        The path that was written.

    Raises:
        ValueError: the picture cannot be read, or the model does not run at this size.
    """
    if size is not None and size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"size: wanted at most {MAX_RESIZED_PIXELS:,} pixels (4096x4096), got "
            f"{size[0]}x{size[1]}; give a smaller size (--size HxW)"
        )
    try:
        as_stored = decode(read_bytes(source_at(image_path)))
    except ImageError as error:
        raise ValueError(f"{os.fspath(image_path)}: {error}") from error
    backbone = AutoBackbone.from_pretrained(model)
    backbone.out_features = [name for name in backbone.stage_names if name != "stem"]
    processor = AutoImageProcessor.from_pretrained(model)
    image = processor.rgb_from_file(as_stored)
    size = size or _view_size(image, processor.output_size)
    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    as_it_is = replace(
        processor.spec,
        resize=None,
        size=None,
        crop_pct=None,
        crop_size=None,
        do_pad=False,
        pad_size=None,
    )
    pixel_values = ImageProcessor(as_it_is).process(image)[None]
    try:
        with torch.no_grad():
            maps = backbone(pixel_values.to(backbone.dtype)).feature_maps
    except (AssertionError, RuntimeError) as error:
        own = "x".join(map(str, processor.output_size or ("H", "W")))
        raise ValueError(
            f"{model} does not run at {size[0]}x{size[1]} ({error}); some models take one size "
            f"only, choose it with size, such as {own}"
        ) from error
    title = f"{Path(image_path).name} · {Path(model).name}"
    sheet = contact_sheet(image, maps, backbone.out_features, title=title)
    sheet.save(out_path)
    return Path(out_path)


def _view_size(image: Image.Image, model_size: tuple[int, int] | None) -> tuple[int, int]:
    longest = min(_LONG_EDGE_PX, max(*image.size, *(model_size or (0, 0))))
    scale = longest / max(image.size)
    width, height = (max(1, round(edge * scale / _STRIDE_PX)) * _STRIDE_PX for edge in image.size)
    return height, width


def _check(
    images: Sequence[Image.Image], feature_maps: Sequence[torch.Tensor], stage_names: Sequence[str]
) -> None:
    if not images:
        raise ValueError("contact_sheet needs at least one image, got none")
    if len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{image.height}x{image.width}" for image in images)
        raise ValueError(f"the images of a contact sheet must have one size, got {sizes}")
    if len(feature_maps) != len(stage_names):
        raise ValueError(
            f"contact_sheet needs one name per feature map, got {len(feature_maps)} maps "
            f"and {len(stage_names)} names"
        )
    for name, maps in zip(stage_names, feature_maps):
        if maps.ndim != 4 or len(maps) != len(images) or maps.numel() == 0:
            raise ValueError(
                f"feature map {name!r} must be [B, C, h, w] with B = {len(images)} images, "
                f"got {list(maps.shape)}"
            )
        if not maps.isfinite().all():
            raise ValueError(f"feature map {name!r} holds NaN or infinity, nothing to draw")


def _pictures(maps: torch.Tensor, images: Sequence[Image.Image]) -> list[Image.Image]:
    """One picture of h x w pixels for each of maps [B, C, h, w]."""
    n_images, n_channels, h, w = maps.shape
    pixels = maps.detach().double().cpu().permute(0, 2, 3, 1).reshape(-1, n_channels)
    left, strengths, _ = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    components = torch.zeros(len(pixels), 3, dtype=torch.float64)
    n_components = min(3, len(strengths))
    components[:, :n_components] = (left * strengths)[:, :n_components]

    components = components * _signs(components, _opponent_colours(images, h, w))
    # half of the middle 90 %: about 1.6 standard deviations, whatever the outliers
    low, middle, high = components.quantile(torch.tensor([0.05, 0.5, 0.95]).double(), dim=0)
    smallest = max(1e-4 * float(pixels.abs().max()), 1e-30)  # rounding errors stay grey
    scale = ((high - low) / 2).clamp_min(smallest)
    # weaker directions stay paler, but not as pale as they are
    scale = scale.max() ** 0.4 * scale**0.6
    colours = _oklab_to_rgb((components - middle) / scale)
    bytes_ = (colours * 255).round().to(torch.uint8).reshape(n_images, h, w, 3)
    return [Image.fromarray(picture.numpy()) for picture in bytes_]


def _opponent_colours(images: Sequence[Image.Image], h: int, w: int) -> torch.Tensor:
    """Lightness, redness and yellowness of the images on an h x w grid, [B * h * w, 3]."""
    rows = []
    for image in images:
        small = image.resize((w, h), Image.Resampling.BOX).convert("YCbCr")
        y, cb, cr = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(-1, 3).T
        rows.append(torch.stack([y, cr, 255 - cb], dim=1).double())
    return torch.cat(rows)


def _signs(components: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """+1 or -1 per column: agreement with the colours, without any, the longer tail."""
    agreement = (components * (colours - colours.mean(0))).sum(0)
    undecided = agreement.abs() <= 1e-9 * components.norm(dim=0) * colours.norm(dim=0)
    agreement = torch.where(undecided, (components**3).sum(0), agreement)
    return torch.where(agreement < 0, -1.0, 1.0)


def _oklab_to_rgb(components: torch.Tensor) -> torch.Tensor:
    """sRGB in 0..1 of [n, 3] values around 0, mostly within -1..1, soft at both ends."""
    lightness = 0.22 + 0.7 * torch.sigmoid(2 * components[:, 0])
    green_red, blue_yellow = (0.13 * torch.tanh(components[:, 1:])).T
    # Oklab to linear sRGB: https://bottosson.github.io/posts/oklab
    long = (lightness + 0.3963377774 * green_red + 0.2158037573 * blue_yellow) ** 3
    medium = (lightness - 0.1055613458 * green_red - 0.0638541728 * blue_yellow) ** 3
    short = (lightness - 0.0894841775 * green_red - 1.2914855480 * blue_yellow) ** 3
    linear = torch.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        dim=1,
    ).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _lay_out(
    columns: Sequence[Sequence[Image.Image]],
    captions: Sequence[tuple[str, str]],
    tile: tuple[int, int],
    title: str,
) -> Image.Image:
    """All columns side by side, or where they are many in several lines of equal length."""
    title_font, label_font = (ImageFont.load_default(size) for size in (_TITLE_PX, _LABEL_PX))
    n_lines = ceil(len(columns) / _MAX_COLUMNS)
    per_line = ceil(len(columns) / n_lines)
    top = _MARGIN_PX + (2 * _TITLE_PX if title else 0)
    tiles_top = 3 * _LABEL_PX
    line_height = tiles_top + len(columns[0]) * (tile[1] + _GAP_PX) + _GAP_PX

    grid_width = per_line * (tile[0] + _GAP_PX) - _GAP_PX
    width = 2 * _MARGIN_PX + max(grid_width, ceil(title_font.getlength(title)))
    height = top + n_lines * line_height - 2 * _GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, _MARGIN_PX - 4), title, _INK, title_font)
    for i, (column, (name, caption)) in enumerate(zip(columns, captions)):
        x = _MARGIN_PX + i % per_line * (tile[0] + _GAP_PX)
        y = top + i // per_line * line_height
        draw.text((x, y), name, _INK, label_font)
        draw.text((x, y + 1.25 * _LABEL_PX), caption, _FAINT_INK, label_font)
        for j, picture in enumerate(column):
            sheet.paste(picture, (x, y + tiles_top + j * (tile[1] + _GAP_PX)))
    return sheet
