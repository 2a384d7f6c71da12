"""Contact sheets: what is drawn where, and that it depends on the features alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat

from fastbb.inspect.contact_sheet import _pictures, contact_sheet

MARGIN_PX, GAP_PX, CAPTIONS_PX = 32, 14, 54


def half_and_half(left: int, right: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Grey image [H, W] = size[::-1] whose halves have these values."""
    image = Image.new("L", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image.convert("RGB")


def random_maps(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tiles(sheet: Image.Image, n_rows: int, n_columns: int, tile: tuple[int, int], line: int = 0):
    """The pictures of a line of a sheet that has no title and no labels: tiles[row][column]."""
    left = MARGIN_PX
    line_height = CAPTIONS_PX + n_rows * (tile[1] + GAP_PX) + GAP_PX
    top = MARGIN_PX + line * line_height + CAPTIONS_PX
    return [
        [
            sheet.crop((x, y, x + tile[0], y + tile[1]))
            for x in range(left, left + n_columns * (tile[0] + GAP_PX), tile[0] + GAP_PX)
        ]
        for y in range(top, top + n_rows * (tile[1] + GAP_PX), tile[1] + GAP_PX)
    ]


def n_colours(picture: Image.Image) -> int:
    return len(picture.getcolors(picture.width * picture.height) or [])


def cells_of(picture: Image.Image, w: int, h: int) -> Image.Image:
    """The middles of w x h cells."""
    return picture.resize((w, h), Image.Resampling.NEAREST)


def lightness(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.convert("L")).mean[0]


def max_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_sheet_holds_the_image_and_one_smooth_picture_per_stage() -> None:
    image = half_and_half(40, 200)
    maps = random_maps((1, 8, 12, 16), (1, 16, 3, 4))
    sheet = contact_sheet(image, maps, ["stage1", "stage2"])
    shown, *pictures = tiles(sheet, 1, 3, (336, 252))[0]
    assert max_difference(shown, image.resize((336, 252), Image.Resampling.LANCZOS)) == 0
    for picture, one, (w, h) in zip(pictures, maps, [(16, 12), (4, 3)]):
        cells = cells_of(picture, w, h)
        assert n_colours(cells) == w * h
        (exact,) = _pictures(one, [image])
        assert max_difference(cells, exact) <= 2
        steps = np.diff(np.asarray(picture, int), axis=1)
        assert np.abs(steps).max() < np.abs(np.diff(np.asarray(exact, int), axis=1)).max() / 4


def test_the_legend_shows_what_each_component_is_drawn_as() -> None:
    sheet = contact_sheet(half_and_half(0, 255), random_maps((1, 8, 3, 4)), ["stage1"])
    legend = sheet.crop((0, MARGIN_PX + CAPTIONS_PX + 252 + GAP_PX, *sheet.size))
    rows = np.asarray(legend, int)
    chroma = np.ptp(rows, axis=2) > 40
    green, red, blue, yellow = (
        chroma & (rows[..., strong] > rows[..., weak].max(-1) + 30)
        for strong, weak in ((1, [0]), (0, [1]), (2, [0, 1]), (0, [2]))
    )
    # from left to right, in one line: green to red, blue to yellow
    where = [int(np.median(np.nonzero(mask.any(0))[0])) for mask in (green, red, blue, yellow)]
    assert all(mask.any() for mask in (green, red, blue, yellow))
    assert where[0] < where[1] and where[2] < where[3]


@pytest.mark.parametrize("size", [(32, 448), (448, 32), (8, 8)], ids=str)
def test_captions_of_thin_images_do_not_overlap(size: tuple[int, int]) -> None:
    names = ["a_long_name_of_a_stage", "another_stage"]
    maps = random_maps((1, 192, 28, 2), (1, 192, 28, 2))
    sheet = contact_sheet(Image.new("RGB", size), maps, names)
    line = np.asarray(sheet)[MARGIN_PX : MARGIN_PX + 22, MARGIN_PX:].max(axis=(0, 2)) > 100
    # runs of columns without ink that are wider than a space: those between captions
    gaps = [len(gap) for gap in "".join(".#"[int(ink)] for ink in line).strip(".").split("#")]
    assert sum(gap >= 10 for gap in gaps) == 2


def test_captions_and_title_are_drawn() -> None:
    maps = random_maps((1, 8, 3, 4))
    image = half_and_half(0, 255)
    plain = contact_sheet(image, maps, ["stage1"])
    assert max_difference(plain, contact_sheet(image, maps, ["stage2"])) > 0
    titled = contact_sheet(image, maps, ["stage1"], title="A long title " * 9)
    assert titled.height > plain.height
    assert titled.width > plain.width
    strip = titled.crop((0, 0, titled.width, MARGIN_PX + 22))
    assert np.asarray(strip).max() > 200


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: -x, id="negated"),
        pytest.param(lambda x: x * 1000, id="scaled"),
        pytest.param(lambda x: x + torch.arange(8.0)[:, None, None], id="shifted"),
        pytest.param(lambda x: x.flip(1), id="channels-reversed"),
        pytest.param(lambda x: x.double(), id="float64"),
        pytest.param(lambda x: x.requires_grad_(), id="with-gradient"),
    ],
)
def test_a_picture_does_not_depend_on_sign_scale_offset_or_dtype(change) -> None:
    image = half_and_half(0, 255)
    (maps,) = random_maps((1, 8, 12, 16))
    before = contact_sheet(image, [maps], ["stage1"])
    assert max_difference(before, contact_sheet(image, [change(maps)], ["stage1"])) <= 1


