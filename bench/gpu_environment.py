"""Description of the machine of `gpu.py`: GPU, software, speed of products and copies."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from gpu_device import NVIDIA_SMI, nvidia_smi, on_device
from gpu_measure import Clock, peaks
from gpu_work import Work, describe

from fastbb_kernels.machine import Machine

PACKAGES = ("transformers", "timm", "torchvision", "numpy", "ml_dtypes")


def environment(work: Work, dry_run: bool) -> None:
    """Writes rows of facts, each separately, so that one that fails does not affect the others."""
    with on_device(dry_run) as device:
        facts = _device_facts(device, dry_run) | _software_facts(device)
        side, n_bytes = (64, 1 << 16) if dry_run else (8192, 2 << 30)
        facts |= {
            f"bf16 matrix product of {side}^3": lambda: (
                f"{_matmul_flops(device, side) / 1e12:.0f} TF/s"
            ),
            f"copy of {n_bytes} bytes, read and written": lambda: (
                f"{_copy_bytes_per_s(device, n_bytes) / 1e9:.0f} GB/s"
            ),
        }
        for item, find in facts.items():
            try:
                value = find()
            except Exception as error:
                value = f"unknown ({describe(error)})"
            work.row(item, value=str(value))


_Facts = dict[str, Callable[[], object]]


def _device_facts(device: torch.device, dry_run: bool) -> _Facts:
    machine = Machine.of(device)
    facts: _Facts = {
        "GPU": lambda: "dry run" if dry_run else machine.device,
        "capability": lambda: machine.capability,
        "driver": lambda: machine.driver,
        "peaks": lambda: str(peaks(device)),
    }
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "GPUs": torch.cuda.device_count,
        "memory": lambda: f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": lambda: properties.multi_processor_count,
        "L2": lambda: f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }
    if torch.version.hip is None:
        found = nvidia_smi()
        facts |= {f"nvidia-smi {name}": lambda n=name: found[n] for name in NVIDIA_SMI}
    return facts


def _software_facts(device: torch.device) -> _Facts:
    facts: _Facts = {
        "python": platform.python_version,
        "torch": lambda: torch.__version__,
        "triton": lambda: Machine.of(device).triton or "not installed",
        "CUDA": lambda: torch.version.cuda or "none",
        "ROCm": lambda: torch.version.hip or "none",
        "cuDNN": lambda: torch.backends.cudnn.version() or "none",
        "kernels": lambda: Machine.of(device).kernels,
        "commit": commit,
        "CPU": lambda: f"{Machine.of(torch.device('cpu')).device}, {os.cpu_count()} cores",
        "system": platform.platform,
    }
    return facts | {name: partial(_version, name) for name in PACKAGES}


def commit() -> str:
    """Returns the commit of the working tree, and whether files differ from it."""
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return "no git here"

    def git(*arguments: str) -> str:
        # this only reads the tree, which may belong to another user
        command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _matmul_flops(device: torch.device, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    call = partial(torch.mm, a, b)
    call()
    return 2 * side**3 / (1e-3 * Clock(device).times({"": call}, 0.5)[""].median_ms)


def _copy_bytes_per_s(device: torch.device, n_bytes: int) -> float:
    x = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    call = partial(y.copy_, x)
    call()
    return 2 * x.numel() / (1e-3 * Clock(device).times({"": call}, 0.5)[""].median_ms)
