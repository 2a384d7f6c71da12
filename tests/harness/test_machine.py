"""Keys of machines: equal on the same machine, different on any other."""

import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fastbb_kernels
from fastbb_kernels import machine as machine_module
from fastbb_kernels.machine import Machine, kernels_digest

PACKAGE = Path(fastbb_kernels.__file__).parent
H100 = Machine(
    device="NVIDIA H100 80GB HBM3",
    capability="9.0",
    driver="570.86.15",
    torch="2.9.0+cu128",
    triton="3.5.0",
    fastbb="0.1.0",
    kernels="0123456789abcdef",
    threads="",
)
NVIDIA_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n"
    "GCC version:  gcc version 12.3.0\n"
)


def test_cpu_machine_has_torch_threads_and_capability() -> None:
    machine = Machine.of(torch.device("cpu"))
    assert all(isinstance(value, str) for value in asdict(machine).values())
    assert machine.device and machine.kernels and machine.driver == ""
    assert machine.torch == torch.__version__
    assert machine.threads == str(torch.get_num_threads())
    assert machine.capability == torch.backends.cpu.get_cpu_capability()
    assert machine == Machine.of(torch.device("cpu"))


@pytest.mark.parametrize(
    "hip, arch, capability, driver",
    [(None, "", "9.0", "570.86.15"), ("7.0", "gfx942:sramecc+:xnack-", "gfx942", "6.12.12")],
    ids=["nvidia", "amd"],
)
def test_gpu_machine_has_driver_and_capability(
    hip: str | None, arch: str, capability: str, driver: str, tmp_path: Path
) -> None:
    nvidia, amd = tmp_path / "nvidia", tmp_path / "amd"
    nvidia.write_text(NVIDIA_DRIVER)
    amd.write_text("6.12.12\n")
    properties = SimpleNamespace(major=9, minor=0, gcnArchName=arch)
    with (
        mock.patch.object(machine_module, "_NVIDIA_DRIVER", nvidia),
        mock.patch.object(machine_module, "_AMD_DRIVER", amd),
        mock.patch.object(torch.version, "hip", hip),
        mock.patch("torch.cuda.get_device_name", lambda device: f"GPU {device.index}"),
        mock.patch("torch.cuda.get_device_properties", lambda device: properties),
    ):
        machine = Machine.of(torch.device("cuda:1"))
    assert machine.device == "GPU 1"
    assert (machine.capability, machine.driver) == (capability, driver)
    assert machine.threads == ""


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted a cpu or a cuda device, got meta"):
        Machine.of(torch.device("meta"))


def test_a_key_is_a_readable_file_name() -> None:
    slug, _, digest = H100.key.rpartition("-")
    assert slug == "nvidia-h100-80gb-hbm3"
    assert len(digest) == 12 and set(digest) <= set("0123456789abcdef")
    odd = replace(H100, device="../../Größe (R) \n" + 200 * "x").key
    assert odd.startswith("gr-e-r-xxx") and len(odd) < 80
    assert replace(H100, device="§").key.startswith("unknown-")


@pytest.mark.parametrize("field", [field.name for field in fields(Machine)])
def test_every_field_changes_the_key(field: str) -> None:
    assert replace(H100, **{field: "another"}).key != H100.key


@pytest.mark.parametrize("name", ["_dispatch.py", "ops/patch_embed.py", "triton_kernels/config.py"])
def test_changed_kernel_source_changes_the_digest(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "fastbb_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "budgets"))
    with mock.patch.object(machine_module, "_PACKAGE", copy):
        assert kernels_digest.__wrapped__() == kernels_digest()
        with (copy / name).open("a") as file:
            file.write("# changed\n")
        assert kernels_digest.__wrapped__() != kernels_digest()


def test_the_machine_is_known_without_package_metadata(tmp_path: Path) -> None:
    """Runs from a copied folder without package metadata."""
    shutil.copytree(
        PACKAGE, tmp_path / "fastbb_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    program = (
        "import sys, importlib.metadata as metadata, torch\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        "import fastbb_kernels.machine as machine\n"
        f"assert machine.__file__.startswith({str(tmp_path)!r})\n"
        "found = machine.Machine.of(torch.device('cpu'))\n"
        "print(found.fastbb, found.kernels)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["source", kernels_digest()], result.stderr
