"""Directories that grow: --update, --retry-failed and --limit, interrupted or not."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbb.extraction import (
    ErrorBudgetError,
    FeatureExtractor,
    InputError,
    PlanMismatchError,
    Report,
    open_features,
    store,
)
from fastbb.extraction.job import extract

Run = Callable[..., Report]
Tree = Callable[[Path], dict[str, bytes]]


def grow(images: Path, encoded: Callable[..., bytes]) -> None:
    """Adds two images, one of them first in the order, removes one, and mends the broken one."""
    (images / "00003.png").write_bytes(encoded(33))
    (images / "0000.png").write_bytes(encoded(34))
    (images / "99999.png").write_bytes(encoded(35))
    (images / "00007.png").unlink()


def generations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(out.glob("rows/generation-*.json"))]


def test_a_folder_that_grows_ends_with_every_row_right_and_no_finished_shard_touched(
    run: Run, model: Path, images: Path, tmp_path: Path, tree: Tree, encoded: Callable[..., bytes]
) -> None:
    out = tmp_path / "out"
    gone = (images / "00007.png").read_bytes()
    run()
    before = {path: path.stat().st_ino for path in out.glob("*/*")}
    data = tree(out)
    grow(images, encoded)

    plain = run()
    assert (plain.new, plain.vanished, plain.tried, plain.rows) == (2, 1, 0, 10)
    assert "2 new images left out (--update adds)" in str(plain) and tree(out) == data

    report = run(update=True, retry_failed=True)
    assert (report.new, report.tried, report.resumed_rows, report.rows) == (0, 3, 9, 12)
    assert (report.ok, report.errors) == (12, {})
    assert {path: path.stat().st_ino for path in before} == before
    kinds = [(g["kind"], g["rows"], len(g["shards"])) for g in generations(out)]
    assert kinds == [("start", 10, 3), ("retry", 0, 1), ("update", 2, 1)]

    features = open_features(out)
    names = [f"{i:05d}.png" for i in range(10)] + ["0000.png", "99999.png"]
    assert features.ids == names and features.complete and not features.errors()
    (images / "00007.png").write_bytes(gone)
    expected = FeatureExtractor(model)([images / name for name in names])
    for name, tensor in expected.items():
        torch.testing.assert_close(features[name], tensor)


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_every_verb_interrupted_at_any_write_ends_with_the_same_bytes(
    run: Run,
    images: Path,
    tmp_path: Path,
    tree: Tree,
    encoded: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    class Killed(BaseException):
        pass

    original, calls = getattr(os, point), []

    def killing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == kill_at:
            raise Killed
        original(*args)

    def extend(out: Path) -> None:
        run(out, update=True, retry_failed=True, limit=14)

    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "first")
    grow(images, encoded)
    (images / "00005.png").write_bytes(b"")  # not read again: it has features
    (images / "99998.png").write_bytes(b"broken")
    kill_at = -1
    monkeypatch.setattr(store.os, point, killing)
    extend(tmp_path / "whole")
    whole, n_calls = tree(tmp_path / "whole"), len(calls)
    assert n_calls >= 11  # 2 lists, 2 generations, 2 shards of 3 files, the manifest
    # after its last fsync the command is complete, and another one tries the failures again
    for kill_at in range(1, n_calls + (point == "replace")):
        out = shutil.copytree(tmp_path / "first", tmp_path / f"out{kill_at}")
        calls.clear()
        with pytest.raises(Killed):
            extend(out)
        kill_at = -1
        extend(out)
        assert tree(out) == whole
    assert open_features(tmp_path / "whole").errors()[0].id == "99998.png"


def test_a_retry_that_fails_again_keeps_the_row_and_its_latest_reason(
    run: Run, images: Path, tmp_path: Path
) -> None:
    run()
    (images / "00003.png").write_bytes(b"")
    report = run(retry_failed=True)
    assert (report.rows, report.ok, report.errors) == (10, 9, {"truncated": 1})
    features = open_features(tmp_path / "out")
    assert [(e.row, e.id, e.kind) for e in features.errors()] == [(3, "00003.png", "truncated")]
    assert run(retry_failed=True).tried == 1
    (images / "00003.png").unlink()
    assert run(retry_failed=True).tried == 0  # it is not among the inputs


def test_limit_freezes_the_first_rows_and_an_update_takes_the_rest(
    run: Run, tmp_path: Path
) -> None:
    first = run(limit=5)
    assert (first.rows, first.new) == (5, 5)
    again = run(limit=5, update=True)
    assert (again.rows, again.tried) == (5, 0)
    more = run(limit=7, update=True)
    assert (more.rows, more.new) == (7, 3)
    rest = run(update=True)
    assert (rest.rows, rest.new, rest.ok) == (10, 0, 9)
    assert open_features(tmp_path / "out").ids[-1] == "00009.png"


def test_nothing_new_appends_nothing(run: Run, tmp_path: Path, tree: Tree) -> None:
    run(max_error_rate=1)
    (tmp_path / "images" / "00003.png").unlink()
    before = tree(tmp_path / "out")
    assert run(update=True, retry_failed=True).tried == 0
    assert tree(tmp_path / "out") == before


def test_a_resume_takes_from_the_plan_what_is_not_said(
    run: Run, images: Path, model: Path, tmp_path: Path
) -> None:
    options = {"features": ("maps", "pooled"), "out_indices": (1, -1), "size": (24, 40)}
    run(precision="bf16", **options)
    shutil.rmtree(tmp_path / "out" / "shards")
    report = extract(None, images, tmp_path / "out")
    assert report.tried == 10
    features = open_features(tmp_path / "out")
    assert features.plan["shard_rows"] == 4 and features["maps.stage1"].dtype == torch.bfloat16
    assert extract(model, images, tmp_path / "out", out_indices=(1, 2)).tried == 0


def test_a_copied_model_is_the_same_one_and_other_weights_are_not(
    run: Run, images: Path, model: Path, tmp_path: Path
) -> None:
    run()
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_bytes())
    labels = {"id2label": {"0": "cat"}, "label2id": {"cat": 0}, "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config | labels))
    assert extract(copy, images, tmp_path / "out").tried == 0
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(PlanMismatchError, match=r"model.config.hidden_act: 'relu' there"):
        extract(copy, images, tmp_path / "out")


def test_inputs_that_cannot_be_listed_again_do_not_keep_a_run_from_its_end(
    run: Run, images: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("images/00000.png\nimages/00001.png\n")
    extract(model, tmp_path / "list.txt", tmp_path / "out", shard_rows=1, batch_size=1)
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    (tmp_path / "list.txt").unlink()
    assert extract(None, tmp_path / "nowhere", tmp_path / "out").tried == 1
    with pytest.raises(InputError):
        extract(None, tmp_path / "nowhere", tmp_path / "out", update=True)


def test_a_resume_uses_the_threads_of_the_first_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    forward = FeatureExtractor._forward

    def watching(self: FeatureExtractor, pixels: torch.Tensor, plain: bool = False) -> Any:
        used.append(torch.get_num_threads())
        return forward(self, pixels, plain)

    run()
    before = torch.get_num_threads()
    assert open_features(tmp_path / "out").plan["threads"] == before
    shutil.rmtree(tmp_path / "out" / "shards")
    monkeypatch.setattr(FeatureExtractor, "_forward", watching)
    try:
        torch.set_num_threads(before + 1)
        run()
        assert set(used) == {before} and torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_another_device_model_is_warned_of(run: Run, tmp_path: Path) -> None:
    run()
    log = tmp_path / "out" / "run.jsonl"
    log.write_text('{"event":"start","device":"Z80"}\n' + log.read_text())
    with pytest.warns(UserWarning, match="an earlier one of .*out was on Z80: features of diff"):
        run(progress=False)


def test_images_in_memory_are_returned_and_not_stored(model: Path, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    found = extract(model, pictures)
    expected = FeatureExtractor(model)(pictures)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    with pytest.raises(ValueError, match="leave `out` out"):
        extract(model, pictures, tmp_path / "out")
    stack = np.stack([np.asarray(picture) for picture in pictures])
    torch.testing.assert_close(extract(model, stack), found)
    with pytest.raises(ValueError, match="out: wanted a directory"):
        extract(model, ["a.jpg"])
    with pytest.raises(ValueError, match="model: wanted a name or directory for a first start"):
        extract(None, pictures)
    assert not (tmp_path / "out").exists()


def test_mended_images_are_retried_after_too_many_failed(
    model: Path, make_images: Callable[..., Path], tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    root = make_images(40)
    for i in range(0, 30, 3):
        (root / f"{i:05d}.png").write_bytes(b"")

    def run(**options: Any) -> Report:
        return extract(model, root, tmp_path / "out", batch_size=4, shard_rows=4, **options)

    with pytest.raises(ErrorBudgetError, match="go on with --retry-failed"):
        run()
    for i in range(0, 30, 3):
        (root / f"{i:05d}.png").write_bytes(encoded(i))
    with pytest.raises(ErrorBudgetError):
        run()
    report = run(retry_failed=True)
    assert (report.ok, report.rows, report.errors) == (40, 40, {})


def test_failures_of_a_run_that_ended_do_not_stop_later_ones(
    model: Path, make_images: Callable[..., Path], tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    root = make_images(40)
    for i in range(30):
        (root / f"{i:05d}.png").write_bytes(b"")
    extract(model, root, tmp_path / "out", max_error_rate=1)
    assert extract(None, root, tmp_path / "out").tried == 0
    assert extract(None, root, tmp_path / "out", retry_failed=True).tried == 30
    for i in range(40, 62):
        (root / f"{i:05d}.png").write_bytes(encoded(i))
    assert extract(None, root, tmp_path / "out", update=True).tried == 22
    for i in range(62, 90):
        (root / f"{i:05d}.png").write_bytes(b"")
    with pytest.raises(ErrorBudgetError, match="stopped: 28 of 28 .*'00089.png': truncated"):
        extract(None, root, tmp_path / "out", update=True)


def test_an_archive_that_is_done_may_change(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / "in" / name, "w") as archive:
            for i in range(2):
                member = tarfile.TarInfo(f"{i}.png")
                data = encoded(i)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def run() -> Report:
        return extract(model, tmp_path / "in", tmp_path / "out", shard_rows=2, batch_size=2)

    run()
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    os.utime(tmp_path / "in" / "a.tar", ns=(1, 1))
    assert run().tried == 2
    (tmp_path / "out" / "shards" / "commit-00001.json").unlink()
    os.utime(tmp_path / "in" / "b.tar", ns=(1, 1))
    with pytest.raises(PlanMismatchError, match="b.tar has changed"):
        run()
