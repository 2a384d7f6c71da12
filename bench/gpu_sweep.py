"""Finds the fastest launch configuration by shape: compiles ahead, checks and times candidates.

It writes a configuration that is faster by more than the noise to the file that launches read.
"""

import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from gpu_candidates import candidates
from gpu_device import nvidia_smi, on_device
from gpu_environment import commit
from gpu_libraries import LIBRARIES
from gpu_measure import graph_of, graph_us, precision
from gpu_pretended import ARCHITECTURE
from gpu_report import DRY_RUN
from gpu_work import Work, describe, read_lines
from torch import Tensor

from fastbb_kernels import library, self_check
from fastbb_kernels._dispatch import Architecture, unchecked
from fastbb_kernels.accuracy import accuracy_problem
from fastbb_kernels.architectures import find_architecture
from fastbb_kernels.case import Case
from fastbb_kernels.cases import real_cases, small_cases
from fastbb_kernels.launching import Launched, forced, noting
from fastbb_kernels.machine import Machine
from fastbb_kernels.measured import SECTION, config_path, plain_sizes, write_configs
from fastbb_kernels.op import Op, find_op, in_float64
from fastbb_kernels.ops.conv3x3_bn_act import Conv3x3Way, usual_way
from fastbb_kernels.precompiling import n_cores
from fastbb_kernels.supported_gpus import named

# ops that take most of the models' time, the most important first
SHAPES = (
    *(f"swin_t-224-b64-stage3-{call}" for call in ("fc1-folded", "fc2", "qkv-folded", "proj")),
    "swin_t-224-b64-stage3-attention",
    *(f"swin_t-224-b64-stage1-{call}" for call in ("mlp", "block", "attention", "fc1")),
    *(f"resnet50-224-b64-stage{stage}-block2-expand" for stage in (1, 2, 3, 4)),
    *(f"resnet50-224-b64-stage{stage}-block2-reduce" for stage in (1, 3, 4)),
    *(f"swin_b-224-b64-stage3-{call}" for call in ("fc1-folded", "fc2", "qkv-folded", "proj")),
    *(f"swin_t-224-b64-stage2-{call}" for call in ("mlp", "block")),
    *(f"swin_t-224-b64-stage4-{call}" for call in ("fc1-folded", "fc2", "merge")),
    *(f"resnet50-224-b64-stage{stage}-block1-dual" for stage in (1, 4)),
    "resnet50-224-b64-stem",
    "resnet50-224-b64-stage3-block2-conv",
    *(f"swin_t-224-b1-stage3-{call}" for call in ("fc1-folded", "fc2")),
    "resnet50-224-b1-stage3-block2-expand",
)
_DRY_SHAPES = ("below-14x21-b3-stem-norm", "below-14x21-b3-stage1-proj")
_MOST_IN_DRY_RUN = 3
_WAY_TABLE = "conv3x3_way"
_COMPILED = "compiled"  # file in the folder of the stage's file
_COMPILE_S = 90.0
_SCREEN_S, _FINAL_S = 0.02, 0.03
_N_FINALISTS, _N_ROUNDS = 4, 5
_GAIN = 1.03  # less is noise
_MOST_SETS, _LEAST_CALLS = 8, 4


@dataclass(frozen=True)
class Shape:
    """A call whose fastest configuration is to be found.

    Attributes:
        case: the call.
        table: name of the choice.
        sizes: arguments of the choice, by name.
        configs: the default of this architecture, then others.
    """

    case: Case
    table: str
    sizes: dict[str, Any]
    configs: list[Any]


@contextmanager
def sweeping(dry_run: bool) -> Iterator[torch.device]:
    """Yields the device; sets bf16, and lets kernels launch without checks, inside the block."""
    with ExitStack() as stack:
        device = stack.enter_context(on_device(dry_run))
        stack.enter_context(precision("bf16"))
        stack.enter_context(unchecked())
        yield device


def architecture_of_gpu(dry_run: bool) -> Architecture:
    """Returns the first GPU's architecture without CUDA, which a forking process must not use.

    Raises:
        ValueError: the architecture cannot be found out, or is not in the table.
    """
    if dry_run:
        return ARCHITECTURE
    return find_architecture(named(nvidia_smi()["compute_cap"])).name


def shapes(where: Architecture | torch.device, dry_run: bool) -> list[Shape]:
    """Returns the shapes to sweep, with their candidates.

    Args:
        where: an architecture, for which nothing compiles or runs; or a device, on which the
            default is launched.
        dry_run: whether to return a few small shapes only.
    """
    cases = {case.name: case for case in (small_cases() if dry_run else real_cases())}
    found: dict[str, Shape] = {}
    for name in _DRY_SHAPES if dry_run else SHAPES:
        case = cases[name]
        launched = _launched(case, where)
        for table, default in launched.configs.items():
            sizes = dict(zip(_parameters(table), launched.sizes[table]))
            configs = candidates(table, default, sizes)[: _MOST_IN_DRY_RUN if dry_run else None]
            key = table + json.dumps(plain_sizes(sizes))
            found.setdefault(key, Shape(case, table, sizes, configs))
    return list(found.values())


