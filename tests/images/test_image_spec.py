"""preprocessor_config.json of any age, against transformers' PIL backend: pixels bit for bit."""

import importlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbb.hosts.model_types import BACKBONE_TYPES, PLAIN_TYPES
from fastbb.images.processor import AutoImageProcessor
from fastbb.images.spec_readers import _TYPE_OF_MODEL, spec_from_config

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = [(1, 1), (1, 9), (11, 1), (2, 97), (37, 61), (61, 37), (224, 224), (225, 223), (240, 320)]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# files of the Hub, oldest layouts included, without mean and std, with smaller sizes
HUB_FILES: dict[str, dict[str, Any]] = json.loads("""{
"swin": {"do_normalize": true, "do_resize": true, "feature_extractor_type": "ViTFeatureExtractor",
    "resample": 3, "size": 224},
"swinv2": {"do_normalize": true, "do_rescale": true, "do_resize": true, "resample": 3,
    "image_processor_type": "ViTImageProcessor", "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256}},
"vit-fast": {"crop_size": null, "data_format": "channels_first", "default_to_square": true,
    "device": null, "do_center_crop": null, "do_convert_rgb": null, "do_normalize": true,
    "do_rescale": true, "do_resize": true, "image_processor_type": "ViTImageProcessorFast",
    "input_data_format": null, "resample": 2, "rescale_factor": 0.00392156862745098,
    "return_tensors": null, "size": {"height": 224, "width": 224}},
"resnet": {"crop_pct": 0.875, "do_normalize": true, "do_resize": true, "resample": 3,
    "feature_extractor_type": "ConvNextFeatureExtractor", "size": 224},
"resnet-crop-95": {"crop_pct": 0.95, "do_normalize": true, "do_resize": true, "resample": 3,
    "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
"convnext-384": {"crop_pct": null, "do_normalize": true, "do_resize": true, "resample": 3,
    "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
"dinov2": {"crop_size": {"height": 224, "width": 224}, "do_center_crop": true,
    "do_convert_rgb": true, "do_normalize": true, "do_rescale": true, "do_resize": true,
    "image_processor_type": "BitImageProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256}},
"upernet": {"do_normalize": true, "do_reduce_labels": true, "do_rescale": true, "do_resize": true,
    "image_processor_type": "SegformerImageProcessor", "resample": 2,
    "size": {"height": 128, "width": 128}},
"maskformer": {"do_normalize": true, "do_resize": true, "ignore_index": 255, "reduce_labels": true,
    "feature_extractor_type": "MaskFormerFeatureExtractor", "size_divisibility": 32,
    "max_size": 133, "resample": 2, "size": 80},
"mask2former": {"do_normalize": true, "do_rescale": true, "do_resize": true, "num_labels": 133,
    "image_processor_type": "Mask2FormerImageProcessor", "ignore_index": 255,
    "size": {"longest_edge": 133, "shortest_edge": 80}, "size_divisor": 32},
"detr": {"do_normalize": true, "do_resize": true, "format": "coco_detection",
    "feature_extractor_type": "DetrFeatureExtractor", "max_size": 133, "size": 80},
"conditional-detr": {"image_processor_type": "ConditionalDetrImageProcessorFast", "do_pad": true,
    "size": {"longest_edge": 133, "shortest_edge": 80}},
"deformable-detr": {"image_processor_type": "DeformableDetrImageProcessor", "do_pad": true,
    "size": {"height": 100, "width": 90}, "pad_size": {"height": 128, "width": 96}},
"clip": {"crop_size": 64, "do_center_crop": true, "do_normalize": true, "do_resize": true,
    "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 64},
"siglip": {"do_normalize": true, "do_rescale": true, "do_resize": true, "resample": 3,
    "image_processor_type": "SiglipImageProcessor", "rescale_factor": 0.00392156862745098,
    "processor_class": "SiglipProcessor", "size": {"height": 96, "width": 96}},
"beit": {"crop_size": 64, "do_center_crop": false, "do_normalize": true, "do_resize": true,
    "feature_extractor_type": "BeitFeatureExtractor", "resample": 2, "size": 64},
"deit": {"crop_size": 64, "do_center_crop": true, "do_normalize": true, "do_resize": true,
    "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3, "size": 72},
"rt_detr": {"do_normalize": false, "do_pad": true, "do_rescale": true, "do_resize": true,
    "image_processor_type": "RTDetrImageProcessor", "pad_size": {"height": 90, "width": 80},
    "resample": 2, "size": {"height": 64, "width": 72}},
"pvt_v2": {"do_normalize": true, "do_rescale": true, "do_resize": true, "resample": 2,
    "image_processor_type": "PvtImageProcessor", "size": {"height": 64, "width": 64}},
"textnet": {"crop_size": {"height": 64, "width": 64}, "do_center_crop": true,
    "image_processor_type": "TextNetImageProcessor", "size": {"shortest_edge": 70}},
"dpt": {"do_normalize": true, "do_resize": true, "ensure_multiple_of": 1, "resample": 3,
    "feature_extractor_type": "DPTFeatureExtractor", "keep_aspect_ratio": false, "size": 64}
}""")
# sizes in which images keep their aspect ratio, so that they make no batch
DEPTH_ANYTHING = {"image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 14}
DEPTH_ANYTHING |= {"keep_aspect_ratio": True, "size": {"height": 70, "width": 98}}
HUB_FILES = {name: {**config, **IMAGENET} for name, config in HUB_FILES.items()}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """RGB noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def load_both(directory: Path, config: dict[str, Any], **overrides):
    """Loads transformers' PIL processor and ours from one file."""
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil", **overrides)
    assert type(theirs).__name__.endswith("Pil")
    return theirs, AutoImageProcessor.from_pretrained(directory, **overrides)


def assert_same(ours, theirs) -> None:
    """Asserts equal entries, bit for bit; ours is fp32 even if no step computes."""
    assert set(ours) == set(theirs)
    assert ours["pixel_values"].dtype == torch.float32
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"].float())
    if "pixel_mask" in theirs:
        assert ours["pixel_mask"].dtype == theirs["pixel_mask"].dtype
        assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])


