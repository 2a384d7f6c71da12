"""Parquet files with paths of images, or with their bytes as `datasets` writes them."""

import datetime
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbb.extraction import ImageError, InputError, extract, open_features
from fastbb.extraction import decode as decoding
from fastbb.extraction import parquet as module
from fastbb.extraction.decode import read_bytes
from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import Source

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path: Path, columns: dict[str, Any], features: Any = None, **options: Any) -> Path:
    """Writes a table; `features` are noted as `datasets` does."""
    table = pyarrow.table(columns)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def images(*cells: tuple[bytes | None, str | None] | None) -> Any:
    rows = [None if cell is None else dict(zip(("bytes", "path"), cell)) for cell in cells]
    return pyarrow.array(rows, IMAGE)


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "caption": {"dtype": "string", "_type": "Value"},
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    cells = [
        (b"image 0", "a.jpg"),
        (b"image 1", None),
        (b"image 2", "b.jpg"),
        (b"image 3", "b.jpg"),
    ]
    columns = {
        "image": images(*cells),
        "label": pyarrow.array([1, 0, -1, None], pyarrow.int64()),
        "caption": ["one", None, "three", "four"],
    }
    return write(tmp_path / "data" / "train.parquet", columns, FEATURES, row_group_size=3)


def test_images_and_labels_of_datasets(dataset: Path) -> None:
    listing = Listing([dataset])
    listed = list(listing)
    assert listed == [
        Source(id, str(dataset), n, image_column="image", columns=columns)
        for n, (id, columns) in enumerate(
            [
                ("a.jpg", {"label": 1, "label_name": "dog", "caption": "one"}),
                ("train.parquet/00000001", {"label": 0, "label_name": "cat", "caption": None}),
                ("train.parquet/00000002", {"label": -1, "label_name": None, "caption": "three"}),
                ("train.parquet/00000003", {"label": None, "label_name": None, "caption": "four"}),
            ]
        )
    ]
    assert list(listing.archives) == [str(dataset)] and not listing.passed_over()
    frozen = [json.loads(json.dumps(asdict(source))) for source in listed]
    assert [read_bytes(Source(**row)) for row in frozen] == [b"image %d" % i for i in range(4)]


def test_a_directory_of_parquet_files_is_a_set(dataset: Path) -> None:
    write(dataset.with_name("test.parquet"), {"image": images((b"x", "a.jpg"), (b"y", None))})
    (dataset.parent / "README.md").touch()
    expected = ["data/test.parquet/a.jpg", "data/test.parquet/00000001"]
    expected += [
        f"data/train.parquet/{name}" for name in ("a.jpg", *(f"0000000{i}" for i in "123"))
    ]
    listing = Listing([dataset.parent.parent])
    assert [source.id for source in listing] == expected
    assert listing.passed_over() == "passed over: 1 file without an image suffix"
    listing = Listing([f"{dataset.parent}/*.parquet"])
    assert [f"data/{source.id}" for source in listing] == expected
    with pytest.raises(InputError, match=r"the id 'a.jpg'.*; give their common parent directory"):
        list(Listing([dataset, dataset.with_name("test.parquet")]))


def test_bytes_win_over_names_and_other_bytes_are_dropped(tmp_path: Path) -> None:
    columns = {
        "path": ["gone.jpg"],
        "image": pyarrow.array([b"image"], pyarrow.large_binary()),
        "id": [7],
        "mask": images((b"mask", None)),
        "thumbnail": [b"small"],
    }
    listing = Listing([write(tmp_path / "x.parquet", columns)])
    (source,) = listing
    assert source.id == "7" and source.columns == {"path": "gone.jpg"}
    assert read_bytes(source) == b"image"
    assert listing.passed_over() == "passed over: 2 columns without JSON values"


def test_only_bytes_without_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [b"a", b"b"]})
    listed = list(Listing([path]))
    assert [source.id for source in listed] == ["x.parquet/00000000", "x.parquet/00000001"]
    assert [source.columns for source in listed] == [None, None]
    assert [read_bytes(source) for source in listed] == [b"a", b"b"]


def test_images_under_another_name_are_found_by_the_features(tmp_path: Path) -> None:
    columns = {"img": images((b"x", "a.png")), "note": ["n"]}
    path = write(tmp_path / "x.parquet", columns, {"img": {"_type": "Image"}})
    (source,) = Listing([path])
    assert source == Source("a.png", str(path), 0, image_column="img", columns={"note": "n"})
    for features in ({}, [], {"img": "Image"}, {"img": {"_type": "Value"}}):
        write(path, columns, features)
        message = "no column `path` .or `file_name`, `filename`, `image`.; columns: img, note"
        with pytest.raises(InputError, match=message):
            list(Listing([path]))


