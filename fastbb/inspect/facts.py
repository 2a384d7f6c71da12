"""What there is on this machine, as `fastbb doctor` needs it; nothing here judges, or raises.

torch is imported inside functions: one that cannot be imported is a fact like others.
"""

import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what fastbb needs where it runs from a checkout, whose metadata nobody has installed
NEEDED = ("torch>=2.11", "triton>=3.6; sys_platform == 'linux'")
_NO_EXTRAS = ("dev",)

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
_BF16_FLAGS = ("bf16", "avx512_bf16", "amx_bf16")
# formats that extraction reads, and how Pillow calls what reads them, where it may lack that
_IMAGE_FORMATS = {
    "JPEG": "jpg",
    "JPEG by libjpeg-turbo": "libjpeg_turbo",
    "PNG": "zlib",
    "WebP": "webp",
    "TIFF": "libtiff",
    "AVIF": "avif",
}


@dataclass(frozen=True)
class Package:
    """A package that fastbb uses.

    Attributes:
        name: on PyPI.
        version: what is installed, None: it is not.
        wanted: least version, "" for any.
        extra: of fastbb that brings it, None: it is always needed.
    """

    name: str
    version: str | None
    wanted: str = ""
    extra: str | None = None

    @property
    def is_old(self) -> bool:
        return self.version is not None and _release(self.version) < _release(self.wanted)