@torch.no_grad()
def _launched(case: Case, where: Architecture | torch.device) -> Launched:
    """Returns the launches of a call; none if its op has no kernel."""
    with ExitStack() as stack:
        if isinstance(where, torch.device):
            device = where
        else:
            from fastbb_kernels.recorder import record_launches

            stack.enter_context(record_launches(where))
            device = torch.device("meta")
        launched = stack.enter_context(noting())
        op, arguments = find_op(case.op), case.arguments(device, torch.bfloat16)
        if op.unsupported(**arguments) is None:
            op.call(**arguments, impl="triton")
    return launched


def _parameters(table: str) -> list[str]:
    """Returns the names of the arguments of a table's choice, without the architecture."""
    if table == _WAY_TABLE:
        choose = usual_way
    elif table.endswith("_way"):
        choose = library.usual_way
    else:
        choose = import_module(f"fastbb_kernels.triton_kernels.{table}").launch_config
    return [name for name in inspect.signature(choose).parameters if name != "arch"]


# compiling


def compile_ahead(work: Work, dry_run: bool) -> None:
    """Compiles all candidates on all cores, without the GPU; Triton's cache keeps them."""
    try:
        arch = architecture_of_gpu(dry_run)
    except Exception as reason:  # the sweep itself then compiles, as far as its time allows
        work.row("compiled ahead", problem=f"nothing: {describe(reason)}")
        return
    tasks = {}
    ranked: dict[str, tuple[int, Any, list[Shape]]] = {}
    for shape in shapes(arch, dry_run):
        for rank, config in enumerate(shape.configs):
            # most shapes share the binary of a configuration
            least, _, of_it = ranked.setdefault(f"{shape.table} {config}", (rank, config, []))
            of_it.append(shape)
            ranked[f"{shape.table} {config}"] = min(least, rank), config, of_it
    for name, (_, config, of_it) in sorted(ranked.items(), key=lambda item: item[1][0]):
        tasks[name] = partial(_compile, work, config, of_it, arch)
    work.say(f"{len(tasks)} configurations, {n_cores()} at once")
    work.in_processes(tasks, n_cores(), _COMPILE_S)


def _compile(work: Work, config: Any, of_it: Sequence[Shape], arch: Architecture) -> dict[str, Any]:
    from fastbb_kernels.pretend_gpu import fake_gpu

    start = time.perf_counter()
    refused = []
    for shape in of_it:
        arguments = shape.case.arguments("meta", torch.bfloat16)
        try:
            with torch.no_grad(), fake_gpu(arch), forced({shape.table: config}):
                find_op(shape.case.op).call(**arguments, impl="triton")
        except Exception as error:  # it is too large, or the compiler refuses it
            refused.append(f"{shape.case}: {describe(error)}")
            continue
        with work.file.with_name(_COMPILED).open("a") as file:
            file.write(json.dumps({"compiled": _key(shape, config)}) + "\n")
    seconds = round(time.perf_counter() - start, 2)
    return {"refused": refused, "seconds": seconds}


def _key(shape: Shape, config: Any) -> str:
    return f"{shape.case} {shape.table} {config}"


def _compiled(work: Work) -> set[str] | None:
    """Reads the names of compiled configurations; None: nothing was compiled ahead."""
    file = work.file.with_name(_COMPILED)
    return {line["compiled"] for line in read_lines(file)} if file.exists() else None


# timing


def sweep(work: Work, dry_run: bool) -> None:
    """Times the configurations of each shape; those that are wrong cannot win."""
    compiled = _compiled(work)
    found = [] if compiled is None else shapes(architecture_of_gpu(dry_run), dry_run)
    with sweeping(dry_run) as device:
        found = found or shapes(device, dry_run)
        path = _file_of_dry_run(work) if dry_run else None
        for item, shape in work.in_time({f"{s.case}, {s.table}": s for s in found}):
            work.say(item)
            # compiling a configuration here takes seconds, and later shapes need time as well
            share = 2 / max(2, len(found) - found.index(shape))
            row = _fastest(shape, compiled, device, share * work.left_s)
            work.row(item, op=shape.case.op, table=shape.table, **row)
            gain = row.get("default_us", 0.0) / row.get("us", math.inf)
            if gain > _GAIN or (dry_run and gain):
                _keep(shape, row, device, path)
            torch.cuda.synchronize()  # raises if the device is lost: a new process runs the rest
            torch.cuda.empty_cache()  # frees the memory of the graphs


