"""`make dist`: the sources and the wheel, and that the wheel works where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).resolve().parents[1]
# files of the checkout that are about the checkout
NOT_SHIPPED = (".ci/", ".gitignore")


class Installed(NamedTuple):
    """The wheel in a virtual environment of its own.

    Attributes:
        bin: folder of its commands.
        sources: what the wheel was built of, unpacked.
        environment: variables for programs in it.
    """

    bin: Path
    sources: Path
    environment: Mapping[str, str]

    def run(self, *command: str, cwd: Path) -> str:
        """Runs a command of the environment, or a script by its Python; returns what it prints."""
        program, *arguments = command
        result = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


def build(target: str, root: Path, out: Path) -> Path:
    """Builds "sdist" or "wheel" of a source tree, as `make dist` does."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)],
        cwd=root,
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel that the sdist makes, installed beside the dependencies of this environment.

    Their folder is on the path of the new environment, but what its .pth files add is not: an
    editable fastbb is not seen.
    """
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build("wheel", sources, folder)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, *options, str(wheel)], check=True, env=os.environ)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Installed(python.parent, sources, environment)


def test_the_sources_hold_every_file_of_the_checkout(sources: Path) -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "--exclude-standard"]
    listed = [
        subprocess.run([*git, kind], capture_output=True, text=True)
        for kind in ("--cached", "--others")
    ]
    if listed[0].returncode:
        pytest.skip("no checkout")
    tracked, new = (
        {name for name in found.stdout.splitlines() if (ROOT / name).exists()} for found in listed
    )
    packed = {p.relative_to(sources).as_posix() for p in sources.rglob("*") if p.is_file()}
    packed -= {"PKG-INFO", ".gitignore"}  # hatchling adds these two
    assert {name for name in tracked if not name.startswith(NOT_SHIPPED)} <= packed
    assert packed <= tracked | new


ACCELERATE = """
import fastbb, timm, torch

model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)).eval()
pixels = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    wanted = model(pixels)
    report = fastbb.accelerate(model, mode="eager")
    torch.testing.assert_close(model(pixels), wanted)
assert report.accelerated
print(fastbb.__file__)
"""


def test_the_wheel_accelerates(installed: Installed, tmp_path: Path) -> None:
    where = installed.run("python", "-c", ACCELERATE, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.bin.parent)


def test_the_wheels_command_extracts(installed: Installed, images: Path, tmp_path: Path) -> None:
    extract = ["fastbb", "extract", str(images), "--out", "features"]
    assert "3 of 3 images" in installed.run(*extract, "--model", "nano-swin-digits", cwd=tmp_path)
    assert "complete" in installed.run("fastbb", "show", "features", cwd=tmp_path)


def test_the_demo_runs_on_the_wheel(installed: Installed, tmp_path: Path) -> None:
    """The demo is a script of the sources, beside which no package lies."""
    for module in ("skimage", "sklearn"):
        pytest.importorskip(module)
    demo = installed.sources / "scripts" / "demo.py"
    assert "k-NN accuracy" in installed.run("python", str(demo), cwd=tmp_path)
