"""Dry runs of the three runs of `make gpu`, and parts of them that must be right."""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpu_candidates
import gpu_measure
import gpu_models
import gpu_profile
import gpu_sweep
import gpu_tools
import pytest
import torch
from gpu_command import BLOCKER, files, gpu_command, outcomes
from gpu_device import on_device
from gpu_ops import SHORT_LIST, TIMED
from gpu_pretended import pretended_gpu
from gpu_report import DRY_RUN
from gpu_sweep import SHAPES
from gpu_tools import NCU_CASES
from gpu_work import Work, read_lines

from fastbb_kernels._dispatch import pretend
from fastbb_kernels.cases import real_cases, small_cases
from fastbb_kernels.launching import chosen_config
from fastbb_kernels.op import find_op
from fastbb_kernels.triton_kernels.config import GemmConfig

CPU = torch.device("cpu")
SECTIONS = {
    1: ["environment", "checks", "models", "devices"],
    2: ["environment", "sweep", "libraries", "conv3x3", "ops"],
    3: ["environment", "tools", "models", "checks"],
}
# calls of torch.cuda that each run must make
PRETENDED = {
    1: {"capture", "CUDAGraph.replay", "Event.record", "Stream", "profile"},
    2: {"capture", "CUDAGraph.replay", "Event.record", "Event.query", "_sleep"},
    3: {"capture", "CUDAGraph.replay", "Event.record", "profile"},
}


@pytest.fixture(scope="module", params=SECTIONS, ids=lambda run: f"run {run}")
def rehearsal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Path]]:
    """Dry run of one of the three runs, with nothing but torch and triton installed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    out, before = folder / "results", resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--run", str(request.param), "--dry-run", "--out", str(out)]
    done = gpu_command(*options, first=str(folder), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # limit on an idle machine, in processor time
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert f"results: {out}" in done.stdout
    yield request.param, out


def test_dry_run_finishes_every_stage(rehearsal: tuple[int, Path]) -> None:
    run, out = rehearsal
    data, tables = files(out)
    assert set(outcomes(data).values()) == {"finished"}
    assert not [name for stage in data["stages"] for name in stage["not_reached"]]
    assert list(data["sections"]) == SECTIONS[run]
    rows = [row for section in data["sections"].values() for row in section]
    assert {row["label"] for row in rows} == {DRY_RUN} == {data["label"]}
    assert not [row for row in rows if row.get("problem") or row.get("problems") or row.get("off")]
    facts = {row["item"]: row["value"] for row in data["sections"]["environment"]}
    assert facts["torch"] == torch.__version__
    assert not [fact for fact in facts.values() if fact.startswith("unknown")]
    # stages that need upstream's libraries say that they ran without them
    for row in data["sections"].get("models", []):
        columns = row.get("columns", {})
        assert not columns or row["upstream"].startswith("fastbb eager (transformers: ModuleNot")
        assert all(column["median_ms"] > 0 for column in columns.values())
        assert all(len(column["kernels"]) == 2 for column in columns.values())
    headings = [line for line in tables.splitlines() if line.startswith("#")]
    assert len(headings) == len(SECTIONS[run]) + 2
    assert all(line.endswith(f"({DRY_RUN})") for line in headings)
    pretended = {name for stage in data["stages"] for name in stage.get("pretended", ())}
    assert pretended >= PRETENDED[run]


def test_dry_run_writes_the_results_of_its_run(rehearsal: tuple[int, Path]) -> None:
    run, out = rehearsal
    sections = files(out)[0]["sections"]
    if run == 1:
        modes = {gpu_models.COMPILED, gpu_models.REDUCE_OVERHEAD}
        assert any(modes <= row.get("columns", {}).keys() for row in sections["models"])
        assert {row["model"] for row in sections["checks"]} == {"swin_t", "resnet50", "swin_b"}
        assert len(sections["devices"]) == 2
    elif run == 2:
        written = json.loads((out / "configs" / "dry-run.json").read_text())
        swept = {row["table"] for row in sections["sweep"] if "us" in row}
        assert swept == {"layer_norm_nchw", "linear_residual"}
        assert written["configs"].keys() == swept | {"conv3x3_way", "linear_residual_way"}
        (entry,) = written["configs"]["linear_residual"]
        assert entry["sizes"].keys() == {"n_rows", "features", "out_features", "dtype"}
        assert len(entry["config"]) == len(GemmConfig._fields)
        assert {"fused", "plain", "triton"} <= sections["conv3x3"][0]["us"].keys()
        assert {"kernel", "library"} <= sections["libraries"][0]["us"].keys()
    else:
        (counters,) = (row for row in sections["tools"] if "metrics" in row)
        assert counters["metrics"]["Duration"] == "12.5 us"
        assert Path(counters["report"]).exists()
        said = [row.get("value") for row in sections["tools"]]
        assert said.count("yes, pretended") == 3
        assert {"ERROR SUMMARY: 0 errors"} < {text for text in said if "SUMMARY: 0" in str(text)}


IMPORTING = """
import gpu, torch
def count():
    print("asked CUDA")
    return 0
