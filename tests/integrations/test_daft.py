"""`fastbb.integrations.daft` inside `daft.functions.embed_image`."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

daft = pytest.importorskip("daft")
from daft import DataType, col  # noqa: E402
from daft.ai.typing import UDFOptions  # noqa: E402
from daft.functions import decode_image, embed_image  # noqa: E402

import fastbb.integrations.daft  # noqa: E402
from fastbb.extraction import FeatureExtractor  # noqa: E402
from fastbb.integrations.daft import Provider  # noqa: E402

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 3}


def embeddings(column: Any, model: Path, provider: Any = None, **options: Any) -> list[Any]:
    """The embeddings of a column of a table, in the order of its rows."""
    data = daft.from_pydict({"image": column, "row": list(range(len(column)))})
    provider = provider or Provider(**OPTIONS)
    embedded = embed_image(col("image"), provider=provider, model=str(model), **options)
    found = data.with_column("embedding", embedded).sort("row").to_pydict()
    assert found["row"] == list(range(len(column)))
    return [None if v is None else v.tolist() for v in found["embedding"]]


@pytest.mark.parametrize("column", ["files", "paths"])
def test_encoded_images_have_the_embeddings_of_the_extractor(
    model: Path,
    column: str,
    expected: list[list[float] | None],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "fastbb")
    assert embeddings(request.getfixturevalue(column), model) == expected
    n_failed = 2 if column == "files" else 3  # a path without a file fails, a null does not
    assert f"{n_failed} of 11 images have no embedding, the first: unsupp" in caplog.text


def test_images_that_daft_has_decoded(
    model: Path, files: list[bytes | None], expected: list[list[float] | None]
) -> None:
    data = daft.from_pydict({"file": files}).with_column(
        "image", decode_image(col("file"), on_error="null")
    )
    embedded = embed_image(col("image"), provider=Provider(**OPTIONS), model=str(model))
    found = data.with_column("embedding", embedded)
    # before any row is computed
    assert found.schema()["embedding"].dtype == DataType.embedding(DataType.float32(), 16)
    for row, wanted in zip(found.to_pydict()["embedding"], expected):
        assert (row is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)


def test_all_rows_may_be_null(model: Path) -> None:
    assert embeddings([b"text", b"", b"text"], model) == [None] * 3


def test_options_of_the_provider_and_of_the_function(model: Path, paths: list[str]) -> None:
    images = [paths[0], paths[2]]
    wanted = FeatureExtractor(model, "pooled", normalize=True, device="cpu")(images)["pooled"]
    provider = Provider("pooled", device="cpu")
    found = embeddings(images, model, provider, normalize=True, batch_size=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_query_ends_where_that_is_asked_for(model: Path, files: list[bytes | None]) -> None:
    with pytest.raises(Exception, match="an image has no embedding: unsupported_format"):
        embeddings(files, model, on_error="raise")


def test_images_are_sent_in_several_batches_to_one_model(model: Path) -> None:
    descriptor: Any = Provider(batch_size=8).get_image_embedder(str(model), concurrency=3)
    options = descriptor.get_udf_options()
    assert (options.batch_size, options.concurrency, options.max_retries) == (32, 3, 0)
    descriptor = Provider().get_image_embedder(str(model))
    options = descriptor.get_udf_options()
    assert (options.batch_size, options.max_retries, options.on_error) == (128, 0, "raise")
    descriptor.instantiate().embed_image([np.zeros((9, 8, 3), np.uint8)])
    assert len(pickle.dumps(descriptor)) < 1000  # the model is not in it


@pytest.mark.parametrize("runner,n_models", [("native", 1), ("ray", 3)])
def test_models_of_the_native_runner_do_not_share_a_gpu(
    model: Path, runner: str, n_models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_gpus = UDFOptions(concurrency=3, num_gpus=1)  # Daft's own choice for three GPUs
    monkeypatch.setattr(fastbb.integrations.daft, "get_gpu_udf_options", lambda: of_gpus)
    monkeypatch.setattr(fastbb.integrations.daft, "get_or_infer_runner_type", lambda: runner)
    for given, wanted in (({}, n_models), ({"concurrency": 2}, 2)):
        descriptor: Any = Provider().get_image_embedder(str(model), **given)
        options = descriptor.get_udf_options()
        assert (options.concurrency, options.num_gpus) == (wanted, 1)


def test_wrong_arguments_are_named_before_a_query(model: Path) -> None:
    provider = Provider(device="cpu")
    with pytest.raises(ValueError, match="model: wanted a name or directory, got none"):
        embed_image(col("image"), provider=provider)
    with pytest.raises(OSError, match="no-such-model"):
        embed_image(col("image"), provider=provider, model="./no-such-model")
    with pytest.raises(ValueError, match=r"maps is no vector: .*fastbb extract"):
        embed_image(col("image"), provider=Provider("maps"), model=str(model))
    with pytest.raises(ValueError, match="feature: wanted one name .*'pooled'"):
        Provider(("embedding", "pooled"))  # pyright: ignore[reportArgumentType] - the error is the test
    with pytest.raises(TypeError, match="normalise"):
        options: dict[str, Any] = {"normalise": True}
        embed_image(col("image"), provider=provider, model=str(model), **options)


def test_the_missing_extra_is_named(without: Callable[[str, str], str]) -> None:
    assert without("daft", "import fastbb.integrations.daft") == (
        "ImportError: fastbb.integrations.daft needs Daft: pip install 'fastbb[daft]'"
    )
