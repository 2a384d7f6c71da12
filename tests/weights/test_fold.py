"""Folding of batch norms: kinds of norms, convolutions and modes; everything else is unchanged."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fold_models import PIXELS, assert_folds, fold, small
from reference_models import images, randomize_
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from fastbb.weights.folded_model import is_folded
from fastbb.weights.recognize import activation_name
from fastbb_kernels import ACTIVATIONS


def detr_norm(channels: int) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.detr.modeling_detr")
    return modeling.DetrFrozenBatchNorm2d(channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "torch": lambda c: nn.BatchNorm2d(c, eps=1e-3),
    "torch-not-affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "torch-sync": nn.SyncBatchNorm,
    "timm-act": lambda c: BatchNormAct2d(c, act_layer=nn.SiLU),
    "timm-act-none": lambda c: BatchNormAct2d(c, apply_act=False),
    "timm-act-unknown": lambda c: BatchNormAct2d(c, act_layer=nn.LeakyReLU),
    "timm-sync-act": SyncBatchNormAct,
    "timm-frozen-act": FrozenBatchNormAct2d,
    "torchvision-frozen": FrozenBatchNorm2d,
    "torchvision-frozen-eps0": lambda c: FrozenBatchNorm2d(c, eps=0.0),
    "transformers-frozen": detr_norm,
}


class Detectron2Conv(nn.Conv2d):
    """Copy of detectron2's Conv2d, which owns its norm and activation."""

    def __init__(self, *args: Any, norm: nn.Module, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        x = F.conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        x = self.norm(x)
        return x if self.activation is None else self.activation(x)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_every_kind_of_norm_is_folded(norm: Callable[[int], nn.Module], bias: bool) -> None:
    report = assert_folds(small(nn.Conv2d(6, 8, 3, 2, 1, bias=bias), norm(8), nn.ReLU()), 1)
    assert report.folded[0].op == "conv3x3_bn_act"


@pytest.mark.parametrize("activation", [None, F.relu_, nn.SiLU()], ids=["none", "relu_", "silu"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_convolution_that_owns_its_norm_is_folded(
    norm: Callable[[int], nn.Module], activation: Any
) -> None:
    conv = Detectron2Conv(6, 8, 3, padding=1, bias=False, norm=norm(8), activation=activation)
    assert_folds(small(conv, nn.Conv2d(8, 4, 1)), 1)


@pytest.mark.parametrize(
    ("conv", "op"),
    [
        (nn.Conv2d(6, 8, 1), "conv1x1_bn_act"),
        (nn.Conv2d(6, 8, 1, stride=2), "conv1x1_bn_act"),
        (nn.Conv2d(6, 8, 3, padding=4, dilation=4), "conv3x3_bn_act"),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), "depthwise_conv_bn_act"),
        (nn.Conv2d(6, 6, 3, padding=1, groups=2), None),
        (nn.Conv2d(6, 8, 3), None),
        (nn.Conv2d(6, 8, (1, 7), padding="same"), None),
        (nn.Conv2d(6, 12, 3, padding=1, groups=6), None),
        (Conv2dSame(6, 8, 3, stride=2), None),
        (Conv2dSame(6, 6, 5, stride=(2, 1), groups=6), None),
    ],
    ids=lambda value: "" if isinstance(value, nn.Module) else str(value),
)
def test_every_kind_of_convolution_is_folded(conv: Any, op: str | None) -> None:
    for pixels in (PIXELS, PIXELS[..., :7, :9]):
        model = small(copy.deepcopy(conv), nn.BatchNorm2d(conv.out_channels), nn.ReLU())
        (entry,) = assert_folds(model, 1, pixels).norms
        assert entry.op == op and entry.fused == "relu"


def test_fold_report_counts_folded_fused_and_refused_norms() -> None:
    model = small(
        *(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8), nn.Tanh(), nn.BatchNorm2d(8)),
    )
    text = str(assert_folds(model, 2))
    assert text.splitlines() == [
        "3 batch norms: 2 folded, 1 of them with their activation, 1 refused",
        "     1 conv1x1_bn_act",
        "     1 plain convolution",
        "  6: it reads the output of a Tanh, not the output of a convolution",
    ]


@torch.no_grad()
def test_training_mode_of_the_norm_alone_decides_folding() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    upstream = copy.deepcopy(model)
    folding = fold(model)
    # frozen norms in a model that trains, as detection does
    for either in (model, upstream):
        either.train()[1].eval()
    got = folding.run(model, PIXELS)
    assert_equals_upstream(got, upstream(PIXELS), rel=1e-12)
    assert not torch.equal(got, upstream(PIXELS))
    # the norm alone trains, and counts what it sees
    for either in (model, upstream):
        either.eval()[1].train()
    for _ in range(2):
        assert torch.equal(folding.run(model, PIXELS), upstream(PIXELS))
    assert torch.equal(model[1].running_mean, upstream[1].running_mean)
    for either in (model, upstream):
        either.eval()
    assert_equals_upstream(folding.run(model, PIXELS), upstream(PIXELS), rel=1e-12)


