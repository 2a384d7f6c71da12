"""The device of the stages of `gpu.py`, and the number of processes that may use it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from gpu_pretended import pretended_gpu
from gpu_work import describe

from fastbb_kernels.precompiling import n_cores

NVIDIA_SMI = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "memory.total",
    "compute_cap",
    "compute_mode",
    "mig.mode.current",
)
MOST_PROCESSES = 12  # processes that use the GPU at once, each with a separate context
_PROCESS_MIB = 6000  # memory of a process with the largest case and its copy in float64


@contextmanager
def on_device(dry_run: bool) -> Iterator[torch.device]:
    """Yields the device of a stage; in a dry run kernels are interpreted on the CPU."""
    with ExitStack() as stack:
        if dry_run:
            from fastbb_kernels.testing import interpret

            torch.set_num_threads(1)
            stack.enter_context(pretended_gpu())
            stack.enter_context(interpret())
        stack.enter_context(torch.no_grad())
        yield device_of(0, dry_run)


def device_of(index: int, dry_run: bool) -> torch.device:
    return torch.device("cpu" if dry_run else f"cuda:{index}")


def nvidia_smi() -> dict[str, str]:
    """Reads clocks, power, memory and modes of the first GPU; does not touch CUDA."""
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(NVIDIA_SMI, "no nvidia-smi on PATH")
    query = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    if visible:
        query += ["-i", visible]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return dict(zip(NVIDIA_SMI, done.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return dict.fromkeys(NVIDIA_SMI, f"unknown ({describe(error)})")


def n_processes(dry_run: bool) -> int:
    """Returns the number of processes that may use the GPU at once."""
    found = nvidia_smi()
    if torch.version.hip is None and "Exclusive" in found["compute_mode"]:
        return 1
    mib = found["memory.total"].partition(" ")[0]
    by_memory = max(1, int(mib) // _PROCESS_MIB) if mib.isdigit() else MOST_PROCESSES
    return min(2 if dry_run else MOST_PROCESSES, by_memory, n_cores())
