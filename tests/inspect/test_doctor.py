"""The doctor puts problems first, each with a remedy, and survives a broken machine."""

import errno
import json
import os
import shutil
import sysconfig
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import fastbb.engine.cpu
import fastbb.images.formats
import fastbb_kernels.machine
from fastbb.cli import main
from fastbb.inspect import facts
from fastbb.inspect.doctor import Doctor, doctor
from fastbb.inspect.facts import Package
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine("Some CPU", "AVX512", "", "2.11.0", "3.6.0", "0.1.0", "0123", "8")
GPU = replace(CPU, device="NVIDIA H100", capability="9.0", driver="580.1", threads="")
NVIDIA = "the NVIDIA driver lists a GPU in /proc/driver/nvidia/gpus"
AVX512_BF16 = frozenset({"avx2", "avx512f", "amx_bf16"})


@dataclass(frozen=True)
class Pretended:
    """A machine; without changes a healthy one that has no GPU."""

    packages: tuple[Package, ...] = (
        Package("torch", "2.11.0+cu130", ">=2.11", None),
        Package("triton", "3.6.0", ">=3.6", None),
        Package("pyarrow", None, ">=17", "parquet"),
        Package("transformers", "5.23.0", ">=5.9", "transformers"),
    )
    torch_version: str = "2.11.0+cu130"
    cuda: str | None = "13.0"
    gpus: tuple[Machine, ...] = ()
    gpu_sign: str = ""
    gpu_error: str | None = None  # torch's error without a GPU
    gpu_warning: str | None = None
    gpus_hidden_by: str = ""
    cores: int = 8
    threads: int = 8
    flags: frozenset[str] = AVX512_BF16
    programs: tuple[str, ...] = ("g++", "gcc")
    header: bool = True
    huge_pages: str = "always"
    formats: tuple[tuple[str, bool], ...] = (("JPEG", True), ("AVIF", True))
    openvino: str | None = "2026.4"
    free_bytes: int = 10 * 2**30
    cache_problem: str | None = None
    triton_cache_problem: str | None = None
    triton_cache_dir: str | None = "triton"

    def apply(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Replaces the real machine by this one."""

        def is_available() -> bool:
            if self.gpu_warning is not None:
                warnings.warn(self.gpu_warning, stacklevel=2)
            return bool(self.gpus)

        def init() -> None:
            if self.gpu_error is not None:
                raise RuntimeError(self.gpu_error)

        def state(path: str) -> dict[str, Any]:
            is_ours = path == str(folder / "fastbb")
            problem = self.cache_problem if is_ours else self.triton_cache_problem
            return {"path": path, "problem": problem, "free_bytes": self.free_bytes}

        def machine_of(device: torch.device) -> Machine:
            return self.gpus[device.index] if device.type == "cuda" else CPU

        ours = version("fastbb")
        include = folder / "include"
        if self.header:
            include.mkdir(exist_ok=True)
            (include / "Python.h").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setenv("HOME", str(folder))
        if self.triton_cache_dir is None:
            monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / self.triton_cache_dir))
        for name in ("CC", "CXX", "THP_MEM_ALLOC_ENABLE"):
            monkeypatch.delenv(name, raising=False)
        pages = f"always [{self.huge_pages}] never"
        properties = SimpleNamespace(total_memory=80 * 2**30)
        for owner, name, value in (
            (facts, "installed_version", lambda x: {"openvino": self.openvino}.get(x, ours)),
            (facts, "needed_packages", lambda: list(self.packages)),
            (facts, "gpu_sign", lambda: self.gpu_sign),
            (facts, "gpus_hidden_by", lambda: self.gpus_hidden_by),
            (facts, "usable_cores", lambda: self.cores),
            (facts, "directory_state", state),
            (facts, "read", lambda path: pages if "hugepage" in str(path) else ""),
            (torch, "__version__", self.torch_version),
            (torch.version, "cuda", self.cuda),
            (torch.version, "hip", None),
            (torch.cuda, "is_available", is_available),
            (torch.cuda, "device_count", lambda: len(self.gpus)),
            (torch.cuda, "init", init),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (torch, "get_num_threads", lambda: self.threads),
            (Machine, "of", machine_of),
            (fastbb_kernels.machine, "cpu_flags", lambda: self.flags),
            (fastbb.engine.cpu, "cpu_flags", lambda: self.flags),
            (shutil, "which", lambda name: f"/bin/{name}" if name in self.programs else None),
            (sysconfig, "get_paths", lambda: {"include": str(include)}),
            (fastbb.images.formats, "pillow_support", lambda: dict(self.formats)),
        ):
            monkeypatch.setattr(owner, name, value)


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Examines a pretended machine, which differs from the healthy one as its arguments say."""

    def examined(**changes: Any) -> Doctor:
        Pretended(**changes).apply(monkeypatch, tmp_path)
        return doctor()

    return examined


def unwrapped(text: str) -> str:
    return " ".join(text.split())


WITH_GPU = {"gpus": (GPU,), "gpu_sign": NVIDIA}


EIGHT_GPUS = {"gpus": (GPU,) * 8, "gpu_sign": NVIDIA}


@pytest.mark.parametrize("changes", [{}, WITH_GPU, EIGHT_GPUS], ids=["cpu", "gpu", "gpus"])
def test_a_healthy_machine_has_neither_problems_nor_hints_and_fits_a_screen(
    examine: Any, changes: dict[str, Any]
) -> None:
    found = examine(**changes)
    assert (found.problems, found.hints) == ([], [])
    text = str(found)
    lines = text.splitlines()
    assert lines[0] == "no problems, no hints"
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "AVX2, AVX-512, AMX BF16; torch uses AVX512" in text
    assert "8 usable cores, 8 threads" in text
    assert "~/triton, 10.0 GiB free" in text
    if changes:
        assert "NVIDIA H100: 9.0, 80.0 GiB, driver 580.1" in text and "not checked yet" in text
    else:
        assert "none: everything runs on the CPU" in text and "not checked yet" not in text
    # aligned: every text begins in the same column
    table = text.split("\n\n")[1].splitlines()
    column = table[0].index(version("fastbb"))
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)

    details = found.text(verbose=True)
    assert max(map(len, details.splitlines())) <= 80
    shown = unwrapped(details)
    assert "pyarrow missing" in shown and "transformers 5.23.0" in shown and "JPEG, AVIF" in shown
    assert not any(name in text for name in ("pyarrow", "transformers", "AVIF"))