@dataclass(frozen=True)
class Torch:
    """PyTorch as it was built.

    Attributes:
        version: of it.
        build: "CUDA 13.0", "ROCm 6.4" or "CPU".
        error: why it cannot be imported, or None.
    """

    version: str = ""
    build: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Results:
    """What earlier runs found out on a device.

    Attributes:
        path: file that remembers it.
        ops: problem, or None, of each "op dtype" that was checked.
        tuned: what won, by "model/dtype/BxHxW".
        notes: why the file was not used.
    """

    path: str
    ops: dict[str, str | None]
    tuned: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees.

    Attributes:
        name: as the driver gives it.
        capability: "9.0" or "gfx942".
        memory_bytes: all of it.
        driver: version, "" if unknown.
        results: of earlier runs.
    """

    name: str
    capability: str
    memory_bytes: int
    driver: str
    results: Results


@dataclass(frozen=True)
class Cpu:
    """The processor and what torch makes of it.

    Attributes:
        name: of the model.
        capability: best instructions that torch uses, "" if unknown.
        instructions: that matter here, the newest last.
        has_bf16: whether it has instructions for bf16; None: unknown.
        usable_cores: that this process may use, as a cgroup may limit them.
        threads: that torch uses, None without torch.
        results: of earlier runs, None without torch.
    """

    name: str
    capability: str
    instructions: tuple[str, ...]
    has_bf16: bool | None
    usable_cores: int
    threads: int | None
    results: Results | None


@dataclass(frozen=True)
class Compilers:
    """What torch.compile and Triton compile with.

    Attributes:
        cpp: path of the C++ compiler that torch.compile would take, or None.
        c: path of the C compiler that Triton would take, or None.
        python_header: whether Python.h is there.
    """

    cpp: str | None
    c: str | None
    python_header: bool


@dataclass(frozen=True)
class CacheDirectory:
    """Where results are remembered.

    Attributes:
        path: of the directory, which may not exist yet.
        writable: whether a file can be made there.
        free_bytes: of its disk, None if unknown.
    """

    path: str
    writable: bool
    free_bytes: int | None


@dataclass(frozen=True)
class Facts:
    """Everything that `fastbb doctor` looks at.

    Attributes:
        python: version.
        system: operating system and architecture.
        fastbb: version.
        packages: that fastbb needs or can use.
        torch: how it was built.
        gpus: that torch sees.
        gpu_sign: why there should be a GPU, a sentence, "" if nothing says so.
        gpu_messages: what torch says when it looks for GPUs.
        gpus_hidden_by: environment variable that hides every GPU from torch, or "".
        cpu: the processor.
        compilers: that are there.
        huge_pages: the kernel's setting, such as "madvise"; "" if unknown.
        asks_for_huge_pages: whether torch's CPU allocator does.
        cache: where results are remembered, None without torch.
        image_formats: whether Pillow reads them.
        errors: what went wrong while looking.
    """

    python: str
    system: str
    fastbb: str
    packages: tuple[Package, ...]
    torch: Torch
    gpus: tuple[Gpu, ...]
    gpu_sign: str
    gpu_messages: tuple[str, ...]
    gpus_hidden_by: str
    cpu: Cpu
    compilers: Compilers
    huge_pages: str
    asks_for_huge_pages: bool
    cache: CacheDirectory | None
    image_formats: dict[str, bool]
    errors: tuple[str, ...] = ()


def gather_facts() -> Facts:
    """Looks at this machine."""
    errors: list[str] = []
    gpu_sign, hidden_by = _gpu_sign(), _gpus_hidden_by()
    torch = _torch()
    has_torch = torch.error is None
    expected = bool(gpu_sign) and not hidden_by and torch.build != "CPU"
    gpus, messages = _gpus(expected) if has_torch else ((), ())
    cpu = _cpu(has_torch, errors)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        fastbb=_version("fastbb") or "from source",
        packages=_packages(),
        torch=torch,
        gpus=gpus,
        gpu_sign=gpu_sign,
        gpu_messages=messages,
        gpus_hidden_by=hidden_by,
        cpu=cpu,
        compilers=_compilers(),
        huge_pages=_huge_pages(),
        asks_for_huge_pages=os.environ.get("THP_MEM_ALLOC_ENABLE", "0") not in ("", "0"),
        cache=None if cpu.results is None else _cache_directory(Path(cpu.results.path).parent),
        image_formats=_image_formats(),
        errors=tuple(errors),
    )


def _packages() -> tuple[Package, ...]:
    try:
        lines = importlib.metadata.requires("fastbb") or list(NEEDED)
    except Exception:  # no metadata, or broken ones
        lines = list(NEEDED)
    return tuple(found for line in lines if (found := parse_requirement(line)) is not None)


def parse_requirement(line: str) -> Package | None:
    """The package that a line of fastbb's metadata asks for; None: not here, or not of users.

    Args:
        line: such as "pyarrow>=17; extra == 'parquet'".
    """
    requirement, _, marker = line.partition(";")
    match = re.match(r"\s*([\w.-]+)[^>]*(?:>=\s*([\d.]+))?", requirement)
    extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
    only_on = re.search(r"sys_platform == ['\"](.+?)['\"]", marker)
    if match is None or (extra and extra[1] in _NO_EXTRAS):
        return None
    if only_on and only_on[1] != sys.platform:
        return None
    name, wanted = match[1], match[2] or ""
    return Package(name, _version(name), wanted, extra and extra[1])


def _version(name: str) -> str | None:
    """What is installed; packages that only lie on the path have no metadata, and are asked."""
    try:
        return importlib.metadata.version(name)
    except Exception:  # whatever a broken installation raises
        return getattr(sys.modules.get(name), "__version__", None)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version that count, without zeros at the end."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch() -> Torch:
    try:
        import torch

        if torch.version.hip:
            build = f"ROCm {torch.version.hip}"
        else:
            build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        return Torch(str(torch.__version__), build)
    except Exception as error:  # a broken torch raises anything
        return Torch(_version("torch") or "", "", _one_line(error))


def _gpus(expected: bool) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that torch sees, and what it says about those that it cannot use."""
    import torch

    messages: list[str] = []
    gpus: list[Gpu] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                gpus += [_gpu(index) for index in range(torch.cuda.device_count())]
            elif expected:
                torch.cuda.init()  # says why
        except Exception as error:  # a driver's words
            messages.append(_one_line(error))
    messages += [_one_line(warning.message) for warning in caught]
    return tuple(gpus), tuple(dict.fromkeys(messages))


