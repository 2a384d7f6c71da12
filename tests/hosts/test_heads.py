"""Configurations of heads give the backbone that they name."""

import json
from typing import Any

import pytest

from fastbb import AutoBackbone, AutoConfig, ResNetConfig, TimmBackboneConfig
from fastbb.backbone.hub import unwrap_head

RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
DETR: dict[str, Any] = {"model_type": "detr", "backbone": "test_resnet"}


@pytest.mark.parametrize(
    ("head", "timm_fields"),
    [
        ({}, {}),
        ({"use_timm_backbone": True}, {}),
        ({"num_channels": 1}, {"num_channels": 1}),
        ({"dilation": False}, {}),
        ({"dilation": True}, {"output_stride": 16}),
        ({"dilation": True, "backbone_kwargs": {"output_stride": 8}}, {"output_stride": 8}),
        ({"backbone_kwargs": {"out_indices": [0, 2]}}, {"out_indices": [0, 2]}),
    ],
    ids=str,
)
def test_head_that_names_a_timm_model_gives_its_timm_config(tmp_path, head, timm_fields):
    (tmp_path / "config.json").write_text(json.dumps({**DETR, **head}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config == TimmBackboneConfig(
        "test_resnet", **{"out_indices": [1, 2, 3, 4], **timm_fields}
    )


def test_reading_a_head_leaves_its_configuration_unchanged():
    head = {**DETR, "dilation": True, "backbone_kwargs": {"drop_rate": 0.1}}
    unwrap_head(head)
    assert head["backbone_kwargs"] == {"drop_rate": 0.1}


def test_head_that_names_a_hub_repository_gives_its_config(hub, tmp_path):
    ResNetConfig(**RESNET).save_pretrained(tmp_path / "resnet")
    hub.add_repo("acme/resnet", tmp_path / "resnet")
    head = {**DETR, "backbone": "acme/resnet", "backbone_kwargs": {"hidden_act": "gelu"}}
    for values in (head, {**head, "use_timm_backbone": False}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = AutoConfig.from_pretrained(tmp_path, out_indices=[0, 1])
        assert config == ResNetConfig(**RESNET, hidden_act="gelu", out_indices=[0, 1])


def test_timm_backbone_config_is_not_taken_for_a_head(tmp_path):
    # it names its `backbone` too
    config = TimmBackboneConfig("test_resnet", out_indices=[0])
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    backbone = AutoBackbone.from_config(config)
    backbone.save_pretrained(tmp_path)
    assert AutoBackbone.from_pretrained(tmp_path).out_indices == [0]
