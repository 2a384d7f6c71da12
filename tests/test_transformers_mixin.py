"""transformers' own backbone tests, from its source distribution, on our backbones."""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference_models import images

from fastbb import (
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
)

transformers = pytest.importorskip("transformers")

TEST_FILE = "tests/test_backbone_common.py"
PIP_TIMEOUT_S = 300


def fetch(folder: Path) -> Path:
    """The test file of exactly the installed version, fetched by pip unless it is there already."""
    file = folder / Path(TEST_FILE).name
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # a directory of its own: the workers of pytest-xdist may fetch at the same time
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
        command += [f"transformers=={transformers.__version__}"]
        subprocess.run(command, check=True, capture_output=True, timeout=PIP_TIMEOUT_S, text=True)
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            (member,) = [m for m in tar.getmembers() if m.name.endswith("/" + TEST_FILE)]
            content = tar.extractfile(member)
            assert content is not None
            archive.with_name(file.name).write_bytes(content.read())
        return archive.with_name(file.name).replace(file)


@pytest.fixture(scope="module")
def upstream_tests() -> ModuleType:
    cache = Path.home() / ".cache" / "fastbb-tests" / f"transformers-{transformers.__version__}"
    try:
        file = fetch(cache)
    except (subprocess.SubprocessError, OSError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        pytest.skip(f"transformers' source distribution cannot be had: {detail}")
    spec = importlib.util.spec_from_file_location("upstream_test_backbone_common", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ModelTester:
    """What the mixin asks for a small model and an input of it."""

    def __init__(self, config: Any):
        self.config = config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.config, {"pixel_values": images(32, 32)}


def swin_config() -> SwinConfig:
    return SwinConfig(
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_indices=[1, 2],
    )


def resnet_config() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 2, 1, 1],
        layer_type="basic",
        out_indices=[1, 2],
    )


def timm_config() -> TimmBackboneConfig:
    config = TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2])
    TimmBackbone(config)  # a timm config learns its stage names from the model
    return config


FAMILIES = {
    "swin": (SwinConfig, SwinBackbone, swin_config),
    "resnet": (ResNetConfig, ResNetBackbone, resnet_config),
    "timm": (TimmBackboneConfig, TimmBackbone, timm_config),
}
TESTS = [
    "test_config",
    "test_forward_signature",
    "test_config_save_pretrained",
    "test_channels",
    "test_create_from_modified_config",
    "test_backbone_common_attributes",
    "test_backbone_outputs",
    "test_backbone_stage_selection",
]


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_upstreams_mixin(family: str, name: str, upstream_tests: ModuleType) -> None:
    if family == "timm" and name == "test_config":
        pytest.skip("the stages of a timm config are known once its model is built")
    config_class, backbone_class, config = FAMILIES[family]

    class Case(upstream_tests.BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (backbone_class,)
        # of timm's, upstream's own tester says no: asking for them is an error
        has_attentions = backbone_class.has_attentions and family != "timm"

        def runTest(self) -> None:
            getattr(self, name)()

    case = Case()
    case.config_class = config_class
    case.model_tester = ModelTester(config())
    outcome = case.run()
    assert outcome is not None and outcome.testsRun == 1
    problems = [text for _, text in outcome.failures + outcome.errors]
    assert not problems, "\n".join(problems)


def test_the_mixin_has_no_test_that_is_not_listed(upstream_tests: ModuleType) -> None:
    mixin = upstream_tests.BackboneTesterMixin
    assert {name for name in vars(mixin) if name.startswith("test_")} == set(TESTS)


def test_backbone_type_is_transformers_own() -> None:
    from transformers.backbone_utils import BackboneType

    assert SwinBackbone(swin_config()).backbone_type is BackboneType.TRANSFORMERS
    assert TimmBackbone(timm_config()).backbone_type is BackboneType.TIMM
