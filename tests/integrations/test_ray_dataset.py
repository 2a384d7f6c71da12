"""`fastbb.integrations.ray` in a Ray cluster of two processors."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ray: Any = pytest.importorskip("ray")
pytest.importorskip("ray.data")
import pyarrow as pa  # noqa: E402
from ray.data.block import BlockAccessor  # noqa: E402

from fastbb.extraction import FeatureExtractor  # noqa: E402
from fastbb.integrations.ray import Extractor, extract  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"batch_size": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",  # not a cluster that runs on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def table(files: list[bytes | None]) -> pa.Table:
    n = len(files)
    columns = {"id": [f"image {i}" for i in range(n)], "bytes": pa.array(files, pa.binary())}
    return pa.table({**columns, "tags": [["a", "b"][: i % 3] for i in range(n)], "error": range(n)})


def check(
    found: pa.Table, expected: list[list[float] | None], kinds: list[str | None], close: bool
) -> None:
    assert found["embedding"].type == pa.list_(pa.float32())
    assert found["error"].type == pa.string()
    errors = found["error"].to_pylist()
    assert [error and error.split(":")[0] for error in errors] == kinds
    for vector, wanted in zip(found["embedding"].to_pylist(), expected):
        if close and wanted is not None:
            torch.testing.assert_close(torch.tensor(vector), torch.tensor(wanted))
        else:
            assert vector == wanted


def test_a_dataset_gets_columns_and_keeps_its_rows(
    cluster: None,
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    kinds: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(model.parent)  # not the working directory of the actors
    source = table(files)
    dataset = ray.data.from_arrow([source.slice(0, 6), source.slice(6)])
    lazy = extract(dataset, model.name, id="id", actors=1, **OPTIONS)
    assert isinstance(lazy, ray.data.Dataset)
    found = pa.concat_tables(ray.get(lazy.to_arrow_refs())).sort_by("column_error")
    assert found.column_names == ["id", "tags", "column_error", "embedding", "error"]
    assert found["id"].to_pylist() == source["id"].to_pylist()
    assert found["tags"].type == source["tags"].type
    assert found["tags"].to_pylist() == source["tags"].to_pylist()
    check(found, expected, kinds, close=False)


def test_a_wrong_model_ends_the_run(cluster: None, tmp_path: Path) -> None:
    dataset = ray.data.from_items([{"bytes": b""}])
    with pytest.raises(Exception, match="no-such-model"):
        extract(dataset, "./no-such-model").take_all()


def test_gpus_are_asked_for_where_the_cluster_has_some(
    cluster: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        ray.data.Dataset, "map_batches", lambda self, fn, **options: asked.append(options)
    )
    dataset = ray.data.from_items([{"bytes": b""}])
    for gpus in ({}, {"GPU": 0.5}, {"GPU": 4.0}):
        monkeypatch.setattr(ray, "cluster_resources", lambda gpus=gpus: {"CPU": 2.0, **gpus})
        extract(dataset, model)
    extract(dataset, model, num_gpus=0.25, actors=3)
    extract(dataset, model, num_gpus=0, num_cpus=2, device="cuda:1", actors=(2, 4))
    assert [options["num_gpus"] for options in asked] == [0, 0.5, 1, 0.25, 0]
    assert [options["num_cpus"] for options in asked] == [None] * 4 + [2]
    devices = [options["fn_constructor_kwargs"]["device"] for options in asked]
    assert devices == ["cpu", "cuda", "cuda", "cuda", "cuda:1"]
    sizes = [(o["compute"].min_size, o["compute"].max_size) for o in asked]
    assert sizes == [(1, 8)] * 3 + [(3, 3), (2, 4)]
    assert {options["batch_size"] for options in asked} == {128}


def test_a_batch_of_arrow_and_one_of_numpy_give_the_same(
    model: Path,
    files: list[bytes | None],
    expected: list[list[float] | None],
    kinds: list[str | None],
) -> None:
    extractor = Extractor(str(model), id="id", device="cpu", **OPTIONS)
    source = table(files)
    batch = {name: np.array(source[name].to_pylist(), object) for name in ("id", "bytes")}
    for found in (extractor(source), extractor(batch)):
        assert found["id"].to_pylist() == source["id"].to_pylist()
        check(found, expected, kinds, close=False)
    assert extractor(batch).column_names == ["id", "embedding", "error"]


def test_images_may_be_paths_arrays_or_structs(
    model: Path,
    files: list[bytes | None],
    paths: list[str],
    expected: list[list[float] | None],
    kinds: list[str | None],
) -> None:
    named = Extractor(model, image="path", id="path", device="cpu", **OPTIONS)
    found = named(pa.table({"path": paths}))
    assert found.column_names == ["id", "embedding", "error"]
    assert found["id"].to_pylist() == paths
    check(found, expected, kinds, close=False)

    anonymous = Extractor(model, image="image", device="cpu", **OPTIONS)
    structs = pa.array([{"bytes": file, "path": "no path"} if file else None for file in files])
    found = anonymous(pa.table({"image": structs, "id": range(11)}))
    assert found.column_names == ["id", "embedding", "error"]
    assert found["id"].to_pylist() == list(range(11))
    check(found, expected, kinds, close=False)


@pytest.mark.parametrize("kind", ["equal", "unequal", "native"])
@pytest.mark.parametrize("format", ["pyarrow", "numpy"])
def test_arrays_of_equal_and_of_unequal_sizes(
    model: Path, kind: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ray.data.DataContext.get_current()
    if kind == "native":  # Arrow's own type in place of Ray's
        tensors = type(context.arrow_fixed_shape_tensor_format)
        monkeypatch.setattr(context, "arrow_fixed_shape_tensor_format", tensors.ARROW_NATIVE)
    rng = np.random.default_rng(0)
    heights = (9, 10, 3) if kind == "unequal" else (9, 9, 9)
    images = [rng.integers(0, 256, (height, 8, 3), dtype=np.uint8) for height in heights]
    block = BlockAccessor.batch_to_arrow_block(
        {"image": images if kind == "unequal" else np.stack(images)}
    )
    assert isinstance(block["image"].type, pa.FixedShapeTensorType) == (kind == "native")
    batch: Any = BlockAccessor.for_block(block).to_batch_format(format)
    found = Extractor(model, image="image", device="cpu", **OPTIONS)(batch)
    wanted = FeatureExtractor(model, device="cpu")(list(map(Image.fromarray, images)))
    check(found, wanted["embedding"].tolist(), [None] * 3, close=True)


def test_columns_with_names_of_new_ones_are_kept(model: Path) -> None:
    names = ["bytes", "error", "column_error", "id", "column_embedding", "path"]
    batch = pa.table({name: [name.encode()] for name in names})
    found = Extractor(model, id="path", device="cpu", **OPTIONS)(batch)
    kept = {name: column[0].as_py() for name, column in zip(found.column_names, found.columns)}
    assert kept.pop("embedding") is None and kept.pop("error").startswith("unsupported_format")
    assert kept == {
        "id": b"path",
        "column_column_error": b"error",
        "column_error": b"column_error",
        "column_id": b"id",
        "column_embedding": b"column_embedding",
    }


def test_files_that_ray_has_read_need_no_id(cluster: None, model: Path, paths: list[str]) -> None:
    for options in ({}, {"id": "path"}):
        dataset = ray.data.read_binary_files(paths[:2], include_paths="id" in options)
        found = extract(dataset, model, num_cpus=0.5, actors=1, **options, **OPTIONS).take_all()
        assert {*found[0]} == {*(["id"] if options else []), "embedding", "error"}


def test_wrong_arguments_are_named(cluster: None, model: Path) -> None:
    with pytest.raises(TypeError, match="dataset: wanted a ray.data.Dataset.*got a list"):
        extract([], model)  # pyright: ignore[reportArgumentType] - the error is the test
    batch = {"bytes": np.array([b""], object), "path": np.array(["a"])}
    with pytest.raises(ValueError, match="id: no column 'id' among bytes, path"):
        Extractor(model, id="id")(batch)
    with pytest.raises(ValueError, match="image: no column 'image' among bytes, path"):
        Extractor(model, image="image")(batch)
    with pytest.raises(TypeError, match="got concurrency"):
        extract(ray.data.from_items([{"bytes": b""}]), model, num_gpus=0, concurrency=2)
    with pytest.raises(TypeError, match='"pyarrow" or "numpy".*got a DataFrame'):
        Extractor(model)(pa.table(batch).to_pandas())  # pyright: ignore[reportArgumentType] - the error is the test


def test_the_missing_extra_is_named(without: Callable[[str, str], str]) -> None:
    code = "from fastbb.integrations.ray import extract\nextract(None, 'resnet50')"
    assert without("ray", code) == (
        "ImportError: fastbb.integrations.ray needs Ray: pip install 'fastbb[ray]'"
    )
