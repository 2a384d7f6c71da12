"""Output directories with other files, damaged files, or the plan of another request."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbb.extraction import (
    ErrorBudgetError,
    OutputError,
    PlanMismatchError,
    Report,
    open_features,
    store,
)
from fastbb.extraction.store import FeatureWriter

Run = Callable[..., Report]
Tree = Callable[[Path], dict[str, bytes]]


def everything(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.tex", "draft.tmp-1", "plan.json.tmp-old", "rows/data.csv", "rows/x.tmp-1"),
        *("shards/photo.jpg", "rows/rows-1.jsonl.bak", ".git"),
    ],
)
def test_directory_with_other_files_is_refused_unchanged(
    run: Run, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("x")
    with pytest.raises(ValueError, match=f"no features but other files .'{name}', 1 in all"):
        run()
    assert everything(tmp_path / "out") == {name: b"x"}


@pytest.mark.parametrize(
    "plan",
    ["{}", "null", "{", '{"format":9}', '{"format":2,"rows":1,"rows_sha256":[]}'],
    ids=["empty", "null", "cut", "later format", "few fields"],
)
def test_a_plan_of_another_format_is_refused_unchanged(run: Run, tmp_path: Path, plan: str) -> None:
    out = tmp_path / "out"
    (out / "notes.tmp-1").mkdir(parents=True)
    (out / "notes.tmp-1" / "a.tmp-2").write_text("x")
    (out / "plan.json").write_text(plan)
    before = everything(out)
    with pytest.raises(
        PlanMismatchError,
        match="is damaged|2 and 3 are read, got 9",
    ):
        run()
    assert everything(out) == before
    with pytest.raises((PlanMismatchError, ValueError), match="is damaged|2 and 3 are read, got 9"):
        open_features(out)


def test_only_our_own_unfinished_files_are_removed(run: Run, tmp_path: Path, tree: Tree) -> None:
    run()
    out = tmp_path / "out"
    before = tree(out)
    for name in ("notes.tmp-1", "shards/mine.tmp-2", "rows-1.jsonl.tmp-3"):
        (out / name).write_text("x")
    for name in ("plan.json.tmp-1", "rows/rows-00000.jsonl.tmp-22", "shards/commit-1.json.tmp-3"):
        (out / name).write_text("x")
    with pytest.raises(PlanMismatchError):
        run(precision="bf16")
    assert len(tree(out)) == len(before) + 6  # nothing is removed for another plan
    run()
    assert sorted(tree(out).keys() - before.keys()) == [
        *("notes.tmp-1", "rows-1.jsonl.tmp-3", "shards/mine.tmp-2")
    ]


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{}", '{"files":{}}', '{"files":null}', "7"],
)
def test_shard_with_a_damaged_commit_is_computed_again(
    run: Run, tmp_path: Path, tree: Tree, text: str
) -> None:
    run()
    out = tmp_path / "out"
    before = tree(out)
    (out / "shards" / "commit-00001.json").write_text(text)
    assert "6 of 10" in open_features(out).describe()
    assert run().resumed_rows == 6 and tree(out) == before


@pytest.mark.parametrize("field", ["rows", "ok", "errors", "shard", "plan_sha256", "files"])
def test_commit_without_a_field_is_ignored(run: Run, tmp_path: Path, field: str) -> None:
    run()
    path = tmp_path / "out" / "shards" / "commit-00001.json"
    commit = json.loads(path.read_bytes())
    del commit[field]
    path.write_text(json.dumps(commit))
    assert "6 of 10" in open_features(tmp_path / "out").describe()


def test_plan_without_a_shown_field_is_called_damaged(run: Run, tmp_path: Path) -> None:
    run()
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_bytes())
    places = [(plan, name) for name in plan]
    places += [
        (inner, name) for inner in plan.values() if isinstance(inner, dict) for name in inner
    ]
    places += [(plan["outputs"]["embedding"], name) for name in ("shape", "dtype")]
    for inner, name in places:
        value = inner.pop(name)
        path.write_text(json.dumps(plan))
        try:
            open_features(tmp_path / "out").describe()
        except PlanMismatchError as error:
            assert "is damaged" in str(error)
        inner[name] = value


def test_damaged_timings_are_ignored(run: Run, tmp_path: Path) -> None:
    run()
    with open(tmp_path / "out" / "run.jsonl", "a") as file:
        file.write('null\n{}\n{"event":"shard"}\n{"eve')
    assert "images/s" in open_features(tmp_path / "out").describe()


@pytest.mark.parametrize("name", ["features-00001.safetensors", "index-00001.jsonl"])
def test_a_shard_with_a_flipped_bit_is_computed_again(
    run: Run, tmp_path: Path, tree: Tree, name: str
) -> None:
    run()
    before = tree(tmp_path / "out")
    path = tmp_path / "out" / "shards" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert run().resumed_rows == 6 and tree(tmp_path / "out") == before


def test_a_directory_that_cannot_be_entered_is_an_output_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(store.Path, "exists", denied)
    with pytest.raises(OutputError, match="cannot write .*plan.json: Permission denied"):
        run()


def test_the_error_budget_counts_failures_of_earlier_runs(run: Run, tmp_path: Path) -> None:
    assert run().errors == {"unsupported_format": 1}
    assert run(max_error_rate=0).tried == 0  # nothing is left that could fail
    (tmp_path / "out" / "shards" / "commit-00002.json").unlink()
    assert run(max_error_rate=0).tried == 2  # what failed in a run that ended was reported
    (tmp_path / "out" / "shards" / "commit-00002.json").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ErrorBudgetError, match="stopped: 1 of 8 images failed"):
        run(max_error_rate=0)


def test_another_precision_is_named_before_other_weights(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(PlanMismatchError, match="another plan:\n  precision: 'fp32' there, 'bf16'"):
        run(precision="bf16")


def test_the_lock_is_free_again_after_a_refusal(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(PlanMismatchError):
        run(precision="bf16")
    with FeatureWriter(tmp_path / "out"):
        pass
