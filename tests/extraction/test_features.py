"""Reading of features: rows that are ok, all rows, retried rows, columns, tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_directories import Directory, row, value, write_format_2

from fastbb.extraction import (
    ExtractionError,
    FeatureExtractor,
    export_features,
    extract,
    open_features,
    verify_features,
)
from fastbb.extraction.features import RowErrors
from fastbb.extraction.reading import table_name

POOLED = {"shape": [16], "dtype": "float32"}


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """Ten rows in three shards; rows 3, 4 and 8 have failed."""
    return Directory(tmp_path / "out").start(map(row, range(10)), failed=(3, 4, 8))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_reads(directory: Directory) -> None:
    """Holds every way of reading to the rows that were written."""
    features = open_features(directory.path)
    ok = [number for number in range(len(directory.rows)) if number not in directory.failed]
    ids = [directory.rows[number].id for number in ok]
    assert features.ids == ids and features.row_ids.tolist() == ok and len(features) == len(ok)
    assert features.all_ids == [row.id for row in directory.rows]
    assert features.mask.tolist() == [number in ok for number in range(len(directory.rows))]
    for name in directory.outputs:
        expected = directory.expected(name)
        assert_equal(features[name], expected)
        assert_equal(torch.stack([features[i][name] for i in range(len(ok))]), expected)
        assert_equal(torch.stack([row[name] for row in features]), expected)
        shards = list(features.iter_shards([name]))
        assert [id for part, _ in shards for id in part] == ids
        assert_equal(torch.cat([tensors[name] for _, tensors in shards]), expected)
        aligned = features.aligned(name)
        assert_equal(aligned[ok], expected)
        assert aligned[sorted(directory.failed)].isnan().all()
    assert [(r["id"], r["row"]) for r in features] == list(zip(ids, ok))
    assert [error.row for error in features.errors()] == sorted(directory.failed)
    assert features.complete
    text = features.describe()
    assert f"ok        {len(ok)}" in text and f"failed    {len(directory.failed)}" in text


def test_rows_that_are_ok_and_all_rows(directory: Directory) -> None:
    assert_reads(directory)


def test_updates_are_numbered_on(directory: Directory) -> None:
    directory.update(map(row, range(10, 13)), failed=(11,))
    assert_reads(directory)
    assert "history   start of 10, update of 3 rows" in open_features(directory.path).describe()


def test_a_retried_row_is_read_at_its_place_and_once(directory: Directory) -> None:
    directory.update(map(row, range(10, 13)), failed=(11,))
    directory.retry(failed=(4, 11))
    assert_reads(directory)
    directory.update(map(row, range(13, 15)))
    directory.retry(failed=(11,))
    assert_reads(directory)
    directory.retry()
    assert_reads(directory)
    assert not open_features(directory.path).errors()


def test_an_ok_is_final_whatever_is_computed_again(directory: Directory) -> None:
    directory.retry(failed=(8,))
    directory.failed = set()
    with directory.open() as writer:
        # shards 0 and 2 were damaged, and all files mended before they were computed again
        for shard in (0, 2):
            directory.commit(writer, writer.shards[shard])
        writer.finish(writer.totals([writer.committed(shard) for shard in writer.shards]))
    assert_reads(directory)


def test_an_ok_of_an_earlier_retry_is_final(directory: Directory) -> None:
    directory.retry(failed=(8,))
    directory.retry(failed=(8,))
    directory.failed = set()
    with directory.open() as writer:  # the first retry was damaged, and is computed again
        directory.commit(writer, writer.shards[3])
        writer.finish(writer.totals([writer.committed(shard) for shard in writer.shards]))
    assert_reads(directory)


def test_a_row_between_retried_ones_may_be_ok_at_the_first_attempt(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "out").start(map(row, range(6)), failed=(1, 2, 3))
    directory.retry()
    directory.failed = {1, 3}
    with directory.open() as writer:  # the first shard was damaged, and is computed again
        directory.commit(writer, writer.shards[0])
        writer.finish(writer.totals([writer.committed(shard) for shard in writer.shards]))
    directory.failed = set()
    assert_reads(directory)
    assert verify_features(directory.path).passed


def test_a_damaged_retry_leaves_the_earlier_failure(directory: Directory) -> None:
    directory.retry()
    (directory.path / "shards" / "commit-00003.json").write_text("{}")
    features = open_features(directory.path)
    assert not features.complete and [e.row for e in features.errors()] == [3, 4, 8]
    assert "damaged   1 of the shards, cut or missing: commit-00003.json" in features.describe()
    assert len(features) == 7


def test_rows_that_are_not_computed_have_a_place(directory: Directory) -> None:
    directory.retry(failed=(8,))
    (directory.path / "shards" / "commit-00000.json").unlink()
    features = open_features(directory.path)
    assert not features.complete and features.row_ids.tolist() == [3, 4, 5, 6, 7, 9]
    assert features.ids[0] == "00003.png" and features.all_ids[0] == "00000.png"
    assert features.mask.tolist() == [number in (3, 4, 5, 6, 7, 9) for number in range(10)]
    assert_equal(features[0]["pooled"], value(3, POOLED))
    assert features.aligned("pooled")[:3].isnan().all()
    text = features.describe()
    assert "not finished" in text.splitlines()[0] and "rows      7 of 10, in 3 of 4 shards" in text


def test_format_2_is_read(tmp_path: Path) -> None:
    write_format_2(tmp_path / "old", failed=(3,))
    features = open_features(tmp_path / "old")
    assert features.complete and features.row_ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert_equal(
        features["pooled"], torch.stack([value(n, POOLED) for n in features.row_ids.tolist()])
    )
    assert features.columns == {} and "format    2, read only" in features.describe()
    (tmp_path / "old" / "shards" / "commit-00001.json").unlink()
    first = open_features(tmp_path / "old").describe().splitlines()[0]
    assert "not finished; format 2 is only read" in first


def test_an_extraction_that_grew_is_read_with_the_columns_of_its_list(
    model: Path, images: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    out, listing = tmp_path / "out", tmp_path / "list.csv"
    names = [f"{i:05d}.png" for i in range(10)]
    listing.write_text("".join(["path,label\n", *(f"{images / n},{n[4]}\n" for n in names)]))
    extract(model, listing, out, shard_rows=4, max_error_rate=1)
    (images / "00003.png").write_bytes(encoded(3))
    with open(listing, "a") as file:
        (images / "new.png").write_bytes(encoded(11))
        (images / "bad.png").write_bytes(b"text")
        file.write(f"{images / 'new.png'},new\n{images / 'bad.png'},bad\n")
    extract(None, listing, out, update=True, retry_failed=True, max_error_rate=1)
    features = open_features(out)
    assert [Path(id).name for id in features.ids] == [*names, "new.png"]
    assert features.columns == {"label": [*"0123456789", "new"]}
    assert features[3]["label"] == "3" and [error.row for error in features.errors()] == [11]
    expected = FeatureExtractor(model)([images / name for name in [*names, "new.png"]])
    for name, tensor in expected.items():
        torch.testing.assert_close(features[name], tensor)
        torch.testing.assert_close(features[3][name], tensor[3])
    assert verify_features(out).passed
    array = np.load(export_features(out, "npy").path / f"{features.names[0]}.npy")
    np.testing.assert_array_equal(array, features.to_numpy())


def test_a_row_is_a_dict_with_its_columns(tmp_path: Path) -> None:
    rows = [row(0, {"label": 3, "id": "a"}), row(1), row(2, {"label": None, "pooled": 2.5})]
    features = open_features(Directory(tmp_path / "out").start(rows).path)
    first = features[0]
    assert {name: first[name] for name in first if name != "pooled"} == {
        "id": "00000.png",
        "row": 0,
        "label": 3,
        "column_id": "a",
    }
    assert features[-1]["column_pooled"] == 2.5 and features[-1]["pooled"].shape == (16,)
    assert features.columns == {
        "label": [3, None, None],
        "id": ["a", None, None],
        "pooled": [None, None, 2.5],
    }
    assert "columns   id, label, pooled" in features.describe()


def test_columns_that_are_renamed_never_share_a_name() -> None:
    names = ["id", "column_id", "column_column_id", "pooled", "column_pooled", "label", "column_x"]
    shown = [table_name(name, ["pooled"]) for name in names]
    assert shown[:2] == ["column_id", "column_column_id"] and shown[-2:] == ["label", "column_x"]
    assert len(set(shown)) == len(names) and not {"id", "row", "error", "pooled"} & set(shown)


def test_positions_and_names_that_do_not_exist_are_refused(directory: Directory) -> None:
    features = open_features(directory.path)
    for position in (7, -8):
        with pytest.raises(IndexError, match=f"row {position} of 7 rows"):
            features[position]
    with pytest.raises(KeyError, match="no features 'maps'; there are pooled"):
        features["maps"]
    with pytest.raises(TypeError, match="wanted the name of features or one position"):
        features[1:3]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert "pooled" in features and "maps" not in features and features.keys() == ("pooled",)


def test_a_loader_takes_features_as_a_data_set(directory: Directory) -> None:
    loader = torch.utils.data.DataLoader(open_features(directory.path), batch_size=4)  # pyright: ignore[reportArgumentType]
    batches = list(loader)
    assert [id for batch in batches for id in batch["id"]] == open_features(directory.path).ids
    assert_equal(torch.cat([batch["pooled"] for batch in batches]), directory.expected("pooled"))


def test_arrays_of_half_and_integer_features(tmp_path: Path) -> None:
    outputs = {
        "half": {"shape": [3], "dtype": "bfloat16"},
        "maps": {"shape": [2, 3], "dtype": "float16"},
        "codes": {"shape": [2], "dtype": "int64"},
    }
    directory = Directory(tmp_path / "out", outputs).start(map(row, range(6)), failed=(1,))
    features = open_features(directory.path)
    half = features.to_numpy("half")
    assert half.dtype == np.float32
    assert_equal(torch.from_numpy(half), directory.expected("half").float())
    assert features.to_numpy("maps").dtype == np.float16
    assert features.aligned("half").dtype is torch.bfloat16
    with pytest.raises(ValueError, match="codes: torch.int64 has no NaN; use ds.'codes'."):
        features.aligned("codes")
    with pytest.raises(ValueError, match="wanted one of codes, half, maps"):
        features.to_numpy()


def test_data_frames(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    rows = [row(number, {"label": number, "error": "mine"}) for number in range(6)]
    outputs = {"pooled": POOLED, "maps": {"shape": [2, 3, 3], "dtype": "float32"}}
    directory = Directory(tmp_path / "out", outputs).start(rows, failed=(1, 5))
    features = open_features(directory.path)
    frame = features.to_pandas()
    assert list(frame) == ["id", "row", "column_error", "label", "maps", "pooled"]
    assert list(frame["id"]) == features.ids and list(frame["label"]) == [0, 2, 3, 4]
    assert frame["maps"][1].shape == (2, 3, 3)
    np.testing.assert_array_equal(np.stack(list(frame["pooled"])), features.to_numpy("pooled"))
    frame = features.to_pandas(errors=True)
    assert list(frame["row"]) == list(range(6)) and list(frame["label"]) == list(range(6))
    assert [cell is None for cell in frame["pooled"]] == [False, True, False, False, False, True]
    np.testing.assert_array_equal(frame["pooled"][2], features.to_numpy("pooled")[1])
    assert frame["error"][1] == "corrupt: no image" and not isinstance(frame["error"][0], str)


def test_arrow_tables(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    columns = [{"n": 1, "mixed": "a"}, {"n": 2.5, "mixed": {"x": [1]}}, {"flag": True}, {"n": None}]
    directory = Directory(tmp_path / "out", shard_rows=2)
    directory.start([row(i, given) for i, given in enumerate(columns)], failed=(2,))
    table = open_features(directory.path).to_arrow()
    assert table.schema.field("pooled").type == pa.list_(pa.float32(), 16)
    assert table.schema.field("pooled").metadata == {b"shape": b"[16]"}
    assert table.column("row").to_pylist() == [0, 1, 3]
    assert table.column("n").to_pylist() == [1.0, 2.5, None]
    assert table.column("mixed").to_pylist() == ["a", '{"x": [1]}', None]
    assert table.schema.field("flag").type == pa.bool_()
    expected = directory.expected("pooled").tolist()
    assert table.column("pooled").to_pylist() == expected


def test_names_that_are_no_utf_8_are_escaped_in_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [row(0), row(1)]
    rows[0].id = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    rows[1].id = "café.png"
    features = open_features(Directory(tmp_path / "out").start(rows).path)
    assert features.ids == [row.id for row in rows]
    assert features.to_arrow().column("id").to_pylist() == ["caf\\xe9.png", "café.png"]
    pytest.importorskip("pandas")
    assert list(features.to_pandas()["id"]) == ["caf\\xe9.png", "café.png"]


def test_a_run_that_too_many_failures_stopped_says_so_and_what_to_do(directory: Directory) -> None:
    (directory.path / "shards" / "commit-00001.json").unlink()
    reason = "stopped: 3 of 8 images failed, more than the share of 0.05 allowed; mend the input"
    with directory.open() as writer:
        writer.log({"event": "stop", "exit_code": 4, "time": 0, "reason": reason})
    first, second, *rest = open_features(directory.path).describe().splitlines()
    assert "not finished, too many images failed; mend them or allow more" in first
    assert second == f"reason    {reason}"
    assert "failed    2, in finished shards" in rest


def test_the_norms_of_the_plan_are_shown(directory: Directory) -> None:
    assert "norm  " not in open_features(directory.path).describe()
    features = open_features(directory.path)
    features.plan |= {"norm": "final", "normalize": True}
    assert "norm      tokens final, vectors of length 1 (L2)" in features.describe()


def test_a_start_that_listed_nothing_is_not_complete(directory: Directory) -> None:
    for path in (directory.path / "rows").glob("generation-*"):
        path.unlink()
    features = open_features(directory.path)
    assert not features.complete and len(features) == 0 and features["pooled"].shape == (0, 16)
    assert list(features) == [] and "not finished" in features.describe()


def test_a_damaged_index_is_named(directory: Directory) -> None:
    path = directory.path / "shards" / "index-00001.jsonl"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ExtractionError, match=r"index-00001.jsonl is damaged .* computed again"):
        _ = open_features(directory.path).ids


def test_notebooks_show_tables(directory: Directory) -> None:
    features = open_features(directory.path)
    html = features._repr_html_()
    assert "features of 7 images, 3 failed, complete" in html and "<td" in html
    errors = features.errors()
    assert isinstance(errors, RowErrors) and "&#x27;00003.png&#x27;" in errors._repr_html_()
    assert "no errors" in RowErrors()._repr_html_() and "<table" not in RowErrors()._repr_html_()


def test_the_embedding_is_taken_where_no_name_is_given(tmp_path: Path) -> None:
    outputs: dict[str, Any] = dict.fromkeys(("embedding", "pooled"), POOLED)
    features = open_features(Directory(tmp_path / "out", outputs).start(map(row, range(4))).path)
    np.testing.assert_array_equal(features.to_numpy(), features.to_numpy("embedding"))
    assert features.aligned().equal(features.aligned("embedding"))
    assert features.search(features["embedding"][1], 1).rows.tolist() == [1]
