"""The stages of `gpu.py` that look at the machine, and at one op at a time."""

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_measure import PRECISIONS, Clock, peaks, precision
from gpu_work import Work, describe
from torch.utils.flop_counter import FlopCounterMode

from fastbb_kernels import self_check, use_impl
from fastbb_kernels.case import Case
from fastbb_kernels.cases import real_cases, small_cases
from fastbb_kernels.machine import Machine
from fastbb_kernels.op import find_op, op_names
from fastbb_kernels.result_cache import ResultCache

PACKAGES = ("transformers", "timm", "torchvision", "numpy", "ml_dtypes")
NVIDIA_SMI = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "compute_mode",
    "mig.mode.current",
)
MOST_PROCESSES = 12  # on the GPU at once, each with a context of its own
# the real cases that are checked, and those that are timed, the first ones first
CHECKED = ("swin_t-224-b8-", "resnet50-224-b8-", "mobile-224-b8-")
TIMED = ("swin_t-224-b64-", "resnet50-224-b64-", "mobile-224-b64-", *CHECKED)
# in fp16, tf32 and fp32
SHORT_LIST = (
    "swin_t-224-b64-stage1-fc1",
    "swin_t-224-b64-stage1-attention-shifted",
    "swin_t-224-b64-stage1-block-shifted",
    "swin_t-224-b64-stage3-qkv",
    "resnet50-224-b64-stem",
    "resnet50-224-b64-stage1-block2-expand",
    "resnet50-224-b64-stage3-block2-conv",
    "mobile-224-b64-480x14-k5-s1",
)
DRY_OPS = ("layer_norm_nchw", "depthwise_conv_bn_act")
# what "auto" runs in their place or in their parts, and which of the two is faster nobody knows
CHOICES = {"conv3x3_bn_act": "cuDNN's fused convolution"}
_CASE_S = 0.15


@contextmanager
def on_device(dry_run: bool) -> Iterator[torch.device]:
    """The device that a stage runs on; in a dry run kernels are interpreted on the CPU."""
    with ExitStack() as stack:
        if dry_run:
            from fastbb_kernels.testing import interpret

            torch.set_num_threads(1)
            stack.enter_context(interpret())
        stack.enter_context(torch.no_grad())
        yield torch.device("cpu" if dry_run else "cuda:0")


# what the machine is


def environment(work: Work, dry_run: bool) -> None:
    """Rows of facts, each by itself, so that one that cannot be had leaves the others."""
    device = torch.device("cpu" if dry_run else "cuda:0")
    facts = _device_facts(device) | _software_facts(device)
    if not dry_run:
        facts |= {
            "bf16 matrix product of 8192^3": lambda: f"{_matmul_flops(device) / 1e12:.0f} TF/s",
            "copy of 2 GiB, read and written": lambda: (
                f"{_copy_bytes_per_s(device) / 1e9:.0f} GB/s"
            ),
        }
    for item, find in facts.items():
        try:
            value = find()
        except Exception as error:
            value = f"unknown ({describe(error)})"
        work.row(item, value=str(value))


_Facts = dict[str, Callable[[], object]]


def _device_facts(device: torch.device) -> _Facts:
    machine = Machine.of(device)
    facts: _Facts = {
        "GPU": lambda: "dry run" if device.type == "cpu" else machine.device,
        "capability": lambda: machine.capability,
        "driver": lambda: machine.driver,
        "peaks": lambda: str(peaks(device)),
    }
    if device.type == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "GPUs": torch.cuda.device_count,
        "memory": lambda: f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": lambda: properties.multi_processor_count,
        "L2": lambda: f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }
    if torch.version.hip is None:
        found = _nvidia_smi()
        facts |= {f"nvidia-smi {name}": lambda n=name: found[n] for name in NVIDIA_SMI}
    return facts


def _software_facts(device: torch.device) -> _Facts:
    facts: _Facts = {
        "python": platform.python_version,
        "torch": lambda: torch.__version__,
        "triton": lambda: Machine.of(device).triton or "not installed",
        "CUDA": lambda: torch.version.cuda or "none",
        "ROCm": lambda: torch.version.hip or "none",
        "cuDNN": lambda: torch.backends.cudnn.version() or "none",
        "kernels": lambda: Machine.of(device).kernels,
        "commit": _commit,
        "CPU": lambda: f"{Machine.of(torch.device('cpu')).device}, {os.cpu_count()} cores",
        "system": platform.platform,
    }
    return facts | {name: partial(_version, name) for name in PACKAGES}


