"""`python -m fastbb_kernels.check`: its steps, and its progress lines."""

import io
from collections.abc import Sequence

import pytest
import torch

from fastbb_kernels import check
from fastbb_kernels.case import Case
from fastbb_kernels.check import Plan, run_plans
from fastbb_kernels.op import op_names
from fastbb_kernels.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]


def test_quick_check_runs_opcheck_interpreter_and_compiler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check.main(["--quick", "--op", "bias_act"]) == 0
    out, err = capsys.readouterr()
    header, row = out.splitlines()[:2]
    assert header.split()[:4] == ["op", "opcheck", "interpreter", "90"]
    assert row.split()[:7] == ["bias_act", "2", "ok", "3", "ok", "1", "ok"]
    assert "100% done in" in err and "left: bias_act" in err and "\r" not in err


@pytest.mark.parametrize("op", op_names())
def test_quick_compiles_one_case_of_every_op(op: str) -> None:
    quick = Plan.of(op, [90], [torch.bfloat16], None, quick=True)
    full = Plan.of(op, [90], [torch.bfloat16], None)
    assert len(quick.compiled) == 1 and quick.compiled[0] in full.compiled
    assert names(quick.small) == names(full.small) != []


def test_progress_counts_failed_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that find a problem count too, so that nothing is left at the end."""
    monkeypatch.setattr(check, "check_interpreted", lambda case, dtype: 1 / 0)
    plan = Plan.of("bias_act", [90, "gfx942"], [torch.bfloat16, torch.float32], None, quick=True)
    weights = []
    report = check.check_op(plan, weights.append)
    assert sum(weights) == plan.weight
    assert len([problem for problem in report.problems if "ZeroDivisionError" in problem]) == 6
    assert run_plans([]) == []


def test_progress_on_a_terminal_is_a_bar_with_the_remaining_time() -> None:
    file = Terminal()
    progress = Progress(4, file)
    progress.begin("patch_embed")
    for _ in range(4):
        progress.step(1)
    progress.close()
    assert "\r" in file.getvalue() and "left: " in file.getvalue()


def test_progress_without_a_terminal_prints_few_lines() -> None:
    file = io.StringIO()
    progress = Progress(1000, file)
    progress.begin("patch_embed")
    for _ in range(1000):
        progress.step(1)
    progress.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in file.getvalue()
    assert lines[0].startswith("0% done in 00:00, about ? left")
    assert lines[-1].startswith("100% done in 00:00, about 00:00 left: patch_embed")


def test_progress_line_shows_percentage_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastbb_kernels.progress._LINES_S", 0.0)
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    file = io.StringIO()
    progress = Progress(40, file)
    progress.begin("patch_embed")
    now[0] = 60.0
    progress.step(10)
    progress.close()
    assert "25% done in 01:00, about 03:00 left: patch_embed" in file.getvalue()
