"""Facts that the doctor gathers, and machines on which gathering them fails."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbb.inspect import facts
from fastbb.inspect.facts import NEEDED, core_limit, directory_state, packages_of

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = """
import sys
sys.argv = ["fastbb", "doctor", "--json"]
from fastbb.cli import main
main()
"""


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program that finds packages in some folders first."""
    path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def problems(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 1 and not result.stderr, result.stderr
    return [problem["what"] for problem in json.loads(result.stdout)["problems"]]


def test_needed_versions_equal_pyproject() -> None:
    lines = (ROOT / "pyproject.toml").read_text()
    for line in NEEDED:
        assert f'"{line}"' in lines


@pytest.mark.parametrize(
    ("line", "name", "wanted", "extra"),
    [
        ("torch>=2.9", "torch", ">=2.9", None),
        ("triton >= 3.5 ; sys_platform == 'linux'", "triton", ">=3.5", None),
        ("pyarrow<30,>=17; extra == 'parquet'", "pyarrow", "<30,>=17", "parquet"),
        ('ml-dtypes; extra == "testing"', "ml-dtypes", "", "testing"),
        ("pip; sys_platform == 'linux' and extra == 'testing'", "pip", "", "testing"),
    ],
    ids=["plain", "platform", "extra", "any_version", "platform_and_extra"],
)
def test_requirement_lines_are_parsed(line: str, name: str, wanted: str, extra: str | None) -> None:
    (package,) = packages_of([line], ["dev", "parquet", "testing"])
    assert (package.name, package.wanted, package.extra) == (name, wanted, extra)


@pytest.mark.parametrize("line", ["pywin32; sys_platform == 'win32'", "ruff; extra == 'dev'"])
def test_requirements_of_other_platforms_and_of_developers_are_left_out(line: str) -> None:
    assert not list(packages_of([line], ["dev"]))


def test_packages_of_this_machine_are_new_enough() -> None:
    names = {package.name: package for package in facts.needed_packages()}
    assert not names["torch"].is_old and names["torch"].version
    assert names["torch"]._replace(wanted=">=99").is_old


def test_checkout_without_metadata_needs_torch_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", gone)
    assert [package.name for package in facts.needed_packages()] == ["torch", "triton"]


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
        ({"cpu.max": "100000 0"}, "0::/", None),
        ({}, "", None),
    ],
    ids=["v2", "no_limit", "parent", "v1", "v1_no_limit", "no_period", "none"],
)
def test_cgroup_limits_give_the_number_of_cores(
    tmp_path: Path, files: dict[str, str], cgroups: str, cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert core_limit(cgroups, tmp_path) == cores


def test_missing_directory_that_can_be_made_is_writable_and_not_made(tmp_path: Path) -> None:
    state = directory_state(str(tmp_path / "a" / "b"))
    assert state["writable"] and state["problem"] is None and state["free_bytes"] > 0
    assert not any(tmp_path.iterdir())


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = directory_state(str(tmp_path / "file" / "cache"))
    assert not state["writable"] and state["problem"] == "Not a directory"
    assert state["free_bytes"] > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_directory_that_root_cannot_make_is_not_reported_as_a_full_disk() -> None:
    state = directory_state("/proc/fastbb")
    assert not state["writable"] and state["problem"] and state["free_bytes"] is None


def test_doctor_survives_a_machine_without_any_package() -> None:
    code = """
import sys, pathlib
for name in ("torch", "timm", "transformers", "triton", "PIL", "numpy"):
    sys.modules[name] = None
import importlib.metadata
def gone(*args): raise importlib.metadata.PackageNotFoundError(*args)
importlib.metadata.version = importlib.metadata.metadata = gone
def unreadable(*args, **kwargs): raise PermissionError("no")
pathlib.Path.read_text = pathlib.Path.iterdir = unreadable
"""
    found = problems(run(code + DOCTOR))
    assert found[0].startswith("torch cannot be imported: ModuleNotFoundError")
    assert "triton is not installed" in found


def test_doctor_survives_a_machine_without_packaging() -> None:
    found = problems(run("import sys; sys.modules['packaging'] = None" + DOCTOR))
    assert found[0].startswith("packages cannot be examined: ModuleNotFoundError")


def broken(package: str, source: str, folder: Path) -> list[str]:
    """What the doctor finds if a package raises when it is imported."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source)
    return problems(run(DOCTOR, folder))


def test_doctor_survives_a_broken_package(tmp_path: Path) -> None:
    found = broken("torch", "raise OSError('libcudart.so is not there')", tmp_path)
    assert any(one.startswith("torch cannot be imported: OSE") for one in found)


def test_doctor_imports_no_package_to_read_its_version() -> None:
    code = """
import sys
from fastbb.inspect.doctor import doctor
doctor()
slow = {"timm", "transformers", "torchvision", "matplotlib", "pyarrow", "torch._inductor.codecache"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
for name in ("timm", "transformers"):
    sys.modules[name] = None
assert not doctor().facts["errors"]
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