@pytest.mark.parametrize("name", HUB_FILES)
def test_pixels_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES[name])
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    for image in images:
        assert_same(ours(image), theirs(image, return_tensors="pt"))
    assert_same(ours(images), theirs(images, return_tensors="pt"))


@pytest.mark.parametrize("name", HUB_FILES)
def test_saved_processor_loads_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES[name])
    ours.save_pretrained(tmp_path / "saved")
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").spec == ours.spec
    reloaded = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    assert type(reloaded) is type(theirs)
    assert_same(ours(picture(50, 70)), reloaded(picture(50, 70), return_tensors="pt"))
    theirs.save_pretrained(tmp_path / "theirs")
    assert AutoImageProcessor.from_pretrained(tmp_path / "theirs").spec == ours.spec


TYPES = sorted({spec_from_config(config).image_processor_type for config in HUB_FILES.values()})


@pytest.mark.parametrize("name", TYPES)
def test_class_defaults_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, {"image_processor_type": name})
    images = [picture(48, 64), picture(30, 20)]
    images[1].info["transparency"] = images[1].getpixel((10, 15))  # becomes white in RGB
    for image in images:
        assert_same(ours(image), theirs(image, return_tensors="pt"))


@pytest.mark.parametrize("name", ["DetrImageProcessor", "MaskFormerImageProcessor"])
def test_max_size_without_size_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, {"image_processor_type": name, "max_size": 300})
    assert_same(ours(picture(30, 90)), theirs(picture(30, 90), return_tensors="pt"))


