"""Stages of `make gpu` that fail, hang or crash, and wrong arguments."""

import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_pretended
import pytest
import torch
from gpu_command import ROOT, files, gpu_command, outcomes

STAGES = """
import os, signal, sys, time
from pathlib import Path
import gpu

def fine(work):
    work.plan(["one"])
    work.row("one", value="1")

def raises(work):
    work.plan(["one", "two"])
    work.row("one", value="1")
    raise ValueError("no such thing")

def hangs(work):
    work.plan(["one", "two"])
    work.row("one", value="1")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1], "pid").write_text(str(os.getpid()))
    time.sleep(600)

def crashes(work):
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(work):
    os._exit(3)

def crashes_at_two(work):
    for name, item in work.in_time({"one": 1, "two": 2, "three": 3}):
        if item == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        work.row(name, value=str(os.getpid()))

def crashes_at_all(work):
    for name, item in work.in_time({"one": 1, "two": 2, "three": 3}):
        os.kill(os.getpid(), signal.SIGSEGV)

def task(item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == 3:
        raise ValueError("no such thing")
    return {"value": str(item)}

def parallel(work):
    work.in_processes({str(item): lambda item=item: task(item) for item in (1, 2, 3, 4)}, 2)

def wait(item):
    time.sleep(600 if item == 1 else 0)
    return {"value": str(os.getpid())}

def one_hangs(work):
    work.in_processes({str(item): lambda item=item: wait(item) for item in (1, 2, 3)}, 1, 0.5)

def run(*functions, box_s=20.0, budget_s=None):
    results = gpu.Results(Path(sys.argv[1]), dry_run=True)
    stages = [gpu.Stage(f.__name__, "ops", 1.5 if f is hangs else box_s, f) for f in functions]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    well = gpu.run_stages(stages, results, budget_s or sum(stage.box_s for stage in stages))
    print("all well" if well else "not all well")
"""