def _nvidia_smi() -> dict[str, str]:
    """Clocks, power and modes of the first GPU; reads only."""
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(NVIDIA_SMI, "no nvidia-smi on PATH")
    query = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    if visible:
        query += ["-i", visible]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return dict(zip(NVIDIA_SMI, done.stdout.splitlines()[0].split(", ")))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return dict.fromkeys(NVIDIA_SMI, f"unknown ({describe(error)})")


def _commit() -> str:
    """The commit of the working tree, and whether files differ from it."""
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return "no git here"

    def git(*arguments: str) -> str:
        # a tree of another user's is only read here
        command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _matmul_flops(device: torch.device) -> float:
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    call = partial(torch.mm, a, b)
    call()
    return 2 * 8192**3 / (1e-3 * Clock(device).times({"": call}, 0.5)[""].median_ms)


def _copy_bytes_per_s(device: torch.device) -> float:
    x = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    call = partial(y.copy_, x)
    call()
    return 2 * x.numel() / (1e-3 * Clock(device).times({"": call}, 0.5)[""].median_ms)


# whether the ops compute what they ought to


def n_processes(dry_run: bool) -> int:
    """How many processes may use the GPU at once."""
    if dry_run:
        return 2
    exclusive = torch.version.hip is None and "Exclusive" in _nvidia_smi()["compute_mode"]
    return 1 if exclusive else min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def check(work: Work, dry_run: bool) -> None:
    """The small cases of every op and then real ones, each op and precision in a process."""
    ops = list(DRY_OPS) if dry_run else op_names()
    names = ["fp32"] if dry_run else list(PRECISIONS)
    tasks: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in names:
        for kind, task in (("small", _small_cases), ("real", _real_cases)):
            for op in ops:
                tasks[f"{op}, {name}, {kind} cases"] = partial(task, op, name, dry_run)
    n = n_processes(dry_run)
    work.say(f"{len(tasks)} checks, {n} at once")
    work.in_processes(tasks, n)


def _small_cases(op: str, name: str, dry_run: bool) -> dict[str, Any]:
    """The self-check that decides in every process whether an op is on; it is remembered."""
    start = time.perf_counter()
    with on_device(dry_run) as device, precision(name) as dtype, ExitStack() as stack:
        if dry_run:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checker = self_check.SelfCheck(cache_of=lambda m: ResultCache(m, folder))
        else:
            checker = self_check.current() or self_check.SelfCheck()
        problem = checker.check_again(op, device, dtype)
    n_cases = sum(case.op == op for case in small_cases())
    problems = [problem] if problem else []
    return _checked("small", op, name, n_cases, problems, start)


def _real_cases(op: str, name: str, dry_run: bool) -> dict[str, Any]:
    start = time.perf_counter()
    chosen = _dry_cases([op])[:1] if dry_run else _named([op], CHECKED)
    problems = []
    with on_device(dry_run) as device, precision(name) as dtype:
        for case in chosen:
            try:
                problem = self_check.case_problem(case, dtype, device, impl="triton")
            except self_check.NotChecked as reason:
                problem = f"not checked: {reason}"
            if problem:
                problems.append(f"{case}: {problem}")
    return _checked("real", op, name, len(chosen), problems, start)