OLD_TORCH = (Package("torch", "2.8.1", ">=2.9", None),)
NO_TRITON = (Package("triton", None, ">=3.6", None),)
# difference from a healthy machine, the problem, its remedy
PROBLEMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "old_torch": (
        {"packages": OLD_TORCH},
        "torch 2.8.1 is too old, torch>=2.9 is needed",
        "pip install --upgrade 'torch>=2.9'",
    ),
    "no_triton": (
        {"packages": NO_TRITON},
        "triton is not installed",
        "pip install 'triton>=3.6'",
    ),
    "cpu_build": (
        {"gpu_sign": NVIDIA, "torch_version": "2.11.0+cpu", "cuda": None},
        "but torch 2.11.0+cpu is a build for CPUs",
        "https://pytorch.org/get-started/locally",
    ),
    "old_driver": (
        {"gpu_sign": NVIDIA, "gpu_error": "The NVIDIA driver is too old"},
        "cannot use it: RuntimeError: The NVIDIA driver is too old",
        "upgrade the driver",
    ),
    "silent_torch": ({"gpu_sign": NVIDIA}, "it says nothing about why", "--gpus all"),
    "gpu_is_too_new": (
        {**WITH_GPU, "gpu_warning": "\n  sm_130 is not compatible\n  with this torch"},
        "UserWarning: sm_130 is not compatible with this torch",
        "install a torch built for them",
    ),
    "no_c_compiler": (
        {**WITH_GPU, "programs": ("g++",)},
        "there is no C compiler: Triton cannot start kernels",
        "apt install gcc",
    ),
    "no_header_beside_a_gpu": (
        {**WITH_GPU, "header": False},
        "there is no Python.h: torch.compile cannot run on the CPU (mode 'compile'), nor Triton",
        "apt install python3-dev",
    ),
    "too_many_threads": (
        {"threads": 64},
        "torch uses 64 threads, but this process may use 8 cores",
        "OMP_NUM_THREADS=8",
    ),
    "no_compiler": (
        {"programs": ("gcc",)},
        "no C++ compiler: torch.compile cannot run on the CPU",
        "apt install g++",
    ),
    "no_header": ({"header": False}, "no Python.h", "apt install python3-dev"),
    "read_only_cache": (
        {"cache_problem": "Permission denied"},
        "/fastbb cannot be made (Permission denied): every process checks",
        "XDG_CACHE_HOME",
    ),
    "full_disk": (
        {"free_bytes": 4096, "triton_cache_dir": None},
        "/fastbb is full",
        "free some space",
    ),
    "disk_that_says_it_is_full": (
        {"cache_problem": os.strerror(errno.ENOSPC)},
        "/fastbb is full",
        "free some space",
    ),
    "no_space_where_nothing_can_be_made": (
        {
            "cache_problem": os.strerror(errno.EROFS),
            "free_bytes": 0,
            "triton_cache_dir": None,
        },
        "/fastbb cannot be made (Read-only file system)",
        "set XDG_CACHE_HOME",
    ),
    "read_only_triton_cache": (
        {**WITH_GPU, "triton_cache_problem": "Permission denied"},
        "/triton cannot be made (Permission denied): no kernel can be compiled",
        "TRITON_CACHE_DIR",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_stands_first_with_its_remedy(examine: Any, name: str) -> None:
    changes, what, remedy = PROBLEMS[name]
    found = examine(**changes)
    (problem,) = found.problems
    assert what in problem.what and remedy in problem.remedy
    text = unwrapped(str(found))
    assert text.startswith(f"1 problem, no hints problem: {problem.what} do: {problem.remedy} ")
    assert found.to_dict()["problems"] == [{"what": problem.what, "remedy": problem.remedy}]


OLD_EXTRA = (Package("transformers", "4.57.1", ">=5", "transformers"),)
HINTS: dict[str, tuple[dict[str, Any], str]] = {
    "huge_pages": ({"huge_pages": "madvise"}, "THP_MEM_ALLOC_ENABLE=1"),
    "no_openvino": ({"openvino": None}, "pip install 'fastbb[openvino]'"),
    "few_threads": ({"threads": 3}, "torch.set_num_threads(8)"),
    "no_bf16": ({"flags": frozenset({"avx2"})}, "stay in fp32"),
    "old_extra": ({"packages": OLD_EXTRA}, "pip install --upgrade 'transformers>=5'"),
    "only_nvidia_smi": ({"gpu_sign": "nvidia-smi is installed"}, "if there is one"),
    "old_gpu": ({"gpus": (replace(GPU, capability="7.0"),)}, "needs no kernels of ours"),
    "new_gpu": ({"gpus": (replace(GPU, capability="13.0"),)}, "needs no kernels of ours"),
    "consumer_amd": ({"gpus": (replace(GPU, capability="gfx1100"),)}, "needs no kernels of ours"),
    "own_triton_cache": ({"triton_cache_problem": "Permission denied"}, "set TRITON_CACHE_DIR"),
    "no_avif": ({"formats": (("JPEG", True), ("AVIF", False))}, "pip install --upgrade pillow"),
}


@pytest.mark.parametrize("name", HINTS)
def test_hint_is_not_counted_as_a_problem(examine: Any, name: str) -> None:
    changes, remedy = HINTS[name]
    found = examine(**changes)
    (hint,) = found.hints
    assert not found.problems and remedy in hint.remedy
    assert str(found).startswith("no problems, 1 hint\nhint: ")


def test_problems_stand_before_hints(examine: Any) -> None:
    found = examine(threads=64, flags=frozenset({"avx2"}), huge_pages="madvise")
    lines = str(found).splitlines()
    kinds = [line.partition(":")[0] for line in lines if line.startswith(("problem:", "hint:"))]
    assert lines[0] == "1 problem, 2 hints" and kinds == ["problem", "hint", "hint"]


VERSIONS = (
    Package("torch", "2.11.0a0+git12", ">=2.11", None),
    Package("numpy", "2", ">=2.0.0", None),
    Package("timm", "unknown", ">=1", None),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus_hidden_by": "CUDA_VISIBLE_DEVICES", "gpu_sign": NVIDIA},
        {"flags": frozenset(), "threads": 4},
        {**WITH_GPU, "huge_pages": "madvise", "flags": frozenset({"avx2"})},
        {"gpus": (replace(GPU, device="AMD MI300X", capability="gfx942", driver=""),)},
        {"packages": VERSIONS},
        {"triton_cache_problem": "Permission denied", "triton_cache_dir": None},
    ],
    ids=["hidden_gpu", "half_the_cores", "cpu_beside_gpu", "amd", "versions", "no_kernels"],
)
def test_intended_or_sufficient_settings_give_no_finding(
    examine: Any, changes: dict[str, Any]
) -> None:
    found = examine(**changes)
    assert (found.problems, found.hints) == ([], [])


