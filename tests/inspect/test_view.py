"""Contact sheets: what is drawn where, and that it depends on the features alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, ImageStat

from fastbb import AutoBackbone, AutoImageProcessor, SwinBackbone
from fastbb.inspect.view import _view_size, contact_sheet, view

MARGIN_PX, GAP_PX = 32, 14


def half_and_half(left: int, right: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Grey image [H, W] = size[::-1] whose halves have these values."""
    image = Image.new("L", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image.convert("RGB")


def random_maps(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tiles(sheet: Image.Image, n_rows: int, n_columns: int, tile: tuple[int, int]):
    """The pictures of a sheet without its captions: tiles[row][column]."""
    left = MARGIN_PX
    top = sheet.height - MARGIN_PX - n_rows * (tile[1] + GAP_PX) + GAP_PX
    return [
        [
            sheet.crop((x, y, x + tile[0], y + tile[1]))
            for x in range(left, left + n_columns * (tile[0] + GAP_PX), tile[0] + GAP_PX)
        ]
        for y in range(top, top + n_rows * (tile[1] + GAP_PX), tile[1] + GAP_PX)
    ]


def n_colours(picture: Image.Image) -> int:
    return len(picture.getcolors(picture.width * picture.height) or [])


def lightness(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.convert("L")).mean[0]


def max_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_sheet_holds_the_image_and_one_crisp_picture_per_stage() -> None:
    image = half_and_half(40, 200)
    maps = random_maps((1, 8, 12, 16), (1, 16, 3, 4))
    sheet = contact_sheet(image, maps, ["stage1", "stage2"])
    shown, fine, coarse = tiles(sheet, 1, 3, (336, 252))[0]
    assert max_difference(shown, image.resize((336, 252), Image.Resampling.LANCZOS)) == 0
    for picture, (w, h) in [(fine, (16, 12)), (coarse, (4, 3))]:
        cells = picture.resize((w, h), Image.Resampling.NEAREST)
        assert max_difference(picture, cells.resize(picture.size, Image.Resampling.NEAREST)) == 0
        assert n_colours(cells) == w * h


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


def test_signs_are_settled_for_an_image_of_one_colour_too() -> None:
    grey = half_and_half(128, 128)
    for maps in random_maps(*[(1, 8, 12, 16)] * 8):
        sheets = [contact_sheet(grey, [m], ["stage1"]) for m in (maps, maps.flip(1), -maps)]
        assert max_difference(sheets[0], sheets[1]) <= 1
        assert max_difference(sheets[0], sheets[2]) <= 1


def test_bfloat16_maps_are_drawn() -> None:
    maps = [m.bfloat16() for m in random_maps((1, 8, 6, 8))]
    sheet = contact_sheet(half_and_half(0, 255), maps, ["stage1"])
    assert n_colours(tiles(sheet, 1, 2, (336, 252))[0][1]) == 48


def test_many_stages_are_drawn_in_several_lines() -> None:
    image = half_and_half(0, 255)
    maps = random_maps(*[(1, 8, 3, 4)] * 7)
    sheet = contact_sheet(image, maps, [f"stage{i}" for i in range(7)])
    assert sheet.width == contact_sheet(image, maps[:3], ["a", "b", "c"]).width
    last = tiles(sheet, 1, 4, (336, 252))[0][3]
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
    assert n_colours(tiles(sheet, 1, 2, (336, 252))[0][1]) >= 0.9 * shape[2] * shape[3]


def test_flat_map_is_grey_and_not_amplified_rounding() -> None:
    maps = torch.full((1, 8, 6, 8), 0.1) + 1e-9 * torch.randn(1, 8, 6, 8)
    picture = tiles(contact_sheet(half_and_half(0, 255), [maps], ["s"]), 1, 2, (336, 252))[0][1]
    assert np.ptp(np.asarray(picture, int), axis=(0, 1)).max() <= 2


@pytest.mark.parametrize(
    ("images", "maps", "names", "message"),
    [
        ([], [], [], "at least one image"),
        ([(8, 8), (8, 9)], [torch.ones(2, 3, 2, 2)], ["a"], "one size, got 8x8, 9x8"),
        ([(8, 8)], [torch.ones(1, 3, 2, 2)], ["a", "b"], "1 maps and 2 names"),
        ([(8, 8)], [torch.ones(2, 3, 2, 2)], ["a"], r"B = 1 images, got \[2, 3, 2, 2\]"),
        ([(8, 8)], [torch.ones(3, 2, 2)], ["a"], r"got \[3, 2, 2\]"),
        ([(8, 8)], [torch.ones(1, 3, 0, 2)], ["a"], r"got \[1, 3, 0, 2\]"),
        ([(8, 8)], [torch.full((1, 3, 2, 2), torch.nan)], ["a"], "'a' holds NaN"),
    ],
    ids=["no-image", "sizes", "names", "batch", "3-d", "empty-map", "nan"],
)
def test_bad_input_is_named(images, maps, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet([Image.new("RGB", size) for size in images], maps, names)


@pytest.mark.parametrize(
    ("image_size", "model_size", "seen"),
    [
        ((600, 400), (224, 224), (288, 448)),
        ((400, 600), (224, 224), (448, 288)),
        ((448, 448), (64, 64), (448, 448)),
        ((8, 8), (64, 64), (64, 64)),
        ((100, 60), (224, 224), (128, 224)),
        ((300, 200), None, (192, 288)),
        ((5000, 10), (224, 224), (32, 448)),
    ],
    ids=["landscape", "portrait", "square", "digit", "small", "no-model-size", "panorama"],
)
def test_view_keeps_the_shape_of_the_image(image_size, model_size, seen) -> None:
    assert _view_size(Image.new("RGB", image_size), model_size) == seen


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    # lying on its side: the orientation turns it by a quarter
    turned = Image.radial_gradient("L").resize((100, 150)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


@pytest.mark.parametrize("size", [None, (64, 96)], ids=["default", "64x96"])
def test_view_writes_the_sheet_of_all_stages(photo: Path, tmp_path: Path, size) -> None:
    path = view(photo, "nano-swin-digits", tmp_path / "sheet.png", size=size)
    assert path == tmp_path / "sheet.png"

    height, width = size or (160, 96)
    with Image.open(photo) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    assert upright.size == (100, 150)
    seen = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    backbone = AutoBackbone.from_pretrained("nano-swin-digits", out_indices=(1, 2, 3, 4))
    pixel_values = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
    title = "photo.png · nano-swin-digits"
    want = contact_sheet(seen, maps, ["stage1", "stage2", "stage3", "stage4"], title=title)
    with Image.open(path) as sheet:
        assert max_difference(sheet, want) <= 1


def test_view_names_the_size_of_a_model_that_takes_no_other(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("196 tokens only")

    monkeypatch.setattr(SwinBackbone, "forward", refuse)
    with pytest.raises(ValueError, match=r"at 160x96 \(196 tokens only\); .* such as 64x64"):
        view(photo, "nano-swin-digits", tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("print.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_format"),
        ("bomb.ppm", b"P6 99999 99999 255\n" + bytes(99), "too_many_pixels"),
        ("none.png", None, "not_found"),
    ],
)
def test_view_refuses_a_bad_picture(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: ({message})"):
        view(tmp_path / name, "nano-swin-digits", tmp_path / "sheet.png")


def test_view_runs_a_checkpoint_in_its_own_dtype(photo: Path, tmp_path: Path) -> None:
    backbone = AutoBackbone.from_pretrained("nano-swin-digits", dtype=torch.bfloat16)
    backbone.out_features = backbone.stage_names
    backbone.save_pretrained(tmp_path / "model")
    AutoImageProcessor.from_pretrained("nano-swin-digits").save_pretrained(tmp_path / "model")
    assert view(photo, tmp_path / "model", tmp_path / "sheet.png").is_file()
