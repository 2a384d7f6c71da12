"""One wheel with two import packages, whose import is fast."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "AutoBackbone",
    "AutoConfig",
    "AutoImageProcessor",
    "BackboneConfigMixin",
    "BackboneMixin",
    "BackboneOutput",
    "FeatureExtractor",
    "ResNetBackbone",
    "ResNetConfig",
    "SwinBackbone",
    "SwinConfig",
    "TimmBackbone",
    "TimmBackboneConfig",
    "extract",
    "list_backbones",
    "open_features",
}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_kernels_folder_is_no_package() -> None:
    # transformers imports `kernels`, PyPI's, wherever it finds it
    assert (ROOT / "kernels" / "fastbb_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_import_kernels_never_finds_our_folder() -> None:
    # in the repository root, a folder named `kernels` comes first on the path
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s and s.origin)"
    origin = python("-c", code).stdout.strip()
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        assert origin == "None"  # a namespace, which transformers passes over
    else:
        assert origin.endswith("__init__.py")
        assert ROOT / "kernels" not in Path(origin).parents


def test_transformers_imports_from_the_repository_root() -> None:
    pytest.importorskip("transformers")
    python("-c", "from transformers import SwinBackbone")


def test_the_wheel_holds_exactly_the_two_packages(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"fastbb", "fastbb_kernels"}
    assert {"fastbb/py.typed", "fastbb_kernels/py.typed"} <= set(names)
    for model in ("nano-swin-digits", "nano-resnet-digits"):
        folder = f"fastbb/assets/{model}"
        assert {f"{folder}/config.json", f"{folder}/model.safetensors"} <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".pt", ".pkl", ".bin"))]
    # files that the checkout uses must be in the wheel
    for package, root in (("fastbb", ROOT), ("fastbb_kernels", ROOT / "kernels")):
        modules = {p.relative_to(root).as_posix() for p in (root / package).rglob("*.py")}
        assert modules <= set(names)


def test_floor_constraints_equal_the_declared_minimum_versions() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tools = ["torchvision", "pytest", "pytest-xdist"]
    assert f"'.[transformers,testing]' {' '.join(tools)}\n" in (ROOT / "Makefile").read_text()
    lines = [*project["dependencies"], *extras["transformers"], *extras["testing"]]
    lines += [line for line in extras["dev"] if line.split(">=")[0] in tools]
    floors = [line.replace(">=", "==") for line in lines]
    pins = (ROOT / "constraints-floor.txt").read_text().splitlines()
    assert [line for line in pins if not line.startswith("#")] == floors


# processor time: other processes share the cores
FRESH_IMPORT = """
import json, sys, time
import torch
def driver(): return "libcuda.so" in open("/proc/self/maps").read()
had_driver = driver()
start = time.process_time()
import fastbb
package = time.process_time()
from fastbb import AutoBackbone, AutoConfig, AutoImageProcessor, ResNetBackbone, SwinBackbone
names = time.process_time()
print(json.dumps({
    "package_s": package - start,
    "names_s": names - start,
    "loaded": sorted({"timm", "transformers", "torchvision"} & set(sys.modules)),
    "gpu": torch.cuda.is_initialized() or driver() > had_driver,
    "names": fastbb.__all__,
    "listed": dir(fastbb),
    "missing": [name for name in fastbb.__all__ if not hasattr(fastbb, name)],
}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """Effects of importing fastbb in a new interpreter: times, modules, names."""
    return json.loads(python("-c", FRESH_IMPORT).stdout)


def test_importing_fastbb_adds_little_time_to_torch(fresh: dict[str, Any]) -> None:
    assert fresh["package_s"] < 0.3
    assert fresh["names_s"] < 0.5


def test_importing_brings_neither_timm_nor_transformers_nor_a_gpu(fresh: dict[str, Any]) -> None:
    assert fresh["loaded"] == []
    assert not fresh["gpu"]


def test_every_public_name_is_there_and_listed(fresh: dict[str, Any]) -> None:
    assert fresh["missing"] == []
    assert PUBLIC <= set(fresh["names"]) <= set(fresh["listed"])


def test_files_named_by_the_makefile_exist() -> None:
    lines = subprocess.run(
        ["make", "--dry-run", "test-quick", "test", "test-floor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = set(re.findall(r"tests/[\w./]+", lines))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
