"""Verification of features directories: each kind of damage is found, and the file is named."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from feature_directories import Directory, content, row, write_format_2

from fastbb.extraction import VerifyReport, open_features, verify_features
from fastbb.extraction.layout import DamagedError, canonical_json

AGAIN = "extract again: the shard is computed again"


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """Four shards of new rows, then one of a retry."""
    directory = Directory(tmp_path / "out").start(map(row, range(10)), failed=(3, 4, 8))
    directory.update(map(row, range(10, 13)))
    directory.retry(failed=(8,))
    return directory


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_good_directory_passes(directory: Directory) -> None:
    report = verify_features(directory.path)
    assert report.passed and report.problems == report.notes == ()
    assert (report.rows, report.ok, report.errors, report.shards) == (13, 12, {"corrupt": 1}, 5)
    n_bytes = sum(p.stat().st_size for p in directory.path.rglob("*") if "rows-" in p.name)
    n_bytes += sum(p.stat().st_size for p in directory.path.glob("shards/[fi]*"))
    assert report.n_bytes == n_bytes
    assert f"{directory.path}: good; 12 rows with features, 1 failed, 5 shards" in repr(report)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "features": (
        lambda out: flip(out / "shards/features-00001.safetensors"),
        rf"shards/features-00001.safetensors: damaged \(sha256 .*; {AGAIN}",
    ),
    "cut features": (
        lambda out: os.truncate(out / "shards/features-00001.safetensors", 90),
        f"shards/commit-00001.json: it or a file that it names .*; {AGAIN}",
    ),
    "index": (
        lambda out: flip(out / "shards/index-00004.jsonl", 9),
        f"shards/index-00004.jsonl: damaged .*; {AGAIN}",
    ),
    "no commit": (
        lambda out: (out / "shards/commit-00002.json").unlink(),
        f"shards: 1 of 5 are not computed; {AGAIN}",
    ),
    "rows": (
        lambda out: flip(out / "rows/rows-00003.jsonl", 3),
        "rows/rows-00003.jsonl: missing or changed .*; extract again into another directory",
    ),
    "no generation": (
        lambda out: (out / "rows/generation-00001.json").unlink(),
        "rows/generation-00001.json is missing, and what came after it is there",
    ),
    "generation": (lambda out: flip(out / "rows/generation-00001.json", 2), "is damaged"),
    "plan is a directory": (
        lambda out: make_directory(out / "plan.json"),
        "plan.json is damaged: .*Is a directory",
    ),
    "plan": (
        lambda out: (out / "plan.json").write_text(
            (out / "plan.json").read_text().replace("fp32", "bf16")
        ),
        "belongs to another plan",
    ),
    "commit without a hash": (
        lambda out: replace(out / "shards/commit-00001.json", '"sha256"', '"md5"'),
        f"shards/commit-00001.json: it or a file that it names .*; {AGAIN}",
    ),
    "commit is a directory": (
        lambda out: make_directory(out / "shards/commit-00001.json"),
        f"shards/commit-00001.json: it or a file that it names .*; {AGAIN}",
    ),
    "features are a directory": (
        lambda out: make_directory(out / "shards/features-00001.safetensors"),
        f"shards/commit-00001.json: it or a file that it names .*; {AGAIN}",
    ),
    "rows are a directory": (
        lambda out: make_directory(out / "rows/rows-00001.jsonl"),
        "rows/rows-00001.jsonl: missing or changed",
    ),
    "generation is a directory": (
        lambda out: make_directory(out / "rows/generation-00001.json"),
        "generation-00001.json is damaged: .*Is a directory",
    ),
    "number of rows is a text": (
        lambda out: replace(out / "rows/generation-00001.json", '"rows":3', '"rows":"3"'),
        "generation-00001.json is damaged: wanted a whole number, got '3'",
    ),
    "number of a shard": (
        lambda out: replace(out / "rows/generation-00001.json", '"shard":3', '"shard":3.0'),
        "generation-00001.json is damaged: wanted a whole number, got 3.0",
    ),
    "no plan": (lambda out: (out / "plan.json").write_text("{}"), "plan.json is damaged"),
    "manifest": (
        lambda out: flip(out / "manifest.json", 0),
        "manifest.json: missing or damaged; extract again",
    ),
    "totals": (
        lambda out: (out / "manifest.json").write_text(
            (out / "manifest.json").read_text().replace('"ok":12', '"ok":11')
        ),
        "manifest.json: its totals are not those of the shards",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(directory: Directory, damage: str) -> None:
    act, message = DAMAGES[damage]
    act(directory.path)
    report = verify_features(directory.path)
    assert not report.passed
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(report.problems))
    assert "problem" in repr(report) and report.problems[0] in repr(report)


@pytest.mark.parametrize("field", ["id", "status", "pos", "kind", "message"])
@pytest.mark.parametrize("shard", [0, 4])  # of new rows, and of a retry
def test_a_damaged_field_of_an_index_is_named(directory: Directory, field: str, shard: int) -> None:
    path = directory.path / "shards" / f"index-{shard:05d}.jsonl"
    replace(path, f'"{field}"', f'"{"x" * len(field)}"')
    with pytest.raises(DamagedError, match=rf"{path.name} is damaged \(a field"):
        open_features(directory.path).describe()
        _ = open_features(directory.path).ids


def recommit(directory: Directory, change: Callable[[dict, list], None]) -> VerifyReport:
    """Commits shard 0 with a content that a defect could have given."""
    tensors, index = content(range(4), [f"{i:05d}.png" for i in range(4)], (3,), directory.outputs)
    change(tensors, index)
    with directory.open() as writer:
        writer.commit(writer.shards[0], tensors, index)
    return verify_features(directory.path)


INCONSISTENCIES: dict[str, tuple[Callable[[dict, list], Any], str]] = {
    "other row_id": (
        lambda tensors, index: tensors["row_id"].add_(1),
        "features-00000.safetensors: row_id differs from the index",
    ),
    "other type": (
        lambda tensors, index: tensors.update(pooled=tensors["pooled"].double()),
        r"pooled is float64 \[3, 16\], not as planned",
    ),
    "fewer rows": (
        lambda tensors, index: tensors.update(pooled=tensors["pooled"][:2].clone()),
        r"pooled is float32 \[2, 16\], not as planned",
    ),
    "other features": (
        lambda tensors, index: tensors.update(cls=tensors.pop("pooled")),
        r"features .'cls', 'row_id'., wanted row_id and .'pooled'.",
    ),
    "other id": (
        lambda tensors, index: index[0].update(id="x.png"),
        "index-00000.jsonl: its rows are not those of the list",
    ),
    "other position": (
        lambda tensors, index: index[0].update(pos=1),
        "index-00000.jsonl: positions do not count up",
    ),
}


@pytest.mark.parametrize("name", INCONSISTENCIES)
def test_files_that_are_at_odds_are_found(directory: Directory, name: str) -> None:
    change, message = INCONSISTENCIES[name]
    report = recommit(directory, change)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(report.problems))


def test_rows_that_are_numbered_wrong_are_found(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "out")
    with directory.open() as writer:
        rows: Any = [(0, row(0)), (2, row(1))]
        writer.append("start", rows)
        shard = writer.shards[0]
        commit = writer.commit(
            shard, *content([0, 2], [row(0).id, row(1).id], (), directory.outputs)
        )
        writer.finish(writer.totals([commit]))
    report = verify_features(directory.path)
    assert any("rows/rows-00000.jsonl: row 2 follows row 0" in p for p in report.problems)


def test_leftovers_are_named_and_do_no_harm(directory: Directory) -> None:
    (directory.path / "shards" / "features-00009.safetensors.tmp-12").write_text("x")
    (directory.path / "notes.txt").write_text("x")
    (directory.path / "rows" / "rows-00007.jsonl").write_text("x")
    report = verify_features(directory.path)
    assert report.passed and len(report.notes) == 3
    assert "notes.txt: belongs to nothing here" in report.notes
    assert "features-00009.safetensors.tmp-12: of a killed run" in repr(report)


def test_an_unfinished_directory_does_not_pass(directory: Directory) -> None:
    (directory.path / "manifest.json").unlink()
    for path in directory.path.glob("shards/*-00004.*"):
        path.unlink()
    (problem,) = verify_features(directory.path).problems
    assert problem == f"shards: 1 of 5 are not computed; {AGAIN}"


def test_format_2_is_verified_and_never_computed_again(tmp_path: Path) -> None:
    out = tmp_path / "old"
    write_format_2(out)
    assert verify_features(out).passed
    flip(out / "shards/features-00002.safetensors")
    (problem,) = verify_features(out).problems
    assert problem.endswith("extract again into another directory")


def test_no_features_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no features directory"):
        verify_features(tmp_path)


def test_the_identity_inside_a_features_file_is_compared(directory: Directory) -> None:
    path = directory.path / "shards" / "features-00000.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    data = safetensors.torch.save(tensors, {"fastbb": "{}"})
    path.write_bytes(data)
    commit_path = directory.path / "shards" / "commit-00000.json"
    commit = json.loads(commit_path.read_bytes())
    commit["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit_path.write_bytes(canonical_json(commit))
    (problem,) = verify_features(directory.path).problems
    assert "it is of another plan or shard" in problem
    assert torch.equal(tensors["row_id"], torch.arange(3))
