"""Stages that check the results of kernels and models on this GPU, without timing."""

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_device import device_of, n_processes, on_device
from gpu_measure import PRECISIONS, precision
from gpu_models import FASTBB, GRAPH, cell, graphed, ours, pixels_of, truth
from gpu_work import Work, describe

from fastbb_kernels import KernelWarning, self_check
from fastbb_kernels._dispatch import unchecked
from fastbb_kernels.case import Case
from fastbb_kernels.cases import model_cases, small_cases
from fastbb_kernels.comparison import NotChecked, case_problem
from fastbb_kernels.op import find_op, op_names
from fastbb_kernels.result_cache import ResultCache

MODEL_NAMES = ("swin_t", "resnet50", "swin_b")
BATCHES = (64, 1, 8)
DRY_OPS = ("layer_norm_nchw", "depthwise_conv_bn_act")
_CASE_S = 90.0  # including a compilation, and float64 on a GPU with slow float64
_N_REPLAYS = 30


def production(work: Work, dry_run: bool) -> None:
    """Checks every distinct call of the timed models, at its own shapes, in bf16, against float64.

    This also compiles the binaries for the later stages.
    """
    tasks = {}
    for batch in BATCHES:
        for model in MODEL_NAMES:
            cases = dry_cases()[:1] if dry_run else model_cases(model, (224, 224), batch)
            for case in cases:
                where = {"model": model, "batch": batch, "op": case.op}
                tasks[f"{model}, batch {batch}: {case}"] = partial(
                    _check, [case], "bf16", dry_run, as_launched=True, **where
                )
    n = n_processes(dry_run)
    work.say(f"{len(tasks)} cases, {n} at once")
    work.in_processes(tasks, n, _CASE_S)


def small(work: Work, dry_run: bool) -> None:
    """Checks the small cases of every op in every precision."""
    tasks = {
        f"{op}, {name}": partial(
            _check,
            [case for case in (dry_cases() if dry_run else small_cases()) if case.op == op],
            name,
            dry_run,
            op=op,
            precision=name,
        )
        for name in (["fp32"] if dry_run else PRECISIONS)
        for op in (DRY_OPS if dry_run else op_names())
    }
    work.in_processes(tasks, n_processes(dry_run), _CASE_S)


def dry_cases() -> list[Case]:
    """Returns the smallest cases of some ops."""
    cases = [case for case in small_cases() if case.op in DRY_OPS]
    return [case for case in cases if case.name.startswith(("small", "below"))]


def _check(
    cases: Sequence[Case], name: str, dry_run: bool, as_launched: bool = False, **where: Any
) -> dict[str, Any]:
    """Checks cases; returns a row with their number and problems.

    Args:
        cases: to check; their results are compared completely.
        name: of the precision.
        dry_run: whether this is a dry run.
        as_launched: before that, runs each as a user does, with the check of a first launch.
        where: further fields of the row.
    """
    start = time.perf_counter()
    problems = []
    with on_device(dry_run) as device, precision(name) as dtype:
        for case in cases:
            found = [_first_launch_problem(case, dtype, device, dry_run)] if as_launched else []
            try:
                with unchecked():
                    found.append(case_problem(case, dtype, device, impl="triton"))
            except NotChecked as reason:
                found.append(f"not checked: {reason}")
            problems += [f"{case}: {problem}" for problem in found if problem]
            torch.cuda.empty_cache()  # other processes use this GPU
    seconds = round(time.perf_counter() - start, 2)
    return {**where, "n_cases": len(cases), "problems": problems, "seconds": seconds}


def _first_launch_problem(
    case: Case, dtype: torch.dtype, device: torch.device, dry_run: bool
) -> str | None:
    """Returns why a kernel is turned off when a user launches it, or None."""
    with ExitStack() as stack:
        if dry_run:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            check = self_check.SelfCheck(cache_of=lambda machine: ResultCache(machine, folder))
            stack.enter_context(self_check.use(check))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", KernelWarning)
        try:
            arguments = case.arguments(device, dtype, seed=0)
            find_op(case.op).call(**arguments, impl="triton")
            torch.cuda.synchronize()
        except Exception as error:
            return f"as users launch it: {describe(error)}"
    return None


def devices(work: Work, dry_run: bool) -> None:
    """Checks for errors that only occur with a second GPU, or with a second stream."""
    items = {"a model on the second GPU": _second_gpu, "two graphs on two streams": _two_streams}
    with on_device(dry_run):
        for item, test in work.in_time(items):
            work.do(item, partial(test, dry_run))


def _second_gpu(dry_run: bool) -> dict[str, str]:
    """Runs a model on a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        return {"value": "not done: there is one GPU"}
    device = device_of(1, dry_run)
    one = cell("swin_t", "bf16", 2, dry_run)
    with precision(one.dtype), torch.inference_mode():
        reference = truth(one.name, one.dtype, one.batch, device, dry_run)
        pixels = pixels_of(one, device)
        backbone = ours(one.name, one.dtype, device, dry_run)
        reference.check(backbone(pixels).feature_maps)
        reference.check(graphed(one, pixels)(pixels))
        torch.cuda.synchronize(device)
    return {"value": f"{FASTBB}; {GRAPH}: right"}


def _two_streams(dry_run: bool) -> dict[str, str]:
    """Replays the graphs of two shapes at the same time, and compares with sequential replays."""
    device = device_of(0, dry_run)
    cells = [cell("swin_t", "bf16", batch, dry_run) for batch in (2, 1)]
    n_wrong = 0
    with precision("bf16"), torch.inference_mode():
        pixels = [pixels_of(one, device) for one in cells]
        run = graphed(cells[0], pixels[0])
        expected = [run(x) for x in pixels]
        streams = [torch.cuda.Stream(device) for _ in cells]
        torch.cuda.synchronize()
        for _ in range(2 if dry_run else _N_REPLAYS):
            found = []
            for stream, x in zip(streams, pixels):
                with torch.cuda.stream(stream):
                    found.append(run(x))
            torch.cuda.synchronize()
            n_wrong += sum(
                not torch.equal(got, right)
                for maps, rights in zip(found, expected)
                for got, right in zip(maps, rights)
            )
    if n_wrong:
        return {"problem": f"{n_wrong} maps differ from those of one stream"}
    return {"value": "the same maps as on one stream"}