def _checked(
    kind: str, op: str, name: str, n_cases: int, problems: list[str], start: float
) -> dict[str, Any]:
    """A row of the results."""
    return {
        "op": op,
        "precision": name,
        "kind": kind,
        "n_cases": n_cases,
        "problems": problems,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _named(ops: list[str], beginnings: tuple[str, ...]) -> list[Case]:
    """The real cases whose names begin so, in the order of the beginnings."""
    cases = [case for case in real_cases() if case.op in ops]
    return [case for begin in beginnings for case in cases if case.name.startswith(begin)]


def _dry_cases(ops: list[str]) -> list[Case]:
    """The smallest cases of some ops."""
    cases = [case for case in small_cases() if case.op in ops]
    return [case for case in cases if case.name.startswith(("small", "below"))]


# how fast they are


def build(work: Work, dry_run: bool) -> None:
    """Compiles the kernels of the timed models, in as many processes as there are cores.

    Nothing is timed; Triton's cache keeps the kernels for the stages that follow.
    """
    from gpu_models import BATCHES, MODEL_NAMES, build_model

    tasks = {
        f"{model}, {name}": partial(build_model, model, name, BATCHES, dry_run)
        for name in PRECISIONS
        for model in MODEL_NAMES
    }
    if dry_run:
        tasks = {"swin_t, fp32": partial(build_model, "swin_t", "fp32", (1,), dry_run)}
    work.in_processes(tasks, n_processes(dry_run))


def tune(work: Work, dry_run: bool) -> None:
    """What mode "auto" of the engine measures and chooses, bf16."""
    from gpu_models import tuned

    cells = {
        f"{model}, bf16, batch {batch}": (model, "bf16", batch)
        for batch in (64, 1, 8)
        for model in ("swin_t", "resnet50")
    }
    if dry_run:
        cells = {"swin_t, fp32, batch 1": ("swin_t", "fp32", 1)}
    for item, (model, name, batch) in work.in_time(cells):
        work.say(item)
        try:
            work.row(item, **tuned(model, name, batch, dry_run))
        except Exception as error:
            work.row(item, problem=describe(error))
        _synchronize(dry_run)


def ops(work: Work, dry_run: bool) -> None:
    """Every distinct call of the shipped models: our kernel, eager PyTorch, and what else can."""
    if dry_run:
        jobs = {f"{case}, fp32": (case, "fp32") for case in _dry_cases(list(DRY_OPS))[:2]}
    else:
        cases = _named(op_names(), TIMED)
        jobs = {f"{case}, bf16": (case, "bf16") for case in cases if "-b64-" in case.name}
        short = [case for case in cases if case.name in SHORT_LIST]
        jobs |= {f"{c}, {name}": (c, name) for name in PRECISIONS for c in short}
        jobs |= {f"{case}, bf16": (case, "bf16") for case in cases}
    with on_device(dry_run) as device:
        clock = Clock(device, flush=True)
        for index, (item, (case, name)) in enumerate(work.in_time(jobs)):
            if index % 20 == 0:
                work.say(f"{index} of {len(jobs)} timed")
            try:
                with precision(name):
                    row = _time_case(case, name, device, clock)
            except Exception as error:
                row = {"problem": describe(error)}
            work.row(item, op=case.op, case=case.name, precision=name, **row)
            _synchronize(dry_run)


def _synchronize(dry_run: bool) -> None:
    """Raises where the device is lost to this process: what is left gets a new one."""
    if not dry_run:
        torch.cuda.synchronize()


def _time_case(case: Case, name: str, device: torch.device, clock: Clock) -> dict[str, Any]:
    """The row of a case; a wrong result is not timed."""
    op, dtype = find_op(case.op), PRECISIONS[name]
    arguments = case.arguments(device, dtype, seed=0)
    reason = op.unsupported(**arguments)
    if reason:
        return {"problem": f"has no kernel here: {reason}"}
    problem = self_check.case_problem(case, dtype, device, impl="triton")
    if problem:
        return {"problem": f"wrong, not timed: {problem}"}
    calls: dict[str, Callable[[], object]] = {
        "triton": lambda: op.call(**arguments, impl="triton"),
        "eager": lambda: op.eager(**arguments),
    }
    other = "its parts, each a kernel" if op.is_block else CHOICES.get(case.op)
    if other and device.type == "cuda":
        calls[other] = lambda: _other(op.call, case.op, op.is_block, arguments)
    for call in calls.values():
        call()
    times = clock.times(calls, max_s=_CASE_S)
    n_bytes = op.n_bytes(**arguments)
    with FlopCounterMode(display=False) as useful:
        op.eager(**case.arguments("meta", dtype))
    n_flops = useful.get_total_flops()
    return {
        "n_bytes": n_bytes,
        "n_flops": n_flops,
        "floor_ms": peaks(device).floor_ms(n_bytes, n_flops, name),
        "times": {name: taken.to_dict() for name, taken in times.items()},
    }


def _other(
    call: Callable[..., object], op: str, is_block: bool, arguments: dict[str, Any]
) -> object:
    """A call of an op as "auto" runs it, or by its parts."""
    if not is_block:
        return call(**arguments, impl="auto")
    with use_impl("eager", ops=(op,)):
        return call(**arguments)
