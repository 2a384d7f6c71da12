"""Allowed costs of each op by case: committed as JSON, with a diff that is reviewed like code.

`make budgets` measures and rewrites the files of `budgets/`; a test measures again and compares.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import triton

from .._dispatch import Architecture as ArchitectureName
from ..architectures import ARCHITECTURES
from ..recorder import Recording
from .binary import BinaryFacts, binary_facts

_PACKAGE = Path(__file__).parent.parent
BUDGETS = _PACKAGE / "budgets"

# the compiler is pinned, so shares only change with the code; this allows a single instruction
_SHARE_TOLERANCE = 0.01

_ADVICE = "if that is meant, run `make budgets` and review the diff"


@dataclass(frozen=True)
class BinaryCost:
    """Costs of a case on an architecture: those of the worst kernel that it launches.

    Attributes:
        registers: per thread.
        spills: see `BinaryFacts`.
        stack: bytes per thread; on AMD any is scratch memory, hence a spill.
        shared: bytes per CTA.
        mma_class: "HMMA"; of several kernels "HMMA+none".
        occupancy: share of the warps that a multiprocessor could hold.
        wide_share: share of 128-bit accesses among those of global memory.
        floors: predicted microseconds by name, of `call_floors`; empty: not computed.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    mma_class: str
    occupancy: float
    wide_share: float
    floors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, binaries: Iterable[BinaryFacts], floors: Mapping[str, float] | None = None
    ) -> "BinaryCost":
        facts = list(binaries)
        return cls(
            registers=max(f.registers for f in facts),
            spills=sum(f.spills for f in facts),
            stack=max(f.stack for f in facts),
            shared=max(f.shared for f in facts),
            mma_class="+".join(sorted({f.mma_class or "none" for f in facts})),
            occupancy=round(min(f.occupancy for f in facts), 4),
            wide_share=round(min(f.wide_share for f in facts), 4),
            floors={name: round(us, 2) for name, us in (floors or {}).items()},
        )


@dataclass(frozen=True)
class CaseCost:
    """Costs of a case of an op.

    Attributes:
        launches: of kernels.
        minimal_bytes: every distinct element read once and every output written once.
        requested_bytes: sum of the kernels' accesses; None: the case was not traced.
        binaries: by architecture.
    """

    launches: int
    minimal_bytes: int
    requested_bytes: int | None
    binaries: Mapping[ArchitectureName, BinaryCost]

    @classmethod
    def of(
        cls,
        recordings: Mapping[ArchitectureName, Recording],
        requested_bytes: int | None = None,
        floors: Mapping[ArchitectureName, Mapping[str, float]] | None = None,
    ) -> "CaseCost":
        """Makes the costs from the recordings of `fake_gpu()` of a call on each architecture.

        Args:
            recordings: by architecture.
            requested_bytes: None: the case was not traced.
            floors: of `call_floors` by architecture, where they are computed.
        """
        return cls(
            launches=max(len(recording.launches) for recording in recordings.values()),
            minimal_bytes=max(recording.n_bytes for recording in recordings.values()),
            requested_bytes=requested_bytes,
            binaries={
                arch: BinaryCost.of(map(binary_facts, recording.kernels), (floors or {}).get(arch))
                for arch, recording in recordings.items()
            },
        )


@dataclass(frozen=True)
class Allowance:
    """A rule that some cases may break, and the reason.

    Attributes:
        case: pattern of case ids, with `*` and `?`.
        arch: the architecture.
        allows: "spills", or "mma_class" (another than the architecture's best).
        reason: for the reader of the file.
    """

    case: str
    arch: ArchitectureName
    allows: str
    reason: str


@dataclass(frozen=True)
class Budget:
    """Measured or committed costs of an op.

    Attributes:
        op: its name.
        source: `source_hash` at the time of the measurement.
        cases: by case id, which contains shape and dtype.
        allowances: written by hand; rewriting the file keeps them.
        triton: the version that compiled the binaries.
    """

    op: str
    source: str
    cases: Mapping[str, CaseCost]
    allowances: tuple[Allowance, ...] = ()
    triton: str = field(default_factory=lambda: triton.__version__)


