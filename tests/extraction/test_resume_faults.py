"""Resumes of directories in which something is lost, damaged, moved or held."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbb.extraction import (
    PlanMismatchError,
    Report,
    open_features,
    store,
    verify_features,
)
from fastbb.extraction.job import extract
from fastbb.extraction.layout import read_events
from fastbb.extraction.store import FeatureWriter

Run = Callable[..., Report]
Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def grown(run: Run, images: Path, tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Directory of three generations: start, update and retry."""
    run()
    (images / "99999.png").write_bytes(encoded(99))
    run(update=True)
    (images / "00003.png").write_bytes(encoded(33))
    run(retry_failed=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("rows/generation-00000.json", "plan.json"),
        ("rows/generation-00001.json", "rows/generation-00001.json"),
        ("rows/generation-00002.json", "rows/generation-00002.json"),
        ("plan.json", "plan.json"),
    ],
    ids=["first", "middle", "last", "plan"],
)
def test_a_lost_list_is_refused_unchanged(
    run: Run, grown: Path, tree: Tree, lost: str, named: str
) -> None:
    (grown / lost).unlink()
    before = tree(grown)
    growing: dict[str, Any] = {"update": True, "retry_failed": True}
    for options in ({}, growing):
        with pytest.raises(PlanMismatchError, match=f"{named} is missing") as caught:
            run(**options)
        assert caught.value.exit_code == 3 and tree(grown) == before


