"""`fastbb.integrations.datasets` inside `datasets.Dataset.map`."""

import importlib.metadata
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

datasets = pytest.importorskip("datasets")
from datasets.fingerprint import Hasher  # noqa: E402

import fastbb.integrations.datasets  # noqa: E402
from fastbb.integrations.columns import ColumnExtractor  # noqa: E402
from fastbb.integrations.datasets import extractor  # noqa: E402

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encoded(files: list[bytes | None], decode: bool) -> Any:
    """A dataset of the files; `label` is the number of the row."""
    rows = [None if file is None else {"bytes": file, "path": None} for file in files]
    data = datasets.Dataset.from_dict({"image": rows, "label": list(range(len(files)))})
    return data.cast_column("image", datasets.Image(decode=decode))


def check(found: Any, expected: list[list[float] | None], kinds: list[str | None]) -> None:
    assert found["label"][:] == list(range(len(expected)))
    assert found["embedding"][:] == expected
    assert [error and error.split(":")[0] for error in found["error"]] == kinds
    types = found.data.schema
    assert str(types.field("embedding").type) == "list<item: float>"
    assert str(types.field("error").type) == "string"


@pytest.mark.parametrize("decode", [True, False])
def test_map_adds_columns(
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    kinds: list[str | None],
    decode: bool,
) -> None:
    data = encoded(files, decode)
    found = data.map(extractor(model, **OPTIONS), batched=True, with_rank=True, batch_size=6)
    assert found.column_names == ["image", "label", "embedding", "error"]
    assert found.features["image"] == data.features["image"]
    check(found, expected, kinds)


def test_bytes_paths_and_decoded_images(
    model: Path,
    files: list[bytes | None],
    paths: list[str],
    expected: list[list[float] | None],
    kinds: list[str | None],
) -> None:
    columns = {"bytes": files, "path": paths, "label": list(range(len(files)))}
    data = datasets.Dataset.from_dict(columns)
    for image in ("bytes", "path"):
        check(data.map(extractor(model, image, **OPTIONS), batched=True), expected, kinds)
    good = [i for i, kind in enumerate(kinds) if kind is None]
    decoded = encoded(files, True).select(good).with_format("torch")
    assert isinstance(decoded[0]["image"], torch.Tensor)
    found = decoded.map(extractor(model, **OPTIONS), batched=True).with_format(None)
    torch.testing.assert_close(
        torch.tensor(found["embedding"][:]), torch.tensor([expected[i] for i in good])
    )


@pytest.mark.parametrize("n_first", [0, 4])
def test_whole_batches_may_fail_and_none_may(
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    n_first: int,
) -> None:
    """Types of columns are those of the first batch, of which nothing or everything may fail."""
    order = [*[1, 4, 8, 1][:n_first], 0, 2, 3, 5, 1, 7]
    data = encoded([files[i] for i in order], True)
    function = extractor(model, device="cpu", batch_size=1)
    found = data.map(function, batched=True, batch_size=2, remove_columns=["image"])
    assert [error is None for error in found["error"]] == [expected[i] is not None for i in order]
    torch.testing.assert_close(
        torch.tensor([v for v in found["embedding"] if v is not None]),
        torch.tensor([expected[i] for i in order if expected[i] is not None]),
    )


# the parent's threads have run when the processes start, as in a notebook
PROCESSES = """
import json, sys
import datasets, torch
from datasets.fingerprint import Hasher
from fastbb.integrations.datasets import extractor
torch.set_num_threads(2)
torch.ones(4096, 4096).exp()
model, *paths = sys.argv[1:]
function = extractor(model, "path", device="cpu", batch_size=3)
data = datasets.Dataset.from_dict({"path": paths})
function(data[:3])
found = data.map(function, batched=True, batch_size=3, with_rank=True, num_proc=2)
print(json.dumps([found["embedding"][:], found["error"][:], Hasher.hash(function)]))
"""


def test_processes_compute_the_same(
    model: Path,
    paths: list[str],
    expected: list[list[float] | None],
    kinds: list[str | None],
    tmp_path: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROCESSES, model, *paths],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=100,
    )
    vectors, errors, hashed = json.loads(result.stdout)
    assert hashed == Hasher.hash(extractor(model, "path", **OPTIONS))
    assert [error and error.split(":")[0] for error in errors] == kinds
    for vector, wanted in zip(vectors, expected):
        assert (vector is None) == (wanted is None)
        if vector is not None:
            torch.testing.assert_close(torch.tensor(vector), torch.tensor(wanted))


def test_streams_have_the_same_rows(
    model: Path, files: list[bytes | None], expected: list[list[float] | None]
) -> None:
    data = encoded(files, False).to_iterable_dataset()
    rows = list(data.map(extractor(model, **OPTIONS), batched=True, batch_size=6))
    found = [None if row["embedding"] is None else list(row["embedding"]) for row in rows]
    assert found == expected