def test_gradients_equal_upstream() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    upstream = copy.deepcopy(model)
    folding = fold(model)
    folding.run(model, PIXELS).square().sum().backward()
    upstream(PIXELS).square().sum().backward()
    for ours, theirs in zip(model.parameters(), upstream.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    # of the input alone
    model.requires_grad_(False)
    pixels = PIXELS.clone().requires_grad_()
    folding.run(model, pixels).sum().backward()
    assert pixels.grad is not None


@torch.no_grad()
def test_hooks_see_the_values_of_their_module() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    want = [model[0](PIXELS), model[:2](PIXELS)]
    folding = fold(model)
    for position in range(2):
        seen: list[Tensor] = []
        handle = model[position].register_forward_hook(lambda _m, _x, y, seen=seen: seen.append(y))
        folding.run(model, PIXELS)
        handle.remove()
        assert torch.equal(seen[0], want[position])


@torch.no_grad()
def test_a_folded_module_called_alone_computes_as_before() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    y = model[0](PIXELS)
    want = [y, model[1](y), model[2](y)]
    folding = fold(model)
    folding.run(model, PIXELS)
    for module, x, expected in zip(model, (PIXELS, y, y), want):
        assert torch.equal(module(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_folds_its_own_weights(make_copy: Callable[[Any], Any]) -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    folding = fold(model)
    want = folding.run(model, PIXELS)
    twin, its_folding = make_copy((model, folding))
    assert all(is_folded(module) for module in twin)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(its_folding.run(twin, PIXELS), want)
    twin[1].eps = 0.5
    assert not torch.equal(its_folding.run(twin, PIXELS), want)


@torch.no_grad()
def test_folded_and_plain_calls_in_threads_do_not_mix() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    folding = fold(model)
    folded_map, own_map = folding.run(model, PIXELS), model(PIXELS)
    assert not torch.equal(folded_map, own_map)

    def call(index: int) -> bool:
        with torch.no_grad():
            got = folding.run(model, PIXELS) if index % 2 else model(PIXELS)
        return torch.equal(got, folded_map if index % 2 else own_map)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


@torch.no_grad()
def test_autocast_equals_upstream() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).float()
    upstream = copy.deepcopy(model)
    folding = fold(model, PIXELS.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folding.run(model, PIXELS.float()), upstream(PIXELS.float()))


@torch.no_grad()
def test_compiles_and_exports() -> None:
    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small(nn.Conv2d(6, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 1))
            self.folding = fold(self.model)

        def forward(self, x: Tensor) -> Tensor:
            return self.folding.run(self.model, x)

    model = Runs()
    want = model(PIXELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equals_upstream(compiled(PIXELS), want, rel=1e-12)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (PIXELS,), dynamic_shapes=shapes).module()
    assert_equals_upstream(exported(PIXELS[:1].repeat(3, 1, 1, 1))[:1], want[:1], rel=1e-12)


def test_activations_are_recognised_by_what_they_compute() -> None:
    import timm.layers as layers
    from transformers.activations import QuickGELUActivation

    names = {
        "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
        "silu": [nn.SiLU(), layers.Swish()],
        "gelu": [nn.GELU(), layers.GELU()],
        "gelu_new": [nn.GELU("tanh"), layers.GELUTanh()],
        "quick_gelu": [QuickGELUActivation(), layers.QuickGELU()],
        "hardswish": [nn.Hardswish(), layers.HardSwish()],
    }
    for name, modules in names.items():
        assert name in ACTIVATIONS
        assert [activation_name(module) for module in modules] == [name] * len(modules)
    others = [nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.Mish(), nn.MaxPool2d(2), nn.Flatten()]
    others += [nn.Identity(), nn.Linear(8, 8), nn.AdaptiveAvgPool2d(1), nn.Softmax(1), nn.Sigmoid()]
    assert [activation_name(module) for module in others] == [None] * len(others)


DETECTION = {
    "fasterrcnn": ("fasterrcnn_resnet50_fpn", 0.0),
    "retinanet": ("retinanet_resnet50_fpn", 1e-5),
    "maskrcnn_v2": ("maskrcnn_resnet50_fpn_v2", None),
    "mobilenet": ("fasterrcnn_mobilenet_v3_large_320_fpn", 1e-5),
    "ssdlite": ("ssdlite320_mobilenet_v3_large", None),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "frozen_eps"), DETECTION.values(), ids=DETECTION)
def test_torchvision_detection_backbones_are_folded(name: str, frozen_eps: float | None) -> None:
    from torchvision import models

    detector: Any = models.get_model(name, weights=None, weights_backbone=None)
    backbone = detector.backbone
    if frozen_eps is not None:  # as with weights
        for module in [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]:
            freeze_(backbone, module, frozen_eps)
    randomize_(backbone)
    pixels = images(64, 96, batch=1)
    want = backbone(pixels)
    folding = fold(backbone, pixels)
    report = folding.report
    assert len(report.folded) > 20 and not report.refused, str(report)
    got = folding.run(backbone, pixels)
    assert list(got) == list(want)
    for key in want:
        assert_equals_upstream(got[key], want[key], rel=1e-4)


def freeze_(backbone: nn.Module, norm: nn.Module, eps: float) -> None:
    (name,) = (name for name, module in backbone.named_modules() if module is norm)
    parent, _, child = name.rpartition(".")
    frozen = FrozenBatchNorm2d(len(norm.get_buffer("running_mean")), eps=eps)
    setattr(backbone.get_submodule(parent), child, frozen)
