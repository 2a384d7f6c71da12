"""Holds every op against its reference: `python -m fastbb_kernels.check`.

Three rungs need no GPU: the op is well formed for torch (opcheck), its kernel computes what the
reference computes in the interpreter, touching what it should, and it compiles for every
architecture within its budget. With a GPU the cases run on it as well.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from ._dispatch import TRITON_DTYPES, Architecture, pretend
from .accuracy import accuracy_problem
from .architectures import ARCHITECTURES
from .case import Case
from .cases import checked_cases, model_cases, real_cases, small_cases
from .comparison import case_problem
from .launching import FEW_IMAGES, Launch, forced, noting
from .op import DTYPE_NAMES, find_op, in_float64, op_names
from .progress import Progress
from .recorder import Recording
from .testing import fake_gpu, record_launches, trace
from .testing.budget import (
    Budget,
    CaseCost,
    read_budget,
    source_hash,
    unenforced,
    violations,
    write_budget,
)
from .testing.floors import call_floors, launch_floors

# the real cases that a check runs on a GPU, beside the small ones
ON_DEVICE = ("swin_t-224-b8", "resnet50-224-b8", "mobile-224-b8")
# architectures for which a check compiles other dtypes than bf16
OTHER_DTYPES_ON: tuple[Architecture, ...] = (90, "gfx942")
# the architecture whose predicted floors are in the budgets
FLOORS_ON: Architecture = 90
# time to compile a case, relative to a run in the interpreter
COMPILE_WEIGHT = 10

_Check = Callable[[Case, torch.dtype], str | None]


def check_registration(case: Case, dtype: torch.dtype) -> None:
    """Runs torch's `opcheck` on the custom op as the public function calls it.

    Raises:
        torch.testing._internal.optests.OpCheckError: schema, fake kernel or tracing are wrong.
    """
    _, args = launch_of(case, "cpu", dtype)
    torch.library.opcheck(find_op(case.op).custom_op, args)


def launch_of(
    case: Case, device: str, dtype: torch.dtype, arch: Architecture | None = None
) -> tuple[Launch, tuple[Any, ...]]:
    """Returns the launch that the custom op of a case runs on GPUs, and its arguments."""
    op, mocked = find_op(case.op), mock.Mock()
    with mock.patch.object(op.kernel, "gpu", mocked), pretend(arch), torch.no_grad():
        op.call(**case.arguments(device, dtype), impl="triton")
    (call,) = mocked.call_args_list
    return op.launch, call.args


@dataclass(frozen=True)
class FirstLaunches:
    """Coverage of a model's binaries by the checks of first launches.

    Attributes:
        n_binaries: distinct ones.
        missed: cases with a binary that the check on few images does not launch.
    """

    n_binaries: int
    missed: tuple[str, ...]


@torch.no_grad()
def first_launches(
    model: str, batches: Sequence[int], dtype: torch.dtype, arch: Architecture
) -> FirstLaunches:
    """Finds the binaries that the self-check would launch for a model's launches; compiles nothing.

    Args:
        model: of `cases.MODELS`, at 224 x 224 pixels.
        batches: numbers of images.
        dtype: of the tensors.
        arch: of the pretended GPU.
    """
    binaries: set[str] = set()
    missed = []
    for case in (case for batch in batches for case in model_cases(model, (224, 224), batch)):
        with pretend(arch):
            if find_op(case.op).unsupported(**case.arguments("meta", dtype)):
                continue
        launch, args = launch_of(case, "meta", dtype, arch)
        with record_launches(arch) as production, noting() as launched:
            launch.run(*args)
        with record_launches(arch) as checked, forced(launched.configs):
            launch.run(*launch.alike(args, FEW_IMAGES, 0))
        found = {one.specialization for one in production.launches}
        if not found <= {one.specialization for one in checked.launches}:
            missed.append(str(case))
        binaries |= found
    return FirstLaunches(len(binaries), tuple(missed))


@dataclass(frozen=True)
class Interpreted:
    """Result of a case in the interpreter.

    Attributes:
        problem: a sentence that describes it, or None.
        minimal_bytes: each distinct element read once and written once, by the tracer.
        requested_bytes: bytes that all programs load and store.
        n_launches: of kernels.
    """

    problem: str | None
    minimal_bytes: int = 0
    requested_bytes: int = 0
    n_launches: int = 0


@torch.no_grad()
def check_interpreted(case: Case, dtype: torch.dtype) -> Interpreted:
    """Runs a case in the interpreter, traced, against the reference in float64.

    A bounds error, race or double write raises at the access; other problems are in the result.
    """
    op = find_op(case.op)
    arguments = case.arguments("cpu", dtype)
    with trace() as traced:
        got = op.call(**arguments, impl="triton")
    traced.assert_written_once()
    problem = accuracy_problem(got, op.eager(**arguments), op.eager(**in_float64(arguments)))
    expected = op.n_bytes(**arguments)
    if problem is None and traced.unique_bytes != expected:
        problem = f"touches {traced.unique_bytes} distinct bytes, n_bytes() says {expected}"
    return Interpreted(problem, traced.unique_bytes, traced.requested_bytes, len(traced.launches))


@cache
def distinct_cases(everything: bool = False) -> dict[str, list[Case]]:
    """Returns, by op, the first case for each distinct set of binaries.

    Args:
        everything: choose among `real_cases`, which takes a minute, not `checked_cases`.
    """
    cases = real_cases() if everything else checked_cases()
    found: dict[str, dict[Any, Case]] = {}
    for case in cases:
        arguments = case.arguments("meta", torch.bfloat16)
        launches = {arch: _recording(case, arguments, arch) for arch in ARCHITECTURES}
        binaries = tuple(
            tuple(launch.specialization for launch in recording.launches)
            for recording in launches.values()
        )
        if any(binaries):
            found.setdefault(case.op, {}).setdefault(binaries, case)
    return {op: list(cases.values()) for op, cases in found.items()}


@torch.no_grad()
def _recording(
    case: Case, arguments: dict[str, Any], arch: Architecture, compiled: bool = False
) -> Recording:
    """Returns the launches of a case; none if the op does not support the architecture."""
    op = find_op(case.op)
    with (fake_gpu if compiled else record_launches)(arch) as recording:
        if op.unsupported(**arguments) is None:
            op.call(**arguments, impl="triton")
    return recording


def compiled_dtypes(arch: Architecture) -> tuple[torch.dtype, ...]:
    """Returns the dtypes that a check compiles for an architecture; others add little."""
    return TRITON_DTYPES if arch in OTHER_DTYPES_ON else (torch.bfloat16,)


def compiled_costs(
    cases: Iterable[Case], dtypes: Sequence[torch.dtype], archs: Sequence[Architecture]
) -> dict[str, CaseCost]:
    """Returns the costs of cases on the architectures that support them, by case and dtype."""
    costs = {}
    for case in cases:
        for dtype in dtypes:
            arguments = case.arguments("meta", dtype)
            recordings = {arch: _recording(case, arguments, arch, True) for arch in archs}
            supported = {arch: r for arch, r in recordings.items() if r.launches}
            if supported:
                floors = _floors(case, arguments, supported) if dtype != torch.float32 else {}
                costs[f"{case}-{DTYPE_NAMES[dtype]}"] = CaseCost.of(supported, floors=floors)
    return costs


@torch.no_grad()
def _floors(
    case: Case, arguments: dict[str, Any], recordings: Mapping[Architecture, Recording]
) -> dict[Architecture, dict[str, float]]:
    """Returns the floors of a case, on `FLOORS_ON` if it is among the recordings."""
    if FLOORS_ON not in recordings:
        return {}
    gpu, recording, op = ARCHITECTURES[FLOORS_ON], recordings[FLOORS_ON], find_op(case.op)
    launches = launch_floors(recording, lambda: op.call(**arguments, impl="triton"), gpu)
    return {FLOORS_ON: call_floors(launches, op.n_bytes(**arguments), gpu)}


def traced_cost(result: Interpreted) -> CaseCost:
    """Returns the part of a budget that the interpreter measures."""
    return CaseCost(result.n_launches, result.minimal_bytes, result.requested_bytes, {})


@dataclass(frozen=True)
class Report:
    """Results of the checks of one op.

    Attributes:
        op: its name.
        cells: the row of the table, by column.
        problems: a sentence each.
        notes: costs beyond a budget that was measured with another version of Triton.
    """

    op: str
    cells: dict[str, str]
    problems: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Plan:
    """Checks to run on one op.

    Attributes:
        op: its name.
        small: small cases for the interpreter and the device.
        dtypes: of the small cases.
        compiled: real cases to compile.
        archs: the architectures to compile for.
        device: the GPU to run on, or None.
        real: real cases that run on it.
    """

    op: str
    small: Sequence[Case]
    dtypes: Sequence[torch.dtype]
    compiled: Sequence[Case]
    archs: Sequence[Architecture]
    device: str | None
    real: Sequence[Case]

    @classmethod
    def of(
        cls,
        op: str,
        archs: Sequence[Architecture],
        dtypes: Sequence[torch.dtype],
        device: str | None,
        quick: bool = False,
    ) -> "Plan":
        """Plans all checks of an op, or with `quick` only one real case."""
        compiled = distinct_cases()[op]
        if quick:
            compiled = [case for case in compiled if _is_compiled(case, archs[0], dtypes[0])][:1]
        real = real_cases() if device is not None and not quick else []
        real = [case for case in real if case.op == op and case.name.startswith(ON_DEVICE)]
        small = [case for case in small_cases() if case.op == op]
        return cls(op, small, dtypes, compiled, archs, device, real)

    def dtypes_on(self, arch: Architecture) -> list[torch.dtype]:
        """The dtypes that are compiled for an architecture."""
        return [dtype for dtype in self.dtypes if dtype in compiled_dtypes(arch)]

    @property
    def weight(self) -> int:
        """Approximate duration: a case in the interpreter counts 1."""
        n_runs = len(self.small[:2]) + len(self.small) * len(self.dtypes)
        if self.device is not None:
            n_runs += (len(self.small) + len(self.real)) * len(self.dtypes)
        n_binaries = sum(len(self.compiled) * len(self.dtypes_on(arch)) for arch in self.archs)
        return n_runs + COMPILE_WEIGHT * n_binaries


def _is_compiled(case: Case, arch: Architecture, dtype: torch.dtype) -> bool:
    return bool(_recording(case, case.arguments("meta", dtype), arch).launches)


def check_op(plan: Plan, progress: Callable[[int], None] = lambda weight: None) -> Report:
    """Runs all rungs of an op, also after one that found a problem.

    Args:
        plan: what to run.
        progress: called with the weight of each step after it has run.
    """
    cells: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    dtypes = plan.dtypes

    def attempt(case: Case, dtype: torch.dtype, check: _Check, weight: int = 1) -> str | None:
        outcome = _attempt(case, dtype, check)
        progress(weight)
        return outcome

    def rung(column: str, checks: Iterator[str | None]) -> None:
        outcomes = list(checks)
        found = [outcome for outcome in outcomes if outcome]
        cells[column] = f"{len(found)} of {len(outcomes)} wrong" if found else f"{len(outcomes)} ok"
        problems.extend(found)

    rung("opcheck", (attempt(case, dtypes[0], check_registration) for case in plan.small[:2]))
    rung(
        "interpreter",
        (attempt(case, dtype, _interpreted_problem) for case in plan.small for dtype in dtypes),
    )
    committed = read_budget(plan.op)
    for arch in plan.archs:
        costs: dict[str, CaseCost] = {}
        compile_case = partial(_compile, arch=arch, costs=costs)
        attempts = [
            attempt(case, dtype, compile_case, COMPILE_WEIGHT)
            for case in plan.compiled
            for dtype in plan.dtypes_on(arch)
        ]
        measured = Budget(plan.op, source_hash(plan.op), costs)
        found = [outcome for outcome in attempts if outcome] + violations(measured, committed)
        cells[str(arch)] = f"{len(found)} wrong" if found else f"{len(costs)} ok" if costs else "-"
        problems.extend(found)
        notes.extend(unenforced(measured, committed))
    if plan.device is not None:
        check = partial(case_problem, device=torch.device(plan.device), impl="triton")
        cases = [*plan.small, *plan.real]
        rung(plan.device, (attempt(case, dtype, check) for case in cases for dtype in dtypes))
    return Report(plan.op, cells, problems, notes)


def _compile(
    case: Case, dtype: torch.dtype, arch: Architecture, costs: dict[str, CaseCost]
) -> None:
    """Adds the cost of a case on an architecture."""
    costs.update(compiled_costs([case], [dtype], [arch]))


def _interpreted_problem(case: Case, dtype: torch.dtype) -> str | None:
    return check_interpreted(case, dtype).problem


def _attempt(case: Case, dtype: torch.dtype, check: _Check) -> str | None:
    """Returns the problem that a check returns or raises, with the name of its case."""
    try:
        problem = check(case, dtype)
    except Exception as error:  # continue: one broken op must not hide the others
        problem = f"{type(error).__name__}: {error}"
    return problem and f"{case.op}, {case}, {DTYPE_NAMES[dtype]}: {problem}"


def rewrite_budget(name: str, everything: bool) -> Path:
    """Measures an op and rewrites its budget.

    Args:
        name: of the op.
        everything: measures every distinct case of `real_cases` in every dtype on every
            architecture, which takes an hour; otherwise the cases that `check_op` compares.
    """
    costs: dict[str, CaseCost] = {}
    for case in distinct_cases(everything)[name]:
        for dtype in TRITON_DTYPES:
            archs = [a for a in ARCHITECTURES if everything or dtype in compiled_dtypes(a)]
            costs |= compiled_costs([case], [dtype], archs)
    for case in small_cases():
        if case.op == name:
            key = f"{case}-{DTYPE_NAMES[torch.bfloat16]}"
            costs[key] = traced_cost(check_interpreted(case, torch.bfloat16))
    return write_budget(name, costs)


def format_table(reports: Sequence[Report]) -> str:
    """Formats one line per op, with aligned columns."""
    columns = list(dict.fromkeys(column for report in reports for column in report.cells))
    rows = [["op", *columns]]
    rows += [
        [report.op, *(report.cells.get(column, "") for column in columns)] for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def report_first_launches(archs: Sequence[Architecture], dtypes: Sequence[torch.dtype]) -> int:
    """Prints how many binaries are checked at their first launch; returns the exit code."""
    is_well = True
    print("binaries of batches 1, 8 and 64 at 224 pixels, by model and GPU:")
    for model in ("swin_t", "swin_b", "resnet50"):
        for arch in archs:
            for dtype in dtypes:
                found = first_launches(model, (1, 8, 64), dtype, arch)
                covered = f"not all are covered: {', '.join(found.missed)}"
                covered = covered if found.missed else "all are covered"
                where = f"{model}, {ARCHITECTURES[arch].label}, {DTYPE_NAMES[dtype]}"
                print(f"{where}: {found.n_binaries}, {covered}")
                is_well &= not found.missed
    return int(not is_well)


def run_plans(plans: Sequence[Plan]) -> list[Report]:
    """Checks ops one after the other, and shows the progress."""
    progress = Progress(sum(plan.weight for plan in plans))
    reports = []
    for plan in plans:
        progress.begin(plan.op)
        reports.append(check_op(plan, progress.step))
    progress.close()
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 without problems, 1 with some."""
    parser = argparse.ArgumentParser(prog="python -m fastbb_kernels.check", description=__doc__)
    archs = {str(arch): arch for arch in ARCHITECTURES}
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    parser.add_argument("--op", action="append", choices=op_names(), help="default: all")
    parser.add_argument("--arch", action="append", choices=list(archs), help="default: all")
    parser.add_argument("--dtype", action="append", choices=list(dtypes), help="default: all")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="about a minute instead of half an hour: bf16 and sm_90 only (unless --dtype and "
        "--arch name others), and of the real cases one for each op",
    )
    parser.add_argument(
        "--write-budgets", action="store_true", help="measure, and rewrite the budgets"
    )
    parser.add_argument(
        "--first-launches",
        action="store_true",
        help="count the binaries of Swin-T, Swin-B and ResNet-50, and whether the check of a first "
        "launch covers them (default dtype: bf16)",
    )
    parser.add_argument(
        "--everything",
        action="store_true",
        help="with --write-budgets: all models and dtypes",
    )
    options = parser.parse_args(argv)
    names = options.op or op_names()
    if options.write_budgets:
        for name in names:
            print(rewrite_budget(name, options.everything), flush=True)
        return 0
    if options.first_launches:
        chosen = [dtypes[dtype] for dtype in options.dtype or ["bf16"]]
        return report_first_launches([archs[arch] for arch in options.arch or archs], chosen)
    default_archs = ["90"] if options.quick else list(archs)
    default_dtypes = ["bf16"] if options.quick else list(dtypes)
    plans = [
        Plan.of(
            name,
            [archs[arch] for arch in options.arch or default_archs],
            [dtypes[dtype] for dtype in options.dtype or default_dtypes],
            "cuda" if torch.cuda.is_available() else None,
            options.quick,
        )
        for name in names
    ]
    reports = run_plans(plans)
    print(format_table(reports))
    for report in reports:
        print(*report.problems, sep="\n", end="\n" if report.problems else "")
    others = sorted({v for name in names if (v := read_budget(name).triton) != triton.__version__})
    if others:
        print(
            f"budgets were measured with triton {', '.join(others)}, this is {triton.__version__}: "
            "their source hashes and limits are not enforced"
        )
        for report in reports:
            print(*(f"note: {note}\n" for note in report.notes), sep="", end="")
    if not torch.cuda.is_available():
        print("no GPU here: nothing ran on a device")
    return int(any(report.problems for report in reports))


if __name__ == "__main__":
    sys.exit(main())
