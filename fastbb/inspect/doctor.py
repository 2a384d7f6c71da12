"""What this machine can run, and what to do where it cannot: `fastbb doctor`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .facts import Facts, Package, Results, gather_facts

_MIN_FREE_BYTES = 2**20


@dataclass(frozen=True)
class Finding:
    """Something that could be better.

    Attributes:
        what: it is, a sentence.
        remedy: what to do about it.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Doctor:
    """What `doctor` found; prints problems first.

    Attributes:
        facts: of the machine.
        problems: what is wrong or impossible here.
        hints: what would help, and works without.
    """

    facts: Facts
    problems: tuple[Finding, ...]
    hints: tuple[Finding, ...]

    @classmethod
    def of(cls, facts: Facts) -> "Doctor":
        """Judges facts; asks the machine nothing."""
        return cls(facts, tuple(_problems(facts)), tuple(_hints(facts)))

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it: problems, hints and the facts."""
        values = json.loads(json.dumps(asdict(self)))
        return {"problems": values["problems"], "hints": values["hints"], **values["facts"]}

    def __str__(self) -> str:
        lines = [f"{_count(self.problems, 'problem')}, {_count(self.hints, 'hint')}"]
        for kind, findings in (("problem", self.problems), ("hint", self.hints)):
            for finding in findings:
                lines += [f"{kind}: {finding.what}", f"    {finding.remedy}"]
        rows = list(_rows(self.facts))
        width = max(len(title) for title, _ in rows)
        return "\n".join([*lines, "", *(f"{title:{width}}  {text}" for title, text in rows)])


def doctor() -> Doctor:
    """Looks at this machine; takes a second, computes nothing and raises nothing."""
    return Doctor.of(gather_facts())


def _problems(facts: Facts) -> Iterator[Finding]:
    if facts.torch.error is not None:
        yield Finding(
            f"torch cannot be imported: {facts.torch.error}",
            "reinstall it: pip install --force-reinstall torch",
        )
    for error in facts.errors:
        yield Finding(
            f"fastbb's own kernels cannot be looked at: {error}",
            "reinstall fastbb, torch and triton",
        )
    for package in facts.packages:
        if package.extra is None and (package.version is None or package.is_old):
            yield _package_problem(package)
    yield from _gpu_problems(facts)
    for name, results in _all_results(facts):
        for op, problem in results.ops.items():
            if problem is not None:
                yield Finding(
                    f"{op} failed its check on {name}: {problem}",
                    "PyTorch's own ops run instead, correct and slower; upgrade the driver, torch "
                    "or triton, or try it again with `fastbb check --again`",
                )
    yield from _cpu_problems(facts)
    cache = facts.cache
    if cache is not None and not cache.writable:
        yield Finding(
            f"{cache.path} cannot be written: every process checks and measures again",
            "make it writable, or set XDG_CACHE_HOME to a directory that is",
        )
    elif cache is not None and cache.free_bytes is not None and cache.free_bytes < _MIN_FREE_BYTES:
        yield Finding(
            f"the disk of {cache.path} is full: every process checks and measures again",
            "free some space, or set XDG_CACHE_HOME to a directory on another disk",
        )


def _package_problem(package: Package) -> Finding:
    wanted = f"{package.name}>={package.wanted}" if package.wanted else package.name
    if package.version is None:
        what = f"{package.name} is not installed"
    else:
        what = f"{package.name} {package.version} is too old, {package.wanted} or later is needed"
    return Finding(what, f"pip install --upgrade '{wanted}'")


def _gpu_problems(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    # a program alone proves no GPU; `_hints` says it
    there_is_one = bool(facts.gpu_sign) and not facts.gpu_sign.startswith("nvidia-smi")
    if facts.gpus_hidden_by:
        return
    if torch.error is None and there_is_one and not facts.gpus:
        if torch.build == "CPU":
            yield Finding(
                f"there is a GPU ({facts.gpu_sign}), but torch {torch.version} is a build for CPUs",
                "install the build for your GPU: https://pytorch.org/get-started/locally",
            )
        else:
            said = "; ".join(facts.gpu_messages) or "it says nothing about why"
            yield Finding(
                f"there is a GPU ({facts.gpu_sign}), but torch, built for {torch.build}, cannot "
                f"use it: {said}",
                "upgrade the driver or install a torch for an older one; in a container pass the "
                "GPU on (docker run --gpus all)",
            )
    elif facts.gpus:
        for message in facts.gpu_messages:
            yield Finding(
                f"torch says about the GPUs: {message}",
                "install a torch built for them: https://pytorch.org/get-started/locally",
            )
    if facts.gpus and (facts.compilers.c is None or not facts.compilers.python_header):
        missing = "a C compiler" if facts.compilers.c is None else "Python.h"
        yield Finding(
            f"Triton needs {missing} to start kernels, and there is none",
            _install("gcc" if facts.compilers.c is None else "python3-dev"),
        )


def _cpu_problems(facts: Facts) -> Iterator[Finding]:
    cpu, compilers = facts.cpu, facts.compilers
    if cpu.threads is not None and cpu.threads > cpu.usable_cores:
        yield Finding(
            f"torch uses {cpu.threads} threads, but this process may use {cpu.usable_cores} "
            f"{'core' if cpu.usable_cores == 1 else 'cores'}: they wait for each other",
            f"set OMP_NUM_THREADS={cpu.usable_cores} before Python starts, or call "
            f"torch.set_num_threads({cpu.usable_cores})",
        )
    if compilers.cpp is None:
        yield Finding(
            "there is no C++ compiler: torch.compile cannot run on the CPU (mode 'compile')",
            _install("g++") + "; or set CXX to the compiler",
        )
    elif not compilers.python_header:
        yield Finding(
            "there is no Python.h: torch.compile cannot run on the CPU (mode 'compile')",
            _install("python3-dev"),
        )


def _hints(facts: Facts) -> Iterator[Finding]:
    for package in facts.packages:
        if package.extra is not None and package.is_old:
            yield Finding(
                f"{package.name} {package.version} is older than the extra '{package.extra}' wants",
                f"pip install --upgrade '{package.name}>={package.wanted}'",
            )
    program_only = facts.gpu_sign.startswith("nvidia-smi") and not facts.gpus_hidden_by
    if program_only and not facts.gpus and facts.torch.error is None:
        yield Finding(
            f"{facts.gpu_sign}, but torch {facts.torch.version} ({facts.torch.build}) sees no GPU",
            "if there is one: a torch built for CUDA and a driver that is new enough",
        )
    for gpu in facts.gpus:
        from fastbb_kernels.supported_gpus import gpu_problem, named  # torch can be imported here

        problem = gpu_problem(named(gpu.capability))
        if problem is not None:
            yield Finding(
                f"{gpu.name}: no kernel of ours runs on it: {problem}",
                "mode='compile' needs no kernels of ours",
            )
    cpu = facts.cpu
    if cpu.threads is not None and 2 * cpu.threads < cpu.usable_cores:
        yield Finding(
            f"torch uses {cpu.threads} of {cpu.usable_cores} cores",
            "unless that is meant: unset OMP_NUM_THREADS, or call "
            f"torch.set_num_threads({cpu.usable_cores})",
        )
    if facts.huge_pages == "madvise" and not facts.asks_for_huge_pages and not facts.gpus:
        yield Finding(
            "large pages are given to programs that ask for them, and torch does not ask",
            "set THP_MEM_ALLOC_ENABLE=1 before Python starts: large CPU tensors get cheaper",
        )
    if cpu.has_bf16 is False and not facts.gpus:
        yield Finding(
            "this CPU has no bf16 instructions: bf16 is slower than fp32 in eager PyTorch here",
            "stay in fp32 on it, or call model.prepare(), which then computes in fp32",
        )
    for name, is_read in facts.image_formats.items():
        if not is_read:
            yield Finding(
                f"Pillow was built without {name}", "pip install --upgrade pillow, from a wheel"
            )
    for name, results in _all_results(facts):
        for note in results.notes:
            yield Finding(f"{name}: {note}", "nothing to do: what it held is found out again")


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """Titles and texts of the table below the findings."""
    yield "fastbb", f"{facts.fastbb}, Python {facts.python} on {facts.system}"
    yield "torch", f"{facts.torch.version} for {facts.torch.build}" if facts.torch.build else "-"
    needed = [p for p in facts.packages if p.extra is None and p.name != "torch"]
    yield "needs", ", ".join(map(_shown, needed))
    extras: dict[str, list[Package]] = {}
    for package in facts.packages:
        if package.extra is not None:
            extras.setdefault(package.extra, []).append(package)
    for extra, packages in extras.items():
        yield f"extra {extra}", ", ".join(map(_shown, packages))
    read = [name for name, is_read in facts.image_formats.items() if is_read]
    yield "images", ", ".join(read) or "-"
    cpu = facts.cpu
    instructions = ", ".join(cpu.instructions) or "unknown instructions"
    yield "CPU", f"{cpu.name}: {instructions}; torch uses {cpu.capability or 'unknown'}"
    yield "", f"{cpu.usable_cores} usable cores, {cpu.threads or '?'} threads in torch"
    if cpu.has_bf16 is not None:
        yield "", "bf16 instructions" if cpu.has_bf16 else "no bf16 instructions"
    compilers = facts.compilers
    header = "Python.h" if compilers.python_header else "no Python.h"
    yield "compilers", f"C++ {compilers.cpp or 'none'}, C {compilers.c or 'none'}, {header}"
    if cpu.results is not None:
        yield from _result_rows(cpu.results, is_gpu=False)
    if not facts.gpus:
        why = f"hidden by {facts.gpus_hidden_by}" if facts.gpus_hidden_by else "none"
        yield "GPU", f"{why}: everything runs on the CPU"
    for gpu in facts.gpus:
        driver = f"driver {gpu.driver}" if gpu.driver else "driver unknown"
        yield "GPU", f"{gpu.name}: {gpu.capability}, {_gib(gpu.memory_bytes)}, {driver}"
        yield from _result_rows(gpu.results, is_gpu=True)
    if facts.cache is not None:
        free = facts.cache.free_bytes
        space = "" if free is None else f", {_gib(free)} free"
        yield "cache", facts.cache.path + space


def _result_rows(results: Results, is_gpu: bool) -> Iterator[tuple[str, str]]:
    by_dtype: dict[str, dict[bool, list[str]]] = {}
    for name, problem in sorted(results.ops.items()):
        op, _, dtype = name.partition(" ")
        by_dtype.setdefault(dtype, {True: [], False: []})[problem is None].append(op)
    for dtype, ops in by_dtype.items():
        failed = f"failed: {', '.join(ops[False])}; " if ops[False] else ""
        yield f"  {dtype}", f"{failed}passed: {', '.join(ops[True]) or 'none'}"
    if is_gpu and not results.ops:
        yield "  ops", "not checked yet: each is at its first launch, or all by `fastbb check`"
    for model, winner in sorted(results.tuned.items()):
        yield "  tuned", f"{model}: {winner}"
    if not results.tuned:
        yield "  tuned", "no model yet: `fastbb tune MODEL`"


def _all_results(facts: Facts) -> Iterator[tuple[str, Results]]:
    """Results by device name; of several alike GPUs, which share them, once."""
    found = {gpu.results.path: (gpu.name, gpu.results) for gpu in facts.gpus}
    if facts.cpu.results is not None:
        found[facts.cpu.results.path] = (facts.cpu.name, facts.cpu.results)
    yield from found.values()


def _shown(package: Package) -> str:
    return f"{package.name} {package.version or 'missing'}"


def _install(package: str) -> str:
    return f"install it, on Debian and Ubuntu: apt install {package}"


def _count(findings: tuple[Finding, ...], noun: str) -> str:
    return f"{len(findings) or 'no'} {noun}{'' if len(findings) == 1 else 's'}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
