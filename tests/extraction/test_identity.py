"""What tells one model from another, and changes of a backbone object."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from feature_models import PICTURES, SMALL_VIT, TIMM_MODELS, gap, save_timm
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb import AutoBackbone, AutoImageProcessor
from fastbb.extraction import FeatureExtractor
from fastbb.extraction.identity import changes, json_types
from fastbb.models.timm import TimmBackbone

SWIN, RESNET = "nano-swin-digits", "nano-resnet-digits"


def model_settings(model: Any, features: Any = "embedding") -> dict[str, Any]:
    """The settings of the model, without its name."""
    settings = FeatureExtractor(model, features).settings()["model"]
    return {name: value for name, value in settings.items() if name != "name"}


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3


def with_hook(backbone: Any) -> None:
    backbone.swin.encoder.layers[0].register_forward_hook(doubled)


def with_another_hook(backbone: Any) -> None:
    backbone.swin.encoder.layers[0].register_forward_hook(tripled)


def with_another_eps(backbone: Any) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5


def with_another_activation(backbone: Any) -> None:
    backbone.swin.encoder.layers[0].blocks[0].mlp.activation_fn = nn.ReLU().eval()


CHANGES = [with_hook, with_another_hook, with_another_eps, with_another_activation]


@pytest.mark.parametrize("first", ["embedding", "pooled"])
def test_every_model_of_an_extractor_is_in_the_settings(first: str, tmp_path: Path) -> None:
    state = save_timm(tmp_path / "a", "test_resnet", 64).state_dict()
    state |= {name: t * 3 + 1 for name, t in state.items() if name.startswith("fc.")}
    save_timm(tmp_path / "b", "test_resnet", 64, state=state)
    a, b = (model_settings(tmp_path / name, (first, "layer:fc")) for name in "ab")
    assert a["weights_sha256"] != b["weights_sha256"]
    assert model_settings(tmp_path / "a", first) == model_settings(tmp_path / "b", first)


def test_a_changed_backbone_has_other_settings() -> None:
    found = [model_settings(AutoBackbone.from_pretrained(SWIN))]
    assert found[0] == model_settings(SWIN) and "changes_sha256" not in found[0]
    for change in CHANGES:
        backbone = AutoBackbone.from_pretrained(SWIN)
        change(backbone)
        found.append(model_settings(backbone))
        again = AutoBackbone.from_pretrained(SWIN)
        change(again)
        assert model_settings(again) == found[-1]
    assert len({json.dumps(settings) for settings in found}) == len(found)


@pytest.mark.parametrize("change", CHANGES)
def test_upstreams_model_does_not_stand_for_a_changed_backbone(change: Callable[..., None]) -> None:
    backbone = AutoBackbone.from_pretrained(SWIN)
    change(backbone)
    with pytest.raises(ValueError, match=r"layer:embeddings: '.*another model without them"):
        FeatureExtractor(backbone, ("embedding", "layer:embeddings"))


def test_timms_full_model_does_not_stand_for_a_changed_backbone(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    plain = model_settings(tmp_path, "pooled")
    hooked = AutoBackbone.from_pretrained(tmp_path)
    hooked._backbone.layer1.register_forward_hook(doubled)
    changed = AutoBackbone.from_pretrained(tmp_path)
    for module in changed.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
    for backbone in (hooked, changed):
        with pytest.raises(ValueError, match="embedding: '_backbone.*another model without them"):
            FeatureExtractor(backbone)
        assert model_settings(backbone, "pooled") != plain
    outer = AutoBackbone.from_pretrained(tmp_path)
    outer.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="'the backbone itself' of this .*do not run here"):
        FeatureExtractor(outer, "pooled")


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "regnetx_002"])
def test_a_loaded_backbone_is_not_changed(name: str, tmp_path: Path) -> None:
    size, options = TIMM_MODELS[name]
    save_timm(tmp_path / "full", name, size, **options)
    backbone = AutoBackbone.from_pretrained(tmp_path / "full", out_indices=[0])
    assert not changes(backbone) and not changes(backbone.prepare("eager"))
    assert not changes(AutoBackbone.from_pretrained(tmp_path / "full", native=False))
    backbone.save_pretrained(tmp_path / "alone")
    assert not changes(AutoBackbone.from_pretrained(tmp_path / "alone"))


def test_weights_that_no_feature_uses_are_not_in_the_settings(tmp_path: Path) -> None:
    AutoBackbone.from_pretrained(SWIN).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(SWIN).save_pretrained(tmp_path)
    for features in ("embedding", "pooled"):
        assert model_settings(tmp_path, features) == model_settings(SWIN, features)
    backbone = AutoBackbone.from_pretrained(SWIN)
    backbone.config.image_size = 999  # there are no absolute embeddings
    with torch.no_grad():
        backbone.hidden_states_norms["stage1"].weight.mul_(2)
    assert model_settings(backbone, "pooled") == model_settings(SWIN, "pooled")
    assert model_settings(backbone, "maps.stage1") != model_settings(SWIN, "maps.stage1")


def test_settings_are_json(tmp_path: Path) -> None:
    size, options = TIMM_MODELS["swin_tiny_patch4_window7_224"]
    save_timm(tmp_path, "swin_tiny_patch4_window7_224", size, **options)
    backbone = AutoBackbone.from_pretrained(tmp_path, window_size=(7, 7), img_size=(56, 56))
    settings = FeatureExtractor(backbone, "pooled").settings()
    assert json.loads(json.dumps(settings)) == settings
    assert json_types({"act": nn.ReLU, "f": F.relu, "t": (1, None)}, "config") == {
        "act": "torch.nn.modules.activation.ReLU",
        "f": "torch.nn.functional.relu",
        "t": [1, None],
    }
    for nameless in (lambda: None, object()):
        with pytest.raises(ValueError, match="config.act is .*no name by which another process"):
            json_types({"act": nameless}, "config")


@pytest.mark.parametrize("name", [SWIN, RESNET])
def test_a_backbone_that_is_changed_after_the_extractor_was_made_is_refused(name: str) -> None:
    backbone = AutoBackbone.from_pretrained(name)
    ex = FeatureExtractor(backbone, ("embedding", "pooled"))
    state = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    expected = ex(PICTURES)
    backbone.train()
    with pytest.raises(ValueError, match=r"in training mode: call .eval\(\) first"):
        ex(PICTURES)
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.state_dict().items())
    backbone.eval()
    assert torch.equal(ex(PICTURES)["embedding"], expected["embedding"])
    backbone.to(torch.bfloat16)
    with pytest.raises(ValueError, match="its weights were given another dtype or device"):
        ex(PICTURES)


def test_the_precision_of_a_backbone_is_that_of_its_weights(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for place in (tmp_path, SWIN):
            ex = FeatureExtractor(AutoBackbone.from_pretrained(place, dtype=dtype))
            assert ex.precision == precision
            expected = FeatureExtractor(place, precision=precision)
            assert torch.equal(ex(PICTURES)["embedding"], expected(PICTURES)["embedding"])
    assert (
        FeatureExtractor(AutoBackbone.from_pretrained(SWIN), precision="bf16").precision == "bf16"
    )
    assert FeatureExtractor(SWIN).precision == "fp32"


def test_hooks_of_a_swin_run_in_place(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.n_calls, self.lock = 0, Lock()  # a lock cannot be copied

        def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
            self.n_calls += 1

    backbone = AutoBackbone.from_pretrained(SWIN)
    block, merging = Recorder(), Recorder()
    backbone.swin.encoder.layers[0].blocks[0].register_forward_hook(block)
    backbone.swin.encoder.layers[0].downsample.register_forward_hook(merging)
    got = FeatureExtractor(backbone)(PICTURES)["embedding"]
    assert block.n_calls and merging.n_calls
    assert gap(got, FeatureExtractor(SWIN)(PICTURES)["embedding"]) < 1e-5
    assert not backbone.swin.encoder.layers[0].blocks[0].spec.clamp_both


def test_a_backbone_of_a_relative_path_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_timm(tmp_path / "timm", "vit_tiny_patch16_224", 64, **SMALL_VIT)
    AutoBackbone.from_pretrained(SWIN).save_pretrained(tmp_path / "native")
    AutoImageProcessor.from_pretrained(SWIN).save_pretrained(tmp_path / "native")
    monkeypatch.chdir(tmp_path)
    backbones = [AutoBackbone.from_pretrained(name) for name in ("timm", "native")]
    assert isinstance(backbones[0], TimmBackbone)
    monkeypatch.chdir("/")
    for backbone, name in zip(backbones, ("timm", "native")):
        settings = FeatureExtractor(backbone).settings()
        assert settings["model"]["name"] == str(tmp_path / name)
