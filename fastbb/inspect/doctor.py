"""`fastbb doctor`: examines this machine, and says what to do where it cannot run something.

Each topic is one function: it looks, judges, and adds a row to the table and values to the JSON.
torch, triton, Pillow and packaging are imported inside them: one that is broken is a problem too.
"""

import os
import platform
import re
import shutil
import sysconfig
import textwrap
import warnings
from collections import Counter
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from . import facts

if TYPE_CHECKING:
    from fastbb_kernels.machine import Machine

_MIN_FREE_BYTES = 2**20
_WIDTH = 80
_PYTORCH = "https://pytorch.org/get-started/locally"
# flag in /proc/cpuinfo -> its usual name, the newest last
_INSTRUCTIONS = {
    "asimd": "NEON",
    "sve": "SVE",
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "bf16": "BF16",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
}


class Finding(NamedTuple):
    """A sentence about something that could be better, and what to do about it."""

    what: str
    remedy: str


class Doctor:
    """Findings of an examination; prints problems first, then hints, then a table.

    Attributes:
        problems: things that are wrong or impossible here.
        hints: improvements; everything works without them.
        facts: values that were seen, for JSON.
    """

    def __init__(self) -> None:
        self.problems: list[Finding] = []
        self.hints: list[Finding] = []
        self.facts: dict[str, Any] = {"gpus": [], "cpu": None, "cache": None, "errors": []}
        self._rows: list[tuple[str, str, bool]] = []

    def problem(self, what: str, remedy: str) -> None:
        """Adds a problem; the same one of alike GPUs counts once."""
        if (found := Finding(what, remedy)) not in self.problems:
            self.problems.append(found)

    def hint(self, what: str, remedy: str) -> None:
        """Adds a hint; the same one of alike GPUs counts once."""
        if (found := Finding(what, remedy)) not in self.hints:
            self.hints.append(found)

    def row(self, title: str, text: str, *, detail: bool = False) -> None:
        """Adds an entry to the table; details are shown on request."""
        self._rows.append((title, text, detail))

    def to_dict(self) -> dict[str, Any]:
        """Returns problems, hints and facts, for JSON."""
        kinds = {"problems": self.problems, "hints": self.hints}
        return {name: [f._asdict() for f in found] for name, found in kinds.items()} | self.facts

    def __str__(self) -> str:
        return self.text()

    def text(self, *, verbose: bool = False) -> str:
        """Returns the findings and the table, at most 80 columns wide where words allow it.

        Args:
            verbose: with packages, single ops, tuned models and image formats.
        """
        counts, lines = [], []
        for kind, findings in (("problem", self.problems), ("hint", self.hints)):
            counts.append(f"{len(findings) or 'no'} {kind}{'' if len(findings) == 1 else 's'}")
            for what, remedy in findings:
                width = len(kind) + 2
                lines += _wrapped(what, f"{kind}: ", " " * width)
                lines += _wrapped(remedy, f"{'do: ':>{width}}", " " * width)
        rows = [(title, text) for title, text, detail in self._rows if verbose or not detail]
        width = 2 + max(len(title) for title, _ in rows)
        for title, text in [("", ""), *rows]:
            lines += _wrapped(text, f"{title:{width}}", " " * width) or [""]
        if not verbose:
            lines += ["", "`fastbb doctor -v` adds packages, ops, tuned models, image formats"]
        return "\n".join([", ".join(counts), *lines])


def doctor() -> Doctor:
    """Examines this machine; takes a second, computes nothing and raises nothing."""
    found = Doctor()
    has_torch = _versions(found)
    for topic in (_packages, *((_gpus, _cpu) if has_torch else ()), _compilers, _caches, _images):
        try:
            topic(found)
        except Exception as error:  # whatever a broken package raises
            problem = f"{topic.__name__.lstrip('_')} cannot be examined: {_in_a_line(error)}"
            found.problem(problem, "reinstall fastbb and the packages that it needs")
            found.facts["errors"].append(problem)
    return found


