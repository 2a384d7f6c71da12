"""Changes of module settings: accelerated and prepared models use the current settings."""

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    has_run_ours,
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
from fastbb.engine.settings import EngineWarning
from fastbb.weights.watch import statistics_note

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
VITS = ["dinov2_backbone", "timm_vit"]
RESNETS = ["resnet_backbone", "timm_resnet", "timm_efficientnet"]
ANY_SIZE = "timm_swin, any size"
MAKES: dict[str, Callable[[], Any]] = {
    **HOSTS,
    "timm_efficientnet": timm_efficientnet,
    ANY_SIZE: partial(timm_swin, strict_img_size=False),
    "timm_swin": timm_swin,
}
# models to which each change applies; upstream runs all of them
APPLIES: dict[str, list[str]] = {
    "eps": [*SWINS, *RESNETS, *VITS, ANY_SIZE],
    "eps of one norm of a block": ["swin_backbone", "maskformer_swin"],
    "eps of mergings": ["swin_classifier", "swin_backbone"],
    "eps of stages": ["swin_backbone", "maskformer_swin"],
    "scale": ["swin_classifier", "swin_backbone", *VITS[:1], ANY_SIZE, "timm_swin"],
    "function of the activation": ["swin_classifier", "swin_backbone", "maskformer_swin"],
    "approximate": ["torchvision_swin", "timm_vit", ANY_SIZE],
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
    "a bias that was not there": [*SWINS, ANY_SIZE],
}
# changes that ours cannot express, with the reason in the report
REFUSED = {
    "scale": "its attention scale is",
    "function of the activation": "its activation is a GELUActivation",
    "class of the activation": "activation",
    "pool": "its stem pools otherwise",
}


def test_every_change_has_models() -> None:
    assert APPLIES.keys() == CHANGES.keys()


@pytest.mark.parametrize(
    ("name", "host"), [(name, host) for name, hosts in APPLIES.items() for host in hosts]
)
def test_accelerated_model_follows_changed_settings(name: str, host: str) -> None:
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
def test_a_reverted_change_runs_ours_again(name: str) -> None:
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


def test_the_report_shows_a_whole_backbone_that_runs_again() -> None:
    model = swin_backbone()
    report = fastbb.accelerate(model, mode="eager")
    attentions = [m for m in model.modules() if "scaling" in vars(m)]
    for factor in (2, 0.5):
        for attention in attentions:
            attention.scaling *= factor
        infer(model)
    assert {runs for _, _, runs, _ in report.rows()} == {"fastbb", "-"}, str(report)


def test_copy_of_a_changed_model_runs_ours_when_changed_back() -> None:
    model = swin_classifier()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    CHANGES["scale"](model)
    infer(model)
    other = copy.deepcopy(model)
    infer(other)
    assert not has_run_ours(other)
    for module in other.modules():
        if "scaling" in vars(module):
            module.scaling /= 2
    assert_close(infer(other), infer(swin_classifier()))
    assert has_run_ours(other)


ODD: dict[str, Callable[[Any], None]] = {
    "a scale for each head": lambda block: setattr(
        block.attn, "scale", torch.tensor([0.5, 0.25])[:, None, None]
    ),
    "a scale that is a tensor": lambda block: setattr(block.attn, "scale", torch.tensor(0.25)),
    "no scale": lambda block: delattr(block.attn, "scale"),
    "no heads": lambda block: setattr(block.attn, "num_heads", 0),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_settings_have_the_outcome_of_upstream(odd: Callable[[Any], None]) -> None:
    model, upstream = (timm_swin(strict_img_size=False) for _ in range(2))
    fastbb.accelerate(model, mode="eager")
    infer(model, PIXELS)
    for either in (model, upstream):
        odd(either.layers[1].blocks[0])
    try:
        want = infer(upstream, PIXELS)
    except Exception as error:
        for _ in range(2):
            with pytest.raises(type(error), match=re.escape(str(error))):
                infer(model, PIXELS)
    else:
        for _ in range(2):
            assert_close(infer(model, PIXELS), want)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_threads_follow_changed_settings(precision: str | None) -> None:
    """No thread may move the model while another one runs it."""
    model, upstream = timm_efficientnet(), timm_efficientnet()
    fastbb.accelerate(model, mode="eager", precision=precision)
    infer(model, PIXELS)
    for either in (model, upstream):
        CHANGES["eps"](either)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: infer(model, PIXELS), range(12)))
    want = infer(upstream, PIXELS)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for got in results:
        assert_equals_upstream(got, want, rel=1e-4 if precision is None else 6e-2)


def test_statistics_with_gaps_in_memory_are_followed() -> None:
    model, upstream = resnet_backbone(), resnet_backbone()
    norms: list[Any] = [
        norm
        for either in (model, upstream)
        for norm in either.modules()
        if isinstance(norm, nn.BatchNorm2d)
    ]
    for norm in norms:
        norm.running_mean = torch.stack([norm.running_mean] * 2, 1)[:, 0]
    fastbb.accelerate(model, mode="eager")
    infer(model)
    for norm in norms:
        norm.running_mean.data.add_(1)
    assert_close(infer(model), infer(upstream))


@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone], ids=["swin", "resnet"])
def test_compiled_host_with_changed_settings_falls_back_with_a_reason(
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
    "a bias that was not there": ["hf swin", "timm swin"],
}


@pytest.mark.parametrize("mode", [None, "eager"], ids=["plain", "prepared"])
@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, models in OF_NATIVE.items() for model in models]
)
def test_native_backbone_follows_changed_settings(name: str, model: str, mode: str | None) -> None:
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
def test_compiled_backbone_with_changed_settings_falls_back(
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
    assert "changed since they were compiled" in explained(prepared).rows[-1].why


def test_a_fused_activation_that_changes_is_reported() -> None:
    pair = NATIVE["timm efficientnet"]()
    n_refused = len(pair.ours.fold_report.refused)
    changed: list[Any] = [m for m in pair.ours.modules() if type(m) is nn.SiLU]
    for activation in changed:
        activation.__class__ = nn.Tanh
    refused = [norm.refused for norm in pair.ours.fold_report.refused]
    assert len(refused) > n_refused
    assert any("its activation was changed: it is a Tanh, was a SiLU" in str(r) for r in refused)


def test_report_says_that_changed_statistics_on_a_gpu_need_refresh() -> None:
    norm = nn.BatchNorm2d(4)
    assert statistics_note(norm) is None
    with FakeTensorMode():
        on_gpu = nn.BatchNorm2d(4, device="cuda")
    assert "call refresh()" in str(statistics_note(nn.Sequential(on_gpu)))
    assert statistics_note(nn.Sequential(nn.Linear(2, 2))) is None
