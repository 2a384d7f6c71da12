"""Times every op beside eager PyTorch, at the shapes of real models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_checks import dry_cases
from gpu_device import on_device
from gpu_measure import PRECISIONS, Clock, peaks, precision
from gpu_work import Work
from torch.utils.flop_counter import FlopCounterMode

from fastbb_kernels import use_impl
from fastbb_kernels._dispatch import unchecked
from fastbb_kernels.case import Case
from fastbb_kernels.cases import real_cases
from fastbb_kernels.comparison import case_problem
from fastbb_kernels.op import Op, find_op

# timed cases, the first ones first
TIMED = ("swin_t-224-b64-", "resnet50-224-b64-", "mobile-224-b64-", "swin_t-224-b8-")
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
_CASE_S = 0.15


def ops(work: Work, dry_run: bool) -> None:
    """Times every distinct call of the models: our kernel, eager PyTorch, and a block's parts."""
    if dry_run:
        jobs = {f"{case}, fp32": (case, "fp32") for case in dry_cases()[:2]}
    else:
        known = real_cases()
        cases = [case for begin in TIMED for case in known if case.name.startswith(begin)]
        jobs = {f"{case}, bf16": (case, "bf16") for case in cases}
        short = [case for case in cases if case.name in SHORT_LIST]
        jobs |= {f"{c}, {name}": (c, name) for name in PRECISIONS for c in short}
    with on_device(dry_run) as device, unchecked():
        clock = Clock(device, flush=True)
        for index, (item, (case, name)) in enumerate(work.in_time(jobs)):
            if index % 20 == 0:
                work.say(f"{index} of {len(jobs)} timed")
            with precision(name):
                work.do(item, partial(_time_case, case, name, device, clock))
            torch.cuda.synchronize()  # raises if the device is lost: a new process runs the rest


def _time_case(case: Case, name: str, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Times a case if its result is correct; returns its row."""
    op, dtype = find_op(case.op), PRECISIONS[name]
    row: dict[str, Any] = {"op": case.op, "case": case.name, "precision": name}
    arguments = case.arguments(device, dtype, seed=0)
    reason = op.unsupported(**arguments)
    if reason:
        return {**row, "problem": f"has no kernel here: {reason}"}
    problem = case_problem(case, dtype, device, impl="triton")
    if problem:
        return {**row, "problem": f"wrong, not timed: {problem}"}
    calls: dict[str, Callable[[], object]] = {
        "triton": partial(op.call, **arguments, impl="triton"),
        "eager": partial(op.eager, **arguments),
    }
    if op.is_block:
        calls["its parts, each a kernel"] = partial(_parts, op, arguments)
    for call in calls.values():
        call()
    times = clock.times(calls, max_s=_CASE_S, max_rounds=30 if device.type == "cuda" else 1)
    n_bytes = op.n_bytes(**arguments)
    with FlopCounterMode(display=False) as useful:
        op.eager(**case.arguments("meta", dtype))
    n_flops = useful.get_total_flops()
    return {
        **row,
        "n_bytes": n_bytes,
        "n_flops": n_flops,
        "floor_ms": peaks(device).floor_ms(n_bytes, n_flops, name),
        "times": {name: taken.to_dict() for name, taken in times.items()},
    }


def _parts(op: Op, arguments: dict[str, Any]) -> object:
    with use_impl("eager", ops=(op.name,)):
        return op.call(**arguments)
