"""Tests of `fastbb check`: its table of ops and dtypes, exit codes and what it remembers."""

import re
from pathlib import Path

import broken_kernels as broken
import pytest
import torch
from broken_kernels import correct, launching, self_check
from cli_runner import cli_runner
from click.testing import Result

from fastbb.cli import main
from fastbb_kernels.device_report import check_ops
from fastbb_kernels.op import op_names
from fastbb_kernels.self_check import use


def fastbb_check(*arguments: str) -> Result:
    return cli_runner().invoke(main, ["check", *arguments])


def test_machine_without_a_gpu_has_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for arguments in ((), ("--device", "cpu"), ("--op", "patch_merging", "--again")):
        result = fastbb_check(*arguments)
        assert result.exit_code == 0
        assert result.output.startswith(
            "no GPU here, so there is nothing to check: on cpu every op"
        )
        assert "`python -m fastbb_kernels.check`" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--op", "patch_mergin"), "op: wanted one of bias_act, .*, got 'patch_mergin'"),
        (("--precision", "fp64"), "'fp64' is not one of 'fp32', 'fp16', 'bf16'"),
        (("--device", "gpu"), "device: wanted cpu, cuda or cuda:N, got 'gpu'"),
        (("--device", "meta"), "device: wanted cpu, cuda or cuda:N, got 'meta'"),
        (("--device", "cuda:99"), "device: cuda:99 is not there: torch sees [0-9]+ GPUs"),
    ],
    ids=["op", "dtype", "device", "meta", "cuda"],
)
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = fastbb_check(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr


def test_working_ops_are_shown_as_ok(tmp_path: Path) -> None:
    with launching(**{op: correct(op) for op in op_names()}), use(self_check(tmp_path)):
        result = fastbb_check("--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Pretended GPU"
    assert lines[1].split() == ["op", "fp32", "fp16", "bf16"]
    rows = [line.split() for line in lines[2 : 2 + len(op_names())]]
    assert rows == [[op, "ok", "ok", "ok"] for op in op_names()]
    assert lines[-1].startswith(f"remembered in {tmp_path}")


def broken_check(folder: Path, *arguments: str) -> tuple[Result, int]:
    """Runs the command with a kernel that gives NaN; returns result and number of launches."""
    launches = {"patch_merging": broken.nan("patch_merging")}
    with launching(**launches) as launched, use(self_check(folder)):
        result = fastbb_check("--device", "cpu", "--op", "patch_merging", *arguments)
    return result, launched["patch_merging"].call_count


def test_broken_kernel_is_shown_as_off_and_exits_with_1(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    result, n_launches = broken_check(tmp_path, "--precision", "bf16", "--dtype", "fp32")
    assert result.exit_code == 1 and n_launches == 2
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [
        ["op", "bf16", "fp32"],
        ["patch_merging", "off", "off"],
    ]
    problems = [line for line in result.stdout.splitlines() if line.startswith("patch_merging, ")]
    assert len(problems) == 2 and all("NaN where eager PyTorch has numbers" in p for p in problems)
    # remembered results are not checked again without --again
    assert broken_check(tmp_path, "--precision", "bf16")[1] == 0
    assert broken_check(tmp_path, "--precision", "bf16", "--again")[1] == 1
    assert len(recwarn) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_work_on_this_gpu() -> None:
    report = check_ops("cuda", again=True)
    assert report.problems == [], str(report)
