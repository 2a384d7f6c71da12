import itertools
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_results import made_extraction
from PIL import Image

import fastbb
from fastbb.bench import stages, waterfall
from fastbb.bench.end_to_end import FEED, MAIN, EndToEnd, markdown, text, verdict
from fastbb.bench.stages import measure_end_to_end
from fastbb.extraction import FeatureExtractor, InputError

MODEL = Path(fastbb.__file__).parent / "assets" / "nano-swin-digits"
N_ROUNDS, ROWS = 2, 16  # in these tests, and the images of a round by their clock
NAMES = [*FEED, *MAIN]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    return directory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stages, "n_decode_threads", lambda device: 1)
    monkeypatch.setattr(stages, "N_ROUNDS", N_ROUNDS)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


class Clock:
    """A clock by which everything takes a second, and what is added by `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def measure(images: Any, **arguments: Any) -> EndToEnd:
    options = {"mode": "eager", "batch": 4, "device": "cpu", "clock": Clock(), "seconds": 1.0}
    return measure_end_to_end(inputs=images, **{"model": MODEL, **options, **arguments})


def test_rates_of_all_stages_come_from_the_clock(images: Path, tmp_path: Path) -> None:
    said, before = list[str](), sorted(images.iterdir())
    result = measure(images, say=said.append)
    assert [stage.name for stage in result.stages] == NAMES
    assert result.together is not None and result.together.rounds == [ROWS] * N_ROUNDS
    by_name = {stage.name: stage for stage in result.stages}
    for name in FEED:  # every image takes a second
        assert by_name[name].images_per_s == 1.0 and by_name[name].seconds == ROWS * N_ROUNDS
    for name in ("copy", "model"):  # every batch of four does
        assert by_name[name].images_per_s == 4.0
    assert by_name["write"].images_per_s == ROWS  # the only shard
    assert all(stage.images == ROWS * N_ROUNDS for stage in result.stages)
    assert (result.n_images, result.n_sampled, result.rows) == (6, 6, ROWS)
    assert result.bound_by in FEED and result.ms == pytest.approx(3000 + 500 + 1000 / ROWS)
    assert (result.mode, result.batch, result.features) == ("eager", 4, ["embedding"])
    assert not result.interrupted and result.errors == {}
    assert said[-1] == "round 2 of 2: 16.0 images/s"
    assert sorted(images.iterdir()) == before and not list((tmp_path / "tmp").glob("fastbb-*"))


def test_medians_find_a_slow_stage(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, copied = Clock(), FeatureExtractor._on_device

    def slow(self: FeatureExtractor, pixels: torch.Tensor) -> torch.Tensor:
        clock.sleep(40.0)
        return copied(self, pixels)

    monkeypatch.setattr(FeatureExtractor, "_on_device", slow)
    monkeypatch.setattr(stages, "N_ROUNDS", 3)
    run, others = stages.Run.run, iter([0.0, 7.0, 99.0])

    def disturbed(self: Any, **arguments: Any) -> Any:
        clock.sleep(next(others))
        return run(self, **arguments)

    monkeypatch.setattr(stages.Run, "run", disturbed)
    result = measure(images, clock=clock)
    rates = {stage.name: stage.images_per_s for stage in result.stages}
    assert rates["copy"] == pytest.approx(4 / 41)
    assert result.bound_by in ("copy", "model")
    together = result.together
    assert together is not None and together.images_per_s == pytest.approx(ROWS / (161 + 7))
    assert together.interval == pytest.approx((ROWS / (161 + 99), ROWS / 161))


def test_stages_run_in_the_threads_of_the_pipeline(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "n_decode_threads", lambda device: 3)
    decoded, used = FeatureExtractor._decoded, set[str]()
    three = threading.Barrier(3, timeout=20)

    def together(self: FeatureExtractor, data: bytes) -> Image.Image:
        if not used:
            three.wait()  # ends only if three threads decode at once
        used.add(threading.current_thread().name)
        return decoded(self, data)

    monkeypatch.setattr(stages._Extractor, "_decoded", together, raising=False)
    monkeypatch.setattr(stages._Bench, "_together", lambda self, folder: None)
    monkeypatch.setattr(stages._Bench, "_warm_up", lambda self, sample: 1.0)
    clocks = threading.local()

    def clock() -> float:  # of each thread its own: an image takes a second
        clocks.now = getattr(clocks, "now", 0.0) + 1.0
        return clocks.now

    result = measure(images, clock=clock)
    assert {s.images_per_s for s in result.stages if s.name in FEED} == {3.0}
    threads = [stage.threads for stage in result.stages]
    assert threads == [3, 3, 3, 1, torch.get_num_threads(), 1]


def test_the_null_model_replaces_the_model(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, calls, stored = False, [], []
    start, write = stages._Bench.start, stages.shard_content

    def begin(self: Any, *arguments: Any) -> None:
        nonlocal started
        started = True
        for model in self._extractor._models:
            model.module.register_forward_pre_hook(lambda *_: calls.append(1))
        start(self, *arguments)

    def keep(parts: Any, outputs: Any) -> Any:
        stored.append(write(parts, outputs))
        return stored[-1]

    monkeypatch.setattr(stages._Bench, "start", begin)
    monkeypatch.setattr(stages, "shard_content", keep)
    forward = fastbb.SwinBackbone.forward_stages

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(started)
        return forward(self, *arguments)

    monkeypatch.setattr(fastbb.SwinBackbone, "forward_stages", counted)
    result = measure(images, null_model=True)
    assert started and True not in calls and False in calls  # an example, before the start
    tensors, index = stored[0]
    assert tensors["embedding"].shape == (ROWS, 96) and not tensors["embedding"].any()
    assert len(index) == ROWS
    assert [stage.name for stage in result.stages] == NAMES and result.null_model
    assert "null model: its features are zeros, and nothing is kept" in result.notes
    calls.clear()
    assert not measure(images).null_model and True in calls


def test_broken_images_are_counted_and_named(images: Path) -> None:
    (images / "a_text.png").write_bytes(b"text")
    (images / "b_empty.png").touch()
    data = (images / "0.png").read_bytes()
    (images / "c_cut.png").write_bytes(data[: len(data) // 2])
    result = measure(images)
    assert result.errors == {"unsupported_format": 1, "truncated": 2}
    assert result.failed[0].startswith("a_text.png: unsupported_format, none of JPEG")
    assert [stage.name for stage in result.stages] == NAMES and result.together is not None
    images_of = {stage.name: stage.images // N_ROUNDS for stage in result.stages}
    assert images_of["read"] == ROWS > images_of["decode"] > images_of["resize"]
    assert "3 failed (truncated 2, unsupported_format 1): a_text.png" in text(result)


def test_a_batch_of_broken_images_is_no_end(images: Path) -> None:
    for i in range(4):
        (images / f"{i}.png").write_bytes(b"text")
    result = measure(images)
    assert result.errors == {"unsupported_format": 4}
    copied = next(stage for stage in result.stages if stage.name == "copy")
    assert copied.images < ROWS * N_ROUNDS  # the first batch has nothing to copy


def test_without_a_usable_image_there_is_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="none of 1 images can be used; the first one, a.png: uns"):
        measure(tmp_path)


@pytest.mark.parametrize("keeps_aspect", [False, True])
def test_stages_store_what_the_extraction_stores(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_aspect: bool
) -> None:
    (images / "a_text.png").write_bytes(b"text")
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    if keeps_aspect:  # images run one by one
        Image.new("RGB", (40, 20)).save(images / "b.png")
        size = {"shortest_edge": 32, "longest_edge": 64}
        config = {"image_processor_type": "DetrImageProcessor", "do_pad": False, "size": size}
        (model / "preprocessor_config.json").write_text(json.dumps(config))
    found: list[dict[str, bytes]] = []
    together = stages._Bench._together

    def compare(self: Any, folder: Path) -> None:
        together(self, folder)
        for directory in (folder.parent / "alone", folder):
            files = sorted((directory / "shards").iterdir())
            found.append({file.name: file.read_bytes() for file in files})

    monkeypatch.setattr(stages._Bench, "_together", compare)
    result = measure(images, model=model)
    assert result.batch == (1 if keeps_aspect else 4) and result.rows == ROWS
    assert len(found) == 2 * N_ROUNDS and len(found[0]) == 3
    assert all(files == found[0] for files in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing", "No such file or directory|no such file"),
        ("empty", "no images found"),
        ("notes.txt", "no images found|not found"),
        ("https://example.org/images", "addresses are not fetched"),
        ([], "wanted at least one directory"),
        ("", "wanted at least one directory"),
    ],
)
def test_inputs_without_images_are_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        measure_end_to_end("no/such-model", given)


def test_arguments_are_checked(images: Path) -> None:
    with pytest.raises(ValueError, match="limit: wanted a whole number, at least 1, got 0"):
        measure(images, limit=0)
    for drawn in (False, True):
        with pytest.raises(ValueError, match="precision: wanted fp32, fp16, bf16, got 'tf32'"):
            measure(images, precision="tf32", random_weights=drawn)
    with pytest.raises(OSError, match="such-model"):
        measure(images, model="./no/such-model")


def test_random_weights_need_only_a_configuration(images: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_bytes((MODEL / name).read_bytes())
    result = measure(images, model=model, random_weights=True)
    assert result.model == str(model) and len(result.stages) == len(NAMES)
    assert any("random weights" in note for note in result.notes)


def test_a_sample_is_spread_over_many_images(images: Path) -> None:
    result = measure([str(images)] * 10, limit=20)
    assert (result.n_images, result.n_sampled, result.rows) == (60, ROWS, ROWS)
    assert stages._spread(list(range(60)), 4) == [0, 15, 30, 45]  # type: ignore[arg-type]
    assert measure(images, limit=2).n_sampled == 2


@pytest.mark.parametrize("n_rounds", [0, 1])
def test_an_interruption_keeps_what_was_measured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_rounds: int
) -> None:
    batch, count = stages._Bench._batch, itertools.count()

    def interrupted(self: Any, *arguments: Any) -> Any:
        if next(count) == 4 * n_rounds + 2:  # a round has four batches
            raise KeyboardInterrupt
        return batch(self, *arguments)

    monkeypatch.setattr(stages._Bench, "_batch", interrupted)
    result = measure(images)
    assert result.interrupted and not list((tmp_path / "tmp").glob("fastbb-*"))
    assert "speeds of a single round" in text(result) and "medians of" not in text(result)
    assert "interrupted: some rounds are missing" in text(result)
    assert not re.search(r"\d to \d", text(result))
    if n_rounds:
        assert [stage.name for stage in result.stages] == NAMES
        assert {len(stage.rounds) for stage in result.stages} == {n_rounds}
        assert result.together is not None and result.bound_by in FEED
        waterfall.plot_waterfall([result], tmp_path / "a.svg")
        assert all(stage.interval is None for stage in result.stages)
    else:
        assert [stage.name for stage in result.stages] == [*FEED, "copy", "model"]
        assert {stage.name: stage.images for stage in result.stages}["model"] == 8
        assert result.together is None and result.bound_by is None
        assert "interrupted before" in text(result) and "interrupted before" in markdown(result)
    assert EndToEnd.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_an_error_is_no_interruption(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(stages._Bench, "_batch", fail)
    with pytest.raises(ValueError, match="broken"):
        measure(images)


def test_a_result_survives_json() -> None:
    result = made_extraction()
    assert EndToEnd.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    good = result.to_dict()
    for damaged in ({}, None, {**good, "more": 1}, {**good, "stages": [{}]}):
        with pytest.raises(ValueError, match="are damaged"):
            EndToEnd.from_dict(damaged)


def test_the_report_names_the_bound_and_what_overlap_hides() -> None:
    result = made_extraction()
    feed = 1 / (1 / 4000 + 1 / 230 + 1 / 2500)
    assert result.lane(FEED) == pytest.approx(feed)
    first, turns, hidden = verdict(result)
    assert first == "bound by decode: together 210.0 images/s, decode alone 230.0"
    assert f"in 4 decode threads: {feed:.1f} images/s" in turns
    whole = sum(1 / rate for rate in (4000, 230, 2500, 9000, 800, 9999))
    assert hidden.endswith(f"overlap hides {100 * (1 - 1 / 210 / whole):.0f} %")
    report = text(result)
    assert "photos: 512 of 1,000 images in each round" in report
    row = next(line for line in report.splitlines() if line.startswith("decode"))
    assert re.split("  +", row) == ["decode", "230.0", "207.0 to 253.0", "4.35 ms", "67 %", "4"]
    assert "medians of 3 rounds, with the lowest and the highest" in report
    table = markdown(result)
    assert "| decode | 230.0 | 207.0 to 253.0 | 4.35 ms | 67 % | 4 |" in table
    assert "* **bound by decode: together 210.0 images/s, decode alone 230.0**" in table


def test_the_bound_is_among_the_threads_that_are_slower() -> None:
    # the model is the slowest stage, but decode and resize share their threads
    result = made_extraction(decode=400, resize=390, model=350, together=190)
    assert result.bound_by == "resize"
    assert verdict(result)[0] == "bound by resize: together 190.0 images/s, resize alone 390.0"
    assert made_extraction(model=100, together=95).bound_by == "model"
    slow = made_extraction(together=100)
    assert verdict(slow)[0].startswith("slower than its stages allow: together")
    assert "times as long" in verdict(slow)[2] and "compete" in verdict(slow)[3]
