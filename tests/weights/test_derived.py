"""Values derived from weights: they follow every change and leave the modules unchanged."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import gradients, images, randomize_
from tolerance import assert_equal_gradients, assert_equals_upstream
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from weight_changes import WEIGHT_CHANGES, load, scale_

from fastbb import (
    AutoBackbone,
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
)
from fastbb.weights.watch import untraced

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
PIXELS = images(32, 32)


def hf_swin() -> Any:
    return randomize_(SwinBackbone(SwinConfig(**SWIN, drop_path_rate=0.0)))


def timm_swin() -> Any:
    name = "swin_tiny_patch4_window7_224"
    config = TimmBackboneConfig(name, img_size=32, out_indices=[1], backbone_kwargs=SWIN)
    return randomize_(TimmBackbone(config))


def hf_resnet() -> Any:
    shape = {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 2]}
    return randomize_(ResNetBackbone(ResNetConfig(**shape)))


def timm_mobilenet() -> Any:
    """A timm model that runs timm's own forward, with folded batch norms."""
    return randomize_(TimmBackbone(TimmBackboneConfig("test_efficientnet", out_indices=[2])))


SWINS = {"hf_swin": hf_swin, "timm_swin": timm_swin}
CONVOLUTIONS = {"hf_resnet": hf_resnet, "timm_mobilenet": timm_mobilenet}


@pytest.fixture(params=[*SWINS.values(), *CONVOLUTIONS.values()], ids=list(SWINS | CONVOLUTIONS))
def backbone(request: pytest.FixtureRequest) -> Any:
    """A tiny model that has run once, so that it holds derived values."""
    model = request.param()
    infer(model)
    return model


@pytest.fixture(params=SWINS.values(), ids=list(SWINS))
def swin(request: pytest.FixtureRequest) -> Any:
    model = request.param()
    infer(model)
    return model


@torch.no_grad()
def infer(model: Any) -> Tensor:
    return model(PIXELS.to(next(model.parameters()).dtype))[0][-1]


def rebuilt(backbone: Any) -> Any:
    """A new model with copies of the weights of another."""
    new = AutoBackbone.from_config(backbone.config).to(backbone.dtype)
    new.load_state_dict({name: tensor.clone() for name, tensor in backbone.state_dict().items()})
    return new.train(backbone.training)


class Gathers(TorchDispatchMode):
    """Counts gathers from a table."""

    n_gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_gathers += func is torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_the_second_forward_derives_nothing(swin: Any, mode: Any) -> None:
    swin.refresh()
    for expected in (3, 0):  # one in each block
        with mode(), Gathers() as gathers:
            swin(PIXELS)
        assert gathers.n_gathers == expected


# changes that are followed without `refresh`


def step_by_hand(backbone: Any) -> None:
    backbone(PIXELS)[0][-1].sum().backward()
    for p in backbone.parameters():
        if p.grad is not None:
            p.data.sub_(p.grad, alpha=1e-3)


CHANGES: dict[str, Callable[[Any], Any]] = {
    **WEIGHT_CHANGES,
    "step_by_hand": step_by_hand,
    "half": lambda backbone: backbone.half(),
    "to_bfloat16": lambda backbone: backbone.to(torch.bfloat16),
    "inside_to_bfloat16": lambda backbone: [child.bfloat16() for child in backbone.children()],
}


def assert_follows(backbone: Any, before: Tensor) -> None:
    maps, want = infer(backbone), infer(rebuilt(backbone))
    assert maps.dtype != before.dtype or not torch.equal(maps, before)
    # values that cannot be kept are not folded, so they round differently
    if any(p.is_inference() for p in backbone.parameters()):
        assert_equals_upstream(maps, want)
    else:
        assert torch.equal(maps, want)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_followed(backbone: Any, change: Callable[[Any], Any]) -> None:
    before = infer(backbone)
    change(backbone)
    assert_follows(backbone, before)


def test_changed_inference_tensors_are_followed(backbone: Any) -> None:
    torch.inference_mode()(load(assign=True))(backbone)
    assert all(p.is_inference() for p in backbone.parameters())
    before = infer(backbone)
    torch.inference_mode()(scale_)(backbone)
    assert_follows(backbone, before)


# changes without a trace, and calls that make a backbone look again

LOOKS_AGAIN: dict[str, Callable[[Any], Any]] = {
    "refresh": lambda backbone: backbone.refresh(),
    "train-eval": lambda backbone: backbone.train().eval(),
    "eval-wrapped": lambda backbone: nn.Sequential(backbone).eval(),
    "apply": lambda backbone: backbone.cpu(),
    "gradient": lambda backbone: backbone(PIXELS),
    "any_optimizer": lambda backbone: SGD([nn.Parameter(torch.ones(1))]).step(),
}


@pytest.mark.parametrize("look_again", LOOKS_AGAIN.values(), ids=LOOKS_AGAIN)
def test_changes_through_data_are_followed_after_refresh_train_or_apply(
    backbone: Any, look_again: Any
) -> None:
    before = infer(backbone)
    for p in backbone.parameters():
        p.data.lerp_(torch.ones_like(p), 0.5)  # a moving average
    look_again(backbone)
    assert_follows(backbone, before)


