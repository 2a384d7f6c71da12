"""Facts about a machine that take more than a line to find out, for `fastbb doctor`."""

import errno
import importlib.metadata
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# requirements where fastbb runs from a checkout, whose metadata nobody has installed
NEEDED = ("torch>=2.11", "triton>=3.6; sys_platform == 'linux'")

# problems of a directory whose disk is full
FULL_DISK = frozenset({os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)})


class Package(NamedTuple):
    """A package that fastbb needs, or that one of its extras brings."""

    name: str
    version: str | None  # None: not installed
    wanted: str  # versions, such as ">=2.11"
    extra: str | None

    @property
    def is_old(self) -> bool:
        """Whether a version is installed that is not among those wanted."""
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version

        try:
            # a vendor's build such as 2.11.0a0+git12 counts as 2.11.0
            release = Version(self.version or "").base_version
        except InvalidVersion:
            return False
        return release not in SpecifierSet(self.wanted)


def needed_packages() -> list[Package]:
    """Returns the packages that fastbb needs here, then those of its extras."""
    try:
        metadata = importlib.metadata.metadata("fastbb")
        lines, extras = metadata.get_all("Requires-Dist"), metadata.get_all("Provides-Extra")
    except Exception:  # no metadata, or broken ones
        lines, extras = None, None
    return list(packages_of(lines or NEEDED, extras or ()))


def packages_of(lines: Sequence[str], extras: Sequence[str]) -> Iterator[Package]:
    """Yields the packages that a distribution's metadata ask for on this platform.

    Args:
        lines: requirements, such as "pyarrow>=17; extra == 'parquet'".
        extras: of the distribution; "dev" is not for users and left out.
    """
    from packaging.requirements import Requirement

    left = [Requirement(line) for line in lines]
    for extra in ("", *(extra for extra in extras if extra != "dev")):
        asked = [r for r in left if r.marker is None or r.marker.evaluate({"extra": extra})]
        for r in asked:
            yield Package(r.name, installed_version(r.name), str(r.specifier), extra or None)
        left = [r for r in left if r not in asked]


def installed_version(name: str) -> str | None:
    """Returns the version of a package that is installed or, without metadata, imported."""
    try:
        return importlib.metadata.version(name)
    except Exception:  # whatever a broken installation raises
        return getattr(sys.modules.get(name), "__version__", None)


def gpu_sign() -> str:
    """Returns why there should be a GPU, as a sentence; "" if nothing says so."""
    with suppress(OSError):
        if any(Path("/proc/driver/nvidia/gpus").iterdir()):
            return "the NVIDIA driver lists a GPU in /proc/driver/nvidia/gpus"
    if os.path.exists("/dev/kfd"):
        return "the AMD driver has made /dev/kfd"
    return "nvidia-smi is installed" if shutil.which("nvidia-smi") else ""


def gpus_hidden_by() -> str:
    """Returns the environment variable that hides every GPU from torch, or ""."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(name, "0").strip() in ("", "-1"):
            return name
    return ""


def usable_cores() -> int:
    """Returns how many cores this process may use, by its affinity and its control groups."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Linux
        cores = os.cpu_count() or 1
    limit = core_limit(read("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def core_limit(cgroups: str, root: Path) -> float | None:
    """Returns the cores that control groups of version 2 or 1 allow, None without a limit.

    Args:
        cgroups: /proc/self/cgroup, lines "id:controllers:path".
        root: where control groups are mounted; in a container, those of the container.
    """
    limits: list[float] = []
    for line in cgroups.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        here = Path(path.lstrip("/"))
        for group in (root / controllers / name for name in (here, *here.parents)):
            words = read(group / "cpu.max").split()
            words = words or [read(group / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
            with suppress(ValueError, ZeroDivisionError):  # "max", or no such file
                limits.append(float(words[0]) / float(words[1]))
    return min((limit for limit in limits if limit > 0), default=None)


def directory_state(path: str) -> dict[str, Any]:
    """Tries whether a directory can be made and written; makes nothing that stays.

    Returns:
        `path`, `writable`, `problem` (why it is not, or None), and `free_bytes` of its disk (None
        if unknown).
    """
    existing, problem, free = path, None, None
    while not os.path.exists(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    try:
        # permissions alone do not tell: root has all of them, also where nothing can be made
        with tempfile.TemporaryDirectory(prefix=".fastbb-", dir=existing):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    with suppress(OSError):
        usage = shutil.disk_usage(existing)
        free = usage.free if usage.total else None  # some file systems count nothing
    return {"path": path, "writable": problem is None, "problem": problem, "free_bytes": free}


def read(path: str | Path) -> str:
    """Returns the text of a file, "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