def test_other_files_of_the_same_names_are_refused(
    run: Run, model: Path, make_images: Callable[..., Path], tmp_path: Path, tree: Tree
) -> None:
    run()
    other, before = make_images(12, "other"), tree(tmp_path / "out")
    growing: list[dict[str, Any]] = [{"update": True}, {"retry_failed": True}]
    for options in growing:
        with pytest.raises(PlanMismatchError, match=f"was {tmp_path}/images/.*, now {other}/"):
            extract(None, other, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == before
    assert extract(None, other, tmp_path / "out").new == 2


def test_a_mended_path_of_a_failed_image_is_retried(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(2)
    listing = tmp_path / "list.csv"
    listing.write_text(f"path,id\n{root}/00000.png,a\n{root}/typo.png,b\n")
    extract(model, listing, tmp_path / "out", max_error_rate=1)
    listing.write_text(f"path,id\n{root}/00000.png,a\n{root}/00001.png,b\n")
    assert extract(None, listing, tmp_path / "out", retry_failed=True).errors == {}


def test_new_ids_of_known_files_are_told(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    report = extract(None, images.parent / "images" / "..", tmp_path / "out")
    assert report.new == 10 and "10 of the new ones are there already" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["features", "index"])
def test_a_damaged_shard_is_computed_again_after_a_retry(
    run: Run, grown: Path, tree: Tree, file: str
) -> None:
    whole = tree(grown)
    suffix = "safetensors" if file == "features" else "jsonl"
    for number in (0, 4):  # of the start, and of the retry
        path = grown / "shards" / f"{file}-{number:05d}.{suffix}"
        data = bytearray(path.read_bytes())
        data[9] ^= 0xFF
        path.write_bytes(data)
        assert not verify_features(grown).passed
        report = run()
        assert (report.ok, report.rows, report.errors) == (11, 11, {})
        if number:  # the mended file is read anew, so the first shard differs, and is right
            assert verify_features(grown).passed
    assert len(open_features(grown).ids) == 11 and len(whole) == len(tree(grown))


def test_rows_of_one_image_are_all_added_after_a_limit(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    make_images(4)
    names = [f"images/{i:05d}.png" for i in (0, 1, 2, 3, 0, 1)]
    rows = "".join(f"{name},{label}\n" for label, name in enumerate(names))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    first = extract(model, tmp_path / "list.csv", tmp_path / "out", limit=4)
    assert (first.rows, first.new) == (4, 2)
    report = extract(None, tmp_path / "list.csv", tmp_path / "out", update=True)
    assert (report.rows, report.new, report.vanished) == (6, 0, 0)
    assert open_features(tmp_path / "out").columns["label"] == list("012345")


def test_an_archive_that_is_replaced_during_a_run_is_noticed(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(name: str, seeds: range) -> Path:
        (tmp_path / "member.bmp").touch()
        with tarfile.open(tmp_path / name, "w") as archive:
            for i, seed in enumerate(seeds):
                (tmp_path / "member.bmp").write_bytes(encoded(seed, format="BMP"))
                archive.add(tmp_path / "member.bmp", f"{i}.bmp")
        return tmp_path / name

    path, other = pack("a.tar", range(8)), pack("b.tar", range(20, 28))
    commit = FeatureWriter.commit

    def replacing(self: FeatureWriter, *content: Any) -> Any:
        done = commit(self, *content)
        if other.exists():
            os.replace(other, path)
        return done

    monkeypatch.setattr(FeatureWriter, "commit", replacing)
    with pytest.raises(PlanMismatchError, match="a.tar has changed"):
        extract(model, path, tmp_path / "out", shard_rows=2, batch_size=2)
    assert open_features(tmp_path / "out").ids == ["0.bmp", "1.bmp"]


def test_the_lock_is_free_after_a_damaged_generation(run: Run, tmp_path: Path) -> None:
    run()
    path = tmp_path / "out" / "rows" / "generation-00000.json"
    whole = path.read_bytes()
    path.write_bytes(b"{")
    # the error is held with its frames, as in a notebook
    with pytest.raises(PlanMismatchError, match="is damaged") as held:
        run()
    path.write_bytes(whole)
    assert run().tried == 0 and held.value.exit_code == 3


def test_an_event_after_a_torn_line_is_not_lost(run: Run, tmp_path: Path) -> None:
    run()
    log = tmp_path / "out" / "run.jsonl"
    os.truncate(log, log.stat().st_size - 7)
    run()
    events = [event["event"] for event in read_events(tmp_path / "out")]
    assert events == ["start", "shard", "shard", "shard", "start", "end"]


def test_files_of_other_names_do_no_harm(run: Run, tmp_path: Path) -> None:
    run()
    for name in ("rows/rows-old.jsonl", "rows/generation-00000 (copy).json"):
        (tmp_path / "out" / name).write_text("x")
    commit = tmp_path / "out" / "shards" / "commit-00001.json"
    commit.write_text("[" * 100_000)
    assert run(update=True).tried == 4


def test_options_of_directories_need_one(model: Path) -> None:
    needless: list[dict[str, Any]] = [{"limit": 1}, {"update": True}, {"shard_rows": 2}]
    needless += [{"record_crashes": True}]
    for options in needless:
        with pytest.raises(ValueError, match=f"{next(iter(options))}: it is for a directory"):
            extract(model, [], **options)
    with pytest.raises(ValueError, match="batch_size: wanted a whole number, at least 1, got 0"):
        extract(model, [], batch_size=0)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"versions": {"pillow": "1.0"}}, "pillow: '1.0' there, .*Install the version"),
        ({"model": {"weights_sha256": "0"}}, "Give the model of the first start .--model"),
        ({"limits": {"bytes": 1}}, "limits.bytes: 1 there, .*Install the version"),
    ],
    ids=["version", "weights", "limits"],
)
def test_the_advice_of_a_mismatch_can_be_followed(
    run: Run, tmp_path: Path, change: dict[str, Any], advice: str
) -> None:
    run()
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_bytes())
    for name, values in change.items():
        plan[name] |= values
    path.write_bytes(store.canonical_json(plan))
    shutil.rmtree(tmp_path / "out" / "rows")
    with pytest.raises(PlanMismatchError, match=f"(?s){advice}"):
        run()


def test_a_model_that_has_moved_is_asked_for(model: Path, images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    extract(copy, images, tmp_path / "out")
    moved = shutil.move(copy, tmp_path / "moved")
    with pytest.raises(OSError, match=f"first start, {copy}, cannot be had: give where it is now"):
        extract(None, images, tmp_path / "out")
    assert extract(moved, images, tmp_path / "out").tried == 0
