"""Loads transformers' own tests from the source distribution of the installed version."""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILES = ("test_backbone_common.py", "test_modeling_common.py")
PIP_TIMEOUT_S = 300


def load_upstream_tests(name: str) -> ModuleType:
    """Returns one of `FILES`, fetched by pip if necessary; skips the test if that fails."""
    import transformers

    version = transformers.__version__
    folder = Path.home() / ".cache" / "fastbb-tests" / f"transformers-{version}"
    try:
        if not (folder / name).exists():
            fetch(version, folder)
    except (subprocess.SubprocessError, OSError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        pytest.skip(f"transformers' source distribution cannot be had: {detail}")
    package = "transformers_tests"
    spec = importlib.util.spec_from_file_location(f"{package}.{Path(name).stem}", folder / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for stub, content in stubs(package).items():
            patch.setitem(sys.modules, stub, content)
        patch.setattr(pytest, "mark", Unmarked())
        spec.loader.exec_module(module)
    return module


def fetch(version: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # a directory of its own: the workers of pytest-xdist may fetch at the same time
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
        command += [f"transformers=={version}"]
        subprocess.run(command, check=True, capture_output=True, timeout=PIP_TIMEOUT_S, text=True)
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            for name in FILES:
                (member,) = [m for m in tar.getmembers() if m.name.endswith(f"/tests/{name}")]
                content = tar.extractfile(member)
                assert content is not None
                file = archive.with_name(name)
                file.write_bytes(content.read())
                file.replace(folder / name)


def stubs(package: str) -> dict[str, ModuleType]:
    """Returns stubs of modules that the files import and the source distribution lacks."""
    members: dict[str, dict[str, Any]] = {
        package: {},
        f"{package}.exporters.test_export": {
            "ExportTesterMixin": type("ExportTesterMixin", (), {})
        },
        f"{package}.generation.test_utils": {
            "GenerationTesterMixin": type("GenerationTesterMixin", (), {})
        },
    }
    if importlib.util.find_spec("parameterized") is None:
        members["parameterized"] = {"parameterized": Parameterized}
    modules = {name: ModuleType(name) for name in members}
    for name, module in modules.items():
        vars(module).update(members[name])
    return modules


class Unmarked:
    """Replacement of `pytest.mark`, which refuses foreign marks."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda test: test


class Parameterized:
    """Used part of the package `parameterized`."""

    @staticmethod
    def expand(cases: Iterable[Any]) -> Callable[[Any], None]:
        """Adds one test for each case to the enclosing class."""
        members = sys._getframe(1).f_locals

        def put(test: Any) -> None:
            for index, case in enumerate(cases):
                values = case if isinstance(case, tuple) else (case,)
                name = f"{test.__name__}_{index}_{values[0]}"
                members[name] = lambda self, values=values: test(self, *values)

        return put