def start(code: str, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGES + textwrap.dedent(code), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def run(code: str, out: Path) -> tuple[dict[str, Any], str, str]:
    """Runs stages; returns the two files and what was printed."""
    printed, _ = start(code, out).communicate(timeout=60)
    return *files(out), printed


def test_failing_stages_leave_the_other_stages_running(tmp_path: Path) -> None:
    data, tables, printed = run("run(hangs, raises, crashes, leaves, fine)", tmp_path)
    found = outcomes(data)
    assert found["raises"] == "failed: ValueError: no such thing"
    assert found["crashes"] == "ended by SIGSEGV"
    assert found["leaves"] == "ended with exit code 3"
    assert found["hangs"].startswith("cut off after ")
    assert found["fine"] == "finished"
    assert all(f"| {stage} | {outcome} |" in tables for stage, outcome in found.items())
    # results from before the failure stay, and missing ones are named
    reached = [row["stage"] for row in data["sections"]["ops"]]
    assert reached == ["hangs", "raises", "fine"]
    assert "- hangs: not reached: two" in tables
    assert printed.endswith("not all well\n")


def test_items_after_a_crash_run_in_another_process(tmp_path: Path) -> None:
    data, tables, _ = run("run(crashes_at_two)", tmp_path)
    rows = {row["item"]: row for row in data["sections"]["ops"]}
    assert rows["two"]["problem"] == "its process ended by SIGSEGV"
    assert rows["one"]["value"] != rows["three"]["value"]
    assert outcomes(data) == {"crashes_at_two": "finished, after it ended by SIGSEGV"}
    assert data["stages"][0]["not_reached"] == []


def test_a_stage_that_crashes_at_every_item_ends(tmp_path: Path) -> None:
    data, _, _ = run("run(crashes_at_all, fine)", tmp_path)
    problems = [row["problem"] for row in data["sections"]["ops"] if "problem" in row]
    assert problems == ["its process ended by SIGSEGV"] * 3
    assert outcomes(data)["fine"] == "finished"


def test_task_that_crashes_leaves_the_other_tasks_running(tmp_path: Path) -> None:
    data, _, _ = run("run(parallel)", tmp_path)
    rows = {row["item"]: row.get("value", row.get("problem")) for row in data["sections"]["ops"]}
    crash = "its process ended by SIGSEGV"
    assert rows == {"1": "1", "2": crash, "3": "ValueError: no such thing", "4": "4"}


def test_a_task_that_hangs_is_ended_and_the_others_share_a_process(tmp_path: Path) -> None:
    data, _, _ = run("run(one_hangs)", tmp_path)
    rows = {row["item"]: row for row in data["sections"]["ops"]}
    assert rows["1"]["problem"] == "ended after 0.5 s"
    assert rows["2"]["value"] == rows["3"]["value"]
    assert outcomes(data) == {"one_hangs": "finished"}


def test_stages_without_time_left_are_reported(tmp_path: Path) -> None:
    data, tables, _ = run("run(hangs, fine, box_s=0.5, budget_s=2.0)", tmp_path)
    assert outcomes(data)["fine"] == "not reached: no time was left"
    assert "| fine | not reached: no time was left |" in tables


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
def test_results_are_written_when_the_run_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    process = start("run(fine, hangs, box_s=30.0, budget_s=60.0)", tmp_path)
    pid = tmp_path / "pid"
    wait_for(pid.exists)
    hanging = int(pid.read_text())
    process.send_signal(number)
    process.wait(10)
    wait_for(lambda: not is_running(hanging))
    data, tables = files(tmp_path)
    expected = {"fine": "finished"}
    if number == signal.SIGTERM:
        expected["hangs"] = "interrupted"
    assert outcomes(data) == expected
    assert "| fine | finished |" in tables


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_results_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        start("run(fine)", tmp_path).wait(30)
    first, second = sorted(tmp_path.glob("*.json"), key=lambda file: len(file.name))
    assert second.stem == f"{first.stem}-2"


def test_machine_without_a_gpu_exits_with_2() -> None:
    done = gpu_command(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.py: wanted a CUDA or ROCm GPU, and torch ")
    assert "--dry-run" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--out", str(ROOT / "bench" / "results")], "is for measurements"),
        (["--budget", "0"], "--budget must be more than 0 seconds, got 0"),
        (["--run", "2", "--stage", "tools"], "--stage of run 2 must be one of environment, sweep,"),
        (["--run", "4"], "invalid choice: 4"),
    ],
    ids=["dry run among measurements", "no time", "a stage of another run", "no such run"],
)
def test_contradictory_arguments_exit_with_2(options: list[str], message: str) -> None:
    done = gpu_command(*options)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("pretended", "real"),
    [
        (gpu_pretended.Stream.wait_stream, torch.cuda.Stream.wait_stream),
        (gpu_pretended.Stream.wait_event, torch.cuda.Stream.wait_event),
        (gpu_pretended.Stream.__init__, torch.cuda.Stream.__new__),
        (gpu_pretended.Event.__init__, torch.cuda.Event.__new__),
        (gpu_pretended.Event.record, torch.cuda.Event.record),
        (gpu_pretended.Event.query, torch.cuda.Event.query),
        (gpu_pretended.Event.synchronize, torch.cuda.Event.synchronize),
        (gpu_pretended.Event.elapsed_time, torch.cuda.Event.elapsed_time),
        (gpu_pretended.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_begin),
        (gpu_pretended.CUDAGraph.capture_end, torch.cuda.CUDAGraph.capture_end),
        (gpu_pretended.CUDAGraph.replay, torch.cuda.CUDAGraph.replay),
        (gpu_pretended._graph, torch.cuda.graph.__init__),
        (gpu_pretended._sleep, torch.cuda._sleep),
    ],
    ids=lambda function: function.__qualname__,
)
def test_pretended_gpu_has_only_arguments_of_the_real_one(
    pretended: Callable[..., object], real: Callable[..., object]
) -> None:
    names = [set(inspect.signature(f).parameters) - {"self", "cls"} for f in (pretended, real)]
    assert names[0] <= names[1]