def _versions(found: Doctor) -> bool:
    """Shows the versions of fastbb and torch; returns whether torch can be imported."""
    system = f"{platform.system()} {platform.machine()}"
    fastbb, python = facts.installed_version("fastbb") or "from source", platform.python_version()
    found.row("fastbb", f"{fastbb}, Python {python} on {system}")
    found.facts |= {"python": python, "system": system, "fastbb": fastbb}
    version, build, problem = facts.installed_version("torch") or "", "", None
    try:
        import torch

        version, cuda, hip = str(torch.__version__), torch.version.cuda, torch.version.hip
        build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU"
    except Exception as error:  # whatever a broken torch raises
        problem = _in_a_line(error)
        found.problem(
            f"torch cannot be imported: {problem}",
            "reinstall it: pip install --force-reinstall torch",
        )
    found.row("torch", f"{version} for {build}" if build else "-")
    found.facts["torch"] = {"version": version, "build": build, "error": problem}
    return problem is None


def _packages(found: Doctor) -> None:
    packages = facts.needed_packages()
    found.facts["packages"] = [package._asdict() for package in packages]
    for name, version, wanted, extra in (package for package in packages if package.is_old):
        remedy = f"pip install --upgrade '{name}{wanted}'"
        if extra is None:
            found.problem(f"{name} {version} is too old, {name}{wanted} is needed", remedy)
        else:
            found.hint(f"{name} {version} is too old for the extra '{extra}'", remedy)
    for name, version, wanted, extra in packages:
        if version is None and extra is None:
            found.problem(f"{name} is not installed", f"pip install '{name}{wanted}'")
    for extra, group in groupby(packages, lambda package: package.extra):
        shown = [f"{p.name} {p.version or 'missing'}" for p in group if p.name != "torch"]
        title = "needs" if extra is None else f"extra {extra}"
        found.row(title, ", ".join(shown), detail=True)


def _gpus(found: Doctor) -> None:
    import torch

    sign, hidden_by, build = facts.gpu_sign(), facts.gpus_hidden_by(), found.facts["torch"]["build"]
    is_only_a_program = sign.startswith("nvidia-smi")  # which proves no GPU
    gpus: list[dict[str, Any]] = []
    said: list[object] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                gpus += _usable_gpus(found)
            elif sign and not hidden_by and build != "CPU":
                torch.cuda.init()  # says why
        except Exception as error:  # a driver's words
            said.append(error)
    messages = list(dict.fromkeys(map(_in_a_line, [*said, *(w.message for w in caught)])))
    found.facts |= {"gpus": gpus, "gpu_sign": sign}
    found.facts |= {"gpu_messages": messages, "gpus_hidden_by": hidden_by}
    if not gpus:
        why = f"hidden by {hidden_by}" if hidden_by else "none"
        found.row("GPU", f"{why}: everything runs on the CPU")
    if hidden_by:
        return
    for message in messages if gpus else ():
        found.problem(
            f"torch says about the GPUs: {message}", f"install a torch built for them: {_PYTORCH}"
        )
    if gpus or not sign:
        return
    if is_only_a_program:
        found.hint(
            f"{sign}, but torch {torch.__version__} ({build}) sees no GPU",
            "if there is one: install a torch built for CUDA and a driver that is new enough",
        )
    elif build == "CPU":
        found.problem(
            f"there is a GPU ({sign}), but torch {torch.__version__} is a build for CPUs",
            f"install the build for your GPU: {_PYTORCH}",
        )
    else:
        found.problem(
            f"there is a GPU ({sign}), but torch, built for {build}, cannot use it: "
            f"{'; '.join(messages) or 'it says nothing about why'}",
            "upgrade the driver or install a torch for an older one; in a container pass the GPU "
            "on (docker run --gpus all)",
        )


def _usable_gpus(found: Doctor) -> list[dict[str, Any]]:
    """The GPUs that torch uses; alike ones have one entry in the table."""
    import torch

    from fastbb_kernels.machine import Machine

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    gpus = [(Machine.of(d), torch.cuda.get_device_properties(d).total_memory) for d in devices]
    values = {gpu: _gpu(found, *gpu, n) for gpu, n in Counter(gpus).items()}
    return [values[gpu] for gpu in gpus]


def _gpu(found: Doctor, machine: "Machine", memory: int, n: int) -> dict[str, Any]:
    from fastbb_kernels.supported_gpus import gpu_problem, named

    name, capability, driver = machine.device, machine.capability, machine.driver
    times = f"{n} x " if n > 1 else ""
    found.row("GPU", f"{times}{name}: {capability}, {_gib(memory)}, driver {driver or 'unknown'}")
    if (problem := gpu_problem(named(capability))) is not None:
        found.hint(
            f"{name}: no kernel of ours runs on it: {problem}",
            "use mode='compile', which needs no kernels of ours",
        )
    values = {"name": name, "capability": capability, "memory_bytes": memory, "driver": driver}
    return {**values, "results": _results(found, machine)}


