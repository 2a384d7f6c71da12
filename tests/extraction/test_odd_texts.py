"""Ids, columns and names that no UTF-8 holds, in tables and files for other programs."""

import json
from pathlib import Path

import pytest
from feature_directories import Directory, row

from fastbb.extraction import export_features, open_features

# a byte of a file name that is no UTF-8, and half of a pair as JSON may hold it
TEXT, SHOWN = "caf\udce9 \ud83d", r"caf\xe9 \ud83d"


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    given = row(0, {TEXT: 1, "text": TEXT, "nested": {"a": [TEXT]}})
    given.id = TEXT
    return Directory(tmp_path / "out").start([given, row(1)])


def test_tables_escape_them(directory: Directory) -> None:
    pytest.importorskip("pyarrow")
    table = open_features(directory.path).to_arrow()
    assert table.column_names[:5] == ["id", "row", SHOWN, "nested", "text"]
    first = table.to_pylist()[0]
    assert (first["id"], first["text"], first[SHOWN]) == (SHOWN, SHOWN, 1)
    assert json.loads(first["nested"]) == {"a": [SHOWN]}
    parquet = pytest.importorskip("pyarrow.parquet")
    written = parquet.read_table(export_features(directory.path, "parquet").path)
    assert written.column("id").to_pylist() == [SHOWN, "00001.png"]


def test_data_frames_escape_them(directory: Directory) -> None:
    pytest.importorskip("pandas")
    frame = open_features(directory.path).to_pandas()
    assert frame["id"][0] == frame["text"][0] == SHOWN and frame[SHOWN][0] == 1
    assert frame["nested"][0] == {"a": [SHOWN]}


def test_rows_keep_them(directory: Directory) -> None:
    first = open_features(directory.path)[0]
    assert first["id"] == first["text"] == TEXT and first[TEXT] == 1


@pytest.mark.parametrize("reader", ["json", "pandas", "polars", "duckdb"])
def test_other_programs_read_the_rows(directory: Directory, reader: str) -> None:
    path = export_features(directory.path, "npy").path / "rows.jsonl"
    program = pytest.importorskip(reader)
    if reader == "json":
        first = json.loads(path.read_bytes().splitlines()[0])
        assert first["nested"] == {"a": [SHOWN]}
    elif reader == "pandas":
        first = program.read_json(path, lines=True).to_dict("records")[0]
    elif reader == "polars":
        first = program.read_ndjson(path).to_dicts()[0]
    else:
        first = program.sql(f"select * from '{path}'").fetchdf().to_dict("records")[0]
    assert first["id"] == first["text"] == SHOWN and first[SHOWN] == 1