def source_hash(op: str) -> str:
    """Returns a digest of the sources that decide an op's costs, and of Triton's version.

    The sources are `ops/<op>.py`, `triton_kernels/<op>.py`, the other modules of `triton_kernels`
    that this imports, directly or not, and the tables in `configs/<GPU>.json` by which they launch.
    `kernel.py` is none of them: it launches what others decide.
    """
    files, pending = set(), [_PACKAGE / "triton_kernels" / f"{op}.py"]
    while pending:
        path = pending.pop()
        if path in files or not path.is_file() or path.stem == "kernel":
            continue
        files.add(path)
        pending += [path.parent / f"{name}.py" for name in _siblings(path.read_text())]
    files.add(_PACKAGE / "ops" / f"{op}.py")

    digest = hashlib.sha256(f"triton {triton.__version__}".encode())
    tables: set[str] = set()
    for path in sorted(files):
        source = path.read_bytes()
        digest.update(f"\n{path.relative_to(_PACKAGE).as_posix()}\n".encode() + source)
        tables.update(re.findall(r'chosen_config\(\s*"(\w+)"', source.decode()))
    for path in sorted(_PACKAGE.glob("configs/*.json")):
        measured = json.loads(path.read_text())["configs"]
        for table in sorted(tables & measured.keys()):
            digest.update(f"\n{path.name} {table} {json.dumps(measured[table])}".encode())
    return digest.hexdigest()


