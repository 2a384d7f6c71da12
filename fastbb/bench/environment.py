"""Hardware and software that a bench's numbers depend on, and the state of a GPU between rounds."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastbb_kernels.machine import Machine, cpu_flags, cpu_name

from ..inspect.facts import read, usable_cores

_LIBRARIES = (
    *("fastbb", "torch", "triton", "transformers", "timm", "torchvision", "openvino"),
    *("onnxruntime", "onnx", "onnxscript", "numpy", "pillow", "segmentation-models-pytorch"),
)
# instruction sets that decide which precisions a CPU computes fast
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "clocks_event_reasons.active": "reasons",
}
# bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down, NVML API reference
_THROTTLES = {
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "its temperature (software)",
    0x40: "its temperature (hardware)",
    0x80: "a power brake",
}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns hardware, versions, load and date; values are texts, numbers, or lists of texts."""
    versions = {}
    for library in _LIBRARIES:
        with suppress(Exception):  # whatever a broken installation raises
            versions[library] = importlib.metadata.version(library)
    machine = Machine.of(device)
    flags = cpu_flags()
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "capability": machine.capability,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": machine.device if device.type == "cuda" else None,
        "driver": machine.driver or None,
        "kernels": machine.kernels,
        "transparent_hugepages": read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "load_average": read("/proc/loadavg").split()[:3],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "fastbb_commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of a checkout that fastbb runs from, None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    # only reads the tree, which may belong to another user
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    return _printed([*git, "rev-parse", "HEAD"]).strip() or None


def gpu_for_smi(device: torch.device) -> str | None:
    """The UUID of a GPU for `gpu_state`; None of a CPU."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    return f"GPU-{str(uuid).removeprefix('GPU-')}"


def gpu_state(gpu: str) -> dict[str, Any]:
    """Clocks, power, temperature and reasons of low clocks, by nvidia-smi; {} where it fails."""
    text = _printed(
        [
            "nvidia-smi",
            f"--query-gpu={','.join(_STATE)}",
            "--format=csv,noheader,nounits",
            "-i",
            gpu,
        ]
    )
    values = [value.strip() for value in text.strip().split(",")]
    if len(values) != len(_STATE):
        return {}
    state: dict[str, Any] = {}
    for name, value in zip(_STATE.values(), values):
        with suppress(ValueError):  # "[N/A]"
            state[name] = int(value, 16) if name == "reasons" else float(value)
    return state


def throttled(states: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence about what slowed the GPU down between rounds, or None."""
    names = [
        name
        for bit, name in _THROTTLES.items()
        if any(int(state.get("reasons", 0)) & bit for state in states)
    ]
    if not names:
        return None
    clocks = [state["sm_mhz"] for state in states if "sm_mhz" in state]
    fastest = max((state["max_sm_mhz"] for state in states if "max_sm_mhz" in state), default=0)
    between = f" ({min(clocks):.0f} to {max(clocks):.0f} of {fastest:.0f} MHz)" if clocks else ""
    return f"the GPU was throttled by {' and '.join(names)}{between}"


def _printed(command: Sequence[str]) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout
    return ""
