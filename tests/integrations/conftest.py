"""A tiny model with its preprocessing, and image files of which some are broken."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbb import ResNetBackbone, ResNetConfig
from fastbb.extraction import FeatureExtractor

N_CHANNELS = 16


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for images of 32 x 32, whose `embedding` has 16 numbers."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, N_CHANNELS], depths=[1, 1], layer_type="basic"
    )
    ResNetBackbone(config).save_pretrained(directory)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.25, 0.2],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def encode(seed: int, mode: str = "RGB") -> bytes:
    """An image file without loss that differs with the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def files() -> list[bytes | None]:
    """Eleven encoded images; 1 is no image, 4 is cut off, 8 is missing, see `kinds`."""
    found: list[bytes | None] = [encode(i, "L" if i == 6 else "RGB") for i in range(11)]
    found[1], found[4], found[8] = b"text", encode(4)[:-40], None
    return found


@pytest.fixture(scope="session")
def kinds() -> list[str | None]:
    """What `fastbb extract` calls the error of each file."""
    found: list[str | None] = [None] * 11
    found[1], found[4], found[8] = "unsupported_format", "truncated", "not_found"
    return found


@pytest.fixture(scope="session")
def paths(files: list[bytes | None], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files on a disk, without the one that is missing."""
    directory = tmp_path_factory.mktemp("files")
    found = [directory / f"{i}.png" for i in range(len(files))]
    for path, file in zip(found, files):
        if file is not None:
            path.write_bytes(file)
    return [str(path) for path in found]


@pytest.fixture(scope="session")
def expected(model: Path, paths: list[str]) -> list[list[float] | None]:
    """The embeddings that `FeatureExtractor` computes of the files in batches of three."""
    found: list[list[float] | None] = [None] * len(paths)
    for batch in FeatureExtractor(model, batch_size=3, device="cpu").stream(paths):
        for row, vector in zip(batch.rows, batch.features["embedding"].tolist()):
            found[row] = vector
    assert [i for i, vector in enumerate(found) if vector is None] == [1, 4, 8]
    return found


@pytest.fixture(scope="session")
def without() -> Callable[[str, str], str]:
    """without(package, code): the last line on stderr of code that runs where none is installed."""

    def run(package: str, code: str) -> str:
        block = f"import sys; sys.modules[{package!r}] = None\n{code}"
        result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert result.returncode == 1
        return result.stderr.splitlines()[-1]

    return run
