"""Description of a machine for remembered results: device, driver, and the code that ran."""

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import device as Device

_PACKAGE = Path(__file__).parent
_SOURCES = ("*.py", "ops/*.py", "triton_kernels/*.py", "configs/*.json")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/sys/module/amdgpu/version")
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Everything that a check's or a measurement's result depends on; all fields are texts.

    Attributes:
        device: name of the GPU or of the CPU's model.
        capability: "9.0" or "gfx942"; of a CPU the best instructions that PyTorch uses: "AVX512".
        driver: its version; "" of a CPU, or unknown.
        torch: version.
        triton: version, "" without it and of a CPU, where nothing runs it.
        fastbb: version, "source" where it is not installed.
        kernels: digest of the kernels' sources.
        threads: that PyTorch uses on a CPU; "" of a GPU.
    """

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    fastbb: str
    kernels: str
    threads: str

    @classmethod
    def of(cls, device: Device) -> "Machine":
        """Describes the current machine with `device`.

        Raises:
            ValueError: the device is neither a CPU nor a CUDA or ROCm device.
        """
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"Machine: wanted a cpu or a cuda device, got {device}")
        is_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
            capability=_gpu_capability(device) if is_gpu else _cpu_capability(),
            driver=_driver() if is_gpu else "",
            torch=str(torch.__version__),
            triton=_triton_version() if is_gpu else "",
            fastbb=_fastbb_version(),
            kernels=kernels_digest(),
            threads="" if is_gpu else str(torch.get_num_threads()),
        )

    @property
    def key(self) -> str:
        """File name without suffix: readable name of the device, and a digest of all fields."""
        fields = json.dumps(asdict(self), sort_keys=True).encode()
        return f"{device_slug(self.device)}-{hashlib.sha256(fields).hexdigest()[:12]}"


def device_slug(name: str) -> str:
    """Converts a device's name to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-") or "unknown"


def find_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the device of that name; default: a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: wanted cpu, cuda or cuda:N, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted cpu, cuda or cuda:N, got {device!r}")
    n_gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= n_gpus:
        raise ValueError(f"device: {found} is not there: torch sees {n_gpus} GPUs")
    return found


def cpu_name() -> str:
    """Model of the CPU as Linux names it; on other systems from Python's `platform`."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU under Linux's names for them; empty where it reports none."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())  # x86, Arm


def _cpu_info() -> dict[str, str]:
    """Entries of /proc/cpuinfo for the first processor."""
    lines = [line.partition(":") for line in _read(_CPU_INFO).splitlines()]
    return {name.strip(): value.strip() for name, _, value in reversed(lines)}


@cache
def kernels_digest() -> str:
    """Digest of the sources that a result depends on, as they were at the first call."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        digest.update(f"\n{path.relative_to(_PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _gpu_capability(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"{properties.major}.{properties.minor}"


def _cpu_capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _driver() -> str:
    """Version of the driver's kernel module; PyTorch only knows its own CUDA version."""
    if torch.version.hip:
        return _read(_AMD_DRIVER).strip()
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _read(_NVIDIA_DRIVER))
    return found[1] if found else ""


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _fastbb_version() -> str:
    try:
        return metadata.version("fastbb")
    except metadata.PackageNotFoundError:
        return "source"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
