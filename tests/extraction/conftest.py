"""Tiny models with a preprocessing, and tiny images."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_interrupts
import numpy as np
import pytest
import torch
from PIL import Image

from fastbb import ResNetBackbone, ResNetConfig
from fastbb.extraction import Report, extract

NORMALIZE = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.25, 0.2],
    "resample": 3,
}


def save_model(directory: Path, processor: dict) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_indices=[2]
    )
    ResNetBackbone(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({**NORMALIZE, **processor}))
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for images of 32 x 32."""
    return save_model(
        tmp_path_factory.mktemp("model"),
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": 32, "width": 32},
        },
    )


@pytest.fixture(scope="session")
def aspect_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights; images keep their aspect ratio, with a shortest edge of 32."""
    return save_model(
        tmp_path_factory.mktemp("aspect_model"),
        {
            "image_processor_type": "DetrImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": 32, "longest_edge": 64},
            "do_pad": False,
        },
    )


def encode(seed: int, size: tuple[int, int] = (10, 12), format: str = "PNG", **options) -> bytes:
    """An image file of `size` (height, width) that differs with the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """make_images(n) writes 00000.png ... into a new directory."""

    def make(n: int, name: str = "images") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for i in range(n):
            (directory / f"{i:05d}.png").write_bytes(encode(i))
        return directory

    return make


@pytest.fixture
def images(make_images: Callable[..., Path]) -> Path:
    """Directory of ten files, of which the fourth is no image."""
    root = make_images(10)
    (root / "00003.png").write_bytes(b"text")
    return root


@pytest.fixture
def run(model: Path, images: Path, tmp_path: Path) -> Callable[..., Report]:
    """Extracts the images in three shards."""

    def run(out: Path = tmp_path / "out", **options: Any) -> Report:
        return extract(model, images, out, **{"shard_rows": 4, "batch_size": 3, **options})

    return run


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    return check_interrupts.tree
