"""A prepared backbone computes with the weights, layers and hooks that it has now."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, resnet_pair, swin_pair
from pretended_device import MANY, Compiler, Device, explained, no_warning
from reference_models import images, timm_pair
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import AdamW
from weight_changes import WEIGHT_CHANGES, load, optimizer_step, replace_data, scale_

from fastbb.engine.engine import Engine
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import EngineWarning
from fastbb.weights.derived import derive, holding_derived
from fastbb.weights.watch import _STAMPS, ModuleStamp

pytestmark = pytest.mark.usefixtures("compiler")
CHANGED = "weights, settings, layers or hooks changed since they were compiled, so it runs eager"


def resnet() -> Any:
    return resnet_pair().ours


def swin() -> Any:
    return swin_pair().ours


@pytest.fixture(params=[resnet, swin], ids=["resnet", "swin"])
def backbone(request: pytest.FixtureRequest) -> Any:
    return request.param()


def upstream_of(backbone: Any) -> Any:
    """transformers' model with the weights of ours, as they are now."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        return getattr(transformers, type(backbone).__name__).from_pretrained(folder).eval()


@torch.no_grad()
def maps_of(model: Any, pixels: Tensor = PIXELS) -> tuple[Tensor, ...]:
    return model(pixels).feature_maps


# changes of weights that their versions show, or that are followed by `refresh`


def edit_data(backbone: Any) -> None:
    for p in backbone.parameters():
        p.data.mul_(0.5)
    backbone.refresh()


def edit_data_of_one(backbone: Any) -> None:
    list(backbone.parameters())[-1].data.add_(1)
    backbone.refresh()


def replace_a_parameter(backbone: Any) -> None:
    layer = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def replace_a_layer(backbone: Any) -> None:
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                other = copy.deepcopy(child)
                with torch.no_grad():
                    other.weight.mul_(0.5)
                setattr(parent, name, other)
                return


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adamw": optimizer_step(AdamW),
    "adamw-fused": WEIGHT_CHANGES["adamw-fused"],
    "sgd-fused": WEIGHT_CHANGES["sgd-fused"],
    "load": load(),
    "load-assign": load(assign=True),
    "in_place": scale_,
    "in_place-inference_mode": torch.inference_mode()(scale_),
    "data_replaced": replace_data,
    "data_edited-refresh": edit_data,
    "data_of_one-refresh": edit_data_of_one,
    "parameter_replaced": replace_a_parameter,
    "layer_replaced": replace_a_layer,
}


