"""ImageProcessor: timm's pixels bit for bit, every kind of input, batches, files, errors.

(transformers' pixels and files: test_image_spec.py)
"""

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from fastbb.images.processor import AutoImageProcessor, ImageProcessor, ImageProcessorSpec
from fastbb.images.spec_readers import spec_from_config, spec_from_timm

SIZES = [(1, 1), (1, 9), (11, 1), (2, 97), (23, 24), (32, 32), (61, 37), (64, 64), (101, 99)]
VIT = {"image_processor_type": "ViTImageProcessor", "size": 32}
BIT = {"image_processor_type": "BitImageProcessor", "size": 40, "crop_size": 32}
DETR = {"image_processor_type": "DetrImageProcessor", "size": 20, "max_size": 60}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """RGB noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def timm_pixels(pretrained_cfg: dict, image: Image.Image, test: bool = False) -> torch.Tensor:
    """Pixels of timm's own evaluation transform."""
    data = resolve_data_config({}, pretrained_cfg=pretrained_cfg, use_test_size=test)
    return create_transform(**data, is_training=False)(image)  # type: ignore[operator]


def processor_for(config: dict, **overrides) -> ImageProcessor:
    return ImageProcessor(spec_from_config(config, **overrides))


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("input_size", [(32, 32), (31, 48), (57, 20)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_pixels_equal_timm(crop_mode, interpolation, input_size, crop_pct) -> None:
    if crop_mode == "center" and input_size[0] != input_size[1]:
        # timm before passes no interpolation on, so that bicubic becomes bilinear
        pytest.importorskip("timm", minversion="1.0.31")
    cfg = {
        "input_size": (3, *input_size),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.2, 0.3, 0.5),
    }
    processor = ImageProcessor(spec_from_timm(cfg))
    assert processor.output_size == input_size
    for size in SIZES:
        image = picture(*size)
        if 0 in processor.spec.resized_size(*size):
            with pytest.raises(ValueError, match="must be > 0"):
                timm_pixels(cfg, image)
            continue
        assert torch.equal(processor.process(image), timm_pixels(cfg, image)), size


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",  # bicubic, center, a larger size at test time
        "timm/resnet50.a1_in1k",
        "cspdarknet53.ra_in1k",  # bilinear, center
        "coat_lite_medium_384.in1k",  # bicubic, squash
        "vit_base_patch16_sapiens2.fb",  # bilinear, squash, not square
        "deepseek_vit_412m.deepseek_v4_flash_vision_exp",  # bicubic, border
    ],
)
@pytest.mark.parametrize("test", [False, True], ids=["default size", "test size"])
def test_pixels_of_a_timm_name_equal_timm(name: str, test: bool) -> None:
    if not timm.is_model(name.removeprefix("timm/").split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no such model")
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert cfg is not None
    image = picture(130, 177)
    processor = AutoImageProcessor.from_pretrained(name, use_test_size=test)
    assert processor.spec.reference == "timm"
    expected = timm_pixels(cfg.to_dict(), image, test)
    assert torch.equal(processor(image).pixel_values[0], expected)
    assert processor.output_size == expected.shape[1:]


def test_size_of_a_timm_model_is_that_of_timms_own_default() -> None:
    model = timm.create_model("resnet18.a1_in1k")
    transform = create_transform(**resolve_data_config({}, model=model))
    processor = AutoImageProcessor.from_pretrained("resnet18.a1_in1k")
    assert processor.output_size == (224, 224)
    image = picture(300, 260)
    assert torch.equal(processor.process(image), transform(image))  # type: ignore[operator]
    test = AutoImageProcessor.from_pretrained("resnet18.a1_in1k", use_test_size=True)
    assert test.output_size == (288, 288)
    with pytest.raises(ValueError, match="ViTImageProcessor has no option 'use_test_size'"):
        spec_from_config(VIT, use_test_size=True)


def test_directory_in_timms_format_equals_timm(tmp_path: Path) -> None:
    cfg = {"input_size": [3, 28, 28], "crop_pct": 0.9, "crop_mode": "squash"}
    config = {"architecture": "resnet18", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = AutoImageProcessor.from_pretrained(tmp_path, interpolation="bilinear")
    expected = timm_pixels({**cfg, "interpolation": "bilinear"}, picture(40, 50))
    assert torch.equal(processor.process(picture(40, 50)), expected)
    processor.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).spec == processor.spec


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("reference", ["hf", "timm"])
def test_exif_orientation_applies_to_files_of_transformers_models_only(
    reference: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    path.write_bytes(png(picture(20, 30), exif=exif))
    spec = spec_from_config(VIT) if reference == "hf" else spec_from_timm({"input_size": (3, 8, 8)})
    processor = ImageProcessor(spec)
    stored = processor(picture(20, 30)).pixel_values
    in_memory = processor(Image.open(path)).pixel_values
    assert torch.equal(in_memory, stored)
    turned = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_270,
        8: Image.Transpose.ROTATE_90,
    }
    upright = picture(20, 30)
    if reference == "hf" and orientation != 1:
        upright = upright.transpose(turned[orientation])
    for source in (path, str(path), path.read_bytes()):
        assert torch.equal(processor(source).pixel_values, processor(upright).pixel_values)


def test_alpha_rules_differ_for_files_and_images_in_memory(tmp_path: Path) -> None:
    clear_red = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    path = tmp_path / "clear.png"
    path.write_bytes(png(clear_red))
    red, white = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "white")
    for spec, in_memory in ((spec_from_config(VIT), white), (spec_from_timm({"_": 0}), red)):
        processor = ImageProcessor(spec)
        assert torch.equal(processor(clear_red).pixel_values, processor(in_memory).pixel_values)
        assert torch.equal(processor(path).pixel_values, processor(red).pixel_values)
    processor_for(VIT, alpha_in_files="white", alpha_in_memory="drop").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(processor(path).pixel_values, processor(white).pixel_values)
    assert torch.equal(processor(clear_red).pixel_values, processor(red).pixel_values)


