"""`make gpu` without a GPU: a dry run of all of it, and what becomes of stages that go wrong."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_measure
import gpu_models
import pytest
import torch
from gpu_report import DRY_RUN
from gpu_stages import CHECKED, SHORT_LIST, TIMED, on_device

from fastbb_kernels._dispatch import pretend
from fastbb_kernels.cases import real_cases, small_cases
from fastbb_kernels.op import find_op

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

# what a machine with nothing but torch and triton lacks (and tqdm, which torch itself looks for)
ABSENT = (
    *("transformers", "timm", "torchvision", "huggingface_hub", "safetensors", "matplotlib"),
    *("click", "fsspec", "PIL", "scipy", "pytest"),
)
BLOCKER = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

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


def files(out: Path) -> tuple[dict[str, Any], str]:
    (data,), (tables,) = out.glob("*.json"), out.glob("*.md")
    return json.loads(data.read_text()), tables.read_text()


def outcomes(data: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in data["stages"]}


def test_a_stage_that_goes_wrong_leaves_the_others(tmp_path: Path) -> None:
    data, tables, printed = run("run(hangs, raises, crashes, leaves, fine)", tmp_path)
    found = outcomes(data)
    assert found["raises"] == "failed: ValueError: no such thing"
    assert found["crashes"] == "ended by SIGSEGV"
    assert found["leaves"] == "ended with exit code 3"
    assert found["hangs"].startswith("cut off after ")
    assert found["fine"] == "finished"
    assert all(f"| {stage} | {outcome} |" in tables for stage, outcome in found.items())
    # what was found before it went wrong stays, and what was not is named
    reached = [row["stage"] for row in data["sections"]["ops"]]
    assert reached == ["hangs", "raises", "fine"]
    assert "- hangs: not reached: two" in tables
    assert printed.endswith("not all well\n")


def test_what_follows_a_crash_gets_another_process(tmp_path: Path) -> None:
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


def test_a_task_that_crashes_leaves_the_others(tmp_path: Path) -> None:
    data, _, _ = run("run(parallel)", tmp_path)
    rows = {row["item"]: row.get("value", row.get("problem")) for row in data["sections"]["ops"]}
    crash = "its process ended by SIGSEGV"
    assert rows == {"1": "1", "2": crash, "3": "ValueError: no such thing", "4": "4"}


def test_stages_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    data, tables, _ = run("run(hangs, fine, box_s=0.5, budget_s=2.0)", tmp_path)
    assert outcomes(data)["fine"] == "not reached: no time was left"
    assert "| fine | not reached: no time was left |" in tables


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
def test_results_are_there_when_the_run_is_ended(tmp_path: Path, number: signal.Signals) -> None:
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


def test_results_of_an_earlier_run_stay(tmp_path: Path) -> None:
    for _ in range(2):
        start("run(fine)", tmp_path).wait(30)
    first, second = sorted(tmp_path.glob("*.json"), key=lambda file: len(file.name))
    assert second.stem == f"{first.stem}-2"


def gpu_command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    search = [
        environment.pop("first", ""),
        *(str(ROOT / name) for name in ("", "kernels", "bench")),
    ]
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_says_so() -> None:
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
    ],
    ids=["dry run among measurements", "no time"],
)
def test_arguments_that_cannot_be_meant(options: list[str], message: str) -> None:
    done = gpu_command(*options)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_dry_run_takes_every_stage_with_nothing_but_torch_and_triton(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    out = tmp_path / "results"
    begin = time.monotonic()
    done = gpu_command("--dry-run", "--out", str(out), first=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 60
    data, tables = files(out)
    assert set(outcomes(data).values()) == {"finished"}
    assert list(data["sections"]) == ["environment", "check", "build", "tune", "ops", "models"]
    rows = [row for section in data["sections"].values() for row in section]
    assert {row["label"] for row in rows} == {DRY_RUN} == {data["label"]}
    assert not [row for row in rows if row.get("problem") or row.get("problems")]
    facts = {row["item"]: row["value"] for row in data["sections"]["environment"]}
    assert facts["torch"] == torch.__version__
    # what upstream's libraries would have been needed for says that it did without
    for row in data["sections"]["models"]:
        assert row["upstream"].startswith("fastbb eager (transformers: ModuleNotFoundError: No ")
        assert all(column["median_ms"] > 0 for column in row["columns"].values())
    headings = [line for line in tables.splitlines() if line.startswith("#")]
    assert len(headings) == 8
    assert all(line.endswith(f"({DRY_RUN})") for line in headings)
    assert f"results: {out}" in done.stdout


def measure(columns: tuple[str, ...] = (gpu_models.UPSTREAM, gpu_models.FASTBB)) -> dict[str, Any]:
    one = gpu_models.cell("swin_t", "bf16", 1, dry_run=True)
    gpu_models.upstream.cache_clear()
    with on_device(True), gpu_measure.precision("bf16"):
        return gpu_models.measure(one, columns, CPU)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_upstream_is_transformers_or_timm(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    if library == "timm":
        absent = mock.Mock(side_effect=ModuleNotFoundError("No module named 'transformers'"))
        monkeypatch.setattr(gpu_models, "_load_transformers", absent)
    row = measure()
    assert row["upstream"].startswith(library)
    assert {name: "problem" in column for name, column in row["columns"].items()} == {
        gpu_models.UPSTREAM: False,
        gpu_models.FASTBB: False,
    }


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (lambda: (torch.ones(1, 16, 8, 8).bfloat16(),) * 2, "wrong, not timed: map 0: "),
        (lambda: (), "wrong, not timed: 0 maps, upstream 2"),
        (mock.Mock(side_effect=torch.OutOfMemoryError("no 5 GiB")), "out of memory: "),
        (mock.Mock(side_effect=RuntimeError("launch failed")), "RuntimeError: launch failed"),
    ],
    ids=["wrong", "too few", "too large", "failing"],
)
def test_a_column_that_is_wrong_or_fails_is_not_timed(
    column: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for load in ("_load_transformers", "load_timm"):
        monkeypatch.setattr(gpu_models, load, mock.Mock(side_effect=ModuleNotFoundError("absent")))
    monkeypatch.setitem(gpu_models.COLUMNS, gpu_models.FASTBB, lambda one, pixels: column)
    columns = measure()["columns"]
    assert columns[gpu_models.FASTBB]["problem"].startswith(problem)
    assert "median_ms" not in columns[gpu_models.FASTBB]
    assert columns[gpu_models.UPSTREAM]["median_ms"] > 0


BYTES_OF = ("conv1x1_dual", "conv1x1_bn_act", "layer_norm_linear", "depthwise_conv_bn_act")


@pytest.mark.parametrize("op_name", BYTES_OF)
def test_the_floor_of_a_model_counts_the_bytes_of_its_launches(op_name: str) -> None:
    op = find_op(op_name)
    for case in (case for case in small_cases() if case.op == op_name):
        arguments = case.arguments("cpu", torch.float32)
        launch = mock.Mock(return_value=torch.empty(0))
        with pretend(None), mock.patch.object(sys.modules[op.call.__module__], "_launch", launch):
            op.call(**arguments, impl="triton")
        with gpu_measure.OurBytes() as counted, torch.no_grad():
            op.custom_op(*launch.call_args.args)
        # what a window leaves out at the edges of an odd map
        assert op.n_bytes(**arguments) == pytest.approx(counted.n_bytes, rel=0.02)
        assert counted.n_launches == 1


def test_a_floor_needs_both_peaks() -> None:
    peaks = gpu_measure.Peaks("somebody", 1e12, {"bf16": 1e15})
    assert peaks.floor_ms(2e9, 1e12, "bf16") == 2.0
    assert peaks.floor_ms(2e9, 5e12, "bf16") == 5.0
    assert peaks.floor_ms(2e9, 1e12, "fp32") is None
    assert gpu_measure.Peaks("nobody", None, {"bf16": 1e15}).floor_ms(1, 1, "bf16") is None


def test_the_table_of_peaks() -> None:
    found = gpu_measure.ARCHITECTURES
    assert (found[90].gpu, found[90].bf16_flops) == ("H100-SXM5-80GB", 989.4e12)


def test_the_cases_that_are_timed_exist() -> None:
    names = [case.name for case in real_cases()]
    assert set(SHORT_LIST) <= set(names)
    for beginning in (*TIMED, *CHECKED):
        assert any(name.startswith(beginning) for name in names)


class Event:
    """A CUDA event on a clock that only `work` moves."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Event.now_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_a_gpus_clock_repeats_short_calls_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls: list[str] = []

    def work(name: str, ms: float) -> None:
        calls.append(name)
        Event.now_ms += ms

    clock = gpu_measure.Clock(torch.device("cuda"))
    times = clock.times(
        {"short": lambda: work("short", 0.5), "long": lambda: work("long", 20.0)}, max_s=0.0
    )
    assert (times["short"].median_ms, times["long"].median_ms) == (0.5, 20.0)
    # twice each to learn how long they take; a short one goes on for 5 ms
    assert calls == ["short"] * 2 + ["long"] * 2 + (["short"] * 10 + ["long"]) * 5