torch._C._cuda_getDeviceCount = count
for run in gpu.RUNS:
    gpu.import_ahead(gpu.stages_of(run, dry_run=False))
assert "gpu_models" in gpu.sys.modules and "torch._dynamo" in gpu.sys.modules
print(torch.cuda.is_initialized(), "torch._inductor.async_compile" in gpu.sys.modules)
"""


def test_imports_before_a_fork_do_not_initialise_cuda() -> None:
    """A forked child cannot use GPUs if its parent has counted them."""
    done = gpu_command("-c", IMPORTING, script=False)
    assert done.stdout == "False False\n", done.stdout + done.stderr


@pytest.fixture
def work(tmp_path: Path) -> Work:
    file = tmp_path / "rows"
    file.touch()
    return Work("tools", file, time.monotonic(), time.monotonic() + 60, tmp_path)


def rows_of(work: Work) -> list[dict[str, Any]]:
    return [line["row"] for line in read_lines(work.file) if "row" in line]


FORBIDDEN = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "no: no ncu on PATH"),
        (f"echo '{FORBIDDEN}'; exit 1", f"no: exit code 1: {FORBIDDEN}"),
        ("echo nothing", "no: it printed no 'gpu__time_duration.sum': nothing"),
    ],
    ids=["absent", "not permitted", "silent"],
)
def test_tool_that_does_not_run_is_reported_with_the_reason(
    program: str | None, reason: str, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program is not None:
        (tmp_path / "ncu").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "ncu").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_tools.ncu(work, dry_run=True)
    (row,) = rows_of(work)
    assert row["value"] == reason


def test_findings_of_the_sanitizer_are_reported_as_a_problem(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\necho '========= Invalid __global__ write of size 2 bytes'\n"
        "echo '========= ERROR SUMMARY: 1 error'\nexit 86\n"
    )
    tool.chmod(0o700)
    row = gpu_tools._sanitized([str(tool)])
    assert row["problem"].startswith("ERROR SUMMARY: 1 error; Invalid __global__ write of size 2")


def test_candidates_are_near_the_default_and_fit() -> None:
    default = GemmConfig(64, 128, 32, num_warps=4, num_stages=3)
    sizes = {"n_rows": 12544, "channels": 256, "out_channels": 1024}
    found = gpu_candidates.candidates("conv1x1_bn_act", default, sizes)
    assert found[0] == default and len(set(found)) == len(found) and 20 <= len(found) <= 40
    assert GemmConfig(128, 128, 64, num_warps=8, num_stages=3) in found
    assert all(2 * (c.block_m + c.block_n) * c.block_k * c.num_stages <= 227 << 10 for c in found)
    # such loops have miscompiled with 8 warps
    others = gpu_candidates.candidates("conv3x3_bn_act", default, sizes)
    assert {config.num_warps for config in others} == {4}


def test_wrong_configuration_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, wrong, raising, best = (GemmConfig(64, 64, 32, 4, stages) for stages in (1, 2, 3, 4))
    us = {usual: 10.0, wrong: 1.0, best: 5.0}

    def config(x: torch.Tensor) -> GemmConfig:
        return chosen_config("table", lambda arch: usual, x.device)

    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        if config(x) == raising:
            raise RuntimeError("out of resource")
        return x + (config(x) == wrong)

    op = SimpleNamespace(
        call=call, eager=lambda x: x * 1, n_bytes=lambda x: 4, name="op", unsupported=None
    )
    case = SimpleNamespace(op="op", arguments=lambda device, dtype, seed=None: {"x": torch.ones(2)})
    monkeypatch.setattr(gpu_sweep, "find_op", lambda name: op)
    monkeypatch.setattr(gpu_sweep, "_recorded", lambda calls: (config(torch.ones(2)), 1))
    monkeypatch.setattr(gpu_sweep, "graph_us", lambda graph, n_calls, max_s: us[graph])
    shape: Any = gpu_sweep.Shape(case, "table", {}, [usual, wrong, raising, best])  # type: ignore[arg-type]
    with pretended_gpu(), pretend(None):
        row = gpu_sweep._fastest(shape, None, CPU, 10.0)
    assert (row["config"], row["us"], row["default_us"]) == (best, 5.0, 10.0)
    assert row["refused"][str(wrong)].startswith("error 1, allowed")
    assert row["refused"][str(raising)] == "RuntimeError: out of resource"


def test_gpu_that_is_not_compiled_ahead_for_is_swept_too(work: Work) -> None:
    with mock.patch.object(gpu_sweep, "architecture_of_gpu", side_effect=ValueError("gfx000")):
        gpu_sweep.compile_ahead(work, dry_run=True)
    assert rows_of(work)[0]["problem"] == "nothing: ValueError: gfx000"
    assert gpu_sweep._compiled(work) is None
    with gpu_sweep.sweeping(dry_run=True) as device:
        found = gpu_sweep.shapes(device, dry_run=True)
    assert [shape.table for shape in found] == ["layer_norm_nchw", "linear_residual"]
    assert all(len(shape.configs) == 3 for shape in found)


def test_overlapping_kernels_count_as_busy_once() -> None:
    with pretended_gpu():
        found = gpu_profile.profiled(lambda: None, 1)
    assert found["busy_us"] == 50
    assert [(kernel["name"], kernel["us"]) for kernel in found["kernels"]] == [
        ("pretended_gemm", 40),
        ("pretended_norm", 20),
    ]


def test_host_is_timed_if_the_profiler_fails() -> None:
    with pretended_gpu(), mock.patch.object(torch.profiler, "profile", side_effect=OSError("no")):
        found = gpu_profile.profiled(lambda: None, 1)
    assert found["profile_problem"] == "OSError: no" and found["host_us"] >= 0


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
        with pretend(None), mock.patch.object(op.kernel, "gpu", launch):
            op.call(**arguments, impl="triton")
        with gpu_measure.OurBytes() as counted, torch.no_grad():
            op.custom_op(*launch.call_args.args)
        # pixels that no window covers at the edges of an odd map
        assert op.n_bytes(**arguments) == pytest.approx(counted.n_bytes, rel=0.02)
        assert counted.n_launches == 1


def test_a_floor_needs_both_peaks() -> None:
    peaks = gpu_measure.Peaks("somebody", 1e12, {"bf16": 1e15})
    assert peaks.floor_ms(2e9, 1e12, "bf16") == 2.0
    assert peaks.floor_ms(2e9, 5e12, "bf16") == 5.0
    assert peaks.floor_ms(2e9, 1e12, "fp32") is None
    assert gpu_measure.Peaks("nobody", None, {"bf16": 1e15}).floor_ms(1, 1, "bf16") is None


def test_the_cases_that_are_timed_exist() -> None:
    names = [case.name for case in real_cases()]
    assert {*SHORT_LIST, *SHAPES, *NCU_CASES} <= set(names)
    for beginning in TIMED:
        assert any(name.startswith(beginning) for name in names)


class Event:
    """A CUDA event on a clock that only `work` moves."""

    now_ms = 0.0
    is_late = False  # whether the GPU woke up before the host had queued all calls

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Event.now_ms

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return Event.is_late

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_gpu_clock_repeats_short_calls_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("host_cycles", [1, 9_000_000, 10**12], ids=["fast", "slow", "hopeless"])
def test_flushing_clock_times_only_queued_calls(
    host_cycles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        Event.is_late = cycles < host_cycles

    def work() -> None:
        # calls that are not queued take as long as the host
        Event.now_ms += 100.0 if Event.is_late else 0.5

    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        clock = gpu_measure.Clock(CPU, flush=True)
        if host_cycles == 10**12:
            with pytest.raises(gpu_measure.NotQueued):
                clock.times({"": work}, max_s=0.0)
            return
        assert clock.times({"": work}, max_s=0.0)[""].max_ms == 0.5
    assert slept[0] == 2_000_000 and slept[-1] == (16_000_000 if host_cycles > 1 else 2_000_000)


def test_replays_of_a_graph_are_divided_by_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "Event", Event)
        graph = gpu_measure.graph_of([lambda: torch.ones(2)] * 3)

        def replay() -> None:
            Event.now_ms += 0.6

        monkeypatch.setattr(graph, "replay", replay)
        assert gpu_measure.graph_us(graph, 3, max_s=0.0) == pytest.approx(200)
