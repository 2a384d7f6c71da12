"""Several processes do the shards of a run: the same bytes, whatever happens to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from check_interrupts import foreground_signals, start_extraction
from check_kills import Kills, is_running
from click.testing import CliRunner
from PIL import Image

from fastbb import AutoBackbone
from fastbb.cli import main
from fastbb.extraction import (
    ErrorBudgetError,
    FeatureExtractor,
    PlanMismatchError,
    Report,
    extract,
    local_workers,
    open_features,
    workers,
)
from fastbb.extraction.executor import InProcess
from fastbb.extraction.layout import read_events
from fastbb.extraction.pool import Ended
from fastbb.extraction.progress import Progress
from fastbb.extraction.ray_workers import RayOptions, _room
from fastbb.extraction.worker import Message, Start
from fastbb.extraction.workers import Workers

Tree = Callable[[Path], dict[str, bytes]]
PAUSE_S = 60


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Gives torch one thread, as each of two workers has on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


class Fatal(local_workers.LocalWorker):
    """A process that is killed in each shard of a number."""

    def ask(self, request: Message) -> None:
        super().ask(request)
        if request.get("shard") == 1:
            os.kill(self._process.pid, signal.SIGKILL)


class Late(local_workers.LocalWorker):
    """A process that seems to end in a shard that it has just committed."""

    def answers(self) -> list[Message | Ended]:
        answers = super().answers()
        return [Ended("gone") if a.get("committed") == 1 else a for a in answers]  # pyright: ignore


# whole runs


@pytest.mark.usefixtures("one_thread", "two_cores")
def test_workers_give_the_bytes_of_one_process(
    run: Callable[..., Report], images: Path, tmp_path: Path, tree: Tree
) -> None:
    for out, options in ((tmp_path / "one", {}), (tmp_path / "two", {"workers": 2})):
        report = run(out, **options)
        assert (report.rows, report.ok, report.errors) == (10, 9, {"unsupported_format": 1})
        (images / "00003.png").write_bytes((images / "00002.png").read_bytes())
        (images / "zzz.png").write_bytes((images / "00001.png").read_bytes())
        report = run(out, update=True, retry_failed=True, **options)
        assert (report.rows, report.ok, report.errors) == (11, 11, {})
        (images / "00003.png").write_bytes(b"text")
        (images / "zzz.png").unlink()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    start = next(event for event in read_events(tmp_path / "two") if event["event"] == "start")
    assert (start["workers"], start["torch_threads"], start["decode_threads"]) == (2, 1, 1)


@pytest.mark.parametrize(("kind", "n"), [("local", 3), ("ray", 2), ("shares", 2)])
def test_killed_processes_lose_and_repeat_nothing(kind: str, n: int, tmp_path: Path) -> None:
    assert Kills(tmp_path, kind, n_images=240).check(n) == []


def test_a_shard_that_ends_every_worker_is_left(
    run: Callable[..., Report],
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path / "whole", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(local_workers, "LocalWorker", Fatal)
        report = run(workers=1)
    assert (report.rows, report.ok, report.left) == (6, 5, 4)
    assert "4 images left, of shards that ended their workers" in repr(report)
    said = capsys.readouterr().err
    assert said.count("was killed (SIGKILL), perhaps for memory; shard 1 is tried again") == 2
    assert "shard 1 is left after 3 tries" in said
    lost = [event["left"] for event in read_events(tmp_path / "out") if event["event"] == "lost"]
    assert lost == [False, False, True]
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(workers=1).ok == 9  # its workers live
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_images_of_a_shard_that_ends_every_worker_become_failed_rows(
    run: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local_workers, "LocalWorker", Fatal)
        report = run(workers=1, record_crashes=True, max_error_rate=1.0)
    assert report.errors == {"unsupported_format": 1, "worker_crash": 4} and not report.left
    crashed = [e for e in open_features(tmp_path / "out").errors() if e.kind == "worker_crash"]
    assert [(e.row, e.id) for e in crashed] == [(i, f"{i:05d}.png") for i in range(4, 8)]
    assert crashed[0].message == "its shard of 4 images ended 3 workers"
    assert run(workers=1, retry_failed=True).errors == {"unsupported_format": 1}


def test_images_of_crashes_count_as_failed(
    run: Callable[..., Report], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "00003.png").unlink()  # which is no image
    monkeypatch.setattr(local_workers, "LocalWorker", Fatal)
    assert run(workers=1, max_error_rate=0.0).left == 4
    with pytest.raises(ErrorBudgetError, match="4 of 9 images failed"):
        run(workers=1, max_error_rate=0.0, record_crashes=True)


def test_a_shard_that_its_last_worker_has_committed_is_not_left(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", workers=1)
    monkeypatch.setattr(local_workers, "LocalWorker", Late)
    advanced: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda _, n: advanced.append(n))
    report = run(workers=1)
    assert (report.rows, report.ok, report.left) == (10, 9, 0)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sum(advanced) == 10


# ends


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command with two workers that have computed something."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(3000):
        Image.new("RGB", (12, 10), (i % 256, i // 256, 9)).save(images / f"{i:05d}.png")
    options: dict[str, object] = {"--model": "nano-resnet-digits", "--out": out, "--workers": 2}
    options |= {"--batch-size": 8, "--shard-rows": 8}
    with foreground_signals(), start_extraction(images, options, tmp_path / "cache") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PAUSE_S
        while len(pids := children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process, [int(pid) for pid in pids]


def ended(pids: Sequence[int]) -> bool:
    deadline = time.monotonic() + PAUSE_S
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, pids))


def test_an_interruption_ends_all(command: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = command
    assert len(pids) == 2
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=PAUSE_S)
    assert process.returncode == 130 and "goes on after the last finished shard" in message
    assert ended(pids)


def test_workers_end_with_a_command_that_is_killed(
    command: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, pids = command
    process.kill()
    process.communicate(timeout=PAUSE_S)
    assert len(pids) == 2 and ended(pids)


# errors


def test_errors_of_workers_are_those_of_one_process(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"features": "cls"}, ValueError),
        ({"size": "test"}, ValueError),
    ]
    for options, kind in wrong:
        texts = []
        for n in (None, 1):
            with pytest.raises(kind) as error:
                run(tmp_path / "wrong", workers=n, **options)
            texts.append(str(error.value))
        assert texts[0] == texts[1] and not (tmp_path / "wrong").exists()
    run()
    with pytest.raises(PlanMismatchError, match="features"):
        run(features="pooled", workers=1)
    assert run(workers=1).tried == 0


@pytest.mark.parametrize(
    ("n_rows", "n_parts", "rows"),
    [(10_000, 1, 4096), (10_000, 2, 1248), (10_000, 100, 32), (10, 8, 32), (10**6, 4, 4096)],
)
def test_every_process_has_some_shards(n_rows: int, n_parts: int, rows: int, model: Path) -> None:
    executor = InProcess(FeatureExtractor(model, mode="eager"))
    plan = executor.make_plan("eager", None, n_rows, n_parts)
    assert plan["shard_rows"] == rows
    assert executor.make_plan("eager", 7, n_rows, n_parts)["shard_rows"] == 7


# arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers: wanted a whole number, at least 1, got 0"),
        ({"workers": 2, "devices": "all"}, "devices: it does not go with workers"),
        ({"workers": 2, "device": "cuda"}, "workers: they are for the CPU; for GPUs give devices"),
        ({"devices": "all", "device": "cuda"}, "devices: it does not go with device"),
        ({"workers": 1, "ray": RayOptions()}, "ray: it does not go with workers"),
        ({"ray": RayOptions(), "device": "cuda:1"}, "device: with ray wanted 'cpu' or 'cuda'"),
        ({"record_crashes": True}, "record_crashes: it is for workers"),
        ({"shard_index": "2/2"}, "shard_index: wanted i/n with i from 0 to n - 1"),
        ({"shard_index": "one"}, "shard_index: wanted i/n"),
        ({"shard_index": "0/2", "retry_failed": True}, "retry_failed: it does not go with"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    options: dict[str, Any], message: str, run: Callable[..., Report], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_workers_of_a_loaded_backbone_are_refused(
    model: Path, images: Path, tmp_path: Path
) -> None:
    backbone = AutoBackbone.from_pretrained(model)
    with pytest.raises(ValueError, match=r"workers load it themselves.*save_pretrained"):
        extract(backbone, images, tmp_path / "out", workers=2)


def test_devices_are_checked_against_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="devices: wanted GPUs, and torch finds none"):
        Workers.parse(None, "all", None, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for given in ("all", "0,1,2", [0, 1, 2], ["cuda:0", "cuda:1", "cuda:2"]):
        found = Workers.parse(None, given, None, None)
        assert found is not None and found.devices == ("cuda:0", "cuda:1", "cuda:2")
    for given in ("3", "0,0", "", "gpu"):
        with pytest.raises(ValueError, match="devices: wanted 'all' or different ones of 0 to 2"):
            Workers.parse(None, given, None, None)
    start = Start("", None, {}, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for plan in ({"device": "cuda"}, None):
        with pytest.raises(ValueError, match="workers: they are for the CPU, and this would run"):
            Workers(2).backend(start, plan, print)
    assert Workers(1).backend(start, {"device": "cpu"}, print).starts
    backend = Workers(devices=("cuda:0", "cuda:2")).backend(start, None, print)
    assert [(s.device, s.threads, s.n_sharers) for s in backend.starts] == [
        ("cuda:0", None, 2),
        ("cuda:2", None, 2),
    ]


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(8)))
    said: list[str] = []

    def starts(n: int, plan: dict[str, Any] | None) -> list[int | None]:
        start = Start("", None, {"device": "cpu"}, None)
        backend = Workers(n).backend(start, plan, said.append)
        return [start.threads for start in backend.starts]

    assert starts(3, None) == [2, 2, 2] and starts(4, {"threads": 2}) == [2] * 4 and not said
    assert starts(4, {"threads": 3}) == [3, 3]
    assert said == [
        "2 instead of 4 workers: the plan gives each 3 torch threads, and there are 8 cores"
    ]
    assert starts(2, {"threads": 16}) == [16]  # one worker runs anywhere


def test_room_for_workers_is_counted_as_ray_counts() -> None:
    for part, n in ((0.1, 10), (0.2, 5), (0.3, 3), (0.5, 2), (1, 1), (2, 0)):
        node = {"CPU": 64.0, "GPU": 1.0}
        assert _room(node, {"num_cpus": 1, "num_gpus": part}) == n
    assert _room({"CPU": 5.0}, {"num_cpus": 2, "num_gpus": 0}) == 2
    assert _room({"CPU": 5.0}, {"num_cpus": 1, "num_gpus": 1}) == 0


@pytest.mark.parametrize(
    ("device", "gpus", "n_there"), [("cuda", None, 0), ("cpu", 1, 4), ("cuda", 0, 4)]
)
def test_a_device_that_workers_of_ray_do_not_get_is_refused(
    device: str, gpus: float | None, n_there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"CPU": 8.0, "GPU": float(n_there)}
    ray = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    start = Start("", None, {"device": device}, None)
    options = RayOptions(num_gpus_per_worker=gpus)
    with pytest.raises(ValueError, match=f"device '{device}' does not go with . GPUs for each"):
        Workers(ray=options).backend(start, None, print)


def test_options_of_ray_need_ray(images: Path) -> None:
    arguments = ["extract", str(images), "--out", "x", "--max-workers", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "--max-workers: it is for --ray" in result.output
    with pytest.raises(ValueError, match="min_workers: wanted at least 1, and at most max_workers"):
        RayOptions(min_workers=3, max_workers=2)


@pytest.mark.parametrize("given", ["photos", "photos/", "cluster"])
def test_an_input_behind_ray_is_not_taken_for_an_address(given: str) -> None:
    result = CliRunner().invoke(main, ["extract", "--ray", given, "--out", "x"])
    assert result.exit_code == 2 and "put --ray behind the inputs" in result.output


def test_without_the_extra_one_sentence_names_it(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["extract", str(images), "--out", str(tmp_path / "out"), "--model", str(model)]
    result = CliRunner().invoke(main, [*arguments, "--ray", "local"])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert result.output.endswith("fastbb: ray: needs Ray; pip install 'fastbb[ray]'\n")