@pytest.mark.parametrize("config", [VIT, BIT, None], ids=["vit", "bit", "timm"])
def test_all_kinds_of_input_give_the_same_pixels(config: dict | None, tmp_path: Path) -> None:
    spec = spec_from_config(config) if config else spec_from_timm({"input_size": (3, 32, 32)})
    processor = ImageProcessor(spec)
    image = picture(40, 50)
    array = np.asarray(image)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    kinds = [
        *(image, array, np.moveaxis(array, -1, 0), array.astype(np.int64), array.astype(float)),
        *(torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1)),
        *(path, str(path), path.read_bytes(), memoryview(path.read_bytes())),
    ]
    for one in kinds:
        assert torch.equal(processor(one).pixel_values, processor(image).pixel_values)
    batch = processor(kinds).pixel_values
    assert batch.shape == (len(kinds), 3, 32, 32)
    assert batch.dtype == torch.float32
    assert (batch == processor.process(image)).all()
    stacked = np.stack([array, array])
    assert torch.equal(processor(stacked).pixel_values, batch[:2])
    assert torch.equal(processor(torch.from_numpy(stacked)).pixel_values, batch[:2])
    assert np.array_equal(processor(image, return_tensors="np").pixel_values, batch[:1])
    assert torch.equal(processor((image,), return_tensors=None)["pixel_values"], batch[:1])


def test_timm_processor_takes_float_arrays_as_8_bit_pictures() -> None:
    processor = ImageProcessor(spec_from_timm({"input_size": (3, 32, 32)}))
    array = np.random.default_rng(0).random((40, 50, 3))
    image = Image.fromarray((array * 255).astype(np.uint8))
    assert torch.equal(processor(array).pixel_values, processor(image).pixel_values)


def test_process_is_thread_safe_and_equals_the_call() -> None:
    processor = processor_for(BIT)
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES * 3)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(processor.process, images))
    assert torch.equal(torch.stack(threaded), processor(images).pixel_values)


def test_batch_is_a_mapping_for_models() -> None:
    inputs = processor_for(DETR)([picture(40, 50), picture(50, 40)])
    assert list(inputs) == ["pixel_values", "pixel_mask"]
    assert (lambda pixel_values, pixel_mask: pixel_values.shape)(**inputs) == (2, 3, 25, 25)
    moved = inputs.to("cpu", torch.bfloat16)
    assert (moved.pixel_values.dtype, moved["pixel_mask"].dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(AttributeError, match="no 'labels' among pixel_values, pixel_mask"):
        _ = inputs.labels


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (VIT, (32, 32)),
        (BIT, (32, 32)),
        ({**BIT, "do_center_crop": False}, None),
        ({**VIT, "do_resize": False}, None),
        ({**DETR, "size": {"height": 7, "width": 9}}, (7, 9)),
        (DETR, None),
        ({**DETR, "pad_size": {"height": 60, "width": 61}}, (60, 61)),
        ({"image_processor_type": "MaskFormerImageProcessor", "size": [40, 50]}, (64, 64)),
    ],
    ids=["exact", "crop", "shortest-edge", "as-is", "detr-exact", "detr", "padded", "divisor"],
)
def test_output_size_is_that_of_every_image_or_none(
    config: dict, size: tuple[int, int] | None
) -> None:
    processor = processor_for(config)
    assert processor.output_size == size
    shapes = {tuple(processor.process(picture(*s)).shape[1:]) for s in [(40, 50), (31, 30)]}
    assert (shapes == {size}) if size else len(shapes) == 2