@pytest.mark.parametrize("change", [lambda backbone: backbone.half(), load()], ids=["half", "load"])
def test_swapped_parameters_are_followed(backbone: Any, change: Callable[[Any], Any]) -> None:
    # torch cannot swap a tensor that has weak references
    before = infer(backbone)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        change(backbone)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_follows(backbone, before)


# attributes, state dict and pickle


def test_deriving_leaves_the_modules_unchanged() -> None:
    backbone = hf_swin()
    before = {name: set(vars(module)) for name, module in backbone.named_modules()}
    state, saved = list(backbone.state_dict()), len(pickle.dumps(backbone))
    infer(backbone)
    after = {name: set(vars(module)) for name, module in backbone.named_modules()}
    after[""].discard("_cached_parts")  # which no copy has
    assert after == before
    assert list(backbone.state_dict()) == state and len(pickle.dumps(backbone)) == saved


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda backbone: pickle.loads(pickle.dumps(backbone))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent(backbone: Any, make_copy: Callable[[Any], Any]) -> None:
    before = infer(backbone)
    twin = make_copy(backbone)
    assert torch.equal(infer(twin), before)
    scale_(twin)
    assert_follows(twin, before)
    assert torch.equal(infer(backbone), before)


def test_gradients_equal_those_of_a_new_model(backbone: Any) -> None:
    backbone.double()
    infer(backbone)
    got, want = (gradients(model, PIXELS.double()) for model in (backbone, rebuilt(backbone)))
    assert any("bias_table" in name or "conv" in name for name in want)
    assert_equal_gradients(got, want)


def test_values_from_inference_mode_allow_a_gradient(backbone: Any) -> None:
    backbone.requires_grad_(False).refresh()
    with torch.inference_mode():
        backbone(PIXELS)
    pixels = PIXELS.clone().requires_grad_()
    backbone(pixels)[0][-1].sum().backward()
    assert pixels.grad is not None and pixels.grad.any()


@pytest.mark.parametrize("kind", [nn.Parameter, lambda tensor: tensor], ids=["parameter", "tensor"])
def test_functional_call_computes_from_its_own_parameters(backbone: Any, kind: Any) -> None:
    before, other = infer(backbone), copy.deepcopy(backbone)
    scale_(other)
    weights = {name: kind(p.detach()) for name, p in other.named_parameters()}
    with torch.no_grad():
        for _ in range(2):
            maps = torch.func.functional_call(backbone, weights, (PIXELS,))[0][-1]
            assert_equals_upstream(maps, infer(other))  # tensors are not folded into each other
            assert not torch.equal(maps, before)
    assert torch.equal(infer(backbone), before)


def under_fake_tensors(backbone: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        backbone(mode.from_tensor(PIXELS))


@torch.no_grad()
def under_autocast(backbone: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        backbone(PIXELS)


@pytest.mark.parametrize("run", [under_fake_tensors, under_autocast])
def test_fake_tensors_and_autocast_leave_no_derived_values(backbone: Any, run: Any) -> None:
    backbone.requires_grad_(False).refresh()
    run(backbone)
    assert torch.equal(infer(backbone), infer(rebuilt(backbone)))


# a graph computes derived values from the parameters

GRAPHS: dict[str, Callable[[Any], Any]] = {
    "compile": lambda backbone: torch.compile(backbone, backend="aot_eager", fullgraph=True),
    "export": lambda backbone: torch.export.export(backbone, (PIXELS,)).module(),
    "make_fx": lambda backbone: make_fx(lambda pixels: backbone(pixels))(PIXELS),
    "jit": lambda backbone: torch.jit.trace(backbone, PIXELS, check_trace=False),
}


@torch.no_grad()
@pytest.mark.parametrize("make_graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.filterwarnings("ignore")  # of torch about its own tracers
def test_compiled_exported_and_traced_graphs_follow_changed_weights(
    make_graph: Callable[[Any], Any],
) -> None:
    backbone = hf_swin()
    backbone.config.return_dict = False  # jit knows tuples only
    before = infer(backbone)
    graph = make_graph(backbone)
    assert_equals_upstream(graph(PIXELS)[0][-1], before)
    scale_(backbone)
    assert_equals_upstream(graph(PIXELS)[0][-1], infer(rebuilt(backbone)))
    assert_follows(backbone, before)


# threads, the optimizers of the process


def test_threads_get_equal_maps_while_weights_are_refreshed(backbone: Any) -> None:
    want, wrong, done = infer(backbone), [], threading.Event()

    def run() -> None:
        while not done.is_set():
            if not torch.equal(infer(backbone), want):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        backbone.refresh()
        infer(backbone)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_optimizer_hook_is_registered_at_first_use() -> None:
    if untraced.step_hook is not None:
        untraced.step_hook.remove()
        untraced.step_hook = None
    before = len(_global_optimizer_post_hooks)
    backbone = hf_swin()
    assert len(_global_optimizer_post_hooks) == before
    infer(backbone)
    infer(hf_swin())
    assert len(_global_optimizer_post_hooks) == before + 1