def _gpu(index: int) -> Gpu:
    import torch

    from fastbb_kernels.machine import Machine

    device = torch.device("cuda", index)
    machine = Machine.of(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return Gpu(machine.device, machine.capability, memory, machine.driver, _results(machine))


def _gpu_sign() -> str:
    try:
        if any(Path("/proc/driver/nvidia/gpus").iterdir()):
            return "the NVIDIA driver lists a GPU in /proc/driver/nvidia/gpus"
    except OSError:
        pass
    if os.path.exists("/dev/kfd"):
        return "the AMD driver has made /dev/kfd"
    return "nvidia-smi is installed" if shutil.which("nvidia-smi") else ""


def _gpus_hidden_by() -> str:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(name, "0").strip() in ("", "-1"):
            return name
    return ""


def _results(machine: Any) -> Results:
    from fastbb_kernels.result_cache import ResultCache

    cache = ResultCache(machine)
    return read_results(
        str(cache.path), cache.items("self_check"), cache.items("tuned"), cache.notes
    )


def read_results(
    path: str, checked: dict[str, Any], tuned: dict[str, Any], notes: Iterable[str] = ()
) -> Results:
    """What the sections of a cache say; an entry of another form is passed over.

    Args:
        path: of the cache.
        checked: {"problem": None or a sentence} by "op/torch.dtype".
        tuned: {"winner": name, ...} by "model/dtype/BxHxW".
        notes: of the cache.
    """
    ops = {
        key.replace("/torch.", " ").replace("/", " "): value["problem"]
        for key, value in checked.items()
        if isinstance(value, dict) and isinstance(value.get("problem", 0), (str, type(None)))
    }
    winners = {
        key: str(value["winner"])
        for key, value in tuned.items()
        if isinstance(value, dict) and "winner" in value
    }
    return Results(path, ops, winners, tuple(notes))


def _cpu(has_torch: bool, errors: list[str]) -> Cpu:
    text = _read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    threads, capability, results = None, "", None
    if has_torch:
        import torch

        threads = torch.get_num_threads()
        try:
            from fastbb_kernels.machine import Machine

            machine = Machine.of(torch.device("cpu"))
            capability, results = machine.capability, _results(machine)
        except Exception as error:  # ours or Triton's, broken in ways that nobody foresaw
            errors.append(_one_line(error))
    return Cpu(
        name[1] if name else platform.processor() or platform.machine(),
        capability,
        tuple(shown for flag, shown in _INSTRUCTIONS.items() if flag in found),
        any(flag in found for flag in _BF16_FLAGS) if flags else None,
        _usable_cores(),
        threads,
        results,
    )


def _usable_cores() -> int:
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Linux
        cores = os.cpu_count() or 1
    quota = _quota(_read("/proc/self/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: str, root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the control groups of this process allow, None: no limit.

    Args:
        cgroups: /proc/self/cgroup, lines "id:controllers:path".
        root: where control groups are mounted; in a container, those of the container.
    """
    limits = []
    for line in cgroups.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / controllers if controllers else root
        here = Path(path.lstrip("/"))
        for group in (here, *here.parents):
            limits.append(_limit(mounted / group))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    """Cores that one control group allows, of version 2 or 1."""
    words = _read(group / "cpu.max").split()
    if not words:
        words = [_read(group / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
    try:
        quota, period = (float(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _compilers() -> Compilers:
    return Compilers(
        # as torch._inductor and Triton look for them; importing those would take seconds
        cpp=shutil.which(os.environ.get("CXX") or "g++"),
        c=shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang"),
        python_header=os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")),
    )


def _huge_pages() -> str:
    match = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else ""


def _cache_directory(path: Path) -> CacheDirectory:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return CacheDirectory(str(path), _is_writable(path, existing), free)


def _is_writable(path: Path, existing: Path) -> bool:
    if existing != path:  # looking must not make it
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def _image_formats() -> dict[str, bool]:
    try:
        from PIL import features

        return {name: bool(features.check(part)) for name, part in _IMAGE_FORMATS.items()}
    except Exception:  # a missing or broken Pillow is told with the packages
        return {}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _one_line(error: object) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
