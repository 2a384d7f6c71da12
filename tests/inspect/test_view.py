"""`fastbb view`: which images, sizes and stages make a sheet, and where it is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from fastbb import AutoBackbone, AutoImageProcessor, SwinBackbone, TimmBackboneConfig
from fastbb.extraction.layout import OutputError
from fastbb.inspect.contact_sheet import contact_sheet
from fastbb.inspect.view import _unlike, _view_size, view

MARGIN_PX, GAP_PX, CAPTIONS_PX = 32, 14, 54


def max_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


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


@pytest.mark.parametrize(
    ("shapes", "shown"),
    [
        ([(8, 4, 4)] * 12, [2, 5, 8, 11]),
        ([(8, 4, 4)] * 24, [5, 11, 17, 23]),
        ([(8, 4, 4)] * 6, [0, 2, 3, 5]),
        ([(8, 4, 4)] * 4, [0, 1, 2, 3]),
        ([(8, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1), (9, 1, 1)], [0, 1, 2, 3, 4]),
        ([(8, 8, 8)] + [(8, 4, 4)] * 8 + [(9, 4, 4)] * 2, [0, 2, 4, 6, 8, 9, 10]),
    ],
    ids=["vit", "large-vit", "six", "four", "pyramid", "mixed"],
)
def test_four_of_many_maps_of_one_shape_are_shown(shapes, shown: list[int]) -> None:
    assert _unlike(shapes) == shown


def save_vit(directory: Path, **options: object) -> Path:
    """A tiny timm ViT with a patch of 14, for images of 56x56."""
    options |= {"embed_dim": 24, "num_heads": 1, "depth": 6, "patch_size": 14, "img_size": 56}
    config = TimmBackboneConfig("vit_tiny_patch16_224", backbone_kwargs=options)
    AutoBackbone.from_config(config).save_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained("vit_tiny_patch16_224", input_size=(3, 56, 56))
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Sizes of the images, shapes of the maps and names of the stages of every sheet."""
    calls: list[tuple[Any, ...]] = []

    def spy(images: Any, maps: Any, names: Any, **options: Any) -> Image.Image:
        shapes = [[tuple(one.shape) for one in column] for column in maps]
        calls.append(([(i.height, i.width) for i in images], shapes, names, options))
        return contact_sheet(images, maps, names, **options)

    monkeypatch.setattr("fastbb.inspect.view.contact_sheet", spy)
    return calls


def test_sizes_are_rounded_to_the_patch(photo: Path, tmp_path: Path, drawn: list[Any]) -> None:
    view(photo, save_vit(tmp_path / "vit"), tmp_path / "sheet.png")
    ((sizes, shapes, names, _),) = drawn
    assert sizes == [(98, 154)]  # timm does not turn images upright
    assert shapes == [[(24, 7, 11)]] * 4
    assert names == ["blocks.0", "blocks.2", "blocks.3", "blocks.5"]