def _cpu(found: Doctor) -> None:
    import torch

    from fastbb_kernels.machine import Machine, cpu_flags

    from ..engine.cpu import has_arithmetic

    cores, threads, has_gpus = facts.usable_cores(), torch.get_num_threads(), found.facts["gpus"]
    machine, flags = Machine.of(torch.device("cpu")), cpu_flags()
    instructions = [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    has_bf16 = has_arithmetic(torch.bfloat16) if flags else None
    known = ", ".join(instructions) or "unknown instructions"
    found.row("CPU", f"{machine.device}: {known}; torch uses {machine.capability}")
    bf16 = {None: "", True: ", bf16 instructions", False: ", no bf16 instructions"}[has_bf16]
    found.row("", f"{cores} usable cores, {threads} threads in torch{bf16}")
    if has_bf16 is False and not has_gpus:
        found.hint(
            "this CPU has no bf16 instructions: bf16 is slower than fp32 in eager PyTorch here",
            "stay in fp32 on it, or call model.prepare(), which then computes in fp32",
        )
    if threads > cores:
        found.problem(
            f"torch uses {threads} threads, but this process may use {cores} "
            f"{'core' if cores == 1 else 'cores'}: they wait for each other",
            f"set OMP_NUM_THREADS={cores} before Python starts, or call "
            f"torch.set_num_threads({cores})",
        )
    elif 2 * threads < cores:
        found.hint(
            f"torch uses {threads} of {cores} cores",
            f"unless that is meant: unset OMP_NUM_THREADS, or call torch.set_num_threads({cores})",
        )
    if not has_gpus and facts.installed_version("openvino") is None:
        found.hint(
            "OpenVINO is not installed, which may run models faster on this CPU",
            "pip install 'fastbb[openvino]', then model.prepare(mode='openvino')",
        )
    pages = re.search(r"\[(\w+)\]", facts.read("/sys/kernel/mm/transparent_hugepage/enabled"))
    huge_pages = pages[1] if pages else ""
    asks = os.environ.get("THP_MEM_ALLOC_ENABLE", "0") not in ("", "0")
    if huge_pages == "madvise" and not asks and not has_gpus:
        found.hint(
            "large pages are given to programs that ask for them, and torch does not ask",
            "set THP_MEM_ALLOC_ENABLE=1 before Python starts: large CPU tensors get cheaper",
        )
    values = {"name": machine.device, "capability": machine.capability, "has_bf16": has_bf16}
    values |= {"instructions": instructions, "usable_cores": cores, "threads": threads}
    found.facts["cpu"] = {**values, "results": _results(found, machine)}
    found.facts |= {"huge_pages": huge_pages, "asks_for_huge_pages": asks}


def _results(found: Doctor, machine: "Machine") -> dict[str, Any]:
    """Tells what earlier runs found on a device; an entry of another form is passed over."""
    from fastbb_kernels.result_cache import ResultCache

    cache = ResultCache(machine)
    ops: dict[str, str | None] = {}
    by_dtype: dict[str, dict[str, list[str]]] = {}
    for key, value in sorted(cache.items("self_check").items()):
        problem = value.get("problem", 0) if isinstance(value, dict) else 0
        if problem is not None and not isinstance(problem, str):
            continue
        op, _, dtype = key.replace("/torch.", " ").replace("/", " ").partition(" ")
        ops[f"{op} {dtype}"] = problem
        outcomes = by_dtype.setdefault(dtype, {"failed": [], "passed": []})
        outcomes["passed" if problem is None else "failed"].append(op)
        if problem is not None:
            found.problem(
                f"{op} {dtype} failed its check on {machine.device}: {problem}",
                "PyTorch's own ops run instead, correct and slower; upgrade the driver, torch or "
                "triton, or try it again with `fastbb check --again`",
            )
    for dtype, outcomes in by_dtype.items():
        texts = (f"{name}: {', '.join(ops)}" for name, ops in outcomes.items() if ops)
        found.row(f"  {dtype}", "; ".join(texts), detail=True)
    if ops:
        n_failed = sum(problem is not None for problem in ops.values())
        found.row("  ops", f"{len(ops)} checked by op and dtype, {n_failed or 'none'} failed")
    elif machine.threads == "":  # a GPU
        found.row("  ops", "not checked yet: each is at its first launch, or all by `fastbb check`")
    entries = cache.items("tuned").items()
    tuned = {k: str(v["winner"]) for k, v in entries if isinstance(v, dict) and "winner" in v}
    shapes = f"{len(tuned)} shape{'' if len(tuned) == 1 else 's'} of models"
    found.row("  tuned", shapes if tuned else "no model yet: `fastbb tune MODEL`")
    for model, winner in sorted(tuned.items()):
        found.row("", f"{model}: {winner}", detail=True)
    for note in cache.notes:
        found.hint(f"{machine.device}: {note}", "nothing, what it held is found out again")
    return {"path": str(cache.path), "ops": ops, "tuned": tuned, "notes": cache.notes}


def _compilers(found: Doctor) -> None:
    # as torch._inductor and Triton look for them; importing those would take seconds
    cpp = shutil.which(os.environ.get("CXX") or "g++")
    c = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")
    header = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    found.facts["compilers"] = {"cpp": cpp, "c": c, "python_header": header}
    has_header = "Python.h" if header else "no Python.h"
    found.row("compilers", f"C++ {cpp or 'none'}, C {c or 'none'}, {has_header}")
    compile_fails = "torch.compile cannot run on the CPU (mode 'compile')"
    has_gpus = bool(found.facts["gpus"])
    for is_there, tool, result, package in (
        (cpp, "C++ compiler", compile_fails, "g++; or set CXX to the compiler"),
        (c or not has_gpus, "C compiler", "Triton cannot start kernels", "gcc"),
        (
            header,
            "Python.h",
            compile_fails + has_gpus * ", nor Triton start kernels",
            "python3-dev",
        ),
    ):
        if not is_there:
            remedy = f"install it, on Debian and Ubuntu: apt install {package}"
            found.problem(f"there is no {tool}: {result}", remedy)


def _caches(found: Doctor) -> None:
    caches = {}
    if cpu := found.facts["cpu"]:
        path, result = cpu["results"]["path"], "every process checks and measures again"
        caches["cache"] = (os.path.dirname(path), "XDG_CACHE_HOME", result)
    with suppress(Exception):  # a missing or broken Triton is told elsewhere
        from triton import knobs

        caches["triton_cache"] = (knobs.cache.dir, "TRITON_CACHE_DIR", "no kernel can be compiled")
    for key, (path, variable, result) in caches.items():
        state = found.facts[key] = facts.directory_state(path)
        problem, free = state["problem"], state["free_bytes"]
        title, shown = "cache" if key == "cache" else "Triton's cache", _short(path)
        found.row(title, shown if free is None else f"{shown}, {_gib(free)} free")
        report = found.problem
        if key == "triton_cache" and not found.facts["gpus"]:
            # kernels run on GPUs only; without one they are compiled ahead, by `fastbb warmup`
            if variable not in os.environ:
                continue
            report = found.hint
        is_low = problem is None and free is not None and free < _MIN_FREE_BYTES
        if problem in facts.FULL_DISK or is_low:
            report(
                f"the disk of {shown} is full: {result}",
                f"free some space, or set {variable} to a directory on another disk",
            )
        elif problem is not None:
            verb = "written" if os.path.isdir(path) else "made"
            report(
                f"{shown} cannot be {verb} ({problem}): {result}",
                f"make it writable, or set {variable} to a directory that is",
            )


def _images(found: Doctor) -> None:
    from PIL import features

    from ..images.formats import pillow_support

    formats = {**pillow_support(), "JPEG by libjpeg-turbo": features.check("libjpeg_turbo")}
    found.facts["image_formats"] = formats
    read = ", ".join(name for name, is_read in formats.items() if is_read)
    found.row("images", read, detail=True)
    for name in (name for name, is_read in formats.items() if not is_read):
        found.hint(f"Pillow was built without {name}", "pip install --upgrade pillow, from a wheel")


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short(path: str) -> str:
    """The path with ~ for the user's home."""
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path


def _in_a_line(error: object) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
