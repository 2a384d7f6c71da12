"""`fastbb bench`: arguments, exit codes and files; most measurements are pretended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_results import made_cell, made_results
from cli_runner import cli_runner
from click.testing import Result

from fastbb.bench import command
from fastbb.bench.exports import write_json
from fastbb.bench.results import Cell, Results
from fastbb.bench.run import Asked
from fastbb.cli import main
from fastbb.engine.interruption import Interrupted


def fastbb(*arguments: Any) -> Result:
    return cli_runner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Asked]]:
    """Makes the command measure these cells; returns what it was asked for."""

    def pretend(*cells: Cell, then: BaseException | None = None) -> list[Asked]:
        seen: list[Asked] = []

        def run_bench(asked: Asked, results: Results, *, old: Any, say: Any) -> None:
            seen.append(asked)
            results.environment = made_results().environment
            results.cells += cells
            if then is not None:
                raise then

        monkeypatch.setattr(command, "run_bench", run_bench)
        return seen

    return pretend


def slower(cell: Cell, factor: float) -> Cell:
    for way in cell.ways:
        if way.ours:
            way.rounds_s = [[factor * call for call in calls] for calls in way.rounds_s]
    return cell


def test_measured_cells_are_printed_and_written(pretended: Any, tmp_path: Path) -> None:
    seen = pretended(made_cell())
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "markdown", "png")}
    options = [f"--{'plot' if name == 'png' else name}={path}" for name, path in files.items()]
    result = fastbb(
        "a", "b", "--batch", "1,8,64", "--precision", "fp32,bf16", "--size", 32, *options
    )
    assert result.exit_code == 0, result.output
    assert "images/s" in result.stdout and "transformers eager" in result.stdout
    (asked,) = seen
    assert asked.models == ("a", "b") and asked.batches == (1, 8, 64) and asked.size == (32, 32)
    assert asked.precisions == ("fp32", "bf16") and asked.modes == ("auto",)
    read = Results.read(files["json"])
    assert len(read.cells) == 1 and Asked.from_options(read.options) == asked
    assert files["csv"].read_text().startswith("model,infer_img_size,infer_samples_per_sec,")
    assert "| images/s" in files["markdown"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_a_wrong_way_makes_the_exit_code_1(pretended: Any) -> None:
    cell = made_cell()
    cell.ways[1].wrong = "stage4: error 1, allowed 0"
    pretended(cell)
    result = fastbb("a")
    assert result.exit_code == 1 and "WRONG" in result.stdout


@pytest.mark.parametrize(("way", "code"), [(0, 1), (1, 0), (-1, 1)])
def test_a_failure_of_upstream_or_ours_makes_the_exit_code_1(
    way: int, code: int, pretended: Any
) -> None:
    cell = made_cell()
    failed = cell.ways[way]
    failed.rounds_s, failed.reason, failed.failed = [], "no such op", True
    pretended(made_cell(batch=2), cell)
    assert fastbb("a").exit_code == code


def test_a_way_that_does_not_run_by_choice_is_no_failure(pretended: Any) -> None:
    cell = made_cell()
    cell.ways[-1].rounds_s, cell.ways[-1].reason = [], "dropped"
    pretended(cell)
    assert fastbb("a").exit_code == 0


def test_what_was_measured_before_ctrl_c_is_printed_and_written(
    pretended: Any, tmp_path: Path
) -> None:
    pretended(made_cell(), then=Interrupted())
    result = fastbb("a", "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    assert result.exit_code == 130
    assert "transformers eager" in result.stdout and "Interrupted" in result.stdout
    assert Results.read(tmp_path / "a.json").interrupted
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(made_cell().ways)


def test_ctrl_c_before_anything_was_measured_says_so(pretended: Any, tmp_path: Path) -> None:
    pretended(then=Interrupted())
    result = fastbb("a", "--json", tmp_path / "a.json")
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert not (tmp_path / "a.json").exists()


def test_compare_finds_a_planted_regression(pretended: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    write_json(made_results(made_cell()), old)
    pretended(made_cell())
    same = fastbb("a", "--compare", old)
    assert same.exit_code == 0, same.stdout
    pretended(slower(made_cell(), 1.25))
    worse = fastbb("a", "--compare", old)
    assert worse.exit_code == 1 and "slower" in worse.stdout


def test_compare_alone_repeats_the_file(pretended: Any, tmp_path: Path) -> None:
    results = made_results(made_cell())
    asked = Asked(models=("a",), batches=(3,), size=(32, 64), precisions=("bf16",), budget_s=9.0)
    results.options = json.loads(json.dumps(vars(asked)))
    write_json(results, tmp_path / "old.json")
    seen = pretended(made_cell())
    assert fastbb("--compare", tmp_path / "old.json").exit_code == 0
    assert seen == [asked]
    refused = fastbb("--compare", tmp_path / "old.json", "--batch", 8)
    assert refused.exit_code == 2 and "repeats what its file measured" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted a MODEL, --accelerate HOST or --compare"),
        (["a", "--precision", "fp8"], "wanted some of fp32, tf32, bf16, fp16, got 'fp8'"),
        (["a", "--precision", "tf32", "--device", "cpu"], "needs an NVIDIA GPU"),
        (["a", "--mode", "fast"], "got 'fast'"),
        (["a", "--against", "tensorrt"], "got 'tensorrt'"),
        (["a", "--batch", "0"], "wanted numbers of images"),
        (["a", "--size", "big"], "wanted height x width"),
        (["./no-such-model"], "no-such-model"),
        (["no_such_model_at_all"], "no_such_model_at_all"),
        (["--accelerate", "NoSuchModelClass"], "NoSuchModelClass"),
        (["a", "--null-model"], "--null-model is for --end-to-end"),
        (["a", "--traffic", "--end-to-end", "."], "--end-to-end does not go with --traffic"),
        (["a", "--traffic", "--against", "timm"], "--against does not go with --traffic"),
        (["a", "--end-to-end", ".", "--size", "32"], "--size does not go with --end-to-end"),
        (["a", "--end-to-end", ".", "--csv", "a.csv"], "--csv does not go with --end-to-end"),
        (["--accelerate", "a", "--against", "timm"], "--against is for MODEL"),
        (["a", "--json", "no/such/dir.json"], "make it first"),
        (["a", "--plot", "a.txt"], "--plot a.txt: wanted one of"),
        (["a", "--compare", "gone.json"], "gone.json cannot be read: No such file"),
        (["a", "--device", "cuda:9"], "device: cuda:9 is not there"),
        (["nano-resnet-digits", "--end-to-end", "no-such-images"], "no-such-images"),
    ],
)
def test_wrong_arguments_are_told_at_once(arguments: list[str], message: str) -> None:
    result = fastbb(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) <= 10


def test_a_file_without_times_is_not_compared_with(tmp_path: Path) -> None:
    cell = made_cell()
    cell.ways = []
    write_json(made_results(cell), tmp_path / "old.json")
    result = fastbb("--compare", tmp_path / "old.json")
    assert result.exit_code == 2 and "nothing in it was timed" in result.stderr


def test_what_was_measured_before_an_error_is_printed_and_written(
    pretended: Any, tmp_path: Path
) -> None:
    pretended(made_cell(), then=OSError("no model of that name"))
    result = fastbb("a", "--json", tmp_path / "a.json")
    assert result.exit_code == 2 and "no model of that name" in result.stderr
    assert "transformers eager" in result.stdout and "Interrupted" in result.stdout
    assert Results.read(tmp_path / "a.json").interrupted


def test_a_damaged_file_to_compare_with_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    whole = json.dumps({**made_results(made_cell()).to_dict(), "options": {"models": 5}})
    path.write_text(whole)
    damaged = fastbb("--compare", path)
    assert damaged.exit_code == 2 and "damaged: models" in damaged.stderr
    for text in ("", "[]", '{"format": 99}', '{"format": 1, "cells": [{}]}', "\xff"):
        path.write_bytes(text.encode("latin-1"))
        result = fastbb("a", "--compare", path)
        assert result.exit_code == 2 and "not a file of `fastbb bench --json`" in result.stderr


def test_missing_software_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastbb.bench.ways.find_spec", lambda name: None)
    result = fastbb("nano-resnet-digits", "--against", "openvino")
    assert result.exit_code == 2 and "pip install 'fastbb[bench]'" in result.stderr


def test_traffic_is_counted_without_a_gpu(tmp_path: Path) -> None:
    files = [f"--json={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'a.md'}"]
    picture = tmp_path / "a.png"
    result = fastbb("nano-resnet-digits", "--traffic", "--batch", 2, *files, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "launches" in result.stdout and "fastbb" in result.stdout
    (cell,) = Results.read(tmp_path / "a.json").cells
    assert 0 < cell.traffic["fastbb"]["bytes"] < cell.traffic["transformers"]["bytes"]
    assert "| traffic" in (tmp_path / "a.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_real_bench_ends_by_ctrl_c_with_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    arguments = ["nano-resnet-digits", "--size", "32", "--batch", "2,1", "--mode", "eager"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbb", "bench", *arguments, "--seconds", "0.2", "--json", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/2]"):
            process.send_signal(signal.SIGINT)
            break
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "transformers eager" in printed and "Interrupted" in printed
    results = Results.read(path)
    assert results.interrupted and [cell.batch for cell in results.cells] == [2]
    (cell,) = results.cells
    assert [way.wrong for way in cell.ways] == [None, None]
    assert all(len(way.rounds_s) == 10 and way.error is not None for way in cell.ways)
    left = subprocess.run(["pgrep", "-f", "fastbb.bench.worker"], capture_output=True, text=True)
    assert not left.stdout or os.environ.get("PYTEST_XDIST_WORKER"), "workers are left"
