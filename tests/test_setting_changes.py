"""An accelerated or prepared model computes with the settings that its modules have now."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pretended_device import Compiler, explained, install
from reference_models import Pair, hf_pair, hf_resnet, hf_swin, images, randomize_, timm_pair
from setting_changes import CHANGES
from tiny_hosts import (
    HOSTS,
    assert_close,
    infer,
    reasons_of,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
)
from tolerance import assert_equals_upstream
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbb
from fastbb import measuring
from fastbb.derived import statistics_note
from fastbb.engine.settings import EngineWarning
from fastbb.watch import ModuleSettings

PIXELS = images(48, 40)


def timm_swin(**options: Any) -> Any:
    import timm

    shape = {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (1, 2),
    }
    name = "swin_tiny_patch4_window7_224"
    return randomize_(timm.create_model(name, **shape, num_classes=3, **options))


def timm_efficientnet() -> Any:
    import timm

    return randomize_(timm.create_model("test_efficientnet", num_classes=3))


SWINS = ["swin_classifier", "swin_backbone", "maskformer_swin", "torchvision_swin"]
RESNETS = ["resnet_backbone", "timm_resnet", "timm_efficientnet"]
ANY_SIZE = "timm_swin, any size"
MAKES: dict[str, Callable[[], Any]] = {
    **HOSTS,
    "timm_efficientnet": timm_efficientnet,
    ANY_SIZE: partial(timm_swin, strict_img_size=False),
    "timm_swin": timm_swin,
}
# which models have what is changed; upstream runs all of these
APPLIES: dict[str, list[str]] = {
    "eps": [*SWINS, *RESNETS, ANY_SIZE],
    "eps of one norm of a block": ["swin_backbone", "maskformer_swin"],
    "eps of mergings": ["swin_classifier", "swin_backbone"],
    "eps of stages": ["swin_backbone", "maskformer_swin"],
    "scale": ["swin_classifier", "swin_backbone", ANY_SIZE, "timm_swin"],
    "function of the activation": ["swin_classifier", "swin_backbone", "maskformer_swin"],
    "approximate": ["torchvision_swin", ANY_SIZE],
    "class of the activation": ["resnet_backbone", "timm_resnet"],
    "index in place": [*SWINS, ANY_SIZE],
    "index replaced": [*SWINS, ANY_SIZE],
    "shift": [*SWINS, ANY_SIZE, "timm_swin"],
    "no shift": [*SWINS, ANY_SIZE],
    "stride": RESNETS,
    "stride of patches": ["swin_backbone", "maskformer_swin", "torchvision_swin"],
    "padding and dilation": RESNETS,
    "padding mode": ["resnet_backbone"],
    "pool": ["resnet_backbone", "timm_resnet"],
    "statistics": RESNETS,
}
# what ours cannot express, in the words of the report
REFUSED = {
    "scale": "its attention scale is",
    "function of the activation": "its activation is a GELUActivation",
    "class of the activation": "activation",
    "pool": "its stem pools otherwise",
}


def test_every_change_is_tried() -> None:
    assert APPLIES.keys() == CHANGES.keys()


@pytest.mark.parametrize(
    ("name", "host"), [(name, host) for name, hosts in APPLIES.items() for host in hosts]
)
def test_an_accelerated_model_follows(name: str, host: str) -> None:
    make, change = MAKES[host], CHANGES[name]
    pixels = images(32, 32) if host == "timm_swin" else PIXELS
    model, upstream = make(), make()
    report = fastbb.accelerate(model, mode="eager")
    before = infer(model, pixels)
    assert change(model) == change(upstream) > 0
    want = infer(upstream, pixels)
    for _ in range(2):
        assert_close(infer(model, pixels), want)
    assert len(before) != len(want) or not all(map(torch.equal, before, want))
    reasons = {why for why in reasons_of(report) if "equal to upstream" not in why}
    if name in REFUSED and host not in ("timm_resnet",):
        assert any(REFUSED[name] in why for why in reasons), str(report)


@pytest.mark.parametrize("name", ["scale", "function of the activation"])
def test_what_is_changed_back_runs_ours_again(name: str) -> None:
    model, upstream = swin_classifier(), swin_classifier()
    report = fastbb.accelerate(model, mode="eager")
    settings = [dict(vars(m)) for m in model.modules()]
    infer(model)
    CHANGES[name](model)
    infer(model)
    assert any(REFUSED[name] in why for why in reasons_of(report))
    for module, was in zip(model.modules(), settings):
        vars(module).update({k: v for k, v in was.items() if k in ("scaling", "act")})
    assert_close(infer(model), infer(upstream))
    assert not reasons_of(report), str(report)


@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone], ids=["swin", "resnet"])
def test_what_was_compiled_falls_back_and_says_why(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = install(Compiler(), monkeypatch)
    model, upstream = make(), make()
    report = fastbb.accelerate(model, mode="compile")
    infer(model)
    n_compiled = len(compiler.compiled)
    assert n_compiled
    for either in (model, upstream):
        CHANGES["eps"](either)
    assert_close(infer(model), infer(upstream))
    assert len(compiler.compiled) == n_compiled
    (why,) = [why for why in reasons_of(report) if "compiled" in why]
    assert "it was compiled before" in why and ".eps is 0.3, was 1e-05" in why


# native backbones

NATIVE: dict[str, Callable[[], Pair]] = {
    "hf swin": lambda: hf_pair(hf_swin("w7")),
    "hf resnet": lambda: hf_pair(hf_resnet("bottleneck")),
    "hf resnet, basic": lambda: hf_pair(hf_resnet("basic")),
    "timm swin": lambda: timm_pair(
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        img_size=64,
        window_size=4,
    ),
    "timm resnet": lambda: timm_pair("resnet50", layers=(2, 1, 1, 1), channels=(8, 16, 24, 32)),
    "timm efficientnet": lambda: timm_pair("test_efficientnet"),
}
OF_NATIVE: dict[str, list[str]] = {
    "eps": list(NATIVE),
    "eps of one norm of a block": ["hf swin"],
    "eps of mergings": ["hf swin", "timm swin"],
    "eps of stages": ["hf swin"],
    "scale": ["timm swin"],
    "approximate": ["timm swin"],
    "class of the activation": ["timm resnet"],
    "index in place": ["timm swin"],
    "index replaced": ["timm swin"],
    "no shift": ["timm swin"],
    "stride": ["hf resnet", "hf resnet, basic", "timm resnet", "timm efficientnet"],
    "stride of patches": ["hf swin", "timm swin"],
    "padding and dilation": ["hf resnet", "timm resnet", "timm efficientnet"],
    "padding mode": ["hf resnet", "timm resnet", "timm efficientnet"],
    "pool": ["timm resnet"],
    "statistics": ["hf resnet", "timm resnet", "timm efficientnet"],
}


@pytest.mark.parametrize("mode", [None, "eager"], ids=["plain", "prepared"])
@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, models in OF_NATIVE.items() for model in models]
)
def test_a_native_backbone_follows(name: str, model: str, mode: str | None) -> None:
    pair, pixels, change = NATIVE[model](), images(64, 72), CHANGES[name]
    ours = pair.ours if mode is None else pair.ours.prepare(mode)
    with torch.no_grad():
        before = ours(pixels).feature_maps
        assert change(ours) == change(pair.upstream) > 0
        want = pair.maps(pixels)
        for _ in range(2):
            assert_equals_upstream(ours(pixels).feature_maps, want)
    assert not all(map(torch.equal, before, want))


@pytest.mark.parametrize("name", ["eps", "stride", "statistics"])
def test_a_compiled_backbone_falls_back(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    install(Compiler(), monkeypatch)
    pair, pixels = NATIVE["hf resnet"](), images(64, 72)
    prepared = pair.ours.prepare("compile", example=pixels)
    for either in (prepared, pair.upstream):
        CHANGES[name](either)
    with pytest.warns(EngineWarning, match="settings, layers or hooks changed"), torch.no_grad():
        got = prepared(pixels).feature_maps
    assert_equals_upstream(got, pair.maps(pixels))
    assert "changed since they were compiled" in explained(prepared, capsys).rows[-1].why


def test_a_fused_activation_that_changes_is_reported() -> None:
    pair = NATIVE["timm efficientnet"]()
    n_refused = len(pair.ours.fold_report.refused)
    changed: list[Any] = [m for m in pair.ours.modules() if type(m) is nn.SiLU]
    for activation in changed:
        activation.__class__ = nn.Tanh
    refused = [norm.refused for norm in pair.ours.fold_report.refused]
    assert len(refused) > n_refused
    assert any("its activation was changed: it is a Tanh, was a SiLU" in str(r) for r in refused)


# the parts: `ModuleSettings`, `compare`


class Odd(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.sizes = [1, [2, 3]]
        self.function = torch.relu
        self.table = torch.zeros(3)  # no setting
        self.names = {"a": 1}  # nor is this
        self.layer = nn.LayerNorm(4)


def test_settings_are_told_by_name() -> None:
    module = Odd()
    settings = ModuleSettings(module)
    assert settings.change() is None
    module.sizes[1][0] = 4  # type: ignore[index]  # a list in a list
    assert settings.change() == "sizes is [1, [4, 3]], was [1, [2, 3]]"
    module.sizes = [1, [2, 3]]
    assert settings.change() is None
    module.forward, module.scale = torch.relu, 1.0
    assert settings.change() == "scale is 1.0, was 2.0"
    module.scale = 2.0
    module.table, module.names = torch.ones(3), {}
    module.layer.eval().requires_grad_(False)
    assert settings.change() is None
    module.layer.eps = 1.0
    assert settings.change() == "layer.eps is 1.0, was 1e-05"
    module.layer.eps = 1e-5
    module.function = torch.tanh
    assert str(settings.change()).startswith("function is <built-in method tanh")
    del module.function
    assert str(settings.change()).startswith("function is 'gone'")
    assert ModuleSettings(module, ignored=("sizes",)).change() is None
    module.sizes = []
    assert ModuleSettings(module).change() is None


def test_a_copy_watches_the_copy() -> None:
    """A `Folding` is copied with the model that it is in."""
    import copy

    module, settings = copy.deepcopy((model := Odd(), ModuleSettings(model)))
    model.layer.eps = 1.0
    assert settings.change() is None
    module.layer.eps = 1.0
    assert settings.change() == "layer.eps is 1.0, was 1e-05"


class Seconds:
    """Returns one number after the other, the last for ever."""

    def __init__(self, *seconds: float) -> None:
        self.left = list(seconds)

    def __call__(self) -> float:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


@pytest.mark.parametrize("slow", [(20.0,), (1.0, 20.0), (20.0, 20.0), (1.0, 1.0, 20.0, 1.0, 20.0)])
def test_outliers_do_not_decide(slow: tuple[float, ...]) -> None:
    found = measuring.compare(Seconds(*slow, 1.0), Seconds(1.2), tie=0.03)
    assert found.ratio < 1 and (found.ours, found.theirs) == (1.0, 1.2)
    other = measuring.compare(Seconds(1.2), Seconds(*slow, 1.0), tie=0.03)
    assert other.ratio > 1.03


def test_a_verdict_against_ours_is_measured_twice() -> None:
    """Something else runs on the machine while the first half is measured."""
    stalled = Seconds(*[20.0] * measuring.MIN_PAIRS, 1.0)
    assert measuring.compare(stalled, Seconds(1.2), tie=0.03).ratio >= 1.03  # a tie of halves
    stalled = Seconds(*[20.0] * (measuring.MIN_PAIRS - 1), 1.0)
    assert measuring.compare(stalled, Seconds(1.2), tie=0.03).ratio < 1


def test_a_report_says_what_a_gpu_does_not_notice() -> None:
    norm = nn.BatchNorm2d(4)
    assert statistics_note(norm) is None
    with FakeTensorMode():
        on_gpu = nn.BatchNorm2d(4, device="cuda")
    assert "call refresh()" in str(statistics_note(nn.Sequential(on_gpu)))
    assert statistics_note(nn.Sequential(nn.Linear(2, 2))) is None
