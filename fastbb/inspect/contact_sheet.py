"""Contact sheets: images beside a picture of each of their feature maps.

The channels of a feature map are projected on their three principal components, which become
lightness and two opposed pairs of hues. The legend of a sheet says so.
"""

from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER = (22, 24, 29)
_INK = (235, 237, 240)
_FAINT_INK = (142, 148, 160)
_GAP_PX = 14
_MARGIN_PX = 32
_TITLE_PX = 22
_LABEL_PX = 18
_LEGEND_PX = 16
_LEGEND_LINE_PX = 26
_BAR_PX = (96, 12)
_MAX_COLUMNS = 6
_MAX_CELLS_OF_STATISTICS = 2**20


def contact_sheet(
    images: Image.Image | Sequence[Image.Image],
    feature_maps: Sequence[Tensor | Sequence[Tensor]],
    stage_names: Sequence[str],
    *,
    title: str = "",
    labels: Sequence[str] = (),
) -> Image.Image:
    """Draws one row per image: the image, then a picture of each of its feature maps.

    More than five maps go on below, under captions of their own.

    Colours are comparable within a column: all images of it share components and scale. Each
    component points to where the images are lighter, redder and yellower, so the sheet does not
    depend on the arbitrary signs of PCA. The middle of a cell has the exact colour, between
    cells colours are interpolated.

    Args:
        images: one image or B of them, of any sizes.
        feature_maps: per stage [B, C, h, w], or B maps [C, h, w] of several sizes; any
            floating-point dtype, any device.
        stage_names: the caption of each map.
        title: a line above everything.
        labels: a line above the row of each image; default: none.

    Returns:
        RGB image, 1,800 pixels wide for four stages of one image.

    Raises:
        ValueError: counts or shapes that do not match, or a map that is not finite.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    _check(images, feature_maps, stage_names, labels)
    images = [image.convert("RGB") for image in images]
    longest = min(336, max(64, 1120 // len(images)))
    tiles = [_scaled(image.size, longest) for image in images]

    columns = [[image.resize(tile, Image.Resampling.LANCZOS) for image, tile in zip(images, tiles)]]
    sizes = {f"{image.height} x {image.width}" for image in images}
    captions = [("image", sizes.pop() if len(sizes) == 1 else "")]
    for name, maps in zip(stage_names, feature_maps):
        pictures = zip(_pictures(maps, images), tiles)
        columns.append([p.resize(tile, Image.Resampling.BICUBIC) for p, tile in pictures])
        shapes = {tuple(one.shape) for one in maps}
        shape = str(list(shapes.pop())) if len(shapes) == 1 else f"[{len(maps[0])}, h, w]"
        captions.append((name, shape))
    return _lay_out(columns, captions, labels, title)


def _check(
    images: Sequence[Image.Image],
    feature_maps: Sequence[Tensor | Sequence[Tensor]],
    stage_names: Sequence[str],
    labels: Sequence[str],
) -> None:
    if not images:
        raise ValueError("contact_sheet needs at least one image, got none")
    if len(feature_maps) != len(stage_names):
        raise ValueError(
            f"contact_sheet needs one name per feature map, got {len(feature_maps)} maps "
            f"and {len(stage_names)} names"
        )
    if labels and len(labels) != len(images):
        raise ValueError(
            f"contact_sheet needs one label per image, got {len(images)} images and "
            f"{len(labels)} labels"
        )
    for name, maps in zip(stage_names, feature_maps):
        shapes = [list(one.shape) for one in maps]
        fits = len(shapes) == len(images) and len({shape[0] for shape in shapes if shape}) == 1
        if not fits or any(len(shape) != 3 or 0 in shape for shape in shapes):
            got = list(maps.shape) if isinstance(maps, Tensor) else shapes
            raise ValueError(
                f"feature map {name!r} must be [B, C, h, w] with B = {len(images)} images, "
                f"got {got}"
            )
        if not all(one.isfinite().all() for one in maps):
            raise ValueError(f"feature map {name!r} holds NaN or infinity, nothing to draw")


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    width, height = (max(1, round(edge * longest / max(size))) for edge in size)
    return width, height


def _pictures(maps: Tensor | Sequence[Tensor], images: Sequence[Image.Image]) -> list[Image.Image]:
    """One picture of h x w pixels for each of the maps [C, h, w]."""
    sizes = [(one.shape[1], one.shape[2]) for one in maps]
    cells = [one.detach().double().cpu().flatten(1).T for one in maps]
    pixels = torch.cat(cells)
    left, strengths, _ = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    components = torch.zeros(len(pixels), 3, dtype=torch.float64)
    n_components = min(3, len(strengths))
    components[:, :n_components] = (left * strengths)[:, :n_components]

    components = components * _signs(components, _opponent_colours(images, sizes))
    some = components[:: 1 + len(components) // _MAX_CELLS_OF_STATISTICS]
    # half of the middle 90 %: about 1.6 standard deviations, whatever the outliers
    low, middle, high = some.quantile(torch.tensor([0.05, 0.5, 0.95]).double(), dim=0)
    smallest = max(1e-4 * float(pixels.abs().max()), 1e-30)  # rounding errors stay grey
    scale = ((high - low) / 2).clamp_min(smallest)
    # weaker components stay paler, but not as pale as they are
    scale = scale.max() ** 0.4 * scale**0.6
    bytes_ = _colours((components - middle) / scale)
    parts = bytes_.split([height * width for height, width in sizes])
    return [Image.fromarray(p.reshape(*size, 3).numpy()) for p, size in zip(parts, sizes)]


def _opponent_colours(images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Lightness, redness and yellowness of the images on grids of h x w cells, [cells, 3]."""
    rows = []
    for image, (h, w) in zip(images, sizes):
        small = image.resize((w, h), Image.Resampling.BOX).convert("YCbCr")
        y, cb, cr = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(-1, 3).T
        rows.append(torch.stack([y, cr, 255 - cb], dim=1).double())
    return torch.cat(rows)


