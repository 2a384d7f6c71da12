"""Search of the closest features, held to a product of whole matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from feature_directories import Directory, content, row, write_format_2

from fastbb.extraction import Neighbours, export_features, open_features, search


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    directory = Directory(tmp_path / "out").start(map(row, range(50)), failed=(3, 4, 30))
    directory.update(map(row, range(50, 60)), failed=(55,))
    directory.retry(failed=(4,))
    return directory


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("n_queries", [1, 5])
def test_the_closest_rows_are_found(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, metric: str, n_queries: int
) -> None:
    monkeypatch.setattr(search, "_CHUNK_BYTES", 200)  # chunks of three rows
    monkeypatch.setattr(search, "_MAX_QUERIES", 2)
    features = open_features(directory.path)
    torch.manual_seed(1)
    queries, stored = torch.randn(n_queries, 16), features["pooled"]
    found = features.search(queries, 7, metric=metric)  # pyright: ignore[reportArgumentType]
    if metric == "cosine":
        queries, stored = (torch.nn.functional.normalize(x) for x in (queries, stored))
    scores, order = (queries @ stored.T).topk(7)
    torch.testing.assert_close(found.scores, scores)
    assert found.rows.tolist() == features.row_ids[order].tolist()
    assert found.ids == [[features.ids[i] for i in part] for part in order.tolist()]
    one = features.search(queries[0].numpy(), 7, "pooled", metric)  # pyright: ignore[reportArgumentType]
    assert one.ids == found.ids[0] and one.rows.shape == (7,)


def test_a_row_is_not_its_own_neighbour(directory: Directory) -> None:
    features = open_features(directory.path)
    assert features.search(features[2]["pooled"], 1).ids == ["00002.png"]
    found = features.search("00002.png", 100)
    assert len(found.ids) == len(features) - 1 and "00002.png" not in found.ids
    assert features.search("00030.png", 1).rows != 30  # retried
    with pytest.raises(ValueError, match="'00004.png' has no features, see errors"):
        features.search("00004.png")
    with pytest.raises(ValueError, match="wanted the id of a row, got 'no.png'"):
        features.search("no.png")


def test_neighbours_are_shown_as_a_table(directory: Directory) -> None:
    features = open_features(directory.path)
    found = features.search(features[2]["pooled"], 3)
    assert isinstance(found, Neighbours)
    title, header, first, *_ = repr(found).splitlines()
    assert title == "3 neighbours" and header.split() == ["id", "score", "row"]
    assert first.split() == ["'00002.png'", "1.0000", "2"]
    assert "<td" in found._repr_html_()
    several = repr(features.search(features["pooled"][:2], 3)).splitlines()
    assert several[0] == "3 neighbours of 2 queries; the closest of each"
    assert several[2].split() == ["0", "'00000.png'", "1.0000"]


def test_the_cosine_of_zeros_is_zero(directory: Directory) -> None:
    assert open_features(directory.path).search(torch.zeros(16), 4).scores.tolist() == [0] * 4


def test_features_that_are_zero_have_a_cosine_of_zero(directory: Directory) -> None:
    tensors, index = content(range(4), [row(i).id for i in range(4)], (), directory.outputs)
    tensors["pooled"][2] = 0
    with directory.open() as writer:
        writer.commit(writer.shards[0], tensors, index)
    found = open_features(directory.path).search(torch.ones(16), 100)
    assert found.scores.isfinite().all() and found.scores[found.rows == 2].tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.zeros(15)}, r"wanted \[16\] or \[n, 16\], got \[15\]"),
        ({"query": torch.zeros(2, 2, 16)}, r"got \[2, 2, 16\]"),
        ({"query": [float("nan")] * 16}, "wanted finite numbers"),
        ({"k": 0}, "k: wanted a whole number, at least 1, got 0"),
        ({"k": True}, "k: wanted a whole number, at least 1, got True"),
        ({"k": 2.0}, "k: wanted a whole number, at least 1, got 2.0"),
        ({"metric": "l1"}, "metric: wanted cosine or dot, got 'l1'"),
    ],
    ids=["width", "dimensions", "nan", "k", "bool", "float", "metric"],
)
def test_wrong_arguments_are_refused(directory: Directory, arguments: dict, message: str) -> None:
    features = open_features(directory.path)
    with pytest.raises(ValueError, match=message):
        features.search(**{"query": torch.zeros(16), **arguments})


def scaled(directory: Directory, factor: float) -> Directory:
    """Commits shard 1 with features of another magnitude."""
    tensors, index = content(range(4, 8), [row(i).id for i in range(4, 8)], (), directory.outputs)
    tensors["pooled"] *= factor
    with directory.open() as writer:
        writer.commit(writer.shards[1], tensors, index)
    return directory


@pytest.mark.parametrize("factor", [1e20, 1e-20, 1e-37, 1e37])
def test_the_cosine_does_not_depend_on_the_magnitude(tmp_path: Path, factor: float) -> None:
    directory = Directory(tmp_path / "out").start(map(row, range(10)))
    features = open_features(directory.path)
    query = features[5]["pooled"]
    wanted = features.search(query, np.int64(9))  # pyright: ignore[reportArgumentType]
    found = open_features(scaled(directory, factor).path).search(query * factor, 9)
    assert found.ids == wanted.ids
    torch.testing.assert_close(found.scores, wanted.scores)


@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_an_index_has_vectors_of_length_one(tmp_path: Path, factor: float) -> None:
    directory = scaled(Directory(tmp_path / "out").start(map(row, range(8))), factor)
    path = export_features(directory.path, "faiss").path / "pooled.faiss"
    vectors = torch.frombuffer(bytearray(path.read_bytes()[-8 * 16 * 4 :]), dtype=torch.float32)
    torch.testing.assert_close(vectors.reshape(8, 16).norm(dim=1), torch.ones(8))


def test_maps_are_not_searched(tmp_path: Path) -> None:
    outputs = {"maps": {"shape": [2, 3, 3], "dtype": "float32"}}
    features = open_features(Directory(tmp_path / "out", outputs).start([row(0)]).path)
    with pytest.raises(ValueError, match=r"one dimension, got maps of shape \[2, 3, 3\]"):
        features.search(torch.zeros(18), name="maps")
    with pytest.raises(ValueError, match="name: wanted one of maps, got None"):
        features.search(torch.zeros(18))
    outputs["embedding"] = {"shape": [5], "dtype": "float32"}
    features = open_features(Directory(tmp_path / "both", outputs).start([row(0)]).path)
    assert features.search(features["embedding"][0]).ids == ["00000.png"]
    outputs = {name: {"shape": [5], "dtype": "float32"} for name in ("cls", "patch_mean")}
    features = open_features(Directory(tmp_path / "three", outputs).start([row(0)]).path)
    with pytest.raises(ValueError, match="name: wanted one of cls, patch_mean, got None"):
        features.search(torch.zeros(5))


def test_half_features_and_unfinished_and_old_directories_are_searched(tmp_path: Path) -> None:
    outputs = {"pooled": {"shape": [16], "dtype": "bfloat16"}}
    directory = Directory(tmp_path / "out", outputs).start(map(row, range(10)))
    (directory.path / "shards" / "commit-00000.json").unlink()
    features = open_features(directory.path)
    assert features.search(features[0]["pooled"], 1).ids == ["00004.png"]
    with pytest.raises(ValueError, match="'00000.png' has no features"):
        features.search("00000.png")
    write_format_2(tmp_path / "old")
    old = open_features(tmp_path / "old")
    assert old.search(old[5]["pooled"], 1).rows.tolist() == [6]