def test_an_earlier_map_is_found_again(
    model: Path, files: list[bytes | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = extractor(model, **OPTIONS)
    before = Hasher.hash(function)
    encoded(files, False).save_to_disk(tmp_path / "data")
    data = datasets.load_from_disk(tmp_path / "data")
    first = data.map(function, batched=True, with_rank=True)
    assert Hasher.hash(function) == before and len(pickle.dumps(function)) < 2000
    monkeypatch.setattr(ColumnExtractor, "__call__", lambda *arguments: 1 / 0)
    again = data.map(extractor(str(model), **OPTIONS), batched=True, with_rank=True)
    assert again.cache_files == first.cache_files != data.cache_files
    assert again["embedding"][:] == first["embedding"][:]
    with pytest.raises(ZeroDivisionError):
        data.map(extractor(model, **OPTIONS, normalize=True), batched=True, with_rank=True)


def test_what_decides_values_is_in_the_hash(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    hashes = {
        Hasher.hash(extractor(model, **OPTIONS)),
        Hasher.hash(extractor(copy, **OPTIONS)),
        Hasher.hash(extractor(copy, "other", **OPTIONS)),
        Hasher.hash(extractor(copy, "other", "pooled", **OPTIONS)),
        Hasher.hash(extractor(copy, "other", "pooled", **OPTIONS, normalize=True)),
    }
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    hashes.add(Hasher.hash(extractor(copy, "other", "pooled", **OPTIONS, normalize=True)))
    assert len(hashes) == 6


@pytest.mark.parametrize("library", ["openvino", "timm", "transformers"])
def test_versions_of_libraries_are_in_the_hash(
    model: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = extractor(model, **OPTIONS)
    hashes = {Hasher.hash(function)}
    version = importlib.metadata.version
    for given in ("0.1", "0.2", None):

        def changed(name: str, given: str | None = given) -> str:
            if name == library and given is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return given if name == library and given else version(name)

        monkeypatch.setattr(fastbb.integrations.datasets, "version", changed)
        hashes.add(Hasher.hash(function))
    assert len(hashes) == 4


@pytest.mark.parametrize("rank,device", [(None, None), (0, "cuda:0"), (1, "cuda:1"), (5, "cuda:2")])
def test_a_process_takes_the_gpu_of_its_rank(
    model: Path, rank: int | None, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    function = extractor(model)
    taken = []
    monkeypatch.setattr(function._extract, "load", lambda device: taken.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        function({"image": [b""]}, rank)
    assert taken == [device]


def test_a_column_that_is_not_there_is_named(model: Path, files: list[bytes | None]) -> None:
    with pytest.raises(ValueError, match="image: no column 'picture' among image, label"):
        encoded(files, True).map(extractor(model, "picture"), batched=True)


@pytest.mark.parametrize("column", ["embedding", "error"])
def test_a_column_that_would_be_overwritten_is_refused(
    model: Path, files: list[bytes | None], column: str
) -> None:
    data = encoded(files, True).rename_column("label", column)
    with pytest.raises(ValueError, match=f"column '{column}': .*overwritten.*rename it"):
        data.map(extractor(model, **OPTIONS), batched=True)


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
@pytest.mark.parametrize("i", [0, 6], ids=["RGB", "L"])
def test_a_map_of_rows_is_refused(
    model: Path, files: list[bytes | None], format: str | None, i: int
) -> None:
    data = encoded([files[i]] * 3, True)
    function = extractor(model, **OPTIONS)
    for one in (data.with_format(format), data.cast_column("image", datasets.Image(decode=False))):
        with pytest.raises(ValueError, match=r"wanted a batch: map\(\.\.\., batched=True\)"):
            one.map(function)
    with pytest.raises(ValueError, match="wanted a batch"):
        next(iter(data.to_iterable_dataset().with_format(format).map(function)))
    found = data.with_format(format).map(function, batched=True).with_format(None)
    assert [len(vector) for vector in found["embedding"]] == [16] * 3


@pytest.mark.parametrize("column", ["bytes", "path"])
def test_a_map_of_rows_of_files_is_refused(
    model: Path, files: list[bytes | None], paths: list[str], column: str
) -> None:
    data = datasets.Dataset.from_dict({"bytes": files, "path": paths})
    with pytest.raises(ValueError, match="wanted a batch"):
        data.map(extractor(model, column, **OPTIONS))
    with pytest.raises(ValueError, match="wanted a batch"):
        next(iter(data.to_iterable_dataset().map(extractor(model, column, **OPTIONS))))
