"""Folding: which norms of which libraries, by which dataflow, and that nothing else changes."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import images, randomize_
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.std_conv import StdConv2d
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from fastbb.fold import activation_name, find_norms, fold_, is_folded, unfold_
from fastbb_kernels import ACTIVATIONS

PIXELS = images(13, 10, channels=6).double()


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
    """What detectron2's Conv2d does, which owns its norm and activation."""

    def __init__(self, *args: Any, norm: nn.Module, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def small(*modules: nn.Module) -> Any:
    """Random weights; float64, so that a wrong eps shows. Small variances for the same reason."""
    model = randomize_(nn.Sequential(*modules)).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.01)
    return model


def folded_(model: Any, pixels: Tensor = PIXELS) -> Any:
    """The model, folded, and its report."""
    return model, fold_(model, find_norms(model, pixels))


@torch.no_grad()
def assert_folds(model: Any, n_folded: int, pixels: Tensor = PIXELS) -> Any:
    """Folds a model, holds it to what it computed before, and returns the report."""
    want = model(pixels)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    _, report = folded_(model, pixels)
    assert len(report.folded) == n_folded, str(report)
    got = model(pixels)
    assert n_folded == 0 or not torch.equal(got, want)  # it is another computation
    assert_equals_upstream(got, want, rel=1e-12)
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    unfold_(model)
    assert torch.equal(model(pixels), want)
    assert not any(is_folded(module) for module in model.modules())
    return report


def reasons(model: Any, pixels: Tensor = PIXELS) -> list[str]:
    return [str(norm.refused) for norm in assert_folds(model, 0, pixels).norms]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_every_kind_of_norm(norm: Callable[[int], nn.Module], bias: bool) -> None:
    report = assert_folds(small(nn.Conv2d(6, 8, 3, 2, 1, bias=bias), norm(8), nn.ReLU()), 1)
    assert report.folded[0].op == "conv3x3_bn_act"


