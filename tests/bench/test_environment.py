"""The description of a machine, and the state of a GPU as nvidia-smi tells it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastbb.bench.environment import describe_machine, gpu_for_smi, gpu_state, throttled

CPU = torch.device("cpu")


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program of that name first on PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_machine_is_described_in_plain_data() -> None:
    found = describe_machine(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["gpu"] is None
    assert found["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert gpu_for_smi(CPU) is None


def test_clocks_and_power_come_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "1410, 1980, 2619, 690.5, 700.00, 71, 0x0000000000000024"
    nvidia_smi(tmp_path, monkeypatch, f'[ "$4" = GPU-1 ] && echo "{row}"')
    state = gpu_state("GPU-1")
    assert state == {
        "sm_mhz": 1410,
        "max_sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 690.5,
        "power_limit_w": 700,
        "temperature_c": 71,
        "reasons": 0x24,
    }
    free = {"sm_mhz": 1980.0, "max_sm_mhz": 1980.0, "reasons": 1}
    assert throttled([free, state]) == (
        "the GPU was throttled by its power limit and its temperature (software) "
        "(1410 to 1980 of 1980 MHz)"
    )
    assert throttled([free, free]) is None and throttled([]) is None


@pytest.mark.parametrize(
    "script", ["exit 9", "echo no devices", "echo '[N/A], [N/A], x, , , , '", "kill -9 $$"]
)
def test_nvidia_smi_that_fails_says_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert gpu_state("GPU-1") == {} and throttled([gpu_state("GPU-1")]) is None


def test_without_nvidia_smi_there_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_state("GPU-1") == {}
