"""transformers' own backbone tests, from its source distribution, on our backbones."""

import unittest
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from reference_models import images
from upstream_tests import load_upstream_tests

import fastbb
from fastbb import (
    AutoConfig,
    BeitConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
    ViTBackbone,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def upstream_tests() -> ModuleType:
    return load_upstream_tests("test_backbone_common.py")


class ModelTester:
    """Attributes that the mixin reads: a small model and its input."""

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


def convnext_config(config_class: Any) -> Any:
    return config_class(hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], out_indices=[1, 2])


def timm_config() -> TimmBackboneConfig:
    config = TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2])
    TimmBackbone(config)  # a timm config learns its stage names from the model
    return config


def vit_config(kind: str) -> Any:
    fields = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    fields |= {"image_size": 32, "patch_size": 8, "out_indices": [1, 2]}
    return AutoConfig.for_model(kind, **fields)


FAMILIES = {
    kind: (
        getattr(fastbb, f"{kind}Config"),
        getattr(fastbb, f"{kind}Backbone"),
        partial(convnext_config, getattr(fastbb, f"{kind}Config")),
    )
    for kind in ("ConvNext", "ConvNextV2", "DINOv3ConvNext")
}
FAMILIES |= {
    "swin": (SwinConfig, SwinBackbone, swin_config),
    "resnet": (ResNetConfig, ResNetBackbone, resnet_config),
    "timm": (TimmBackboneConfig, TimmBackbone, timm_config),
    "dinov2": (Dinov2Config, ViTBackbone, lambda: vit_config("dinov2")),
    "beit": (BeitConfig, ViTBackbone, lambda: vit_config("beit")),
    "dinov3_vit": (DINOv3ViTConfig, ViTBackbone, lambda: vit_config("dinov3_vit")),
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
def test_of_upstreams_mixin_passes(family: str, name: str, upstream_tests: ModuleType) -> None:
    if family == "timm" and name == "test_config":
        pytest.skip("the stages of a timm config are known once its model is built")
    config_class, backbone_class, config = FAMILIES[family]

    class Case(upstream_tests.BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (backbone_class,)
        # upstream's tester says no for timm, where asking for attentions is an error
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


def test_every_test_of_upstreams_mixin_is_listed(upstream_tests: ModuleType) -> None:
    mixin = upstream_tests.BackboneTesterMixin
    assert {name for name in vars(mixin) if name.startswith("test_")} == set(TESTS)


def test_backbone_type_is_the_enum_of_transformers() -> None:
    from transformers.backbone_utils import BackboneType

    assert SwinBackbone(swin_config()).backbone_type is BackboneType.TRANSFORMERS
    assert TimmBackbone(timm_config()).backbone_type is BackboneType.TIMM