def test_spec_survives_json() -> None:
    for spec in (spec_from_config(DETR), spec_from_config(BIT), spec_from_timm({"_": 0})):
        values = json.loads(json.dumps(spec.to_dict()))
        assert values == spec.to_dict()
        assert ImageProcessorSpec.from_dict(values) == spec
        assert hash(spec) == hash(ImageProcessorSpec.from_dict(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "bicubic"}, "no field 'interpolation'.*The fields are alpha_in_files"),
        ({"size": [32]}, r"size must be 2 positive whole number\(s\) of pixels, got \(32,\)"),
        ({"size": [32, 0]}, r"got \(32, 0\)"),
        ({"size": [float("nan"), 32]}, r"got \(nan, 32\)"),
        ({"size": 32}, "got 32"),
        ({"size": None}, "exactly one of `size` and `crop_pct`"),
        ({"resize": None}, "exactly one of `size` and `crop_pct`"),
        ({"resize": "stretch"}, "resize must be one of None, 'exact'.*, got 'stretch'"),
        ({"resample": 3}, "resample must be one of 'nearest'.*, got 3"),
        ({"reference": "torchvision"}, "reference must be one of 'hf', 'timm'"),
        ({"image_mean": [0.5]}, "image_mean must be 3 finite numbers"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must not hold 0"),
        ({"image_std": None}, "must both be given"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a positive number, got nan"),
        ({"alpha_in_files": "black"}, "alpha_in_files must be one of 'white', 'drop'"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_wrong_spec_raises_value_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessorSpec.from_dict({**spec_from_config(VIT).to_dict(), **changes})


def test_spec_from_dict_needs_every_field() -> None:
    values = spec_from_config(VIT).to_dict()
    del values["exif_in_files"]
    with pytest.raises(ValueError, match="missing: exif_in_files"):
        ImageProcessorSpec.from_dict(values)


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        ([], ValueError, "list of images is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "list of images is empty"),
        (None, TypeError, r"images\[0\]: an image is a PIL image.*got NoneType"),
        ([picture(4, 4), 7], TypeError, r"images\[1\]: .*got int"),
        (np.zeros((9, 5, 2), np.uint8), ValueError, r"1, 3 or 4 channels, got shape \(9, 5, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "0x5 pixels is empty"),
        (np.full((9, 5, 3), 256), ValueError, "whole numbers in 0..255 .* from 256 to 256"),
        (np.full((9, 5, 3), np.nan), ValueError, "from nan to nan"),
        (np.full((9, 5, 3), -0.5), ValueError, "fractions in 0..1, got float64 values from -0.5"),
        (b"not an image", ValueError, "12 bytes that are no image file"),
        ("http://example.org/a.png", ValueError, "images are not downloaded"),
        ("nowhere.png", FileNotFoundError, "nowhere.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_images_are_refused(images, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        processor_for(VIT)(images)


def test_truncated_file_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(png(picture(40, 40))[:-2000])
    with pytest.raises(OSError, match=r"cut\.png: .*truncated"):
        processor_for(VIT)(path)


@pytest.mark.parametrize("format", ["EPS", "ICO", "TGA"])
def test_formats_outside_the_list_are_not_opened(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format.lower()}"
    picture(40, 40).save(path, format)
    for image in (path, path.read_bytes()):
        with pytest.raises((OSError, ValueError), match="no image file of JPEG, .*pass the image"):
            processor_for(VIT)(image)


def test_other_wrong_arguments_are_refused() -> None:
    keeps_aspect = processor_for({**BIT, "do_center_crop": False})
    with pytest.raises(ValueError, match="2 sizes make no batch.*pass one at a time"):
        keeps_aspect([picture(10, 20), picture(20, 10)])
    with pytest.raises(ValueError, match="40x5200000 pixels, more than Pillow allows"):
        keeps_aspect(picture(1, 130_000))
    with pytest.raises(ValueError, match="0x60 pixels, nothing"):
        processor_for(DETR)(picture(1, 2000))
    with pytest.raises(ValueError, match=r"pad_size \(8, 8\) is smaller than .* \(20, 40\)"):
        processor_for({**DETR, "pad_size": 8})(picture(10, 20))
    with pytest.raises(ValueError, match="needs an RGB image, got mode 'L'"):
        keeps_aspect.process(picture(10, 20).convert("L"))
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        keeps_aspect(picture(10, 20), return_tensors="tf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 1 channels"):
        spec_from_timm({"input_size": (1, 28, 28)})
    with pytest.raises(ValueError, match="no option 'do_flip'; options are alpha_in_files"):
        spec_from_timm({"input_size": (3, 28, 28)}, do_flip=True)
    unnamed = dataclasses.replace(spec_from_config(VIT), size_divisor=7)
    with pytest.raises(ValueError, match="no keys for this spec.*spec.to_dict"):
        ImageProcessor(unnamed).save_pretrained("unused")


def test_a_directory_without_preprocessing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(OSError, match=r"no preprocessor_config\.json and is not a timm model"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        AutoImageProcessor.from_pretrained(tmp_path)
