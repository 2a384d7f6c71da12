"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest
from engine_rig import EngineRig, resnet_pair
from pretended_device import Compiler, Device, install
from reference_models import Pair

from fastbb_kernels import _dispatch


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A backbone whose weights stay unchanged; files with tests that change them override it."""
    return resnet_pair()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A pretended compiler in the place of torch's, and no OpenVINO beside it."""
    monkeypatch.setattr("fastbb.engine.openvino.openvino_version", lambda: None)
    return install(Compiler(), monkeypatch)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps caches in the test's folder, and the process's implementation of ops as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # threads may leave the setting of another thread
    monkeypatch.setattr(_dispatch, "_default", _dispatch._default)


@pytest.fixture
def rig(pair: Pair, compiler: Compiler, tmp_path: Path) -> EngineRig:
    return EngineRig(pair, Device(), compiler, tmp_path)