def test_a_row_without_bytes_is_the_file_at_its_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"file")
    cells = [(None, "sub/a.jpg"), (None, "gone.jpg"), (None, None), None, (b"", "e.jpg")]
    cells.append((None, "https://host.org/a.jpg?key=s3cret"))
    listed = list(Listing([write(tmp_path / "x.parquet", {"image": images(*cells)})]))
    assert read_bytes(listed[0]) == b"file"
    found = {}
    for source in listed[1:]:
        with pytest.raises(ImageError) as caught:
            read_bytes(source)
        found[source.id] = str(caught.value)
    assert found == {
        "gone.jpg": "not_found: No such file or directory",
        "x.parquet/00000002": "not_found: the row has neither bytes nor a path",
        "x.parquet/00000003": "not_found: the row has neither bytes nor a path",
        "e.jpg": "truncated: the image is empty",
        "https://host.org/a.jpg": "io: addresses are not fetched, download it first: "
        "https://host.org/a.jpg",
    }


def test_columns_of_all_types(tmp_path: Path) -> None:
    utc = datetime.timezone.utc
    time = datetime.datetime(2024, 1, 2, 3, 4, 5, 600_000)
    columns = {
        "image": ["a.jpg"],
        "nanoseconds": pyarrow.array([time], pyarrow.timestamp("ns")),
        "zoned": pyarrow.array([time.replace(tzinfo=utc)], pyarrow.timestamp("us", "UTC")),
        "day": [time.date()],
        "took": pyarrow.array([datetime.timedelta(seconds=90)], pyarrow.duration("ns")),
        "price": pyarrow.array([Decimal("1.10")]),
        "half": pyarrow.array([1.5], pyarrow.float32()).cast(pyarrow.float16()),
        "score": [float("nan")],
        "boxes": [[{"x": [1.5, float("inf")], "name": "n"}]],
        "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "kind": pyarrow.array(["red"]).dictionary_encode(),
        "nested_bytes": [[{"data": b"x"}]],
        "hash": pyarrow.array([b"xx"], pyarrow.binary(2)),
        "far": pyarrow.array([2**60], pyarrow.int64()).cast(pyarrow.timestamp("us")),
    }
    listing = Listing([write(tmp_path / "x.parquet", columns)])
    (source,) = listing
    assert source == Source(
        "a.jpg",
        f"{tmp_path}/a.jpg",
        columns={
            "nanoseconds": "2024-01-02T03:04:05.600000",
            "zoned": "2024-01-02T03:04:05.600000+00:00",
            "day": "2024-01-02",
            "took": 90.0,
            "price": "1.10",
            "half": 1.5,
            "score": None,
            "boxes": [{"x": [1.5, None], "name": "n"}],
            "map": [["k", 1]],
            "kind": "red",
            "far": None,
        },
    )
    assert listing.passed_over() == "passed over: 3 columns without JSON values"


def test_a_listing_reads_no_bytes_of_images(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    read = parquet.ParquetFile.iter_batches

    def noting(self: Any, *args: Any, columns: list[str], **options: Any) -> Any:
        wanted.extend(columns)
        return read(self, *args, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noting)
    assert len(list(Listing([dataset]))) == 4
    assert set(wanted) == {"image.path", "label", "caption"}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    cells = images(*((b"%d" % i * (i % 7 + 1), None) for i in range(1000)))
    return write(tmp_path / "many.parquet", {"image": cells}, row_group_size=170)


def test_rows_are_read_in_any_order_and_by_several_threads(many: Path) -> None:
    listed = list(Listing([many]))
    data = [b"%d" % i * (i % 7 + 1) for i in range(1000)]
    order = [(i * 367) % 1000 for i in range(300)] + [999, 0, 170, 169, 340, 339, 0, 999]
    assert [read_bytes(listed[i]) for i in order] == [data[i] for i in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_bytes, listed)) == data