def test_signs_are_fixed_for_an_image_of_one_colour() -> None:
    grey = half_and_half(128, 128)
    for maps in random_maps(*[(1, 8, 12, 16)] * 8):
        sheets = [contact_sheet(grey, [m], ["stage1"]) for m in (maps, maps.flip(1), -maps)]
        assert max_difference(sheets[0], sheets[1]) <= 1
        assert max_difference(sheets[0], sheets[2]) <= 1


def test_bfloat16_maps_are_drawn() -> None:
    maps = [m.bfloat16() for m in random_maps((1, 8, 6, 8))]
    sheet = contact_sheet(half_and_half(0, 255), maps, ["stage1"])
    assert n_colours(cells_of(tiles(sheet, 1, 2, (336, 252))[0][1], 8, 6)) == 48


def test_many_stages_are_drawn_in_several_lines() -> None:
    image = half_and_half(0, 255)
    maps = random_maps(*[(1, 8, 3, 4)] * 7)
    sheet = contact_sheet(image, maps, [f"stage{i}" for i in range(7)])
    assert sheet.width == contact_sheet(image, maps[:3], ["a", "b", "c"]).width
    last = tiles(sheet, 1, 4, (336, 252), line=1)[0][3]
    alone = tiles(contact_sheet(image, maps[6:], ["stage6"]), 1, 2, (336, 252))[0][1]
    assert max_difference(last, alone) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_strongest_direction_is_light_where_the_image_is_light(sign: int) -> None:
    maps = torch.zeros(1, 4, 6, 8)
    maps[:, 2, :, 4:] = sign * 5.0
    for image, lighter in [(half_and_half(0, 255), "right"), (half_and_half(255, 0), "left")]:
        picture = tiles(contact_sheet(image, [maps], ["s"]), 1, 2, (336, 252))[0][1]
        left, right = picture.crop((0, 0, 168, 252)), picture.crop((168, 0, 336, 252))
        assert (lightness(right) > lightness(left) + 60) == (lighter == "right")
        assert (lightness(left) > lightness(right) + 60) == (lighter == "left")


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (1, 1, -1)], ids=str)
def test_weaker_directions_are_red_and_yellow_where_the_image_is(signs: tuple[int, ...]) -> None:
    # three independent patterns of quadrants, the third +1 at the top left and the bottom right
    rows, columns = torch.meshgrid(*[torch.tensor([1.0, 1, -1, -1])] * 2, indexing="ij")
    patterns = torch.stack([rows, columns, rows * columns])
    colours = torch.tensor([[50.0, 50, 50], [35, -18, 0], [8, 8, -60]])
    rgb = (128 + torch.einsum("khw,kc->hwc", patterns, colours)).byte().numpy()
    maps = patterns * torch.tensor([8, 4, 2])[:, None, None] * torch.tensor(signs)[:, None, None]
    sheet = contact_sheet(Image.fromarray(rgb), [maps[None]], ["stage1"])
    picture = tiles(sheet, 1, 2, (336, 336))[0][1].resize((4, 4), Image.Resampling.NEAREST)
    red, green, blue = torch.from_numpy(np.array(picture)).double().permute(2, 0, 1)
    assert ((red - green) * columns).mean() > 20
    assert (((red + green) / 2 - blue) * rows * columns).mean() > 20


