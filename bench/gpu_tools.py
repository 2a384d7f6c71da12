"""NVIDIA's own tools on our kernels, where they may run: Nsight Compute and compute-sanitizer.

They start this file as a program, which makes the calls that they examine:

    PYTHONPATH=.:kernels:bench ncu --set full python bench/gpu_tools.py --case NAME
    PYTHONPATH=.:kernels:bench compute-sanitizer python bench/gpu_tools.py --small OP
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_device import n_processes, on_device
from gpu_measure import precision
from gpu_work import Work

from fastbb_kernels._dispatch import unchecked
from fastbb_kernels.case import Case
from fastbb_kernels.cases import real_cases, small_cases
from fastbb_kernels.op import find_op, op_names

# one of each kind of kernel that takes much of a model's time
NCU_CASES = (
    "swin_t-224-b64-stage1-mlp",
    "swin_t-224-b64-stage1-block-shifted",
    "swin_t-224-b64-stage3-fc1",
    "swin_t-224-b64-stage3-fc2",
    "resnet50-224-b64-stage3-block2-expand",
    "resnet50-224-b64-stage3-block2-conv",
)
DRY_OP = "layer_norm_nchw"
DRY_CASE = "below-14x21-b3-stem-norm"
# counters of `ncu` that the table shows; the files contain all of them
METRICS = (
    "Duration",
    "Compute (SM) Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "L2 Hit Rate",
    "Executed Ipc Active",
    "Registers Per Thread",
    "Achieved Occupancy",
)
_PROBE_S = 30
_TOOL_S = 60
_N_SMALL = 2  # cases per op
_ERRORS = 86  # exit code
_PROBE_METRIC = "gpu__time_duration.sum"
_WITHOUT_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # reveals accesses out of bounds


class NotPossible(Exception):
    """A tool does not run here; the message says why."""


def ncu(work: Work, dry_run: bool) -> None:
    """Reads all counters of six kernels, if this user may read counters."""
    cases = (DRY_CASE,) if dry_run else NCU_CASES
    if not _may_use(work, "ncu", ["--metrics", _PROBE_METRIC, "--csv"], _PROBE_METRIC, dry_run):
        return
    folder = work.out / time.strftime("ncu-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in work.in_time({f"ncu: {case}": case for case in cases}):
        work.say(name)
        work.do(name, partial(_counters, case, folder, dry_run))


def sanitize(work: Work, dry_run: bool, tool: str) -> None:
    """Runs compute-sanitizer on small cases of every op."""
    options = ["--tool", tool, "--error-exitcode", str(_ERRORS), "--print-limit", "20"]
    if not _may_use(work, "compute-sanitizer", options, "SUMMARY: ", dry_run):
        return
    command = ["compute-sanitizer", *options, *_this("--small", dry_run)]
    tasks = {
        f"{tool}: {op}": partial(_sanitized, [*command, op])
        for op in ((DRY_OP,) if dry_run else op_names())
    }
    work.in_processes(tasks, max(1, n_processes(dry_run) // 2), _TOOL_S + 5)


def _may_use(work: Work, program: str, options: Sequence[str], wanted: str, dry_run: bool) -> bool:
    """Tries a tool on one small kernel of PyTorch; reports why if it does not run."""
    item = f"{program} {' '.join(options[:2])}: whether it runs here"
    try:
        printed = _run([program, *options, *_this("--probe", dry_run)], _PROBE_S)
        if wanted not in printed:
            raise NotPossible(f"it printed no {wanted!r}: {_end_of(printed)}")
    except NotPossible as reason:
        work.row(item, value=f"no: {reason}")
        return False
    work.row(item, value="yes, pretended" if dry_run else "yes")
    return True


def _counters(case: str, folder: Path, dry_run: bool) -> dict[str, Any]:
    report = folder / f"{case}.ncu-rep"
    # the first launch is the warm-up
    which = ["--kernel-name", "regex:.*_fwd_kernel", "--launch-skip", "1", "--launch-count", "1"]
    to_file = ["--set", "full", *which, "--export", str(report), "--force-overwrite"]
    _run(["ncu", *to_file, *_this("--case", dry_run), case], _TOOL_S)
    printed = _run(["ncu", "--import", str(report), "--page", "details", "--csv"], _TOOL_S)
    report.with_suffix(".csv").write_text(printed)
    found = list(_csv_rows(printed))
    metrics = {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}" for row in found}
    if not metrics:
        raise NotPossible(f"no kernel was profiled: {_end_of(printed)}")
    return {
        "kernel": found[0]["Kernel Name"],
        "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "report": str(report),
    }


def _csv_rows(printed: str) -> Iterator[dict[str, str]]:
    """Finds the table in the output of `ncu --csv`."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    return (row for row in csv.DictReader(lines) if row.get("Metric Name"))


