"""The documentation page that fastbb implements: its code runs, on fastbb, with loaded weights.

The blocks are those of Hugging Face transformers, docs/source/en/backbones.md (March 2025,
Apache-2.0), word by word. They run with `transformers` replaced by `fastbb` in their import lines,
and with a local image in place of the one that the page fetches with `requests`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer
from page_models import PROCESSOR
from PIL import Image
from reference_models import images, randomize_
from tolerance import assert_equals_upstream

transformers = pytest.importorskip("transformers")

SWIN, RESNET = "microsoft/swin-tiny-patch4-window7-224", "microsoft/resnet-50"

LOAD = """\
from transformers import AutoBackbone
model = AutoBackbone.from_pretrained("microsoft/swin-tiny-patch4-window7-224", out_indices=(1,))
"""
AUTO_BACKBONE = """\
from transformers import AutoImageProcessor, AutoBackbone
model = AutoBackbone.from_pretrained("microsoft/swin-tiny-patch4-window7-224", out_indices=(1,))
"""
PRETRAINED = """\
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation
config = MaskFormerConfig(backbone="microsoft/resnet-50", use_pretrained_backbone=True)
model = MaskFormerForInstanceSegmentation(config)
"""
CONFIGURATION = """\
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig
# instantiate backbone configuration
backbone_config = ResNetConfig()
# load backbone in model
config = MaskFormerConfig(backbone_config=backbone_config)
# attach backbone to model head
model = MaskFormerForInstanceSegmentation(config)
"""
TIMM = """\
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation
config = MaskFormerConfig(backbone="resnet50", use_timm_backbone=True, use_pretrained_backbone=True)
model = MaskFormerForInstanceSegmentation(config)
"""
TIMM_CONFIGURATION = """\
from transformers import TimmBackboneConfig
backbone_config = TimmBackboneConfig("resnet50", use_pretrained_backbone=True)
"""
TIMM_CONFIGURATION_IN_HEAD = """\
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation
config = MaskFormerConfig(backbone_config=backbone_config)
model = MaskFormerForInstanceSegmentation(config)
"""
FEATURES = """\
from transformers import AutoImageProcessor, AutoBackbone
import torch
from PIL import Image
import requests
model = AutoBackbone.from_pretrained("microsoft/swin-tiny-patch4-window7-224", out_indices=(1,))
processor = AutoImageProcessor.from_pretrained("microsoft/swin-tiny-patch4-window7-224")
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = Image.open(requests.get(url, stream=True).raw)
inputs = processor(image, return_tensors="pt")
outputs = model(**inputs)
"""
MAPS = """\
feature_maps = outputs.feature_maps
list(feature_maps[0].shape)
[1, 96, 56, 56]
"""


def run(block: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a block of the page on fastbb, after others whose names it uses; returns all names."""
    names = {} if names is None else names
    exec(block.replace("from transformers import", "from fastbb import"), names)
    return names


def publish(hub: HubServer, folder: Path, name: str, model: Any) -> Any:
    """A tiny checkpoint, of a classifier as on the Hub, under the name that the page uses."""
    randomize_(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    hub.add_repo(name, folder)
    return model


@pytest.fixture
def swin(hub: HubServer, tmp_path: Path) -> Any:
    config = transformers.SwinConfig(depths=[1, 1, 1, 1])  # Swin-T's widths
    return publish(hub, tmp_path, SWIN, transformers.SwinForImageClassification(config))


@pytest.fixture
def resnet(hub: HubServer, tmp_path: Path) -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 16, 32], depths=[1, 1, 1, 1]
    )
    return publish(hub, tmp_path, RESNET, transformers.ResNetForImageClassification(config))


@pytest.fixture
def resnet50(hub: HubServer, tmp_path: Path) -> Any:
    """timm's resnet50 in full size, since the page names it."""
    model = timm.create_model("resnet50")
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    hub.add_repo("timm/resnet50.a1_in1k", tmp_path)
    return model


def assert_holds(module: Any, weights: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Every tensor of a module is that of a checkpoint."""
    state = {name.removeprefix(prefix): tensor for name, tensor in module.state_dict().items()}
    assert state and state.keys() <= weights.keys(), sorted(state.keys() - weights.keys())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())


@torch.no_grad()
@pytest.mark.parametrize("block", [LOAD, AUTO_BACKBONE], ids=["first", "second"])
def test_auto_backbone_block_equals_transformers(block: str, swin: Any) -> None:
    model = run(block)["model"]
    assert model.out_features == ["stage1"]
    theirs = transformers.SwinBackbone.from_pretrained(SWIN, out_indices=[1]).eval()
    pixels = images(64, 80)
    assert_equals_upstream(model(pixels).feature_maps, theirs(pixels).feature_maps)
    table = "swin.encoder.layers.0.blocks.0.layernorm_before.weight"
    assert torch.equal(model.state_dict()[table], swin.state_dict()[table])


def test_head_with_a_pretrained_backbone_has_its_weights(resnet: Any) -> None:
    model = run(PRETRAINED)["model"]
    assert type(model) is transformers.MaskFormerForInstanceSegmentation
    encoder = model.model.pixel_level_module.encoder
    assert_holds(encoder, resnet.resnet.state_dict())
    assert encoder.channels == [16, 16, 16, 32]
    with torch.no_grad():
        assert model.eval()(images(64, 80)).class_queries_logits.isfinite().all()

    # transformers 5 takes the same arguments, but draws random weights
    config = transformers.MaskFormerConfig(backbone=RESNET, use_pretrained_backbone=True)
    theirs = transformers.MaskFormerForInstanceSegmentation(config)
    drawn = "embedder.embedder.convolution.weight"
    random = theirs.model.pixel_level_module.encoder.state_dict()[drawn]
    assert not torch.equal(random, resnet.resnet.state_dict()[drawn])


def test_head_around_a_configuration_has_its_backbone() -> None:
    with pytest.warns(UserWarning, match="cannot run on a single feature map"):
        names = run(CONFIGURATION)
    encoder = names["model"].model.pixel_level_module.encoder
    assert type(encoder) is transformers.ResNetBackbone and encoder.channels == [2048]
    assert encoder.config.to_dict() == transformers.ResNetConfig().to_dict()


def test_head_around_timm_has_the_pretrained_weights(resnet50: Any) -> None:
    weights = resnet50.state_dict()
    named = run(TIMM)["model"]
    with pytest.warns(UserWarning, match="cannot run on a single feature map"):
        configured = run(TIMM_CONFIGURATION_IN_HEAD, run(TIMM_CONFIGURATION))["model"]
    for model, channels in ((named, [256, 512, 1024, 2048]), (configured, [2048])):
        assert type(model) is transformers.MaskFormerForInstanceSegmentation
        encoder = model.model.pixel_level_module.encoder
        assert type(encoder) is transformers.TimmBackbone and encoder.channels == channels
        assert_holds(encoder, weights, "_backbone.")


def test_feature_extraction_block_prints_the_documented_shape(swin: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    block = FEATURES.replace("import requests\n", "")
    block = block.replace("requests.get(url, stream=True).raw", "photo")
    assert "requests" not in block
    names = run(block, {"photo": photo})
    assignment, shape, printed = MAPS.splitlines()
    names = run(assignment, names)
    assert repr(eval(shape, names)) == printed
