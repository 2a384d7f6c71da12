"""Folded models that are changed, hooked, inspected or called in unusual ways."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fold_models import PIXELS, assert_folds, fold, reasons, small
from reference_models import images, randomize_
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from fastbb import ResNetBackbone, ResNetConfig, TimmBackbone, TimmBackboneConfig


def plain() -> Any:
    return small(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def with_act() -> Any:
    return small(nn.Conv2d(6, 8, 3, padding=1), BatchNormAct2d(8), nn.Conv2d(8, 4, 1))


class LowRank(nn.Module):
    """A convolution with an adapter beside it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = conv
        self.adapter = nn.Conv2d(6, 8, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


def adapt(model: Any) -> None:
    model[0] = LowRank(model[0])


def remove_norm(model: Any) -> None:
    model[1] = nn.Identity()


def replace_inner_activation(model: Any) -> None:
    if hasattr(model[1], "act"):
        model[1].act = nn.Tanh()


def patch_forward(model: Any) -> None:
    model[1].forward = lambda x: 2 * x


def make_circular(model: Any) -> None:
    model[0].padding_mode = "circular"


def set_stride(model: Any) -> None:
    model[0].stride = 2


def without_statistics(model: Any) -> None:
    model[1].running_mean = model[1].running_var = None


CHANGES = [
    *(adapt, remove_norm, replace_inner_activation, patch_forward),
    *(make_circular, set_stride, without_statistics),
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", [plain, with_act])
def test_changed_modules_are_followed(make: Callable[[], Any], change: Any) -> None:
    model = make()
    upstream = copy.deepcopy(model)
    folding = fold(model)
    folding.run(model, PIXELS)
    for either in (model, upstream):
        change(either)
    assert_equals_upstream(folding.run(model, PIXELS), upstream(PIXELS), rel=1e-12)


@torch.no_grad()
def test_an_activation_that_a_converted_norm_never_runs_is_not_fused() -> None:
    model: Any = small(nn.Conv2d(6, 8, 3), BatchNormAct2d(8))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert hasattr(model[1], "act")
    assert_folds(model, 1)


@torch.no_grad()
def test_global_hooks_see_the_values_of_their_module() -> None:
    model, seen = plain(), []
    folding = fold(model)
    handle = register_module_forward_hook(lambda _m, _x, y: seen.append(y))
    try:
        folding.run(model, PIXELS)
    finally:
        handle.remove()
    assert torch.equal(seen[0], model[0](PIXELS))


@torch.no_grad()
def test_hooks_of_a_container_around_conv_and_norm_see_its_values() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.inner(x))

    model, seen = small(Outer()), []
    (norm,) = assert_folds(model, 1).norms
    assert norm.fused == "relu" and norm.containers == ("0.inner",)
    folding = fold(model)
    model[0].inner.register_forward_hook(lambda _m, _x, y: seen.append(y.clone()))
    folding.run(model, PIXELS)
    assert seen[0].min() < 0


@torch.no_grad()
def test_maps_have_the_memory_layout_of_upstream() -> None:
    model = plain()
    folding = fold(model)
    for pixels in (PIXELS, PIXELS.to(memory_format=torch.channels_last)):
        assert folding.run(model, pixels).stride() == model(pixels).stride()
    model.to(memory_format=torch.channels_last)
    assert folding.run(model, PIXELS).stride() == model(PIXELS).stride()


def test_grad_mode_changed_inside_the_model_equals_upstream() -> None:
    class Mixed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                y = self[0](input)
            z = self[2](self[1](y))
            with torch.no_grad():
                return self[3](z)

    model = Mixed(*plain()).eval()
    upstream = copy.deepcopy(model)
    folding = fold(model)
    assert_equals_upstream(folding.run(model, PIXELS), upstream(PIXELS), rel=1e-12)


@torch.no_grad()
def test_vmap_ensemble_equals_the_single_models() -> None:
    models = [plain() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = plain()
    folding = fold(base)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (PIXELS,))

    got = folding.run(torch.vmap(call), parameters, buffers)
    assert_equals_upstream(got[1], models[1](PIXELS), rel=1e-12)


class Kept(nn.Module):
    def __init__(self, keep: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.keep = keep

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        kept = self.keep(self, y)
        return self.norm(y), kept


@dataclass
class Maps:
    before: Tensor


def stash(module: Any, y: Tensor) -> None:
    module.last = y


@pytest.mark.parametrize(
    "keep",
    [lambda _, y: Maps(y), lambda _, y: {"y": [y]}, stash],
    ids=["object", "dict", "attribute"],
)
def test_a_convolution_result_that_is_kept_forbids_folding(keep: Any) -> None:
    model = Kept(keep).eval().double()
    (norm,) = fold(model).report.norms
    assert norm.refused and norm.refused.endswith("also read by the result of the model")


class Odd(nn.Conv2d):
    """Convolutions that do more, or less, than their arguments say."""

    def __init__(self, kind: str) -> None:
        super().__init__(6, 8, 3, padding=1, bias=kind == "no_bias")
        self.kind = kind
        self.norm = nn.BatchNorm2d(8)
        self.activation = F.relu

    def forward(self, input: Tensor) -> Tensor:
        kind, bias = self.kind, self.bias
        if kind == "pads":
            input = F.pad(input, (1, 1, 1, 1))
        bias = None if kind == "no_bias" else bias
        stride = 2 if kind == "stride" else self.stride
        y = self.norm(F.conv2d(input, self.weight, bias, stride, self.padding))
        if kind == "scales_norm":
            y = 2 * y
        y = y if kind == "no_activation" else self.activation(y)
        return 2 * y if kind == "scales" else y


KINDS = ["pads", "no_bias", "stride", "scales_norm", "no_activation", "scales"]


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_with_extra_computation_are_refused(kind: str) -> None:
    (why,) = reasons(small(Odd(kind), nn.Conv2d(8, 4, 1)))
    assert why.startswith("its convolution, a Odd, does more than")


class Scaled(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(2 * input, weight, bias)


def test_a_convolution_that_scales_its_input_is_refused() -> None:
    (why,) = reasons(small(Scaled(6, 8, 3), nn.BatchNorm2d(8)))
    assert why == "its convolution, a Scaled, does more than convolve"


class FrozenBatchNorm2d(nn.Module):
    """Another class of this name; it computes the same only while its weights are new."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, *statistics, self.weight.abs(), self.bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_with_other_arithmetic_is_refused(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), FrozenBatchNorm2d()).eval().to(device)
    (norm,) = fold(model, torch.empty(1, 6, 9, 9, device=device)).report.norms
    assert norm.refused == "a FrozenBatchNorm2d does not compute what batch norms do"


def test_norm_with_dropout_is_refused() -> None:
    norm = FrozenBatchNormAct2d(8, drop_layer=nn.Dropout)
    assert reasons(small(nn.Conv2d(6, 8, 3), norm)) == ["it drops values at random"]


def timm_backbone() -> Any:
    return randomize_(TimmBackbone(TimmBackboneConfig("test_efficientnet", out_indices=[2])))


@torch.no_grad()
def test_a_model_that_does_not_run_on_the_meta_device_is_not_folded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("fastbb.models.timm.find_norms", refuse)
    backbone = timm_backbone()
    refused = {norm.refused for norm in backbone.fold_report.norms}
    assert refused == {"the model does not run on the meta device: no kernel"}
    assert backbone(images(32, 32)).feature_maps[0].isfinite().all()


@torch.no_grad()
def test_a_native_resnet_follows_changes_of_its_convolutions() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[2], out_indices=[1])
    model, pixels = randomize_(ResNetBackbone(config)), images(40, 40)
    before = model(pixels).feature_maps[0]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            around: Any = [module.kernel_size[0] // 2] * 4
            module._reversed_padding_repeated_twice = around
    circular = model(pixels).feature_maps[0]
    assert not torch.allclose(circular, before)