@pytest.mark.parametrize("activation", [None, F.relu_, nn.SiLU()], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_convolutions_that_own_their_norm(
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
def test_every_kind_of_convolution(conv: Any, op: str | None) -> None:
    for pixels in (PIXELS, PIXELS[..., :7, :9]):
        model = small(copy.deepcopy(conv), nn.BatchNorm2d(conv.out_channels), nn.ReLU())
        (entry,) = assert_folds(model, 1, pixels).norms
        assert entry.op == op and entry.fused == "relu"


class Wired(nn.Module):
    """Two convolutions and two norms, wired by a function."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        # registered in an order that is not that of the computation
        self.norm2, self.norm1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.act = nn.ReLU()
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    return m.act(x + m.norm2(m.conv2(m.act(m.norm1(m.conv1(x))))))


def inplace_residual(m: Any, x: Tensor) -> Tensor:
    y = m.norm1(m.conv1(x))
    y += x
    return F.relu_(y)


def same_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(m.act(m.norm1(m.conv1(x)))))


def two_names(m: Any, x: Tensor) -> Tensor:
    y = m.conv2(x)
    z = m.conv1(x)
    return m.norm1(y) - m.norm2(z)


@pytest.mark.parametrize(
    ("wiring", "pairs"),
    [
        (residual, {"norm1": "conv1", "norm2": "conv2"}),
        (inplace_residual, {"norm1": "conv1"}),
        (same_twice, {"norm1": "conv1"}),
        (two_names, {"norm1": "conv2", "norm2": "conv1"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pairs_are_found_by_dataflow(wiring: Any, pairs: dict[str, str]) -> None:
    report = assert_folds(small(Wired(wiring)), len(pairs))
    assert {norm.norm: norm.conv for norm in report.folded} == {
        f"0.{norm}": f"0.{conv}" for norm, conv in pairs.items()
    }
    # the one ReLU runs twice, so it stays a module
    assert not any(norm.activation for norm in report.folded)


def read_by_a_function(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.norm1(y) + y


def read_by_a_module(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.norm1(y) + m.conv2(y)


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y.mul_(2)
    return m.norm1(y)


def activated_between(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.act(m.conv1(x)))


def after_an_addition(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x) + x)


def two_norms(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x)) + m.norm2(m.conv1(x))


def two_convolutions(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x)) + m.norm1(m.conv2(x))


def functional_weight(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x) if x is None else F.conv2d(x, m.conv1.weight, padding=1))


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (read_by_a_function, "also read by `add`"),
        (read_by_a_module, "also read by a Conv2d"),
        (changed_in_place, "also read by `mul_`"),
        (activated_between, "it reads the output of a ReLU, not the output of a convolution"),
        (after_an_addition, "it reads something computed, not the output of a convolution"),
        (two_norms, "also read by a BatchNorm2d"),
        (two_convolutions, "runs several times, after different modules"),
        (functional_weight, "it reads something computed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dataflow_that_forbids_folding(wiring: Any, reason: str) -> None:
    assert all(reason in why for why in reasons(small(Wired(wiring))))


def test_an_output_that_the_model_returns_is_not_folded() -> None:
    class Returns(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            y = self[0](x)
            return {"map": [y], "norm": self[1](y)}

    model = Returns(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)).eval().double()
    (norm,) = find_norms(model, PIXELS)
    assert norm.refused == ("the output of its convolution is also read by the result of the model")


class NotABatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([StdConv2d(6, 8, 3), nn.BatchNorm2d(8)], "computes its weights (weight standard"),
        (
            [parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), nn.BatchNorm2d(8)],
            "computes its weights",
        ),
        ([nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)], "no running stat"),
        ([nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)], "'reflect'"),
        ([nn.Conv2d(6, 8, 3), NotABatchNorm(8)], "NotABatchNorm does not compute what batch"),
        ([nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8)], "output of a ConvTranspose2d"),
        ([nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)], "it reads something computed"),
    ],
    ids=lambda value: "",
)
def test_modules_that_forbid_folding(modules: list[nn.Module], reason: str) -> None:
    (why,) = reasons(small(*modules))
    assert reason in why


def test_a_report_says_what_became_of_every_norm() -> None:
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
def test_the_mode_of_the_norm_decides() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    upstream = copy.deepcopy(model)
    folded_(model)
    # frozen norms in a model that trains, as detection does
    for either in (model, upstream):
        either.train()[1].eval()
    got = model(PIXELS)
    assert_equals_upstream(got, upstream(PIXELS), rel=1e-12)
    assert not torch.equal(got, upstream(PIXELS))
    # the norm alone trains, and counts what it sees
    for either in (model, upstream):
        either.eval()[1].train()
    for _ in range(2):
        assert torch.equal(model(PIXELS), upstream(PIXELS))
    assert torch.equal(model[1].running_mean, upstream[1].running_mean)
    for either in (model, upstream):
        either.eval()
    assert_equals_upstream(model(PIXELS), upstream(PIXELS), rel=1e-12)


def test_gradients_are_upstreams() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    upstream = copy.deepcopy(model)
    folded_(model)
    for either in (model, upstream):
        either(PIXELS).square().sum().backward()
    for ours, theirs in zip(model.parameters(), upstream.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    # of the input alone
    model.requires_grad_(False)
    pixels = PIXELS.clone().requires_grad_()
    model(pixels).sum().backward()
    assert pixels.grad is not None


@torch.no_grad()
def test_hooks_see_the_values_of_their_module() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    want = [model[0](PIXELS), model[:2](PIXELS)]
    folded_(model)
    for position in range(2):
        seen: list[Tensor] = []
        handle = model[position].register_forward_hook(lambda _m, _x, y, seen=seen: seen.append(y))
        model(PIXELS)
        handle.remove()
        assert torch.equal(seen[0], want[position])


@torch.no_grad()
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_folds_its_own_weights(make_copy: Callable[[Any], Any]) -> None:
    model, _ = folded_(small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    want = model(PIXELS)
    twin = make_copy(model)
    assert all(is_folded(module) for module in twin)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(PIXELS), want)
    twin[1].eps = 0.5
    assert not torch.equal(twin(PIXELS), want)


@torch.no_grad()
def test_autocast_computes_as_upstream() -> None:
    model = small(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).float()
    upstream = copy.deepcopy(model)
    folded_(model, PIXELS.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(PIXELS.float()), upstream(PIXELS.float()))


@torch.no_grad()
def test_compiles_and_exports() -> None:
    model, _ = folded_(small(nn.Conv2d(6, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 1)))
    want = model(PIXELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equals_upstream(compiled(PIXELS), want, rel=1e-12)
    shapes = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (PIXELS,), dynamic_shapes=shapes).module()
    assert_equals_upstream(exported(PIXELS[:1].repeat(3, 1, 1, 1))[:1], want[:1], rel=1e-12)


def test_activations_are_known_by_what_they_compute() -> None:
    import timm.layers as layers

    names = {
        "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
        "silu": [nn.SiLU(), layers.Swish()],
        "gelu": [nn.GELU(), layers.GELU()],
        "gelu_new": [nn.GELU("tanh"), layers.GELUTanh()],
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
def test_torchvisions_detection_backbones(name: str, frozen_eps: float | None) -> None:
    from torchvision import models

    detector = models.get_model(f"{name}", weights=None, weights_backbone=None)
    backbone = detector.backbone
    if frozen_eps is not None:  # as with weights
        for module in [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]:
            freeze_(backbone, module, frozen_eps)
    randomize_(backbone)
    pixels = images(64, 96, batch=1)
    want = backbone(pixels)
    report = fold_(backbone, find_norms(backbone, pixels))
    assert len(report.folded) > 20 and not report.refused, str(report)
    got = backbone(pixels)
    assert list(got) == list(want)
    for key in want:
        assert_equals_upstream(got[key], want[key], rel=1e-4)


def freeze_(backbone: nn.Module, norm: nn.Module, eps: float) -> None:
    (name,) = (name for name, module in backbone.named_modules() if module is norm)
    parent, _, child = name.rpartition(".")
    frozen = FrozenBatchNorm2d(len(norm.get_buffer("running_mean")), eps=eps)
    setattr(backbone.get_submodule(parent), child, frozen)