def test_colours_are_comparable_between_images() -> None:
    one, other = random_maps((1, 8, 6, 8), (1, 8, 6, 8))
    image = half_and_half(0, 255)
    sheet = contact_sheet([image] * 3, [torch.cat([one, other, one])], ["stage1"])
    (_, first), (_, second), (_, third) = tiles(sheet, 3, 2, (336, 252))
    assert max_difference(first, third) == 0
    assert max_difference(first, second) > 50


def test_one_extreme_cell_does_not_flatten_the_rest() -> None:
    maps = torch.zeros(1, 3, 8, 8)
    maps[:, 0, :, 4:] = 1.0
    maps[:, 0, 0, 7] = 1000.0
    image = half_and_half(0, 255, (64, 64))
    picture = tiles(contact_sheet(image, [maps], ["s"]), 1, 2, (336, 336))[0][1]
    halves = [lightness(picture.crop((x, 100, x + 100, 300))) for x in (0, 200)]
    assert halves[1] > halves[0] + 60


@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 1), (1, 1, 6, 8), (1, 2, 6, 8), (1, 64, 1, 2)], ids=str
)
def test_maps_with_few_cells_or_channels_are_drawn(shape: tuple[int, ...]) -> None:
    sheet = contact_sheet(half_and_half(0, 255), random_maps(shape), ["stage1"])
    # one channel gives greys only, and of those a few coincide
    (exact,) = _pictures(random_maps(shape)[0], [half_and_half(0, 255)])
    assert n_colours(exact) >= 0.9 * shape[2] * shape[3]
    cells = cells_of(tiles(sheet, 1, 2, (336, 252))[0][1], shape[3], shape[2])
    assert max_difference(cells, exact) <= 2


def test_flat_map_is_grey_and_not_amplified_rounding() -> None:
    maps = torch.full((1, 8, 6, 8), 0.1) + 1e-9 * torch.randn(1, 8, 6, 8)
    picture = tiles(contact_sheet(half_and_half(0, 255), [maps], ["s"]), 1, 2, (336, 252))[0][1]
    assert np.ptp(np.asarray(picture, int), axis=(0, 1)).max() <= 2


@pytest.mark.parametrize(
    ("images", "maps", "names", "message"),
    [
        ([], [], [], "at least one image"),
        ([(8, 8)], [[torch.ones(3, 2, 2), torch.ones(3, 2, 2)]], ["a"], r"B = 1 images"),
        ([(8, 8)] * 2, [[torch.ones(3, 2, 2), torch.ones(4, 2, 2)]], ["a"], "must be"),
        ([(8, 8)], [torch.ones(1, 3, 2, 2)], ["a", "b"], "1 maps and 2 names"),
        ([(8, 8)], [torch.ones(2, 3, 2, 2)], ["a"], r"B = 1 images, got \[2, 3, 2, 2\]"),
        ([(8, 8)], [torch.ones(3, 2, 2)], ["a"], r"got \[3, 2, 2\]"),
        ([(8, 8)], [torch.ones(1, 3, 0, 2)], ["a"], r"got \[1, 3, 0, 2\]"),
        ([(8, 8)], [torch.full((1, 3, 2, 2), torch.nan)], ["a"], "'a' holds NaN"),
    ],
    ids=["no-image", "maps", "channels", "names", "batch", "3-d", "empty-map", "nan"],
)
def test_wrong_input_raises_value_error(images, maps, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet([Image.new("RGB", size) for size in images], maps, names)