def test_huge_pages_that_torch_asks_for_give_no_hint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Pretended(huge_pages="madvise").apply(monkeypatch, tmp_path)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert not doctor().hints


def test_results_of_earlier_runs_are_shown(examine: Any, tmp_path: Path) -> None:
    cache = ResultCache(GPU, tmp_path / "fastbb")
    for op, value in {
        "window_attention/torch.bfloat16": {"problem": None},
        "patch_embed/torch.bfloat16": {"problem": None},
        "patch_embed/torch.float32/tf32": {"problem": "NaN"},
        "other/torch.float32": "of another form",
        "third/torch.float32": {"problem": 3},
    }.items():
        cache.put("self_check", op, value)
    cache.put("tuned", "swin/fp32/8x224x224", {"winner": "triton", "trials": []})
    cache.put("tuned", "odd", {"trials": []})
    # equal GPUs share their results, which are shown once
    found = examine(gpus=(GPU, GPU), gpu_sign=NVIDIA)
    (problem,) = found.problems
    assert problem.what == "patch_embed float32 tf32 failed its check on NVIDIA H100: NaN"
    assert "fastbb check --again" in problem.remedy
    text = str(found)
    assert "GPU             2 x NVIDIA H100: 9.0" in text
    assert "3 checked by op and dtype, 1 failed" in text and "1 shape of models" in text
    assert "passed: " not in text
    details = found.text(verbose=True)
    assert "passed: patch_embed, window_attention\n" in details
    assert "failed: patch_embed\n" in details
    assert details.count("swin/fp32/8x224x224: triton") == 1
    assert found.facts["gpus"][0]["results"]["tuned"] == {"swin/fp32/8x224x224": "triton"}