def random_config(rng: random.Random) -> dict[str, Any]:
    """Random combination of keys, with small sizes, absent keys and null values."""

    def edge() -> int:
        return rng.choice([1, 2, 5, 13, 16, 31, 32, 40, 57])

    name = rng.choice(TYPES)
    size = rng.choice(
        [
            *(edge(), [edge(), edge()], {"height": edge(), "width": edge()}),
            *({"shortest_edge": edge()}, {"max_height": edge(), "max_width": edge()}),
            {"shortest_edge": edge(), "longest_edge": edge() + 30},
        ]
    )
    if name == "ConvNextImageProcessor":
        size = {"shortest_edge": rng.choice([5, 31, 56, 384, 400])}
    flags = ["do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad"]
    flags += ["do_convert_rgb", "default_to_square", "pad_and_return_pixel_mask"]
    options: dict[str, list[Any]] = dict.fromkeys(flags, [True, False, None])
    options["resample"] = [0, 1, 2, 3, 4, 5]
    options["crop_size"] = [edge(), {"height": 9, "width": 20}]
    options["max_size"] = [60, 100, None]
    options["rescale_factor"] = [0.00392156862745098, 1 / 127.5, 1]
    options["image_mean"] = [[0.4, 0.5, 0.6], 0.5]
    options["image_std"] = [[0.2, 0.3, 0.4], 0.5]
    options["size_divisor"] = [0, 1, 7, 32]
    options["pad_size"] = [{"height": 64, "width": 70}, 150]
    options["crop_pct"] = [0.875, 0.9, 1.0]
    options["keep_aspect_ratio"] = [True, False]
    options["ensure_multiple_of"] = [1, 2, 14, 32]
    options["use_square_size"] = [True, False]
    chosen = {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.25}
    return {"image_processor_type": name, "size": size, **chosen}


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations_equal_transformers(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    compared = 0
    for number in range(100):
        config = random_config(rng)
        sizes = [(1, 1), (1, 9), (2, 40), (17, 23), (32, 32), (61, 37), (64, 64), (3, 150)]
        images = [picture(*rng.choice(sizes), seed=number + k) for k in range(rng.choice([1, 2]))]
        try:
            theirs, ours = load_both(tmp_path, config)
            expected = theirs(images, return_tensors="pt")
        except (ValueError, TypeError, AttributeError, ZeroDivisionError):
            continue  # upstream refuses; fastbb may too, or ignore what the processor never uses
        assert_same(ours(images), expected)
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("name", ["swin", "dinov2", "detr"])
@pytest.mark.parametrize(
    "steps", [{}, {"do_resize": False}, {"do_resize": False, "do_rescale": False}], ids=str
)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1, 255], ids=["0..1", "0..255"])
def test_arrays_equal_transformers(name, steps, dtype, scale, tmp_path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES[name], **steps)
    values = np.random.default_rng(0).random((40, 50, 3)) * scale
    array = (values if scale == 1 else values.round()).astype(dtype)
    for one in (array, np.moveaxis(array, -1, 0), torch.from_numpy(array)):
        assert_same(ours(one), theirs(one, return_tensors="pt"))


def file_of(kind: str) -> bytes:
    """An image file of an uncommon kind."""
    rgb, buffer = picture(40, 50), io.BytesIO()
    alpha = picture(40, 50, seed=1).getchannel(0)
    first = rgb.getpixel((0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "rgba": (Image.merge("RGBA", (*rgb.split(), alpha)), {}),
        "la": (Image.merge("LA", (rgb.convert("L"), alpha)), {}),
        "gray": (rgb.convert("L"), {}),
        "1-bit": (rgb.convert("1"), {}),
        "palette": (rgb.convert("P"), {}),
        "palette-alpha": (rgb.convert("P"), {"transparency": bytes(range(256))}),
        "palette-one-clear": (rgb.convert("P"), {"transparency": 16}),
        "rgb-one-clear": (rgb, {"transparency": first}),
        "exif": (rgb, {"exif": exif}),
        "exif-rgba": (Image.merge("RGBA", (*rgb.split(), alpha)), {"exif": exif}),
    }
    if kind == "cmyk-jpeg":
        rgb.convert("CMYK").save(buffer, "JPEG")
    else:
        image, options = images[kind]
        image.save(buffer, "PNG", **options)
    return buffer.getvalue()


FILE_KINDS = [
    *("rgba", "la", "gray", "1-bit", "palette", "palette-alpha", "palette-one-clear"),
    *("rgb-one-clear", "exif", "exif-rgba", "cmyk-jpeg"),
]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("name", ["swin", "dinov2"])
def test_files_equal_transformers_load_image(name: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES[name])
    path = tmp_path / "image"
    path.write_bytes(file_of(kind))
    expected = theirs(str(path), return_tensors="pt")
    assert_same(ours(path), expected)
    assert_same(ours(path.read_bytes()), expected)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_images_in_memory_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES["dinov2"])  # converts to RGB
    image = Image.open(io.BytesIO(file_of(kind)))
    assert_same(ours(image), theirs(image, return_tensors="pt"))
    theirs, ours = load_both(tmp_path, HUB_FILES["swin"])  # raises for all modes but RGB
    if image.mode == "RGB":
        assert_same(ours(image), theirs(image, return_tensors="pt"))
    else:
        with pytest.raises(ValueError, match="mean must have|infer channel|cannot reshape|axis"):
            theirs(image, return_tensors="pt")
        assert ours(image).pixel_values.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("swin", {"size": {"height": 64, "width": 48}, "resample": 2}),
        ("swin", {"do_rescale": False, "do_normalize": False}),
        ("dinov2", {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 35}}),
        ("mask2former", {"size": {"shortest_edge": 40, "longest_edge": 60}, "size_divisor": 16}),
        ("detr", {"do_pad": False}),
        ("detr", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
    ],
    ids=str,
)
def test_overrides_equal_transformers(name: str, overrides: dict, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, HUB_FILES[name], **overrides)
    assert_same(ours(picture(50, 70)), theirs(picture(50, 70), return_tensors="pt"))