@pytest.mark.parametrize("of_original", [False, True], ids=["prepared", "original"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_used(
    change: Callable[[Any], None], of_original: bool, backbone: Any
) -> None:
    """The original and the prepared backbone share their weights, so either may be changed."""
    prepared = backbone.prepare("compile", example=PIXELS)
    before = maps_of(prepared)
    change(backbone if of_original else prepared)
    want = maps_of(upstream_of(prepared))
    with pytest.warns(EngineWarning, match=CHANGED) as warned:
        got = maps_of(prepared)
    assert len(warned) == 1 and not torch.equal(got[-1], before[-1])
    assert_equals_upstream(got, want)
    with no_warning():
        assert_equals_upstream(maps_of(prepared), want)
    assert explained(prepared).rows[-1].why.startswith(CHANGED)


def statistics_in_place(backbone: Any) -> None:
    for buffer in backbone.buffers():
        buffer.mul_(2)


def statistics_through_data(backbone: Any) -> None:
    for buffer in backbone.buffers():
        buffer.data.mul_(2)
    backbone.refresh()


def statistics_of_training(backbone: Any) -> None:
    backbone.train()
    maps_of(backbone)
    backbone.eval()


@pytest.mark.parametrize(
    "change", [statistics_in_place, statistics_through_data, statistics_of_training]
)
def test_changed_statistics_are_used(change: Callable[[Any], None]) -> None:
    prepared = resnet().prepare("compile", example=PIXELS)
    before = maps_of(prepared)
    change(prepared)
    with pytest.warns(EngineWarning, match=CHANGED):
        got = maps_of(prepared)
    assert not torch.equal(got[-1], before[-1])
    assert_equals_upstream(got, maps_of(upstream_of(prepared)))
    assert prepared.explain().rows[0].runs == "eager"


def twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def negative(module: nn.Module, inputs: Any) -> Any:
    return tuple(-x for x in inputs)


def convolution_of(model: Any) -> nn.Conv2d:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("make", [lambda: timm_pair("test_efficientnet"), resnet_pair, swin_pair])
def test_added_swapped_and_removed_hooks_of_layers_are_followed(make: Any) -> None:
    pair = make()
    prepared = pair.ours.prepare("compile", example=PIXELS)
    layers = [convolution_of(model) for model in (prepared, pair.upstream)]
    handles: list[Any] = []

    def add(hook: Any, before: bool = False) -> None:
        for layer in layers:
            register = layer.register_forward_pre_hook if before else layer.register_forward_hook
            handles.append(register(hook))

    def remove() -> None:
        while handles:
            handles.pop().remove()

    compiled = maps_of(prepared)
    assert_equals_upstream(compiled, pair.maps(PIXELS))
    add(twice)
    with pytest.warns(EngineWarning, match="layers have hooks, which only run where it runs eager"):
        doubled = maps_of(prepared)
    assert not torch.equal(doubled[-1], compiled[-1])
    assert_equals_upstream(doubled, pair.maps(PIXELS))
    remove()
    add(lambda module, inputs, y: y * 3)
    with no_warning():
        assert_equals_upstream(maps_of(prepared), pair.maps(PIXELS))
        remove()
        add(negative, before=True)
        assert_equals_upstream(maps_of(prepared), pair.maps(PIXELS))
        remove()
        assert all(map(torch.equal, maps_of(prepared), compiled))


def test_hooks_of_all_modules_run_in_a_prepared_backbone(compiler: Compiler) -> None:
    pair, seen = resnet_pair(), []
    prepared = pair.ours.prepare("compile", example=PIXELS)
    handle = register_module_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    try:
        with pytest.warns(EngineWarning, match="layers have hooks"):
            got = maps_of(prepared)
    finally:
        handle.remove()
    assert_equals_upstream(got, pair.maps(PIXELS))
    n_convolutions = sum(isinstance(m, nn.Conv2d) for m in prepared.modules())
    assert seen.count(nn.Conv2d) == n_convolutions


def test_a_hook_of_a_layer_that_was_put_in_later_sees_each_call_once() -> None:
    prepared, seen = resnet().prepare(), []
    maps_of(prepared)
    stem = prepared.embedder.embedder
    stem.activation = nn.ReLU()
    stem.activation.register_forward_hook(lambda *_: seen.append(1))
    maps_of(prepared, images(60, 60))
    assert seen == [1]


def test_hooks_see_each_call_once_when_a_backbone_is_prepared(compiler: Compiler) -> None:
    pair, seen = resnet_pair(), []
    convolution_of(pair.ours).register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(EngineWarning, match="layers have hooks"):
        prepared = pair.ours.prepare("compile", example=PIXELS)
    assert_equals_upstream(maps_of(prepared), pair.maps(PIXELS))
    assert len(seen) == 2 and not compiler.compiled


def test_a_hook_of_the_backbone_keeps_the_compiled_run(compiler: Compiler) -> None:
    prepared = resnet().prepare("compile", example=PIXELS)
    seen: list[Any] = []
    prepared.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with no_warning():
        output = torch.no_grad()(prepared)(PIXELS)
    assert seen == [output] and len(compiler.compiled) == 1


@torch.no_grad()
def test_training_mode_of_the_original_applies_to_the_prepared(backbone: Any) -> None:
    """The prepared backbone shares its layers with the original."""
    prepared = backbone.prepare("compile")
    before = maps_of(prepared)
    backbone.train()
    maps_of(prepared)
    assert "in training mode: call .eval()" in explained(prepared).rows[-1].why
    with pytest.raises(ValueError, match="training"):
        prepared.prepare("compile")
    backbone.eval()
    if type(backbone).__name__ == "SwinBackbone":  # Swin has no running statistics
        assert all(map(torch.equal, maps_of(prepared), before))


def test_patched_forward_of_a_layer_makes_the_stamp_outdated() -> None:
    backbone = resnet()
    stamp = ModuleStamp(backbone)
    layer: Any = backbone.embedder.embedder.convolution
    layer.forward = layer.forward
    assert not stamp.is_current()
    del layer.forward
    assert stamp.is_current()


def test_converted_dtype_is_followed_with_a_warning() -> None:
    prepared = resnet().prepare("compile", example=PIXELS)
    prepared.half()
    with pytest.warns(EngineWarning, match=CHANGED):
        assert maps_of(prepared, PIXELS.half())[0].dtype == torch.float16


def test_eager_follows_changes_without_a_warning(backbone: Any) -> None:
    prepared = backbone.prepare("eager", example=PIXELS)
    for change in CHANGES.values():
        change(prepared)
        with no_warning():
            got = maps_of(prepared)
        assert_equals_upstream(got, maps_of(upstream_of(prepared)))


def test_a_change_before_compiling_gives_no_warning(compiler: Compiler, tmp_path: Path) -> None:
    """The empty batch runs eager; the next batch is compiled with the new weights."""
    tools = Device().tools(tmp_path)
    prepared = prepare(resnet(), "compile", expected_images=MANY, tools=tools)
    maps_of(prepared, PIXELS[:0])
    scale_(prepared)
    want = maps_of(upstream_of(prepared))
    with no_warning():
        assert_equals_upstream(maps_of(prepared), want)
        assert_equals_upstream(maps_of(prepared), want)
    assert len(compiler.compiled) == 1


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=str)
def test_no_shape_is_compiled_after_a_change(
    size: tuple[int, int], compiler: Compiler, tmp_path: Path
) -> None:
    tools = Device().tools(tmp_path)
    prepared = prepare(resnet(), "compile", example=PIXELS, expected_images=MANY, tools=tools)
    scale_(prepared)
    pixels = images(*size, batch=3)
    with pytest.warns(EngineWarning, match=CHANGED) as warned:
        got = maps_of(prepared, pixels)
    assert len(warned) == 1 and len(compiler.compiled) == 1
    assert_equals_upstream(got, maps_of(upstream_of(prepared), pixels))


def test_preparing_again_compiles_the_current_weights(compiler: Compiler) -> None:
    prepared = resnet().prepare("compile", example=PIXELS)
    scale_(prepared)
    again = prepared.prepare("compile", example=PIXELS)
    with no_warning():
        assert_equals_upstream(maps_of(again), maps_of(upstream_of(again)))
    assert len(compiler.compiled) == 2


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fp32_copy_on_a_cpu_without_bf16_follows_changes(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbb.engine.ways.has_arithmetic", lambda dtype: dtype.itemsize > 2)
    prepared = resnet().prepare("eager", "bf16")
    maps_of(prepared)
    with torch.inference_mode(False):
        change(prepared)
    upstream = upstream_of(prepared).float()
    want = [x.bfloat16() for x in maps_of(upstream, PIXELS.bfloat16().float())]
    got = maps_of(prepared, PIXELS)
    for ours, theirs in zip(got, want):  # rounded once from fp32, which is within its tolerance
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs.float()).abs().max() <= 2**-8 * theirs.abs().max()


# the parts: `ModuleStamp`, `holding_derived`


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()


def test_a_stamp_of_an_unchanged_module_is_current() -> None:
    module = layers()
    stamp = ModuleStamp(module)
    module(PIXELS).sum().backward()
    optimizer = AdamW(layers().parameters())  # of other parameters
    optimizer.step()
    module.eval()
    copy.deepcopy(module).zero_grad()
    assert stamp.is_current()


def test_a_stamp_notices_added_and_nested_layers() -> None:
    module = layers()
    stamp = ModuleStamp(module)
    module.append(nn.Identity())
    assert not stamp.is_current()
    del module[2]
    assert stamp.is_current()
    module.get_submodule("1").add_module("2", nn.GELU())
    assert not stamp.is_current()


def test_deleted_stamp_is_not_kept_alive() -> None:
    module = layers()
    stamp = ModuleStamp(module)
    del stamp
    weight = module.get_parameter("0.weight")
    assert not any(weight is tensor for stamp in _STAMPS for tensor in stamp._tensors)


def test_holding_derived_collects_the_values_in_use() -> None:
    module = nn.Linear(3, 2).requires_grad_(False)

    def use() -> tuple[Tensor, ...]:
        return derive(module, "doubled", lambda weight: (weight * 2,), module.weight)

    (value,) = use()
    with holding_derived() as held:
        assert not held
        use()
        with holding_derived() as inner:
            use()
        use()
    use()
    assert [one is value for (one,) in held] == [True, True]
    assert [one is value for (one,) in inner] == [True]


def test_a_call_reads_the_modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(resnet(), mode="compile", example=PIXELS)
    stamp, engine = ModuleStamp.is_current, Engine._why_plain_modules
    read: list[str] = []
    monkeypatch.setattr(ModuleStamp, "is_current", lambda s: read.append("all") or stamp(s))
    monkeypatch.setattr(Engine, "_why_plain_modules", lambda e: read.append("few") or engine(e))
    maps_of(model)
    assert read == ["all"]