def test_reading_nearly_in_order_reads_every_row_once(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = list(Listing([many]))
    starts = []
    read = parquet.ParquetFile.iter_batches

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        starts.append(options["row_groups"])
        return read(self, *args, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noting)
    module._tables.clear()
    for i in range(0, 1000, 10):  # ten threads, the later ones first
        for j in reversed(range(i, i + 10)):
            read_bytes(listed[j])
    assert starts == [range(6)]
    (cells,) = module._tables.values()
    assert sum(len(batch) for _, batch in cells._kept) <= module._KEPT_ROWS


def test_large_images_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [os.urandom(3 * 2**20) for _ in range(3)]
    listed = list(Listing([write(tmp_path / "x.parquet", {"image": data})]))
    assert [read_bytes(source) for source in listed] == data
    (cells,) = (c for key, c in module._tables.items() if key[0] == str(tmp_path / "x.parquet"))
    assert cells._batch_rows == 1
    monkeypatch.setattr(decoding, "MAX_BYTES", 2**20)
    with pytest.raises(ImageError, match=f"too_many_bytes: {3 * 2**20} bytes"):
        read_bytes(listed[0])


def test_a_row_group_is_read_in_a_stream(tmp_path: Path) -> None:
    data = [os.urandom(10_000) for _ in range(3000)]
    options = {"use_dictionary": False, "data_page_size": 2**16, "write_batch_size": 16}
    path = write(tmp_path / "x.parquet", {"image": data}, **options)
    assert parquet.ParquetFile(path).num_row_groups == 1
    source = next(iter(Listing([path])))
    before = pyarrow.total_allocated_bytes()
    assert read_bytes(source) == data[0]
    assert pyarrow.total_allocated_bytes() - before < 8 * 2**20


def test_a_few_files_stay_open(tmp_path: Path) -> None:
    for i in range(5):
        (source,) = Listing([write(tmp_path / f"{i}.parquet", {"image": [b"%d" % i]})])
        assert read_bytes(source) == b"%d" % i
    assert len(module._tables) <= 2


TIME = pyarrow.timestamp("ns")


@pytest.mark.parametrize(
    ("type", "value", "wanted"),
    [
        (pyarrow.list_(TIME), [1500], ["1970-01-01T00:00:00.000001"]),
        (pyarrow.large_list(TIME), [1500], ["1970-01-01T00:00:00.000001"]),
        (pyarrow.list_(TIME, 1), [1500], ["1970-01-01T00:00:00.000001"]),
        (pyarrow.struct([("a", TIME)]), {"a": 1500}, {"a": "1970-01-01T00:00:00.000001"}),
        (pyarrow.map_(pyarrow.string(), pyarrow.duration("ns")), [("a", 1500)], [["a", 1e-6]]),
        (pyarrow.list_(pyarrow.list_(pyarrow.float16())), [[1.5]], [[1.5]]),
    ],
    ids=["list", "large list", "fixed-size list", "struct", "map", "lists of fp16"],
)
@pytest.mark.parametrize("pandas", ["with pandas", "without pandas"])
def test_nested_times_have_microseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: Any, value: Any, wanted: Any, pandas: str
) -> None:
    if pandas == "without pandas":
        monkeypatch.setitem(sys.modules, "pandas", None)
    elif "float" not in str(type):
        pytest.importorskip("pandas")
    value = [[np.float16(1.5)]] if "float" in str(type) else value
    columns = {"path": ["a.jpg"], "value": pyarrow.array([value], type)}
    (source,) = Listing([write(tmp_path / "x.parquet", columns)])
    assert source.columns == {"value": wanted}


def test_a_replaced_file_is_read_anew_and_a_damaged_one_fails_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [b"old", b"two"]})
    first, second = Listing([path])
    assert read_bytes(first) == b"old"
    write(path, {"image": [b"new"]})
    assert read_bytes(first) == b"new"
    with pytest.raises(ImageError, match="corrupt: Parquet file: row 1 of 1"):
        read_bytes(second)
    path.write_bytes(b"PAR1 text")
    with pytest.raises(ImageError, match="corrupt: Parquet file: "):
        read_bytes(first)
    path.unlink()
    with pytest.raises(ImageError, match="not_found"):
        read_bytes(first)
    os.mkfifo(path)
    with pytest.raises(ImageError, match="io: not a regular file"):
        read_bytes(first)


def test_features_of_a_dataset_resume(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    cells = images(*((encoded(i), f"{i}.png") for i in range(3)), (b"text", "3.png"))
    write(tmp_path / "in" / "train.parquet", {"image": cells, "label": [0, 1, 0, 1]}, FEATURES)
    report = extract(model, tmp_path / "in", tmp_path / "out", shard_rows=2)
    assert report.errors == {"unsupported_format": 1}
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    assert extract(model, tmp_path / "in", tmp_path / "out", shard_rows=2).resumed_rows == 2
    assert open_features(tmp_path / "out").ids == [f"train.parquet/{i}.png" for i in range(3)]