def _signs(components: Tensor, colours: Tensor) -> Tensor:
    """+1 or -1 per column: agreement with the colours, without any, the longer tail."""
    agreement = (components * (colours - colours.mean(0))).sum(0)
    undecided = agreement.abs() <= 1e-9 * components.norm(dim=0) * colours.norm(dim=0)
    agreement = torch.where(undecided, (components**3).sum(0), agreement)
    return torch.where(agreement < 0, -1.0, 1.0)


def _colours(components: Tensor) -> Tensor:
    """8-bit sRGB [n, 3] of values around 0, mostly within -1..1, soft at both ends."""
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
    rgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (rgb * 255).round().to(torch.uint8)


def _lay_out(
    columns: Sequence[Sequence[Image.Image]],
    captions: Sequence[tuple[str, str]],
    labels: Sequence[str],
    title: str,
) -> Image.Image:
    """All columns side by side, or where they are many in several lines of equal length."""
    title_font, label_font = (ImageFont.load_default(size) for size in (_TITLE_PX, _LABEL_PX))
    n_lines = ceil(len(columns) / _MAX_COLUMNS)
    per_line = ceil(len(columns) / n_lines)
    # thin pictures stand apart, so that captions fit
    texts = [text for caption in captions for text in caption]
    column_width = max(
        *(picture.width for picture in columns[0]),
        *(ceil(label_font.getlength(text)) for text in texts),
    )
    label_height = round(1.5 * _LABEL_PX) if labels else 0
    tops = [3 * _LABEL_PX]  # of the rows, below the captions
    for picture in columns[0]:
        tops.append(tops[-1] + label_height + picture.height + _GAP_PX)
    line_height = tops[-1] + _GAP_PX

    widths = [
        per_line * (column_width + _GAP_PX) - _GAP_PX,
        *(ceil(title_font.getlength(title)), *(ceil(label_font.getlength(t)) for t in labels)),
    ]
    legend = _legend(max(widths))
    top = _MARGIN_PX + (2 * _TITLE_PX if title else 0)
    legend_top = top + n_lines * line_height
    height = legend_top + legend.height + _MARGIN_PX
    sheet = Image.new("RGB", (2 * _MARGIN_PX + max(*widths, legend.width), height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, _MARGIN_PX - 4), title, _INK, title_font)
    sheet.paste(legend, (_MARGIN_PX, legend_top))
    for i, (column, (name, caption)) in enumerate(zip(columns, captions)):
        x = _MARGIN_PX + i % per_line * (column_width + _GAP_PX)
        y = top + i // per_line * line_height
        draw.text((x, y), name, _INK, label_font)
        draw.text((x, y + 1.25 * _LABEL_PX), caption, _FAINT_INK, label_font)
        for picture, row_top in zip(column, tops):
            sheet.paste(picture, (x, y + row_top + label_height))
        if i % per_line == 0:
            for label, row_top in zip(labels, tops):
                draw.text((x, y + row_top), label, _FAINT_INK, label_font)
    return sheet


def _legend(width: int) -> Image.Image:
    """The legend, in as many lines as it takes at this width."""
    font = ImageFont.load_default(_LEGEND_PX)
    bars = [_bar(component) for component in range(3)]
    parts: list[list[Image.Image | str]] = [
        ["colours: the three principal components of a map's channels"],
        [bars[0], "1st", bars[1], "2nd", bars[2], "3rd"],
        ["similar colours in a column: similar features"],
    ]

    def length(item: Image.Image | str) -> int:
        return ceil(font.getlength(item)) if isinstance(item, str) else item.width

    placed, x, y = [], 0, 0
    for part in parts:
        part_width = sum(map(length, part)) + (len(part) - 1) * _GAP_PX
        width = max(width, part_width)
        if x + part_width > width:
            x, y = 0, y + _LEGEND_LINE_PX
        for item in part:
            placed.append((item, x, y))
            x += length(item) + _GAP_PX
        x += _GAP_PX
    legend = Image.new("RGB", (width, y + _LEGEND_LINE_PX), _PAPER)
    for item, x, y in placed:
        if isinstance(item, str):
            ImageDraw.Draw(legend).text((x, y), item, _FAINT_INK, font)
        else:
            legend.paste(item, (x, y + 5))
    return legend


def _bar(component: int) -> Image.Image:
    """The colours of a component from low to high, the others in the middle."""
    width, height = _BAR_PX
    values = torch.zeros(width, 3, dtype=torch.float64)
    values[:, component] = torch.linspace(-1.5, 1.5, width)
    return Image.fromarray(_colours(values).expand(height, -1, -1).numpy())
