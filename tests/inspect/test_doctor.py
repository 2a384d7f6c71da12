"""The doctor names what is wrong first, with a remedy, and survives what it examines."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastbb.cli import main
from fastbb.inspect import facts as facts_module
from fastbb.inspect.doctor import Doctor, doctor
from fastbb.inspect.facts import (
    NEEDED,
    CacheDirectory,
    Compilers,
    Cpu,
    Facts,
    Gpu,
    Package,
    Results,
    Torch,
    gather_facts,
    parse_requirement,
    read_results,
)
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

ROOT = Path(__file__).resolve().parents[2]
NOTHING = Results("/cache/cpu.json", {}, {})
CPU = Cpu("Some CPU", "AVX512", ("AVX2", "AVX-512", "AMX BF16"), True, 8, 8, NOTHING)
GPU = Gpu("NVIDIA H100", "9.0", 80 * 2**30, "580.1", Results("/cache/gpu.json", {}, {}))
HEALTHY = Facts(
    python="3.12.1",
    system="Linux x86_64",
    fastbb="0.1.0",
    packages=(
        Package("torch", "2.9.0+cu130", "2.9"),
        Package("triton", "3.5.0", "3.5"),
        Package("pyarrow", None, "17", "parquet"),
        Package("transformers", "5.23.0", "5", "transformers"),
    ),
    torch=Torch("2.9.0+cu130", "CUDA 13.0"),
    gpus=(),
    gpu_sign="",
    gpu_messages=(),
    gpus_hidden_by="",
    cpu=CPU,
    compilers=Compilers("/usr/bin/g++", "/usr/bin/gcc", True),
    huge_pages="always",
    asks_for_huge_pages=False,
    cache=CacheDirectory("/cache", True, 10 * 2**30),
    image_formats={"JPEG": True, "AVIF": True},
)
WITH_GPU = dataclasses.replace(
    HEALTHY, gpus=(GPU,), gpu_sign="the NVIDIA driver lists a GPU in /proc/driver/nvidia/gpus"
)
NO_CUDA = Torch("2.9.0+cpu", "CPU")


def cpu(**changes: Any) -> Cpu:
    return dataclasses.replace(CPU, **changes)


def gpu(**changes: Any) -> tuple[Gpu, ...]:
    return (dataclasses.replace(GPU, **changes),)


def test_a_healthy_machine_has_neither_problems_nor_hints() -> None:
    for facts in (HEALTHY, WITH_GPU):
        found = Doctor.of(facts)
        assert (found.problems, found.hints) == ((), ())
        lines = str(found).splitlines()
        assert lines[0] == "no problems, no hints"
        assert "AVX2, AVX-512, AMX BF16; torch uses AVX512" in str(found)
        assert "8 usable cores, 8 threads" in str(found)
        assert "pyarrow missing" in str(found) and "transformers 5.23.0" in str(found)
    assert "none: everything runs on the CPU" in str(Doctor.of(HEALTHY))
    text = str(Doctor.of(WITH_GPU))
    assert "NVIDIA H100: 9.0, 80.0 GiB, driver 580.1" in text and "not checked yet" in text
    # aligned: every text begins in the same column
    table = text.split("\n\n")[1].splitlines()
    column = table[0].index("0.1.0")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)


PROBLEMS: dict[str, tuple[Facts, dict[str, Any], str, str]] = {
    "no_torch": (
        HEALTHY,
        {
            "torch": Torch("", "", "OSError: libcudart.so is not there"),
            "cpu": cpu(threads=None, results=None, capability=""),
            "cache": None,
        },
        "torch cannot be imported: OSError: libcudart.so",
        "pip install --force-reinstall torch",
    ),
    "old_torch": (
        HEALTHY,
        {"packages": (Package("torch", "2.8.1", "2.9"),)},
        "torch 2.8.1 is too old, 2.9 or later is needed",
        "pip install --upgrade 'torch>=2.9'",
    ),
    "no_triton": (
        HEALTHY,
        {"packages": (Package("triton", None, "3.5"),)},
        "triton is not installed",
        "pip install --upgrade 'triton>=3.5'",
    ),
    "cpu_build": (
        WITH_GPU,
        {"torch": NO_CUDA, "gpus": ()},
        "but torch 2.9.0+cpu is a build for CPUs",
        "https://pytorch.org/get-started/locally",
    ),
    "old_driver": (
        WITH_GPU,
        {"gpus": (), "gpu_messages": ("RuntimeError: The NVIDIA driver is too old",)},
        "cannot use it: RuntimeError: The NVIDIA driver is too old",
        "upgrade the driver",
    ),
    "gpu_is_too_new": (
        WITH_GPU,
        {"gpu_messages": ("UserWarning: sm_130 is not compatible with this torch",)},
        "sm_130 is not compatible",
        "install a torch built for them",
    ),
    "no_c_compiler": (
        WITH_GPU,
        {"compilers": Compilers("/usr/bin/g++", None, True)},
        "Triton needs a C compiler",
        "apt install gcc",
    ),
    "failing_op": (
        WITH_GPU,
        {"gpus": gpu(results=Results("/g", {"window_attention bfloat16": "error 3, off"}, {}))},
        "window_attention bfloat16 failed its check on NVIDIA H100: error 3, off",
        "fastbb check --again",
    ),
    "too_many_threads": (
        HEALTHY,
        {"cpu": cpu(threads=64)},
        "torch uses 64 threads, but this process may use 8 cores",
        "OMP_NUM_THREADS=8",
    ),
    "no_compiler": (
        HEALTHY,
        {"compilers": Compilers(None, "/usr/bin/gcc", True)},
        "no C++ compiler: torch.compile cannot run on the CPU",
        "apt install g++",
    ),
    "no_header": (
        HEALTHY,
        {"compilers": Compilers("/usr/bin/g++", "/usr/bin/gcc", False)},
        "no Python.h",
        "apt install python3-dev",
    ),
    "read_only_cache": (
        HEALTHY,
        {"cache": CacheDirectory("/cache", False, 2**30)},
        "/cache cannot be written",
        "XDG_CACHE_HOME",
    ),
    "full_disk": (
        HEALTHY,
        {"cache": CacheDirectory("/cache", True, 4096)},
        "the disk of /cache is full",
        "free some space",
    ),
    "broken_kernels": (
        HEALTHY,
        {"errors": ("AttributeError: triton has no jit",)},
        "cannot be looked at: AttributeError: triton has no jit",
        "reinstall fastbb",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_stands_first_with_its_remedy(name: str) -> None:
    facts, changes, what, remedy = PROBLEMS[name]
    found = Doctor.of(dataclasses.replace(facts, **changes))
    (problem,) = found.problems
    assert what in problem.what and remedy in problem.remedy
    lines = str(found).splitlines()
    assert lines[0] == "1 problem, no hints"
    assert lines[1] == f"problem: {problem.what}" and lines[2].strip() == problem.remedy
    assert found.to_dict()["problems"] == [{"what": problem.what, "remedy": problem.remedy}]


HINTS: dict[str, tuple[dict[str, Any], str]] = {
    "huge_pages": ({"huge_pages": "madvise"}, "THP_MEM_ALLOC_ENABLE=1"),
    "few_threads": ({"cpu": cpu(threads=3)}, "torch.set_num_threads(8)"),
    "no_bf16": ({"cpu": cpu(has_bf16=False)}, "stay in fp32"),
    "old_extra": (
        {"packages": (Package("transformers", "4.57.1", "5", "transformers"),)},
        "pip install --upgrade 'transformers>=5'",
    ),
    "only_nvidia_smi": ({"gpu_sign": "nvidia-smi is installed"}, "if there is one"),
    "old_gpu": ({"gpus": gpu(name="V100", capability="7.0")}, "needs no kernels of ours"),
    "new_gpu": ({"gpus": gpu(name="R100", capability="13.0")}, "needs no kernels of ours"),
    "consumer_amd": ({"gpus": gpu(name="7900", capability="gfx1100")}, "needs no kernels of ours"),
    "no_avif": ({"image_formats": {"AVIF": False}}, "pip install --upgrade pillow"),
    "note": (
        {"cpu": cpu(results=Results("/c", {}, {}, ("ignored /c: it is not JSON",)))},
        "found out again",
    ),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_is_no_problem(name: str) -> None:
    changes, remedy = HINTS[name]
    found = Doctor.of(dataclasses.replace(HEALTHY, **changes))
    (hint,) = found.hints
    assert not found.problems and remedy in hint.remedy
    assert str(found).startswith("no problems, 1 hint\nhint: ")


def test_problems_stand_before_hints() -> None:
    found = Doctor.of(
        dataclasses.replace(HEALTHY, cpu=cpu(threads=64, has_bf16=False), huge_pages="madvise")
    )
    lines = str(found).splitlines()
    kinds = [line.partition(":")[0] for line in lines if line.startswith(("problem:", "hint:"))]
    assert lines[0] == "1 problem, 2 hints" and kinds == ["problem", "hint", "hint"]


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus_hidden_by": "CUDA_VISIBLE_DEVICES", "gpus": ()},
        {"huge_pages": "madvise", "asks_for_huge_pages": True},
        {"cpu": cpu(has_bf16=None, threads=4)},
        {"gpus": gpu(name="AMD MI300X", capability="gfx942", driver="")},
        {"packages": (Package("torch", "2.10.0a0+git12", "2.9"), Package("numpy", "2", "2.0.0"))},
    ],
    ids=["hidden_gpu", "huge_pages", "half_the_cores", "amd", "versions"],
)
def test_what_is_meant_or_enough_is_not_complained_of(changes: dict[str, Any]) -> None:
    found = Doctor.of(dataclasses.replace(WITH_GPU, **changes))
    assert not found.problems and not found.hints


def test_shows_what_earlier_runs_found() -> None:
    results = read_results(
        "/cache/gpu.json",
        {
            "window_attention/torch.bfloat16": {"problem": None},
            "patch_embed/torch.bfloat16": {"problem": None},
            "patch_embed/torch.float32/tf32": {"problem": "NaN"},
            "other/torch.float32": "of another form",
            "third/torch.float32": {"problem": 3},
        },
        {"swin/fp32/8x224x224": {"winner": "triton", "trials": []}, "odd": {"trials": []}},
    )
    assert results.tuned == {"swin/fp32/8x224x224": "triton"}
    # alike GPUs share their results, and tell them once
    gpus = gpu(results=results) * 2
    found = Doctor.of(dataclasses.replace(WITH_GPU, gpus=gpus))
    (problem,) = found.problems
    assert problem.what.startswith("patch_embed float32 tf32 failed its check")
    text = str(found)
    assert "passed: patch_embed, window_attention\n" in text
    assert "failed: patch_embed; passed: none\n" in text
    assert "swin/fp32/8x224x224: triton" in text


def test_reads_the_cache_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = ResultCache(Machine.of(torch.device("cpu")))
    before = doctor()
    assert before.facts.cache is not None and before.facts.cache.writable
    assert not (tmp_path / "fastbb").exists()  # looking makes nothing
    cache.put("self_check", "patch_embed/torch.float32", {"problem": "wrong by 3"})
    cache.put("tuned", "swin/fp32/1x64x64", {"winner": "compile", "trials": []})
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "problem: patch_embed float32 failed its check" in result.stdout
    assert "swin/fp32/1x64x64: compile" in result.stdout
    cache.path.write_text("{")
    assert any("ignored" in hint.what for hint in doctor().hints)


def test_the_command_and_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    text, as_json = (CliRunner().invoke(main, ["doctor", *extra]) for extra in ([], ["--json"]))
    values = json.loads(as_json.stdout)
    assert list(values)[:2] == ["problems", "hints"]
    for kind in ("problem", "hint"):
        for finding in values[f"{kind}s"]:
            assert f"{kind}: {finding['what']}\n    {finding['remedy']}\n" in text.stdout
    assert text.exit_code == as_json.exit_code == (1 if values["problems"] else 0)
    assert values["torch"]["version"] == torch.__version__
    assert values["cpu"]["threads"] == threads
    assert values["cache"]["path"] == str(tmp_path / "fastbb")


def test_the_facts_of_this_machine() -> None:
    facts = gather_facts()
    names = {package.name: package for package in facts.packages}
    assert names["torch"].extra is None and not names["torch"].is_old
    assert names["pyarrow"].extra == "parquet" and "pytest" not in names
    assert 1 <= facts.cpu.usable_cores <= (os.cpu_count() or 1)
    assert not facts.errors and facts.image_formats["JPEG"]


def test_the_floors_are_those_of_the_package() -> None:
    lines = (ROOT / "pyproject.toml").read_text()
    for line in NEEDED:
        assert f'"{line}"' in lines


@pytest.mark.parametrize(
    ("line", "name", "wanted", "extra"),
    [
        ("torch>=2.9", "torch", "2.9", None),
        ("triton >= 3.5 ; sys_platform == 'linux'", "triton", "3.5", None),
        ("pyarrow<30,>=17; extra == 'parquet'", "pyarrow", "17", "parquet"),
        ('ml-dtypes; extra == "testing"', "ml-dtypes", "", "testing"),
    ],
    ids=["plain", "platform", "extra", "any_version"],
)
def test_requirements(line: str, name: str, wanted: str, extra: str | None) -> None:
    package = parse_requirement(line)
    assert package is not None
    assert (package.name, package.wanted, package.extra) == (name, wanted, extra)
    assert parse_requirement("pywin32; sys_platform == 'win32'") is None
    assert parse_requirement("ruff; extra == 'dev'") is None


@pytest.mark.parametrize(
    ("files", "cgroups", "cores"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 4),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/x/cpu.cfs_period_us": "1e5"},
            "4:memory:/x\n3:cpu,cpuacct:/x",
            2,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", None),
        ({}, "", None),
    ],
    ids=["v2", "no_limit", "parent", "v1", "v1_no_limit", "none"],
)
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], cgroups: str, cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert facts_module._quota(cgroups, tmp_path) == cores


def test_survives_a_machine_without_anything() -> None:
    code = """
import sys, pathlib
for name in ("torch", "timm", "transformers", "triton", "PIL", "numpy"):
    sys.modules[name] = None
import importlib.metadata
def gone(*args): raise importlib.metadata.PackageNotFoundError(*args)
importlib.metadata.version = importlib.metadata.requires = gone
def unreadable(*args, **kwargs): raise PermissionError("no")
pathlib.Path.read_text = pathlib.Path.iterdir = unreadable
sys.argv = ["fastbb", "doctor", "--json"]
from fastbb.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and not result.stderr, result.stderr
    problems = [problem["what"] for problem in json.loads(result.stdout)["problems"]]
    assert problems[0].startswith("torch cannot be imported: ModuleNotFoundError")
    assert "triton is not installed" in problems


def test_imports_no_package_only_to_ask_its_version() -> None:
    code = """
import sys
from fastbb.engine.doctor import doctor
doctor()
slow = {"timm", "transformers", "torchvision", "matplotlib", "pyarrow", "torch._inductor.codecache"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
for name in ("timm", "transformers"):
    sys.modules[name] = None
assert not any("imported" in problem.what for problem in doctor().problems)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