def test_the_cache_of_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = ResultCache(Machine.of(torch.device("cpu")))
    assert doctor().facts["cache"]["writable"]
    assert not any(tmp_path.iterdir())  # nothing is created
    cache.put("self_check", "patch_embed/torch.float32", {"problem": "wrong by 3"})
    cache.put("tuned", "swin/fp32/1x64x64", {"winner": "compile", "trials": []})
    result = CliRunner().invoke(main, ["doctor", "-v"])
    assert result.exit_code == 1
    assert "problem: patch_embed float32 failed its check" in result.stdout
    assert "swin/fp32/1x64x64: compile" in result.stdout
    cache.path.write_text("{")
    (hint,) = (hint for hint in doctor().hints if "ignored" in hint.what)
    assert "found out again" in hint.remedy


def test_doctor_command_and_its_json_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    text, as_json = (CliRunner().invoke(main, ["doctor", *extra]) for extra in ([], ["--json"]))
    values = json.loads(as_json.stdout)
    assert list(values)[:2] == ["problems", "hints"]
    for kind in ("problem", "hint"):
        for finding in values[f"{kind}s"]:
            said = f"{kind}: {finding['what']} do: {finding['remedy']} "
            assert said in unwrapped(text.stdout)
    assert text.exit_code == as_json.exit_code == (1 if values["problems"] else 0)
    assert values["torch"]["version"] == torch.__version__
    assert values["cpu"]["threads"] == threads
    assert values["cache"]["path"] == str(tmp_path / "fastbb")
    names = {package["name"]: package for package in values["packages"]}
    assert names["torch"]["extra"] is None and names["pyarrow"]["extra"] == "parquet"
    assert "pytest" not in names
    assert 1 <= values["cpu"]["usable_cores"] <= (os.cpu_count() or 1)
    assert not values["errors"] and values["image_formats"]["JPEG"]