def _fastest(
    shape: Shape, compiled: set[str] | None, device: torch.device, left_s: float
) -> dict[str, Any]:
    """Times the configurations of a shape; returns its row."""
    op, end = find_op(shape.case.op), time.monotonic() + left_s
    sets = _argument_sets(op, shape.case, device)
    reference = Reference.of(op, sets[0])
    refused: dict[str, str] = {}
    screened: dict[str, float] = {}
    by_name: dict[str, Any] = {}

    def recorded(config: Any) -> tuple[torch.cuda.CUDAGraph, int]:
        with forced({} if config is None else {shape.table: config}):
            return _recorded([partial(op.call, **one, impl="triton") for one in sets])

    for config in shape.configs:
        name = str(config)
        if compiled is not None and _key(shape, config) not in compiled:
            refused[name] = "not compiled ahead"
            continue
        if screened and time.monotonic() > end:
            break
        try:
            with forced({shape.table: config}):
                problem = reference.problem(partial(op.call, **sets[0], impl="triton"))
            if problem is None:
                screened[name] = graph_us(*recorded(config), _SCREEN_S)
                by_name[name] = config
        except Exception as error:
            problem = describe(error)
            torch.cuda.synchronize()  # raises if this configuration lost the device
        if problem:
            refused[name] = problem
    n_tried = len(screened) + len(refused)
    if not screened:
        return {"problem": f"no configuration is right: {refused}"}
    finalists = sorted(screened, key=lambda name: screened[name])[:_N_FINALISTS]
    # None is the present configuration
    graphs = {None: recorded(None), **{name: recorded(by_name[name]) for name in finalists}}
    taken: dict[str | None, list[float]] = {name: [] for name in graphs}
    for _ in range(_N_ROUNDS):
        for name, graph in graphs.items():
            taken[name].append(graph_us(*graph, _FINAL_S))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    best = min(finalists, key=lambda name: medians[name])
    return {
        "config": by_name[best],
        "us": medians[best],
        "default_us": medians[None],
        "n_tried": n_tried,
        "n_candidates": len(shape.configs),
        "screened_us": screened,
        "refused": refused,
        "libraries": _libraries(shape.case.op, sets),
    }