def test_dpt_keeps_the_aspect_ratio_as_transformers(tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, DEPTH_ANYTHING)
    for size in [(70, 98), (98, 70), (71, 300), (61, 37), (240, 320), (30, 42)]:
        assert_same(ours(picture(*size)), theirs(picture(*size), return_tensors="pt"))
    ours.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).spec == ours.spec


def test_types_of_models_are_those_of_transformers() -> None:
    auto = importlib.import_module("transformers.models.auto.image_processing_auto")
    table = auto.IMAGE_PROCESSOR_MAPPING_NAMES
    added = {"clip_vision_model", "siglip_vision_model", "dinov2_with_registers"}
    added |= {"dinov3_convnext"}
    theirs = {name: found["torchvision"] for name, found in table.items() if "torchvision" in found}
    same = {name: kind for name, kind in _TYPE_OF_MODEL.items() if name not in added}
    assert same == {name: theirs.get(name) for name in same}
    assert not added & set(theirs)
    left_out = {*BACKBONE_TYPES, *PLAIN_TYPES} & set(theirs) - set(_TYPE_OF_MODEL)
    assert left_out <= {"pp_lcnet", "sapiens2", "tipsv2"}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("swin", "ViTImageProcessor"), ("resnet", "ConvNextImageProcessor")],
)
def test_processor_file_without_type_follows_the_model_type(
    model_type, expected, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = load_both(tmp_path, {"size": {"shortest_edge": 40}})
    assert type(theirs).__name__.removesuffix("Pil") == ours.spec.image_processor_type == expected
    assert_same(ours(picture(50, 70)), theirs(picture(50, 70), return_tensors="pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_processor_type": "SamImageProcessor"},
            "'SamImageProcessor' is not supported.*ViT",
        ),
        ({"image_processor_type": None}, "type None is not supported"),
        (
            {"image_processor_type": "DPTImageProcessor", "do_pad": True, "size_divisor": 14},
            "pads on all sides .* not supported",
        ),
        (
            {"image_processor_type": "DPTImageProcessor", "size": 48, "ensure_multiple_of": 32},
            "half-way between multiples of 32",
        ),
        (
            {"image_processor_type": "DINOv3ViTImageProcessor", "do_rescale": False},
            "resize_after_rescale needs a rescale_factor",
        ),
        (
            {"image_processor_type": "DINOv3ViTImageProcessor", "resample": 1},
            "must be one of 'bilinear', 'bicubic', got 'lanczos'",
        ),
        ({"size": "large"}, r"size must be a whole number.*got 'large'"),
        ({"size": float("nan")}, "got nan"),
        ({"size": {"height": float("nan"), "width": 32}}, r"got \(nan, 32\)"),
        ({"size": {"longest_edge": 32}}, "height and width; .*got {'longest_edge': 32}"),
        ({"size": None}, "size is needed .* null or missing"),
        ({"size": -3}, r"got \(-3, -3\)"),
        ({"resample": 9}, "resample must be one of Pillow's filters, 0 to 5, got 9"),
        ({"image_mean": [0.5]}, r"image_mean must be one number or one per channel \(3\)"),
        ({"do_center_crop": True}, "crop_size is needed"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "'height' and 'width'"),
        ({"image_processor_type": "DetrImageProcessor", "max_size": None}, "'longest_edge' too"),
        ({"image_processor_type": "MaskFormerImageProcessor"}, "'longest_edge' too"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": [8, 8]}, "'shortest_edge'"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "do_center_crop": True},
            "a second crop is not supported",
        ),
    ],
    ids=str,
)
def test_unsupported_processor_files_raise_value_error(changes: dict, message: str) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "size": 32, **changes}
    with pytest.raises(ValueError, match=message):
        spec_from_config(config)


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ValueError, match="ViTImageProcessor has no option 'do_flip'; options are"):
        spec_from_config({"image_processor_type": "ViTImageProcessor"}, do_flip=True)