def test_a_model_that_takes_one_size_only_gets_it(
    photo: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    model = save_vit(tmp_path / "vit", dynamic_img_size=False)
    view(photo, model, tmp_path / "sheet.png")
    assert drawn[0][0] == [(56, 56)]
    with pytest.raises(ValueError, match=r"at 70x42 \(.*\); some models .* try size 56x56"):
        view(photo, model, tmp_path / "sheet.png", size=(70, 42))


def test_a_model_that_takes_no_size_is_named(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("196 tokens only")

    monkeypatch.setattr(SwinBackbone, "forward", refuse)
    with pytest.raises(ValueError, match=r"the model does not run at 64x64 \(196 tokens only\)$"):
        view(photo, "nano-swin-digits", tmp_path / "sheet.png")


def test_several_images_of_other_shapes_are_rows_of_one_sheet(
    photo: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    wide = Image.linear_gradient("L").resize((128, 64)).convert("RGB")
    wide.save(tmp_path / "wide.png")
    paths = [photo, str(tmp_path / "wide.png")]
    path = view(paths, "nano-swin-digits", tmp_path / "sheet.png", stages=["stage2"])
    ((sizes, shapes, _, options),) = drawn
    assert sizes == [(160, 96), (64, 128)]
    assert shapes == [[(24, 20, 12), (24, 8, 16)]]
    assert options == {
        "title": "2 images · nano-swin-digits",
        "labels": ["photo.png", "wide.png"],
    }
    label_height, first_tile = 27, 336
    with Image.open(path) as sheet:
        shown = sheet.crop((MARGIN_PX, 0, MARGIN_PX + 336, sheet.height))
    top = MARGIN_PX + 44 + CAPTIONS_PX + label_height + first_tile + GAP_PX + label_height
    second = shown.crop((0, top, 336, top + 168))
    want = wide.resize((336, 168), Image.Resampling.LANCZOS)
    assert max_difference(second, want) == 0


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        (["stage3", "stem"], ["stem", "stage3"]),
        (["-1", 0], ["stem", "stage4"]),
        (["stage4", "4"], ["stage4"]),
    ],
    ids=["names", "indices", "twice"],
)
def test_stages_are_chosen_by_name_or_index(
    photo: Path, tmp_path: Path, drawn: list[Any], stages: list[str], names: list[str]
) -> None:
    view(photo, "nano-swin-digits", tmp_path / "sheet.png", stages=stages)
    assert drawn[0][2] == names


@pytest.mark.parametrize("stages", [["stage9"], ["5"], []], ids=str)
def test_stages_that_are_not_there_are_an_error(
    photo: Path, tmp_path: Path, stages: list[str]
) -> None:
    with pytest.raises(ValueError, match="stages: wanted .* of stem, stage1, .*stage4"):
        view(photo, "nano-swin-digits", tmp_path / "sheet.png", stages=stages)


def test_no_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted at least one image, got none"):
        view([], "nano-swin-digits", tmp_path / "sheet.png")


def test_missing_directories_of_the_picture_are_made(photo: Path, tmp_path: Path) -> None:
    assert view(photo, "nano-swin-digits", tmp_path / "a" / "b" / "sheet.jpg").is_file()
    with pytest.raises(OSError, match="no-such-model"):
        view(photo, "no-such-model/at-all", tmp_path / "c" / "sheet.jpg")
    assert not (tmp_path / "c").exists()  # whatever fails, fails before


def test_a_picture_that_cannot_be_written_is_an_output_error(photo: Path, tmp_path: Path) -> None:
    for name in ("sheet", "sheet.txt"):
        with pytest.raises(ValueError, match="wanted a name that ends in .png"):
            view(photo, "nano-swin-digits", tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match="cannot write .*sheet.png: (Not a directory|File exists)"
    ):
        view(photo, "nano-swin-digits", tmp_path / "file" / "sheet.png")


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


@pytest.mark.parametrize("name", ["sheet.psd", "sheet.txt", "sheet"])
def test_a_name_of_no_picture_that_can_be_written_is_an_error(
    photo: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=r"out_path: wanted a name that ends in \.png"):
        view(photo, "nano-swin-digits", tmp_path / name)


def test_an_image_is_not_overwritten_by_its_sheet(photo: Path) -> None:
    before = photo.read_bytes()
    with pytest.raises(ValueError, match="is one of the images"):
        view(photo, "nano-swin-digits", photo)
    assert photo.read_bytes() == before


def test_a_model_whose_maps_are_tokens_is_drawn(tmp_path: Path) -> None:
    """Depth-Anything's backbone has reshape_hidden_states=False."""
    pytest.importorskip("transformers")
    from tiny_types import upstream

    upstream("dinov2", reshape_hidden_states=False).save_pretrained(tmp_path / "model")
    processor = {"image_processor_type": "ViTImageProcessor", "size": 32}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    Image.new("RGB", (40, 32), "teal").save(tmp_path / "image.png")
    view([tmp_path / "image.png"], str(tmp_path / "model"), tmp_path / "view.png")
    assert Image.open(tmp_path / "view.png").size[0] > 100
