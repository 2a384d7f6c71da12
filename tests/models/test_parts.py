"""Parts of backbones: read once, kept with the backbone, read again after layers change."""

import copy
import gc
import pkgutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import from_hf, hf_resnet, hf_swin, images, randomize_
from tolerance import assert_equals_upstream
from torch import nn

import fastbb.models
from fastbb import (
    DINOv3ViTConfig,
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
    ViTBackbone,
)
from fastbb.backbone.registry import FAMILIES
from fastbb.models import resnet_parts, swin_parts
from fastbb.models.parts import Refused, activation_of

PIXELS = images(64, 64, 1)


def swin() -> Any:
    return SwinBackbone(SwinConfig(embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4))


def resnet() -> Any:
    return ResNetBackbone(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]))


def vit() -> Any:
    config = DINOv3ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return ViTBackbone(config)


def timm_swin() -> Any:
    small = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    name = "swin_tiny_patch4_window7_224"
    return TimmBackbone(TimmBackboneConfig(name, img_size=64, backbone_kwargs=small))


def timm_resnet() -> Any:
    small = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
    return TimmBackbone(TimmBackboneConfig("resnet50", backbone_kwargs=small))


MAKES = [swin, resnet, vit, timm_swin, timm_resnet]
# a layer of each, by the name of its parent
LAYERS = {
    swin: ("swin.encoder.layers.0.blocks.0.mlp", "fc1"),
    resnet: ("encoder.stages.0.layers.0.layer.1", "convolution"),
    vit: ("model.layer.0.mlp", "up_proj"),
    timm_swin: ("_backbone.layers_0.blocks.0.mlp", "fc1"),
    timm_resnet: ("_backbone.layer1.0", "conv2"),
}


def infer(backbone: Any) -> torch.Tensor:
    with torch.inference_mode():
        return backbone(PIXELS).feature_maps[-1]


