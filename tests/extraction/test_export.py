"""Export: files that other programs read, with the values that are stored, whole or not at all."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_directories import Directory, row, write_format_2

from fastbb.extraction import OutputError, export, export_features, open_features, tables

OUTPUTS = {
    "pooled": {"shape": [16], "dtype": "float32"},
    "half": {"shape": [3], "dtype": "bfloat16"},
    "maps": {"shape": [2, 3], "dtype": "float16"},
}
LABELS = ["cat", "dog", "cat", "dog", "bird", "dog", "cat", "dog", "cat", "dog"]


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """Ten rows with a label; row 8 has failed, row 3 is ok since a retry."""
    rows = [row(i, {"label": label, "number": i}) for i, label in enumerate(LABELS)]
    directory = Directory(tmp_path / "out", OUTPUTS).start(rows, failed=(3, 8))
    directory.retry(failed=(8,))
    return directory


@pytest.fixture
def parquet(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(tables, "_BATCH_BYTES", 250)  # batches of three rows
    report = export_features(directory.path, "parquet")
    assert report.path == directory.path.with_name("out.parquet")
    assert (report.rows, report.ok, report.failed, report.missing) == (10, 9, 1, 0)
    assert report.n_bytes == report.path.stat().st_size
    return report.path


def expected(directory: Directory) -> dict[str, list[Any]]:
    """The columns of the table."""
    columns: dict[str, list[Any]] = {"id": [row.id for row in directory.rows]}
    columns |= {"row": list(range(10)), "label": LABELS, "number": list(range(10))}
    for name in sorted(OUTPUTS):  # as the plan has them
        values = iter(directory.expected(name).float().flatten(1).tolist())
        columns[name] = [None if i == 8 else next(values) for i in range(10)]
    columns["error"] = ["corrupt: no image" if i == 8 else None for i in range(10)]
    return columns


def test_pyarrow_reads_the_table(parquet: Path, directory: Directory) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(parquet)
    assert table.to_pydict() == expected(directory)
    assert json.loads(table.schema.field("maps").metadata[b"shape"]) == [2, 3]
    assert json.loads(table.schema.metadata[b"fastbb"])["model"] == "tiny"


def test_pandas_reads_the_table(parquet: Path, directory: Directory) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(parquet)
    wanted = expected(directory)
    assert list(frame) == list(wanted) and list(frame["label"]) == LABELS
    found = [None if cell is None else list(cell) for cell in frame["pooled"]]
    assert found == wanted["pooled"]
    assert list(frame["error"].dropna()) == ["corrupt: no image"]


def test_polars_reads_the_table(parquet: Path, directory: Directory) -> None:
    polars = pytest.importorskip("polars")
    assert polars.read_parquet(parquet).to_dict(as_series=False) == expected(directory)
    lazy = polars.scan_parquet(parquet).filter(polars.col("label") == "cat").select("id").collect()
    assert len(lazy) == 4


def test_duckdb_reads_the_table(parquet: Path, directory: Directory) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"select * from '{parquet}' order by row").fetchall()
    assert rows == list(zip(*expected(directory).values()))
    counts = duckdb.sql(f"select label, count(*) from '{parquet}' group by label order by label")
    assert counts.fetchall() == [("bird", 1), ("cat", 4), ("dog", 5)]


def test_datasets_reads_the_table(parquet: Path, directory: Directory, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "cache"))
    assert found.to_dict() == expected(directory)


@pytest.mark.parametrize("to", ["npy", "faiss"])
def test_directories_have_the_rows_that_are_ok(directory: Directory, to: Any) -> None:
    report = export_features(directory.path, to, features=["pooled"])
    assert report.path == directory.path.with_name(f"out-{to}")
    manifest = json.loads((report.path / "export.json").read_bytes())
    assert manifest == {
        "format": to,
        "features": ["pooled"],
        "files": [f"pooled.{to}", "rows.jsonl"],
    }
    assert sorted(os.listdir(report.path)) == ["export.json", f"pooled.{to}", "rows.jsonl"]
    rows = [json.loads(line) for line in (report.path / "rows.jsonl").read_bytes().splitlines()]
    features = open_features(directory.path)
    assert [row["id"] for row in rows] == features.ids
    assert [row["row"] for row in rows] == features.row_ids.tolist()
    assert [row["label"] for row in rows] == features.columns["label"]
    assert repr(report).endswith("rows: 9 with features, 1 failed; only the first are in it")


def test_arrays_equal_what_is_stored(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PART_ROWS", 3)
    out = export_features(directory.path, "npy").path
    for name, dtype in (("pooled", "float32"), ("half", "float32"), ("maps", "float16")):
        array = np.load(out / f"{name}.npy", mmap_mode="r")
        assert array.dtype == dtype
        wanted = directory.expected(name)
        assert torch.equal(torch.from_numpy(np.array(array)), wanted.to(getattr(torch, dtype)))


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_an_index_is_the_one_that_faiss_writes(directory: Directory, metric: Any) -> None:
    faiss = pytest.importorskip("faiss")
    out = export_features(directory.path, "faiss", features=["pooled", "half"], metric=metric).path
    for name in ("pooled", "half"):
        vectors = directory.expected(name).float()
        if metric == "cosine":
            vectors = torch.nn.functional.normalize(vectors)
        index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(vectors.shape[1])
        index.add(vectors.numpy())
        written = (out / f"{name}.faiss").read_bytes()
        assert written == faiss.serialize_index(index).tobytes()
    index = faiss.read_index(str(out / "pooled.faiss"))
    features = open_features(directory.path)
    _, places = index.search(features.to_numpy("pooled")[:2], 3)
    assert places[:, 0].tolist() == [0, 1]
    if metric == "cosine":
        found = features.search(features["pooled"][:2], 3, "pooled").ids
        assert [[features.ids[i] for i in part] for part in places] == found


def test_rows_that_are_not_computed_are_said_to_be(directory: Directory) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    (directory.path / "shards" / "commit-00001.json").unlink()
    report = export_features(directory.path, "parquet")
    assert (report.ok, report.failed, report.missing) == (5, 1, 4)
    assert "4 not computed yet" in repr(report)
    errors = pq.read_table(report.path).column("error").to_pylist()
    assert errors[4:8] == ["not computed yet"] * 4 and errors[3] is None


def test_format_2_is_exported(tmp_path: Path) -> None:
    write_format_2(tmp_path / "old")
    out = export_features(tmp_path / "old", "npy", tmp_path / "new" / "arrays").path
    array = np.load(out / "pooled.npy")
    np.testing.assert_array_equal(array, open_features(tmp_path / "old").to_numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "csv"}, "to: wanted parquet, npy, faiss, got 'csv'"),
        ({"metric": "l1"}, "metric: wanted cosine, dot, l2, got 'l1'"),
        ({"features": "cls"}, "features: no 'cls'; there are half, maps, pooled"),
        ({"features": ()}, "features: wanted at least one of half, maps, pooled, got none"),
        ({"metric": "l2"}, "metric: only a faiss index has one, got 'l2' with 'npy'"),
        ({"to": "faiss"}, r"an index holds vectors, got maps of shape \[2, 3\]"),
    ],
    ids=["to", "metric", "features", "no features", "metric of npy", "maps"],
)
def test_wrong_arguments_are_refused(directory: Directory, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_features(directory.path, **{"to": "npy", **arguments})


def test_an_export_into_the_features_is_refused(directory: Directory) -> None:
    with pytest.raises(ValueError, match="outside of the features directory"):
        export_features(directory.path, "npy", directory.path / "npy")


def test_parquet_without_pyarrow_says_what_to_install(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastbb\[parquet\]'"):
        export_features(directory.path, "parquet")


@pytest.mark.parametrize("to", ["parquet", "npy"])
def test_only_an_earlier_export_is_replaced_and_only_if_asked(
    directory: Directory, tmp_path: Path, to: Any
) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    out = export_features(directory.path, to).path
    with pytest.raises(ValueError, match="replaced only with overwrite"):
        export_features(directory.path, to)
    inode = out.stat().st_ino
    export_features(directory.path, to, overwrite=True)
    assert out.stat().st_ino != inode
    (tmp_path / "file").write_text("thesis")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("")
    (tmp_path / "mine" / "thesis.tex").write_text("thesis")
    for place in (tmp_path / "file", tmp_path / "mine"):
        with pytest.raises(ValueError, match="is no earlier export"):
            export_features(directory.path, to, place, overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "thesis.tex").read_text()


@pytest.mark.parametrize(
    "change", ["file added", "folder added", "no manifest", "foreign manifest"]
)
def test_files_beside_those_of_an_export_are_never_replaced(
    directory: Directory, change: str
) -> None:
    out = export_features(directory.path, "npy", features=["pooled", "pooled"]).path
    before = {"file added": "mine.npy", "folder added": "folder.npy"}.get(change, "rows.jsonl")
    if change == "file added":
        (out / before).write_text("thesis")
    elif change == "folder added":
        (out / before).mkdir()
    elif change == "no manifest":
        (out / "export.json").unlink()
    else:
        (out / "export.json").write_text('["a"]')
    with pytest.raises(ValueError, match="is no earlier export"):
        export_features(directory.path, "npy", overwrite=True)
    assert (out / before).exists()


class Broken(BaseException):
    """A BaseException, so that `except Exception` does not catch it."""


def tree(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.exists() else []
    return {file.name.replace(path.name, ""): file.read_bytes() for file in files}


@pytest.mark.parametrize("to", ["parquet", "npy", "faiss"])
@pytest.mark.parametrize("before", ["nothing", "an earlier export"])
@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_killed_export_leaves_the_old_files_or_none(
    directory: Directory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: Any,
    before: str,
    call: str,
) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "old"

    def run() -> None:
        export_features(directory.path, to, out, features=["pooled"], overwrite=True)

    if before == "an earlier export":
        run()
        directory.update([row(10)])
    old = tree(out)
    original: Callable[..., Any] = getattr(os, call)
    for fail_at in range(1, 10):
        calls = []

        def failing(*args: Any, calls: list[Any] = calls, fail_at: int = fail_at) -> None:
            calls.append(args)
            if len(calls) == fail_at:
                raise Broken if fail_at % 2 else OSError(errno.ENOSPC, "No space left on device")
            original(*args)

        monkeypatch.setattr(export.os, call, failing)
        try:
            run()
            break  # it was not called so often
        except (Broken, OutputError) as error:
            assert isinstance(error, Broken) or "free some space" in str(error)
        finally:
            monkeypatch.undo()
        # the last call syncs the directory, after the new files have taken their place
        new = call == "fsync" and len(calls) == {"parquet": 2, "npy": 5, "faiss": 5}[to]
        assert new or tree(out) == old
        assert {path.name for path in tmp_path.iterdir()} <= {"out", "old"}
        if new:
            break
    run()
    whole = tree(out)
    assert whole and whole != old
    export_features(directory.path, to, tmp_path / "again", features=["pooled"])
    assert whole == tree(tmp_path / "again")


def test_leftovers_of_killed_exports_are_removed(directory: Directory, tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the largest number of a process
    (tmp_path / f"x.tmp-{dead}").mkdir()
    (tmp_path / f"x.tmp-{dead}" / "pooled.npy").write_text("half")
    (tmp_path / f"x.tmp-{dead}.old").mkdir()
    (tmp_path / f"y.tmp-{dead}").write_text("of another export")
    (tmp_path / f"x.tmp-{os.getppid()}").mkdir()  # of an export that still runs
    export_features(directory.path, "npy", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out", "x", f"x.tmp-{os.getppid()}", f"y.tmp-{dead}"]
    )