def _argument_sets(op: Op, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Makes arguments of a call, several sets if the cache would keep one from call to call."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    n_bytes = op.n_bytes(**case.arguments("meta", torch.bfloat16))
    n_sets = max(1, min(_MOST_SETS, math.ceil(1.5 * cache / n_bytes)))
    return [case.arguments(device, torch.bfloat16, seed) for seed in range(n_sets)]


def _recorded(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """Records all calls in a graph, repeatedly if they are few; returns it and its call count."""
    many = [*calls] * math.ceil(_LEAST_CALLS / len(calls))
    many[0]()
    return graph_of(many), len(many)


def _graph_time(calls: Sequence[Callable[[], object]], max_s: float) -> float:
    """Returns microseconds per call, from replays of a graph of all calls."""
    return graph_us(*_recorded(calls), max_s)


@dataclass(frozen=True)
class Reference:
    """Reference results of a call."""

    eager: Tensor
    exact: Tensor

    @classmethod
    def of(cls, op: Op, arguments: dict[str, Any]) -> "Reference":
        return cls(op.eager(**arguments), op.eager(**in_float64(arguments)))

    def problem(self, call: Callable[[], Tensor]) -> str | None:
        """Returns the problem of the results of two calls, or None."""
        results = []
        for _ in range(2):
            # so that the memory of the next result holds NaN
            nans = torch.full_like(self.eager, torch.nan)
            del nans
            results.append(call())
            torch.cuda.synchronize()
            problem = accuracy_problem(results[-1], self.eager, self.exact)
            if problem is not None:
                return problem
        return None if torch.equal(*results) else "two runs with the same inputs differ"


def _libraries(op: str, sets: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns microseconds of library functions for the same call, or for its product alone."""
    found = {}
    for name, make in {"eager": find_op(op).eager, **LIBRARIES.get(op, {})}.items():
        with suppress(Exception):  # the library does not support this shape
            found[name] = _graph_time([partial(make, **one) for one in sets], _FINAL_S)
    return found


def _file_of_dry_run(work: Work) -> Path:
    return work.out / "configs" / "dry-run.json"


def _keep(shape: Shape, row: dict[str, Any], device: torch.device, path: Path | None) -> None:
    """Adds the fastest configuration to those that launches read."""
    entry = {
        "sizes": plain_sizes(shape.sizes),
        "config": row["config"],
        "us": round(row["us"], 2),
        "default_us": row["default_us"] and round(row["default_us"], 2),
    }
    machine = Machine.of(device)
    in_checkout = (Path(__file__).parents[1] / ".git").exists()
    cache = self_check.SelfCheck().cache(device) if path is None and not in_checkout else None
    file = path or config_path(machine.device)
    if cache is not None:
        tables: dict[str, Any] = cache.items(SECTION)
    else:
        tables = json.loads(file.read_text())["configs"] if file.exists() else {}
    others = [old for old in tables.get(shape.table, []) if old["sizes"] != entry["sizes"]]
    entries = [*others, entry]
    if cache is not None:
        cache.put(SECTION, shape.table, entries)
        return
    facts = {
        **({"label": DRY_RUN} if path is not None else {}),
        "commit": commit(),
        "torch": machine.torch,
        "triton": machine.triton,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_configs(machine.device, {**tables, shape.table: entries}, facts, file)


# choice between kernels and libraries


@dataclass(frozen=True)
class Contest:
    """A choice between ways to compute an op.

    Attributes:
        table: name of the choice.
        ways: by their names.
        usual: makes the choice without a measurement.
    """

    table: str
    ways: dict[str, Any]
    usual: Callable[..., Any]


CONV3X3 = Contest(
    _WAY_TABLE, {name: Conv3x3Way(name) for name in ("fused", "plain", "triton")}, usual_way
)


def of_library(op: Op) -> Contest:
    """The choice between the kernel of an op and a library."""
    assert op.library is not None
    ways = {name: library.Way(name) for name in (library.KERNEL, library.LIBRARY)}
    return Contest(op.library.table, ways, library.usual_way)


def conv3x3(work: Work, dry_run: bool) -> None:
    """Times 3x3 convolutions: cuDNN's fused one, its plain one with our epilogue, and ours."""
    names = ("bottleneck",) if dry_run else ("resnet50-224-b", "resnet18-224-b64")
    known = small_cases() if dry_run else real_cases()
    cases = [c for c in known if c.op == "conv3x3_bn_act" and c.name.startswith(names)]
    cases.sort(key=lambda case: "-b64-" not in case.name)
    _contests(work, cases[: 1 if dry_run else None], dry_run)


def libraries(work: Work, dry_run: bool) -> None:
    """Times ops by their kernels and by libraries, at the shapes of the sweep."""
    known = {case.name: case for case in (small_cases() if dry_run else real_cases())}
    names = _DRY_SHAPES[1:] if dry_run else SHAPES
    cases = [known[name] for name in names if find_op(known[name].op).library is not None]
    _contests(work, cases, dry_run)


def _contests(work: Work, cases: Sequence[Case], dry_run: bool) -> None:
    path = _file_of_dry_run(work) if dry_run else None
    with sweeping(dry_run) as device:
        for item, case in work.in_time({str(c): c for c in cases}):
            work.do(item, partial(_contest, case, device, path))
            torch.cuda.synchronize()


def _contest(case: Case, device: torch.device, path: Path | None) -> dict[str, Any]:
    op = find_op(case.op)
    contest = CONV3X3 if op.library is None else of_library(op)
    sets = _argument_sets(op, case, device)
    reference = Reference.of(op, sets[0])
    found: dict[str, float] = {}
    refused = []
    # a dry run chooses nothing
    sizes: dict[str, Any] | None = None
    if path is not None:
        sizes = dict.fromkeys(_parameters(contest.table), 0)
    for name, way in contest.ways.items():
        with forced({contest.table: way}):
            try:
                with noting() as launched:
                    problem = reference.problem(partial(op.call, **sets[0], impl="auto"))
                if contest.table in launched.sizes:
                    sizes = dict(zip(_parameters(contest.table), launched.sizes[contest.table]))
                if _is_other(name, launched) and device.type == "cuda":
                    problem = "it cannot run this call, another one does"
                if problem is None:
                    calls = [partial(op.call, **one, impl="auto") for one in sets]
                    found[name] = _graph_time(calls, _FINAL_S)
            except Exception as error:
                problem = describe(error)
        if problem:
            refused.append(f"{name}: {problem}")
    wins = min(found, key=lambda name: found[name]) if found else "none"
    if found and sizes is not None:
        usual = found.get(contest.usual(**sizes, arch=None).name)
        if usual is None or usual > _GAIN * found[wins] or path is not None:
            row = {"config": [wins], "us": found[wins], "default_us": usual}
            _keep(Shape(case, contest.table, sizes, []), row, device, path)
    return {"us": found | _libraries(case.op, sets), "wins": wins, "refused": refused}


def _is_other(way: str, launched: Launched) -> bool:
    """Whether another way ran, because the chosen one cannot run the call."""
    mark = {"fused": "cuDNN", library.LIBRARY: library.LIBRARY}.get(way)
    return mark is not None and mark not in launched.binaries
