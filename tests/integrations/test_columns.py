"""What the three integrations share: rows that stay in place, whatever their images are."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbb import AutoBackbone
from fastbb.extraction import FeatureExtractor
from fastbb.integrations.columns import ColumnExtractor

OPTIONS = {"device": "cpu", "batch_size": 3}


def kinds_of(errors: list[str | None]) -> list[str | None]:
    return [error and error.split(":")[0] for error in errors]


def test_rows_are_those_of_the_extractor(
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    kinds: list[str | None],
) -> None:
    columns, errors = ColumnExtractor(model, "embedding", OPTIONS)(files)
    assert [v if v is None else v.tolist() for v in columns["embedding"]] == expected
    assert kinds_of(errors) == kinds


def test_values_of_a_row_do_not_depend_on_the_number_of_rows(
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extract = ColumnExtractor(model, "embedding", OPTIONS)
    extractor = extract.load()
    forward, sizes = extractor._forward, set()
    monkeypatch.setattr(extractor, "_forward", lambda x: sizes.add(len(x)) or forward(x))
    for n in (1, 2, 3, 4, 6):
        vectors = extract(files[:n])[0]["embedding"]
        assert [v if v is None else v.tolist() for v in vectors] == expected[:n]
    assert sizes == {3}


def test_several_features_of_images_in_memory(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    gray = Image.fromarray(pixels).convert("L")
    images: list[Any] = [Image.fromarray(pixels), pixels, {"bytes": None, "path": "none.png"}]
    images += [gray, np.asarray(gray)[..., None], {"bytes": None, "path": None}]
    images += [torch.from_numpy(pixels).permute(2, 0, 1)]
    extract = ColumnExtractor(model, ("pooled", "embedding"), OPTIONS)
    columns, errors = extract(images)
    assert list(columns) == ["embedding", "pooled"]
    assert kinds_of(errors) == [None, None, "not_found", None, None, "not_found", None]
    wanted = FeatureExtractor(model, ("pooled", "embedding"), device="cpu")([images[0], gray])
    for name, vectors in columns.items():
        found = np.stack([v for v in vectors if v is not None])
        np.testing.assert_allclose(found, wanted[name][[0, 0, 1, 1, 0]], rtol=1e-5, atol=1e-6)


def test_an_array_of_three_rows_is_no_image_of_three_channels(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 3), dtype=np.uint8)
    columns, _ = ColumnExtractor(model, "embedding", OPTIONS)([pixels, Image.fromarray(pixels)])
    array, image = columns["embedding"]
    assert array is not None and image is not None and np.array_equal(array, image)


def test_what_is_no_image_fails_its_row_only(model: Path) -> None:
    good = np.zeros((9, 8, 3), np.uint8)
    bad: list[Any] = [np.zeros((0, 8, 3), np.uint8), np.full((9, 8, 3), -1.0), [good, good], 7]
    bad += [np.zeros((9, 8, 5), np.uint8), "https://user:secret@host/a.png"]
    columns, errors = ColumnExtractor(model, "embedding", OPTIONS)([*bad, good])
    assert kinds_of(errors) == ["transform"] * 5 + ["io", None]
    assert "secret" not in str(errors)
    assert [v is None for v in columns["embedding"]] == [True] * 6 + [False]


def test_pickle_holds_the_arguments_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    extract = ColumnExtractor(model.name, "embedding", OPTIONS)
    before = pickle.dumps(extract)
    (vector,) = extract([np.zeros((9, 8, 3), np.uint8)])[0]["embedding"]
    assert pickle.dumps(extract) == before and len(before) < 1000
    monkeypatch.chdir("/")  # another process has another working directory
    (other,) = pickle.loads(before)([np.zeros((9, 8, 3), np.uint8)])[0]["embedding"]
    assert vector is not None and np.array_equal(vector, other)


@pytest.mark.parametrize("feature", ["maps", "maps.stage2", "tokens", "layer:embedder"])
def test_features_that_are_no_vectors_are_refused(model: Path, feature: str) -> None:
    with pytest.raises(ValueError, match="no vector: .*fastbb extract"):
        ColumnExtractor(model, feature, OPTIONS)([np.zeros((9, 8, 3), np.uint8)])
    with pytest.raises(ValueError, match="no vector: .*fastbb extract"):
        ColumnExtractor(model, feature, OPTIONS).size()


def test_wrong_arguments_are_named(model: Path) -> None:
    with pytest.raises(TypeError, match="model: wanted a name or a directory.*ResNetBackbone"):
        ColumnExtractor(AutoBackbone.from_pretrained(model), "embedding", {})  # pyright: ignore[reportArgumentType] - the error is the test
    with pytest.raises(ValueError, match="features: wanted some of embedding"):
        ColumnExtractor(model, "embeding", {})
    with pytest.raises(TypeError, match="of FeatureExtractor.*got normalise. Did you mean norm"):
        ColumnExtractor(model, "embedding", {"normalise": True})
    with pytest.raises(TypeError, match="got features"):
        ColumnExtractor(model, "embedding", {"features": "pooled"})


def test_the_size_is_known_without_images(model: Path) -> None:
    assert ColumnExtractor(model, "embedding", {"precision": "bf16"}).size() == 16