def _sanitized(command: Sequence[str]) -> dict[str, Any]:
    printed = _run(command, _TOOL_S, accepted=(0, _ERRORS), **_WITHOUT_CACHE)
    found = [line.lstrip("= ") for line in printed.splitlines() if line.startswith("=====")]
    summary = next((line for line in found if "SUMMARY" in line), "no summary")
    is_clean = "SUMMARY: 0 " in summary
    return {"value": summary} if is_clean else {"problem": "; ".join([summary, *found[:6]])}


def _run(
    command: Sequence[str], timeout_s: int, accepted: Sequence[int] = (0,), **environment: str
) -> str:
    """Runs a tool; returns its output.

    Raises:
        NotPossible: it is missing, takes too long, or fails; the message quotes its output.
    """
    if shutil.which(command[0]) is None:
        raise NotPossible(f"no {command[0]} on PATH")
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as error:
        raise NotPossible(f"not done within {timeout_s} s") from error
    if done.returncode not in accepted:
        raise NotPossible(f"exit code {done.returncode}: {_end_of(done.stdout)}")
    return done.stdout


def _end_of(printed: str) -> str:
    """Returns a tool's own messages, else the end of its output."""
    lines = [line for line in printed.splitlines() if line.strip()]
    own = [line for line in lines if "ERR" in line.upper() and line.startswith("==")]
    return " ".join((own or lines)[-3:])[-300:]


# the program that the tools start


def _this(what: str, dry_run: bool) -> list[str]:
    options = ["--dry-run"] if dry_run else []
    return [sys.executable, str(Path(__file__).resolve()), *options, what]


def _make_calls(cases: Sequence[Case], n_calls: int, dry_run: bool) -> None:
    with ExitStack() as stack:
        device = stack.enter_context(on_device(dry_run))
        dtype = stack.enter_context(precision("fp32" if dry_run else "bf16"))
        stack.enter_context(unchecked())  # the tool would also see the kernels of checks
        for case in cases:
            arguments = case.arguments(device, dtype, seed=0)
            for _ in range(n_calls):
                find_op(case.op).call(**arguments, impl="triton")
        torch.cuda.synchronize()


def _probe(dry_run: bool) -> None:
    with on_device(dry_run) as device:
        torch.ones(1024, device=device).add_(1)
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes a few calls for a tool to look at.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--probe", action="store_true", help="a kernel of PyTorch")
    which.add_argument("--case", help="a case of `fastbb_kernels.cases`, after a warm-up")
    which.add_argument("--small", choices=op_names(), help="small cases of an op")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    signal.alarm(_TOOL_S)  # if the tool was killed, but not this process
    if options.probe:
        _probe(options.dry_run)
    elif options.case:
        known = small_cases() if options.dry_run else real_cases()
        cases = [case for case in known if case.name == options.case]
        if not cases:
            parser.error(f"no such case: {options.case}")
        _make_calls(cases[:1], 3, options.dry_run)
    else:
        cases = [case for case in small_cases() if case.op == options.small]
        _make_calls(cases[: 1 if options.dry_run else _N_SMALL], 1, options.dry_run)


if __name__ == "__main__":
    main()