def _siblings(source: str) -> list[str]:
    """Finds the modules of the same package that a module imports."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    found = []
    for node in imports:
        if node.level == 1:
            found += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def read_budget(op: str, folder: Path = BUDGETS) -> Budget:
    """Reads the committed budget of an op.

    Raises:
        FileNotFoundError: the op has no budget.
        ValueError: the file does not have the form of `write_budget`; the message names it.
    """
    path = folder / f"{op}.json"
    try:
        content = json.loads(path.read_text())
        return Budget(
            op,
            content["source"],
            {case: _case_from(entry) for case, entry in content["budgets"].items()},
            tuple(
                Allowance(**{**entry, "arch": _arch_from(str(entry["arch"]))})
                for entry in content["allowances"]
            ),
            content["triton"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no budget: {type(error).__name__}: {error}") from error


def write_budget(op: str, cases: Mapping[str, CaseCost], folder: Path = BUDGETS) -> Path:
    """Replaces the committed costs of an op; its allowances stay.

    The file has one line per case and architecture, in a fixed order.
    """
    path = folder / f"{op}.json"
    allowances = read_budget(op, folder).allowances if path.exists() else ()
    lines = ["{", f'  "source": {json.dumps(source_hash(op))},', '  "allowances": [']
    lines += _with_commas(f"    {json.dumps(asdict(allowance))}" for allowance in allowances)
    lines += ["  ],", '  "budgets": {']
    entries = []
    for name in sorted(cases, key=_natural):
        case = cases[name]
        fields = {
            "launches": case.launches,
            "bytes": {"minimal": case.minimal_bytes, "requested": case.requested_bytes},
            **{
                str(arch): _entry_of(case.binaries[arch])
                for arch in ARCHITECTURES
                if arch in case.binaries
            },
        }
        body = _with_commas(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items())
        entries.append("\n".join([f"    {json.dumps(name)}: {{", *body, "    }"]))
    lines += [*_with_commas(entries), "  },"]
    lines += [f'  "triton": {json.dumps(triton.__version__)}', "}", ""]
    folder.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def violations(measured: Budget, committed: Budget) -> list[str]:
    """Returns a sentence for each cost of `measured` that exceeds `committed`.

    It compares only measured values, so a measurement may have some of the cases or architectures.
    For binaries of another Triton than the budget's, it checks only the rules for all versions: no
    spills, and the matrix instructions. `unenforced` returns the other differences.
    """
    same = measured.triton == committed.triton
    found = [
        f"{committed.op}: the allowance of {a.allows} for {a.case} on {_label(a.arch)} gives no "
        f"reason; write one into budgets/{committed.op}.json"
        for a in committed.allowances
        if not a.reason.strip()
    ]
    if same and measured.source != committed.source:
        found.append(
            f"{committed.op}: its source or Triton changed since the budget was measured; "
            f"run `make budgets` and review the diff"
        )
    for name, case in measured.cases.items():
        where = f"{committed.op}, {name}"
        budget = committed.cases.get(name, CaseCost(case.launches, 0, case.requested_bytes, {}))
        if same and name not in committed.cases:
            found.append(f"{where}: there is no budget for this case; {_ADVICE}")
            continue
        found += _over(where, "kernel launches", budget.launches, case.launches)
        if case.requested_bytes is not None:
            limit = budget.requested_bytes
            found += _over(where, "bytes requested", limit or 0, case.requested_bytes)
        for arch, cost in case.binaries.items():
            place = f"{where}, {_label(arch)}"
            allowed = {
                a.allows
                for a in committed.allowances
                if a.arch == arch and fnmatch(name, a.case) and a.reason.strip()
            }
            limits = budget.binaries.get(arch)
            if limits is None and same:
                found.append(f"{place}: there is no budget for this architecture; {_ADVICE}")
                continue
            found += _broken_rules(place, arch, cost, limits, allowed)
            if limits is not None and same:
                if "spills" in allowed:
                    found += _over(place, "spills", limits.spills, cost.spills)
                found += _over_limits(place, cost, limits)
    return found


def unenforced(measured: Budget, committed: Budget) -> list[str]:
    """Returns sentences on exceeded limits that apply only to the Triton of `committed`."""
    if measured.triton == committed.triton:
        return []
    as_limits = replace(committed, triton=measured.triton, source=measured.source)
    enforced = violations(measured, committed)
    found = [sentence for sentence in violations(measured, as_limits) if sentence not in enforced]
    return [sentence.removesuffix(f"; {_ADVICE}") for sentence in found]


def _broken_rules(
    place: str,
    arch: ArchitectureName,
    cost: BinaryCost,
    budget: BinaryCost | None,
    allowed: set[str],
) -> list[str]:
    """Returns broken rules that apply to the binaries of every version of Triton."""
    architecture = ARCHITECTURES[arch]
    found = []

    scratch = 0 if architecture.is_nvidia else cost.stack
    if (cost.spills or scratch) and "spills" not in allowed:
        found.append(
            f"{place}: wanted 0 spills, came {cost.spills} and {cost.stack} B of stack; use "
            f"smaller tiles or more warps, or add an allowance with its reason to the budget file"
        )
    lesser = set(cost.mma_class.split("+")) - {architecture.mma_class, "none"}
    if lesser and "mma_class" not in allowed:
        found.append(
            f"{place}: wanted matrix instructions {architecture.mma_class}, came "
            f"{cost.mma_class}; change tiles or warps, or add an allowance with its reason to the "
            f"budget file"
        )
    elif budget is not None and cost.mma_class != budget.mma_class:
        found.append(
            f"{place}: wanted matrix instructions {budget.mma_class}, came {cost.mma_class}; "
            f"{_ADVICE}"
        )
    return found


def _over_limits(place: str, cost: BinaryCost, budget: BinaryCost) -> list[str]:
    """Returns costs beyond the budget, of binaries compiled by the Triton of the budget."""
    return [
        *_over(place, "bytes of stack", budget.stack, cost.stack),
        *_over(place, "bytes of shared memory", budget.shared, cost.shared),
        *_under(place, "occupancy", budget.occupancy, cost.occupancy),
        *_under(place, "share of 128-bit accesses", budget.wide_share, cost.wide_share),
        *_slower(place, cost.floors, budget.floors),
    ]


def _slower(place: str, came: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """Returns that the largest floor rose; the others bound nothing."""
    if not came or not limits:
        return []
    largest, most = max(came, key=lambda name: came[name]), max(limits.values())
    if came[largest] <= most * (1 + _SHARE_TOLERANCE):
        return []
    return [
        f"{place}: wanted no floor above {most:.1f} µs (predicted), came {came[largest]:.1f} µs of "
        f"{largest}; {_ADVICE}"
    ]


def _over(place: str, what: str, limit: int, came: int) -> list[str]:
    if came <= limit:
        return []
    return [f"{place}: wanted at most {limit} {what}, came {came}; {_ADVICE}"]


def _under(place: str, what: str, limit: float, came: float) -> list[str]:
    if came >= limit - _SHARE_TOLERANCE:
        return []
    return [f"{place}: wanted {what} >= {limit:.2f}, came {came:.2f}; {_ADVICE}"]


def _label(arch: ArchitectureName) -> str:
    return ARCHITECTURES[arch].label


def _entry_of(cost: BinaryCost) -> dict[str, Any]:
    entry = asdict(cost)
    return entry if cost.floors else {k: v for k, v in entry.items() if k != "floors"}


def _case_from(entry: Mapping[str, Any]) -> CaseCost:
    binaries = {key: cost for key, cost in entry.items() if key not in ("launches", "bytes")}
    return CaseCost(
        entry["launches"],
        entry["bytes"]["minimal"],
        entry["bytes"]["requested"],
        {_arch_from(key): BinaryCost(**cost) for key, cost in binaries.items()},
    )


def _arch_from(key: str) -> ArchitectureName:
    """Converts a key of JSON; NVIDIA's architectures are numbers."""
    names = {str(name): name for name in ARCHITECTURES}
    if key not in names:
        raise ValueError(f"{key!r} is none of the architectures {list(names)}")
    return names[key]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts b2 before b16."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _with_commas(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return [f"{line}," for line in lines[:-1]] + lines[-1:]
