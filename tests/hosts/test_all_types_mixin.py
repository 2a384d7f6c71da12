"""transformers' own backbone tests, on its types that fastbb does not compute itself."""

import unittest
from types import ModuleType
from typing import Any

import pytest
from reference_models import images
from tiny_types import FIELDS
from upstream_tests import load_upstream_tests

from fastbb import TransformersBackbone, TransformersBackboneConfig
from fastbb.hosts.transformers_config import wrapped_types

transformers = pytest.importorskip("transformers")

TESTS = (
    "test_config",
    "test_forward_signature",
    "test_config_save_pretrained",
    "test_channels",
    "test_create_from_modified_config",
    "test_backbone_common_attributes",
    "test_backbone_outputs",
    "test_backbone_stage_selection",
)


@pytest.fixture(scope="module")
def upstream_tests() -> ModuleType:
    return load_upstream_tests("test_backbone_common.py")


@pytest.mark.parametrize("model_type", sorted({*wrapped_types()} & {*FIELDS}))
def test_upstreams_mixin_passes(model_type: str, upstream_tests: ModuleType) -> None:
    class Config(TransformersBackboneConfig):
        def __init__(self, model_type: str = model_type, **fields: Any) -> None:
            super().__init__(model_type, **fields)

    class Tester:
        def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
            return Config(**FIELDS[model_type]), {"pixel_values": images(32, 32)}

    mapping: Any = transformers.AutoBackbone._model_mapping
    upstream = mapping[transformers.CONFIG_MAPPING[model_type]]

    class Case(upstream_tests.BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (TransformersBackbone,)
        config_class = Config
        model_tester = Tester()
        # PVT says that it has them, and returns none
        has_attentions = upstream.has_attentions and model_type != "pvt_v2"

        def runTest(self) -> None:
            # PVT has no stem, and upstream's class fails there too
            for name in TESTS[model_type == "pvt_v2" :]:
                with self.subTest(name):
                    getattr(self, name)()

    outcome = Case().run()
    assert outcome is not None and outcome.testsRun == 1
    assert not outcome.failures + outcome.errors, outcome