@pytest.fixture(params=MAKES, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return request.param


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Records the modules whose parts are read from now on."""
    read: list[nn.Module] = []
    for cls in (SwinBackbone, ResNetBackbone, ViTBackbone):
        own: Any = cls._parts
        monkeypatch.setattr(
            cls, "_parts", lambda self, *args, own=own: read.append(self) or own(self, *args)
        )
    for family in FAMILIES:
        if family.timm_parts is not None:

            def timm_parts(features: nn.Module, own: Any = family.timm_parts) -> Any:
                parts = own(features)
                read.append(features)
                return parts

            monkeypatch.setitem(vars(family), "timm_parts", timm_parts)
    return read


def test_parts_are_read_once(make: Callable[[], Any], readings: list[nn.Module]) -> None:
    backbone = randomize_(make())
    first = infer(backbone)
    with torch.no_grad():
        backbone.load_state_dict(backbone.state_dict())
        next(backbone.parameters()).mul_(2)
    for module in backbone.modules():
        if hasattr(module, "eps") and make in (swin, resnet, vit):  # read at every call
            module.eps = 0.1
    assert not torch.equal(infer(backbone), first)
    assert len(readings) == 1


def test_a_layer_replaced_later_is_read(make: Callable[[], Any], readings: list[nn.Module]) -> None:
    backbone = randomize_(make())
    first = infer(backbone)
    parent, name = LAYERS[make]
    old = getattr(backbone.get_submodule(parent), name)
    new = copy.deepcopy(old)
    vars(new).pop("forward", None)  # the forward of a folded layer
    with torch.no_grad():
        new.weight.mul_(2)
    setattr(backbone.get_submodule(parent), name, new)
    changed = infer(backbone)
    assert not torch.allclose(changed, first) and len(readings) == 2
    setattr(backbone.get_submodule(parent), name, old)
    torch.testing.assert_close(infer(backbone), first)


@pytest.mark.parametrize("name", ["swin", "hidden_states_norms"])
def test_a_whole_part_replaced_later_is_read(name: str) -> None:
    backbone, other = randomize_(swin()), randomize_(swin())
    first = infer(backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    setattr(backbone, name, getattr(other, name))
    assert not torch.allclose(infer(backbone), first)


def test_copies_and_replicas_read_their_own_layers(make: Callable[[], Any]) -> None:
    backbone = randomize_(make())
    first = infer(backbone)
    shallow = copy.copy(backbone)
    assert torch.equal(infer(shallow), first)
    twin = copy.deepcopy(backbone)
    replica = backbone._replicate_for_data_parallel()  # as DataParallel does for another device
    replica._modules = dict(twin._modules)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert torch.equal(infer(replica), infer(twin)) and not torch.equal(infer(twin), first)
    assert torch.equal(infer(backbone), first)


def test_parts_do_not_keep_a_backbone_alive(make: Callable[[], Any]) -> None:
    backbone = randomize_(make())
    infer(backbone)
    alive = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make_timm", [timm_swin, timm_resnet])
def test_hooks_and_training_select_timms_own_forward(
    make_timm: Callable[[], Any],
) -> None:
    backbone = randomize_(make_timm())
    inside = backbone._backbone.get_submodule(LAYERS[make_timm][0].removeprefix("_backbone."))
    first = infer(backbone)
    assert backbone.native_forward() is not None
    handle = inside.register_forward_hook(lambda *_: None)
    assert backbone.native_forward() is None
    handle.remove()
    inside.train()
    assert backbone.native_forward() is None
    inside.eval()
    inside.forward = lambda x: x
    assert backbone.native_forward() is None
    del inside.forward
    assert backbone.native_forward() is not None and torch.equal(infer(backbone), first)


def test_a_changed_forward_of_a_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = randomize_(swin())
    first = infer(backbone)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
    changed = infer(backbone)
    assert not torch.allclose(changed, first)
    monkeypatch.undo()
    assert torch.equal(infer(backbone), first)


def test_refusals_of_builders_name_the_reason() -> None:
    blocks: list[Any] = [timm_swin()._backbone.layers_0.blocks[0] for _ in range(4)]
    blocks[0].norm1 = nn.Identity()
    blocks[1].attn.scale = 2.0
    blocks[2].mlp.act = nn.Softplus()
    blocks[3].mlp.fc1 = nn.Linear(8, 32, bias=False)
    reasons = ["not layer norms", "attention scale is 2.0", "is a Softplus", "MLP has no bias"]
    for block, reason in zip(blocks, reasons):
        with pytest.raises(Refused, match=reason):
            swin_parts.timm_block(block)
    resnets: list[Any] = [timm_resnet()._backbone for _ in range(2)]
    resnets[0].layer1[0].act1 = nn.SiLU()
    resnets[1].layer1[0].bn2 = nn.GroupNorm(1, 2)
    reasons = ["between its convolutions is not ReLU", "not of convolutions and batch norms"]
    for features, reason in zip(resnets, reasons):
        with pytest.raises(Refused, match=reason):
            resnet_parts.timm_block(features.layer1[0])
        blocks = list(resnet_parts.timm_parts(features).stages[0])
        assert blocks == [features.layer1[0]]  # runs as timm's module
    for read in (swin_parts.timm_parts, resnet_parts.timm_parts):
        with pytest.raises(Refused, match="it is no"):
            read(nn.Sequential(nn.Linear(2, 2)))


def test_activations_have_the_names_of_the_ops() -> None:
    assert activation_of(nn.ReLU()) == "relu" and activation_of(nn.GELU()) == "gelu"
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_new"
    with pytest.raises(Refused, match="it"):
        activation_of(nn.Tanh())


def test_every_family_in_the_folder_is_registered() -> None:
    names = {module.name for module in pkgutil.iter_modules(fastbb.models.__path__)}
    modules = [family.backbone.__module__.rpartition(".") for family in FAMILIES]
    registered = {name.split("_")[0] for package, _, name in modules if package == "fastbb.models"}
    assert registered == {name for name in names if "_" not in name} - {"layers", "lookup", "parts"}


def test_mergings_of_timms_swin_are_computed_by_our_op() -> None:
    parts = swin_parts.timm_parts(timm_swin()._backbone)
    assert {type(stage.downsample) for stage in parts.stages[1:]} == {swin_parts.MergingParts}


@torch.no_grad()
def test_parts_follow_absolute_positions() -> None:
    pixels = images(32, 32)
    swin = from_hf(hf_swin())
    before = swin(pixels).feature_maps
    swin.swin.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 64, 16))
    after = swin(pixels).feature_maps
    assert_equals_upstream(after, copy.deepcopy(swin)(pixels).feature_maps)
    assert not torch.equal(before[0], after[0])
    swin.swin.embeddings.position_embeddings = None
    assert_equals_upstream(swin(pixels).feature_maps, before)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: from_hf(hf_resnet()),
        lambda: TimmBackbone(TimmBackboneConfig("mobilenetv2_035")).eval(),
    ],
    ids=["native", "folded_timm"],
)
def test_weights_changed_while_a_layer_was_wrapped_are_noticed(make: Callable[[], Any]) -> None:
    """LoRA merges like this: it wraps a layer, writes through `.data` and puts the layer back."""
    pixels, backbone = images(32, 32), make()
    backbone(pixels)
    convolutions = [n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)]
    name, _, child = convolutions[3].rpartition(".")
    parent = backbone.get_submodule(name)
    conv: Any = getattr(parent, child)
    setattr(parent, child, nn.Sequential(conv))
    conv.weight.data.mul_(1.5)
    setattr(parent, child, conv)
    want = copy.deepcopy(backbone)(pixels).feature_maps
    assert_equals_upstream(backbone(pixels).feature_maps, want)
