"""Comparison with peers: statistics of pretended peers on a pretended clock, and a tiny run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peer_processes
import peers
import pytest
import torch
from peer_models import PEERS, Cell, Peer, Skip, Started
from peer_report import report
from peers import CellRun, Result, interleave, relative_differences, summarize

pytest.importorskip("transformers")

CELL = Cell("resnet50", "float32", 2, 64, tiny=True)
UPSTREAM = PEERS["transformers eager"]


class Clock:
    """Clock that only pretended calls advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes these times in turn."""
        turn = 0

        def run() -> None:
            nonlocal turn
            self.order.append(name)
            self.now += seconds[turn % len(seconds)]
            turn += 1

        return run


def test_every_round_begins_with_another_peer() -> None:
    clock = Clock()
    interleave({name: clock.call(name, 1.0) for name in "abc"}, 4, 0.2, clock)
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize(
    ("call_s", "repetitions"),
    [(0.25, 8), (1.5, 3), (3.0, 3), (100.0, 1)],
    ids=["fast", "slower", "slow", "very-slow"],
)
def test_turn_repeats_for_its_seconds_three_times_or_once_if_slow(
    call_s: float, repetitions: int
) -> None:
    clock = Clock()
    times, _ = interleave({"a": clock.call("a", call_s)}, 2, 2.0, clock)
    assert times == {"a": [[call_s] * repetitions] * 2}


def test_peer_that_fails_leaves_the_other_peers_running() -> None:
    clock, calls = Clock(), 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no more\nof it")

    times, reasons = interleave({"a": clock.call("a", 1.0), "b": fails}, 3, 0.0, clock)
    assert times == {"a": [[1.0]] * 3}
    assert reasons == {"b": "MemoryError: no more"}
    assert calls == 2


def test_summary_has_medians_spread_and_ratios() -> None:
    results = {
        # 2 images: the median of all is 0.5 s, those of the rounds 0.4, 0.5 and 1.0
        "transformers eager": Result("", rounds_s=[[0.4, 0.4, 9.0], [0.5], [1.0]]),
        "OpenVINO": Result("", rounds_s=[[0.25], [0.25]]),
        "timm eager": Result("", rounds_s=[[0.01]], differs=True),
        "ONNX Runtime": Result("", reason="is not there"),
        "fastbb eager": Result("", rounds_s=[[0.4]]),
        "fastbb auto": Result("", rounds_s=[[0.2]]),
    }
    summary = summarize(CELL, results)
    row = summary["peers"]["transformers eager"]
    assert (row["images_per_s"], row["repetitions"]) == (4.0, 5)
    assert (row["lowest"], row["highest"]) == (2.0, 5.0)
    assert "images_per_s" not in summary["peers"]["ONNX Runtime"]
    assert (summary["best_ours"], summary["best_peer"]) == ("fastbb auto", "OpenVINO")
    assert summary["ratio"] == pytest.approx(10 / 8)
    assert summary["eager_ratio"] == pytest.approx(5 / 4)


def test_a_cell_without_peers_has_no_ratio() -> None:
    summary = summarize(CELL, {"fastbb eager": Result("", rounds_s=[[0.4]])})
    assert not {"ratio", "best_peer", "eager_ratio"} & set(summary)


def test_differences_are_relative_and_nan_is_infinite() -> None:
    want = [torch.tensor([2.0, -4.0]), torch.tensor([1.0])]
    got = [torch.tensor([2.0, -3.0]), torch.tensor([float("nan")])]
    assert relative_differences(got, want, ["stage1", "stage2"]) == {
        "stage1": 0.25,
        "stage2": float("inf"),
    }
    with pytest.raises(ValueError, match=r"stage1: shape \(2,\) instead of \(3,\)"):
        relative_differences([torch.zeros(2)], [torch.zeros(3)], ["stage1"])
    with pytest.raises(ValueError, match="1 maps instead of 2"):
        relative_differences([torch.zeros(2)], want, ["stage1", "stage2"])


def scaled(factor: float) -> Peer:
    """Upstream with a wrong last map."""

    def start(model: torch.nn.Module, cell: Cell) -> Started:
        def run(pixels: torch.Tensor) -> list[torch.Tensor]:
            *maps, last = model(pixels)
            return [*maps, last * factor]

        return Started(run, "scaled")

    return replace(UPSTREAM, start=start)


def raising(error: Exception) -> Peer:
    def load(cell: Cell, state: object) -> None:
        raise error

    return replace(UPSTREAM, load=load)


def test_wrong_and_failing_peers_are_marked_and_the_rest_is_measured() -> None:
    pretended = {
        "right": UPSTREAM,
        "own": replace(scaled(1.01), own_maps={"resnet": ("stage4",)}),
        "wrong": scaled(1.01),
        "crash": raising(RuntimeError("no such kernel\nat all")),
        "skip": raising(Skip("not in this dtype")),
        "missing": raising(ImportError("No module named 'openvino'")),
    }
    with torch.no_grad():
        results = CellRun(CELL, pretended).measure(rounds=1, seconds=0.0)
    assert [name for name, result in results.items() if result.differs] == ["wrong"]
    wrong = results["wrong"].differences
    assert wrong is not None
    assert wrong["stage4"] == pytest.approx(0.01, rel=1e-3)
    assert max(wrong[stage] for stage in ("stage1", "stage2", "stage3")) == 0
    assert {name: result.reason for name, result in results.items() if result.reason} == {
        "crash": "RuntimeError: no such kernel",
        "skip": "not in this dtype",
        "missing": "No module named 'openvino': pip install 'fastbb[bench]'",
    }
    assert all(len(results[name].rounds_s) == 1 for name in ("right", "own", "wrong"))

    data = {
        "machine": peers.machine(),
        "cells": [summarize(CELL, results)],
        "repeats": [{"reason": "the process ended with 1"}],
    }
    lines = report(data).splitlines()
    # footnote 1 is of `right`: a single repetition
    assert any(line.startswith("| wrong") and "differs [3]" in line for line in lines)
    assert "[3] wrong: a map is 0.01 away" in lines
    assert any(line.startswith("| crash") and "- [" in line for line in lines)
    assert any(line.endswith("crash: RuntimeError: no such kernel") for line in lines)
    assert any(line.startswith("| the same, new process 1 [") for line in lines)


def test_bf16_maps_are_allowed_the_bf16_error_of_upstream() -> None:
    cell = replace(CELL, dtype="bfloat16")
    pretended = {"right": UPSTREAM, "wrong": scaled(1.2)}
    with torch.no_grad():
        results = CellRun(cell, pretended).measure(rounds=1, seconds=0.0)
    assert not results["right"].differs
    assert results["right"].differences and min(results["right"].differences.values()) > 0
    assert results["wrong"].differs


@pytest.mark.parametrize("name", ["swin_t", "resnet50"])
def test_timm_has_the_same_weights(name: str) -> None:
    cell = replace(CELL, name=name)
    with torch.no_grad():
        run = CellRun(cell, {"timm eager": PEERS["timm eager"]})
        result = run.measure(rounds=1, seconds=0.0)["timm eager"]
    assert result.reason is None and result.differences is not None
    assert not result.differs
    assert max(result.differences[stage] for stage in ("stage1", "stage2", "stage3")) < 1e-5


def test_a_process_measures_memory_or_says_why_not() -> None:
    row = peer_processes.memory(CELL, {"fastbb eager": PEERS["fastbb eager"]}, 120.0)
    measured = row["peers"]["fastbb eager"]
    assert 50 < measured["start_mb"] < 5000
    assert measured.get("run_mb", 50) <= measured["start_mb"] + 100
    too_short = peer_processes.memory(CELL, {"fastbb eager": PEERS["fastbb eager"]}, 0.01)
    assert too_short["peers"]["fastbb eager"]["reason"].startswith("took longer than")


def test_a_tiny_run_writes_tables_json_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results" / "peers.json", tmp_path / "peers.png"
    arguments = ["--tiny", "--dtype", "float32", "--batch", "1", "--rounds", "2", "--repeats", "0"]
    arguments += ["--peers", "transformers eager", "--peers", "fastbb eager", "--seconds", "0"]
    arguments += ["--only", "peers", "--only", "early_exit"]
    arguments += ["--json", str(results), "--plot", str(picture)]
    monkeypatch.setattr("sys.argv", ["peers.py", *arguments])
    assert peers.main() == 0

    data = json.loads(results.read_text())
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "openvino"} <= data["machine"]["versions"].keys()
    for cell in data["cells"]:
        for row in cell["peers"].values():
            assert row["reason"] is None and not row["differs"]
            assert row["repetitions"] == 2
        assert cell["ratio"] == cell["eager_ratio"] > 0
    assert [cell["stages"] for cell in data["early_exit"]] == [["stage1"]] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    tables = capsys.readouterr().out
    assert "| tiny Swin, 64 px: images/s" in tables
    assert tables.count("| fastbb's best / best peer") == 2
    assert tables.count("out_indices=(1,)") == 2


def test_run_without_any_measurement_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PEERS, "fastbb eager", raising(RuntimeError("broken")))
    arguments = ["--tiny", "--model", "resnet50", "--dtype", "float32", "--batch", "1"]
    arguments += ["--peers", "fastbb eager", "--only", "peers", "--repeats", "0"]
    monkeypatch.setattr("sys.argv", ["peers.py", *arguments])
    assert peers.main() == 1
    assert "RuntimeError: broken" in capsys.readouterr().out
