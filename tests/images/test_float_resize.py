"""Resize after rescale, in floats: DINOv3's processor, against torchvision's of transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbb.images.processor import AutoImageProcessor, ImageProcessor
from fastbb.images.spec import ImageProcessorSpec
from fastbb.images.spec_readers import spec_from_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")
transformers.logging.set_verbosity_error()

# the file of facebook/dinov3-vits16-pretrain-lvd1689m
DINOV3: dict[str, Any] = json.loads("""{
"crop_size": null, "data_format": "channels_first", "default_to_square": true, "device": null,
"disable_grouping": null, "do_center_crop": null, "do_convert_rgb": null, "do_normalize": true,
"do_rescale": true, "do_resize": true, "image_mean": [0.485, 0.456, 0.406],
"image_processor_type": "DINOv3ViTImageProcessorFast", "image_std": [0.229, 0.224, 0.225],
"input_data_format": null, "resample": 2, "rescale_factor": 0.00392156862745098,
"return_tensors": null, "size": {"height": 224, "width": 224}}""")
SIZES = [(1, 1), (1, 9), (11, 1), (2, 97), (37, 61), (224, 224), (225, 223), (480, 640)]


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def load_both(directory: Path, config: dict[str, Any], **overrides):
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoImageProcessor.from_pretrained(directory, **overrides)
    assert type(theirs).__name__ == "DINOv3ViTImageProcessor"
    return theirs, AutoImageProcessor.from_pretrained(directory, **overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"resample": 3, "size": {"height": 64, "width": 48}},
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 47},
        {"do_resize": False, "do_center_crop": True, "crop_size": 30},
        {"do_resize": False},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_pixels_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, DINOV3, **overrides)
    for image in [noise(*size) for size in SIZES]:
        expected = theirs(image, return_tensors="pt").pixel_values
        assert torch.equal(ours(image).pixel_values, expected), image.size
        assert torch.equal(ours.process(image), expected[0]), image.size


def test_a_batch_and_a_file_equal_transformers(tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, DINOV3)
    smooth = noise(9, 12).resize((400, 300), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "smooth.png")
    images = [noise(50, 40), smooth, noise(50, 40)]
    expected = theirs(images, return_tensors="pt").pixel_values
    assert torch.equal(ours(images).pixel_values, expected)
    assert torch.equal(ours(tmp_path / "smooth.png").pixel_values[0], expected[1])


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_arrays_equal_transformers(dtype: str, tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, DINOV3)
    array = (np.random.default_rng(0).random((40, 50, 3)) * 255).astype(dtype)
    expected = theirs(array, return_tensors="pt").pixel_values
    assert torch.equal(ours(array).pixel_values, expected.float())


def test_class_defaults_equal_transformers(tmp_path: Path) -> None:
    theirs, ours = load_both(tmp_path, {"image_processor_type": "DINOv3ViTImageProcessor"})
    expected = theirs(noise(50, 40), return_tensors="pt").pixel_values
    assert torch.equal(ours(noise(50, 40)).pixel_values, expected)


def test_saved_processor_loads_here_and_in_transformers(tmp_path: Path) -> None:
    _, ours = load_both(tmp_path, DINOV3)
    ours.save_pretrained(tmp_path / "saved")
    theirs, again = load_both(
        tmp_path, json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    )
    assert again.spec == ours.spec
    expected = theirs(noise(50, 40), return_tensors="pt").pixel_values
    assert torch.equal(again(noise(50, 40)).pixel_values, expected)


def test_plans_without_the_field_are_equal_to_those_of_before() -> None:
    vit = spec_from_config({"image_processor_type": "ViTImageProcessor"})
    assert "resize_after_rescale" not in vit.to_dict()
    assert ImageProcessorSpec.from_dict(vit.to_dict()) == vit
    dinov3 = spec_from_config(DINOV3)
    assert dinov3.to_dict()["resize_after_rescale"] is True
    assert ImageProcessorSpec.from_dict(dinov3.to_dict()) == dinov3
    # another class has no key for it, so it is not saved as that class
    other = ImageProcessorSpec.from_dict(
        {**dinov3.to_dict(), "image_processor_type": "ViTImageProcessor"}
    )
    with pytest.raises(ValueError, match="ViTImageProcessor has no keys for this spec"):
        ImageProcessor(other).save_pretrained("nowhere")
