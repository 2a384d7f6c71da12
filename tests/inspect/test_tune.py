"""`fastbb tune` measures the ways to run a model; mode "auto" runs the winner."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import cli_runner
from click.testing import Result
from pretended_device import Device, baked, silent
from torch import Tensor

from fastbb import AutoBackbone
from fastbb.backbone.base import Backbone
from fastbb.cli import main
from fastbb.engine import compiled, ways
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import Tools
from fastbb.inspect.tune import tune_model
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

MODEL = "nano-resnet-digits"


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Replaces the compiler, and hides OpenVINO."""
    monkeypatch.setattr("fastbb.engine.openvino.openvino_version", lambda: None)

    def put(compile_maps: Callable[..., Any]) -> None:
        monkeypatch.setattr(ways, "compile_maps", compile_maps)

    put(lambda backbone, example, impl: baked(backbone))
    return put


def tune(*arguments: str) -> Result:
    return cli_runner().invoke(main, ["tune", *arguments])


def test_tune_prints_the_winner_and_the_other_candidates(user_cache: Path, compiler: Any) -> None:
    result = tune(MODEL, "--batch", "1", "--batch", "2", "--size", "32x40", "--budget", "0.1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    heads = [line for line in lines if line.startswith("fp32, ")]
    # the largest batch comes first, since it needs most memory
    assert re.match(r"fp32, 2x32x40: (eager|compile), \d+\.\d images/s", heads[0])
    assert re.match(r"fp32, 1x32x40: (eager|compile), \d+\.\d images/s", heads[1])
    tried = [line.split(":")[0].strip() for line in lines if line.startswith("  ")]
    assert tried == ["eager", "compile"] * 2
    assert lines[-1].startswith(f"remembered in {user_cache}")
    assert "measuring fp32, 2x32x40" in result.stderr


def test_mode_auto_runs_the_tuned_winner(user_cache: Path, compiler: Any) -> None:
    device = Device()

    def slow(backbone: Backbone, example: Tensor, impl: str) -> Any:
        run = baked(backbone)

        def timed(pixels: Tensor) -> tuple[Tensor, ...]:
            device.say(0.25)
            return run(pixels)

        return timed

    compiler(slow)
    tools = lambda: Tools(device.clock, progress=silent)  # noqa: E731
    (tuned,) = tune_model(MODEL, batches=[2], sizes=[(32, 32)], tools=tools)
    assert str(tuned).startswith("fp32, 2x32x32: compile, 8.0 images/s")
    assert [(t.name, t.seconds) for t in tuned.trials] == [("eager", 1.0), ("compile", 0.25)]

    n_timed = device.n_timed
    backbone = AutoBackbone.from_pretrained(MODEL)
    for expected, runs in ((None, "eager"), (1_000_000, "compile")):
        ready = prepare(backbone, "auto", None, (2, 32, 32), "auto", expected, tools())
        (row,) = ready.explain().rows
        assert row.runs.startswith(runs) and "measured before on this machine" in row.why
    assert device.n_timed == n_timed
    # another shape was not measured
    ready = prepare(backbone, "auto", None, (3, 32, 32), tools=tools())
    assert "measured before" not in ready.explain().rows[0].why


def test_random_weights_are_measured_and_remembered_for_the_model(
    user_cache: Path, compiler: Any, tmp_path: Path
) -> None:
    config = AutoBackbone.from_pretrained(MODEL).config
    config.save_pretrained(tmp_path / "model")  # and no weights
    result = tune(str(tmp_path / "model"), "--random-weights", "--batch", "1", "--size", "32x32")
    assert result.exit_code == 0 and "fp32, 1x32x32: " in result.stdout, result.output
    ready = prepare(AutoBackbone.from_pretrained(MODEL), "auto", None, (1, 32, 32), tools=Tools())
    assert "measured before on this machine" in ready.explain().rows[0].why
    refused = tune(str(tmp_path / "model"), "--batch", "1", "--size", "32x32")
    assert refused.exit_code == 2 and "weights" in refused.stderr


def test_results_that_cannot_be_kept_are_not_called_remembered(
    compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = tune(MODEL, "--batch", "1", "--size", "32x32", "--budget", "0.1")
    assert result.exit_code == 0 and "remembered in" not in result.stdout, result.output
    assert result.stdout.splitlines()[-1].startswith("results are not kept: ")


def test_failing_candidate_is_reported_and_eager_wins(user_cache: Path, compiler: Any) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no compiler here")

    compiler(fails)
    result = tune(MODEL, "--batch", "1", "--size", "32x32")
    assert result.exit_code == 0, result.output
    assert "fp32, 1x32x32: eager, " in result.stdout
    assert "  compile: RuntimeError: no compiler here" in result.stdout
    cache = ResultCache(Machine.of(torch.device("cpu")))
    (value,) = cache.items("tuned").values()
    assert isinstance(value, dict) and value["winner"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model",), "no-such-model"),
        ((MODEL, "--size", "32"), "wanted height x width"),
        ((MODEL, "--batch", "0"), "0 is not in the range"),
        ((MODEL, "--precision", "fp64"), "'fp64' is not one of"),
        ((MODEL, "--dtype", "fp64"), "'--precision': 'fp64' is not one of"),
        ((MODEL, "--precision", "tf32", "--device", "cpu"), "precision='tf32' needs an NVIDIA GPU"),
        ((MODEL, "--device", "tpu"), "device: wanted cpu, cuda or cuda:N, got 'tpu'"),
        ((MODEL, "--budget", "0"), "is not in the range"),
    ],
    ids=["model", "size", "batch", "precision", "dtype", "tf32", "device", "budget"],
)
def test_wrong_arguments_exit_with_2(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = tune(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_unwritable_cache_does_not_fail_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.compile_maps is not ways.compile_maps  # nothing is compiled here
    result = tune(MODEL, "--batch", "1", "--size", "32x32")
    assert result.exit_code == 0, result.output
