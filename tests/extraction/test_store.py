import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastbb.extraction import (
    ExtractionError,
    OutputError,
    OutputLockedError,
    PlanMismatchError,
    Report,
    open_features,
    store,
)
from fastbb.extraction.job import extract
from fastbb.extraction.store import FeatureWriter, canonical_json

Tree = Callable[[Path], dict[str, bytes]]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_finished_directory_holds_plan_manifest_rows_and_shards(
    run: Callable[..., Report], images: Path, tmp_path: Path, tree: Tree
) -> None:
    run()
    out = tmp_path / "out"
    numbers = ("00000", "00001", "00002")
    assert sorted(tree(out)) == sorted(
        ["plan.json", "manifest.json"]
        + ["rows/generation-00000.json"]
        + [f"rows/rows-{n}.jsonl" for n in numbers]
        + [f"shards/features-{n}.safetensors" for n in numbers]
        + [f"shards/index-{n}.jsonl" for n in numbers]
        + [f"shards/commit-{n}.json" for n in numbers]
    )
    for name, data in tree(out).items():
        if not name.endswith(".safetensors"):
            assert b"".join(canonical_json(json.loads(line)) for line in data.splitlines()) == data
    identity = hashlib.sha256((out / "plan.json").read_bytes()).hexdigest()
    rows = [row for n in numbers for row in lines(out / f"rows/rows-{n}.jsonl")]
    assert rows[9] == {"row": 9, "id": "00009.png", "path": str(images / "00009.png")}

    index = lines(out / "shards/index-00000.jsonl")
    assert index[2] == {"row": 2, "id": "00002.png", "status": "ok", "pos": 2}
    assert index[3].pop("message").startswith("none of JPEG")
    assert index[3] == {
        "row": 3,
        "id": "00003.png",
        "status": "error",
        "kind": "unsupported_format",
    }
    path = out / "shards/features-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "fastbb": canonical_json({"plan_sha256": identity, "shard": 0}).decode().rstrip()
        }
        assert file.get_tensor("row_id").tolist() == [0, 1, 2]
        assert file.get_tensor("row_id").dtype == torch.int64
        assert file.get_tensor("embedding").shape == (3, 16)
    (commit,) = lines(out / "shards/commit-00000.json")
    assert commit["files"][path.name] == {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert commit["plan_sha256"] == identity
    (manifest,) = lines(out / "manifest.json")
    assert (manifest["rows"], manifest["ok"]) == (10, 9)
    assert manifest["errors"] == {"unsupported_format": 1}


def test_files_get_the_permissions_of_the_umask(run: Callable[..., Report], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*.*")}
    assert modes == {0o640}


def test_a_second_run_changes_nothing(
    run: Callable[..., Report], images: Path, tmp_path: Path, tree: Tree
) -> None:
    run()
    out = tmp_path / "out"
    before, inodes = tree(out), {p: p.stat().st_ino for p in out.rglob("*.*")}
    (images / "99999.png").write_bytes((images / "00000.png").read_bytes())
    report = run()
    assert (report.resumed_rows, report.rows) == (10, 10)
    assert "nothing was left to do" in str(report)
    assert tree(out) == before and {p: p.stat().st_ino for p in out.rglob("*.*")} == inodes


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no commit": lambda shards: (shards / "commit-00001.json").unlink(),
    "cut commit": lambda shards: os.truncate(shards / "commit-00001.json", 30),
    "no features": lambda shards: (shards / "features-00001.safetensors").unlink(),
    "cut features": lambda shards: os.truncate(shards / "features-00001.safetensors", 90),
    "cut index": lambda shards: os.truncate(shards / "index-00001.jsonl", 9),
    "other plan": lambda shards: (shards / "commit-00001.json").write_text(
        (shards / "commit-00001.json").read_text().replace('"plan_sha256":"', '"plan_sha256":"0')
    ),
    "no manifest": lambda shards: (shards.parent / "manifest.json").unlink(),
    "leftovers": lambda shards: (shards / "features-00001.safetensors.tmp-12").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_without_a_valid_commit_is_computed_again(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, damage: str
) -> None:
    run()
    out = tmp_path / "out"
    before = tree(out)
    others = {p: p.stat().st_ino for n in (0, 2) for p in out.rglob(f"*-0000{n}.*")}
    DAMAGES[damage](out / "shards")
    assert tree(out) != before
    report = run()
    assert report.resumed_rows == (10 if damage in ("no manifest", "leftovers") else 6)
    assert tree(out) == before
    assert {p: p.stat().st_ino for p in others} == others


def flatten(value: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat = {}
    for name, item in value.items():
        flat |= flatten(item, (*path, name)) if isinstance(item, dict) else {(*path, name): item}
    return flat


def test_every_field_of_the_plan_is_compared(run: Callable[..., Report], tmp_path: Path) -> None:
    run()
    path = tmp_path / "out" / "plan.json"
    text = path.read_text()
    plan = json.loads(text)
    taken = {  # what a resume takes from the plan
        *("format", "batch_size", "shard_rows", "mode", "runs", "threads", "preprocessing"),
        *("features", "norm", "normalize", "feature_dtype", "precision", "device"),
    }
    assert plan.keys() - taken == {"model", "limits", "outputs", "versions"}
    fields = [field for field in flatten(plan) if field[0] not in taken]
    fields.remove(("model", "name"))
    shutil.rmtree(tmp_path / "out" / "rows")  # they name the plan that they belong to
    for field in fields:
        plan = json.loads(text)
        inner = plan
        for name in field[:-1]:
            inner = inner[name]
        inner[field[-1]] = "changed"
        path.write_text(json.dumps(plan))
        with pytest.raises(PlanMismatchError, match=f"{'.'.join(field)}: 'changed' there"):
            run()
        del inner[field[-1]]
        path.write_text(json.dumps(plan))
        with pytest.raises(PlanMismatchError, match="nothing there|is damaged"):
            run()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"precision": "bf16"}, "precision"),
        ({"features": "maps"}, "features"),
        ({"normalize": True}, "normalize"),
        ({"feature_dtype": "fp16"}, "outputs.embedding.dtype"),
        ({"features": ("pooled", "maps")}, "features"),
        ({"size": (32, 64)}, "preprocessing.size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_options_is_refused(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, options: dict, field: str
) -> None:
    run()
    before = tree(tmp_path / "out")
    with pytest.raises(PlanMismatchError, match=f"{field}: ") as caught:
        run(**options)
    assert len(str(caught.value).splitlines()) <= 5
    assert caught.value.exit_code == 3 and tree(tmp_path / "out") == before


def test_other_weights_in_the_same_place_are_refused(
    model: Path, images: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    extract(copy, images, tmp_path / "out")
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PlanMismatchError, match="model.weights_sha256"):
        extract(copy, images, tmp_path / "out")


def test_a_changed_list_of_rows_is_refused(run: Callable[..., Report], tmp_path: Path) -> None:
    run()
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    path = tmp_path / "out" / "rows" / "rows-00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"00005", b"00006"))
    with pytest.raises(PlanMismatchError, match="rows_sha256"):
        run()


def test_a_directory_with_other_files_is_refused_unchanged(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no features but other files .'thesis.tex'"):
        run()
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_a_second_writer_is_refused(run: Callable[..., Report], tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "out"), pytest.raises(OutputLockedError, match="another process"):
        run()
    assert run().ok == 9


@pytest.mark.parametrize("out", ["file/out", "file", "/proc/self/out", "/dev/null/out"])
def test_an_output_that_cannot_be_written_is_an_output_error(
    run: Callable[..., Report], tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write .*give a directory that can be") as caught:
        run(tmp_path / out)
    assert caught.value.exit_code == 6


def test_file_size_limit_is_reported_as_an_output_error(
    run: Callable[..., Report], tmp_path: Path, tree: Tree
) -> None:
    run(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"shard_rows": 10, "features": ("maps",), "out_indices": (0,)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(OutputError, match="features-00000.* too large; free some space"):
            run(**options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [name for name in tree(tmp_path / "out") if name.startswith("shards/")]
    assert run(**options).ok == 9


class Broken(BaseException):
    """A BaseException, so that `except Exception` does not catch it."""


@pytest.mark.parametrize("point", ["fsync", "replace", "after"])
def test_after_any_failed_write_the_next_run_completes_the_same_tree(
    run: Callable[..., Report],
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    run(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    original = getattr(os, "fsync" if point == "after" else point)
    calls = []

    def failing(*args: Any) -> None:
        calls.append(args)
        # every file is synced once and its directory once
        n = len(calls)
        if point == "after":
            if n % 2 == 0 and n // 2 == fail_at:
                raise Broken
        elif (n if point == "replace" else (n + 1) // 2) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)

    # the plan, which is linked, 3 lists, the generation, 3 shards of 3 files, the manifest
    for fail_at in range(1, 15 if point == "replace" else 16):
        out = tmp_path / f"out{fail_at}"
        calls.clear()
        monkeypatch.setattr(store.os, "fsync" if point == "after" else point, failing)
        expected = Broken if point == "after" else OutputError
        with pytest.raises(expected, match=None if point == "after" else "No space left"):
            run(out)
        monkeypatch.setattr(store.os, "fsync" if point == "after" else point, original)
        left = tree(out)
        assert not [name for name in left if ".tmp-" in name]
        assert {name: whole[name] for name in left} == left
        run(out)
        assert tree(out) == whole


def test_a_file_system_without_links_gets_the_same_tree(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    run()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_rows_of_a_run_killed_while_listing_are_removed(
    run: Callable[..., Report], tmp_path: Path, tree: Tree
) -> None:
    run(tmp_path / "whole")
    (tmp_path / "out" / "rows").mkdir(parents=True)
    for n in (1, 7):
        (tmp_path / "out" / "rows" / f"rows-0000{n}.jsonl").write_text("{}\n")
    run()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_unfinished_directory_shows_its_committed_shards(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    run()
    whole = open_features(tmp_path / "out")
    assert whole.complete and len(whole) == 9
    for path in (tmp_path / "out").rglob("commit-00000.json"):
        path.unlink()
    part = open_features(tmp_path / "out")
    assert not part.complete and part.ids == whole.ids[3:] and not part.errors()
    torch.testing.assert_close(part["embedding"], whole["embedding"][3:], rtol=0, atol=0)
    assert "not finished" in part.describe() and "6 of 10" in part.describe()


def test_iter_shards_yields_what_indexing_returns(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    run(features=("pooled", "maps"), out_indices=(0, 2))
    features = open_features(tmp_path / "out")
    assert features.names == ("maps.stage2", "maps.stem", "pooled")
    shards = list(features.iter_shards(["maps.stem", "pooled"]))
    assert [name for ids, _ in shards for name in ids] == features.ids
    for name in ("maps.stem", "pooled"):
        parts = torch.cat([tensors[name] for _, tensors in shards])
        torch.testing.assert_close(parts, features[name], rtol=0, atol=0)
    with pytest.raises(KeyError, match="no features 'maps.stage9'; there are maps.stage2"):
        features["maps.stage9"]


def test_a_missing_directory_and_a_later_format_are_refused(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no features directory"):
        open_features(tmp_path)
    run()
    path = tmp_path / "out" / "plan.json"
    path.write_text(path.read_text().replace('"format":3', '"format":4'))
    with pytest.raises(ExtractionError, match="formats 2 and 3 are read, got 4"):
        open_features(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(ExtractionError, match="is damaged"):
        open_features(tmp_path / "out")
