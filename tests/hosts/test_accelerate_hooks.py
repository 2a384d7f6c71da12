"""Hooks, parametrizations, subclasses and patched forwards in accelerated hosts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_hosts import (
    NO_ACCELERATE_WARNING,
    PIXELS,
    accelerated,
    assert_bit_equal,
    assert_close,
    assert_ours_ran,
    block_of,
    infer,
    maskformer_swin,
    reasons_of,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
    tensors,
    torchvision_swin,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import fastbb

pytestmark = NO_ACCELERATE_WARNING


def layer_of(model: nn.Module) -> Any:
    """A layer with a weight inside the first block."""
    layers = block_of(model).modules()
    return [m for m in layers if type(m) in (nn.Linear, nn.Conv2d)][-1]


# hooks


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def hooked(model: Any, modules: list[nn.Module]) -> tuple[list[Any], list[Any]]:
    """Registers hooks of all kinds; returns what they were called with, and their handles."""
    names, seen, handles = names_of(model), [], []

    def after(module: Any, args: Any, kwargs: Any, result: Any) -> None:
        seen.append(("after", names[module], tensors((args, kwargs)), tensors(result)))

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(("before", names[module], tensors((args, kwargs)), []))

    def backward(module: Any, inputs: Any, outputs: Any) -> None:
        seen.append(("backward", names[module], tensors(inputs), tensors(outputs)))

    for module in modules:
        handles.append(module.register_forward_hook(after, with_kwargs=True))
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if modules[0] is not model:
            handles.append(module.register_full_backward_hook(backward))
    return seen, handles


def assert_seen_alike(got: list[Any], want: list[Any]) -> None:
    assert [call[:2] for call in got] == [call[:2] for call in want] and want
    for (*_, inputs, outputs), (*_, their_inputs, their_outputs) in zip(got, want):
        ours, theirs = [*inputs, *outputs], [*their_inputs, *their_outputs]
        assert len(ours) == len(theirs)
        assert_close([x.detach() for x in ours], [x.detach() for x in theirs])


HOOKED: dict[str, Callable[[Any], list[nn.Module]]] = {
    "all": lambda model: list(model.modules()),
    "itself": lambda model: [model],
    "block": lambda model: [block_of(model)],
    "layer": lambda model: [layer_of(model)],
}
BACKWARD = (HOOKED["block"], HOOKED["layer"])


@pytest.mark.parametrize("ran_before", [True, False], ids=["ran", "not_run"])
@pytest.mark.parametrize("which", [*HOOKED.values()][1:], ids=[*HOOKED][1:])
def test_hooks_see_the_values_of_upstream(
    make: Callable[[], Any], which: Callable[[Any], list[nn.Module]], ran_before: bool
) -> None:
    model, twin, report = accelerated(make)
    if ran_before:
        infer(model)
    (got, handles), (want, _) = (hooked(either, which(either)) for either in (model, twin))
    assert_close(infer(model), infer(twin))
    assert_seen_alike(got, want)
    for either in (model, twin):
        results = tensors(either(PIXELS))
        torch.stack([result.square().mean() for result in results]).sum().backward()
    assert_seen_alike(got, want)
    # upstream fails if all modules have such hooks; hooks of a dataclass are not called
    assert any(kind == "backward" for kind, *_ in got) == (which in BACKWARD)
    for handle in handles:
        handle.remove()
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


@pytest.mark.parametrize("which", HOOKED.values(), ids=HOOKED)
def test_hooks_that_change_values_take_effect(
    make: Callable[[], Any], which: Callable[[Any], list[nn.Module]]
) -> None:
    def negative(module: Any, args: Any) -> Any:
        return tuple(-x if isinstance(x, Tensor) else x for x in args)

    model, twin, _ = accelerated(make)
    before = infer(model)
    for either in (model, twin):
        for module in which(either)[:3]:
            module.register_forward_pre_hook(negative)
    want = infer(twin)
    assert_close(infer(model), want)
    # torchvision reads the weights of its attention's layers, and never calls these
    assert not torch.equal(want[-1], before[-1])


def test_global_hooks_see_every_module(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated(make)
    infer(model)
    seen: list[str] = []

    def see(module: nn.Module, *_: Any) -> None:
        seen.append(type(module).__name__)

    handle = register_module_forward_hook(see)
    try:
        assert_bit_equal(infer(model), infer(twin))
    finally:
        handle.remove()
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and half > 10
    assert "hooks of all modules are registered" in reasons_of(report)
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


# parametrized layers, subclasses and patched forwards

PARAMETRIZED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": weight_norm,
    "old_spectral_norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone, torchvision_swin])
@pytest.mark.parametrize("when", ["before", "after", "after_a_call"])
@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_layers_equal_upstream(
    make: Callable[[], Any], parametrize: Callable[[Any], Any], when: str
) -> None:
    def change(model: Any) -> None:
        torch.manual_seed(0)
        parametrize(layer_of(model))
        model.eval()

    model, twin = make(), make()
    if when == "before":
        change(model)
    fastbb.accelerate(model, mode="eager")
    if when == "after_a_call":
        infer(model)
    if when != "before":
        change(model)
    change(twin)
    for _ in range(2):
        assert_close(infer(model), infer(twin))
        with torch.no_grad():
            for either in (model, twin):
                for name, p in layer_of_any(either).named_parameters():
                    if "weight" in name or "original" in name:
                        p.mul_(1.5).add_(0.1)


def layer_of_any(model: nn.Module) -> nn.Module:
    return next(
        m
        for m in model.modules()
        if hasattr(m, "parametrizations") or hasattr(m, "weight_g") or hasattr(m, "weight_orig")
    )


def doubled(cls: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return type("Doubled", (cls,), {"forward": forward})


@pytest.mark.parametrize("when", ["before", "after", "after_a_call"])
def test_subclass_with_its_own_forward_runs_it(make: Callable[[], Any], when: str) -> None:
    def change(model: Any) -> None:
        block = block_of(model)
        block.__class__ = doubled(type(block))

    model, twin = make(), make()
    if when == "before":
        change(model)
    report = fastbb.accelerate(model, mode="eager")
    if when == "after_a_call":
        infer(model)
    if when != "before":
        change(model)
    change(twin)
    assert_close(infer(model), infer(twin))
    why = {left.was: left.why for left in report.left_alone}
    if when == "before":
        assert "a subclass of" in why["Doubled"] and "its own forward" in why["Doubled"]
    assert any(choice.ours for r in report.replaced for choice in r.choices.values())


@pytest.mark.parametrize("make", [maskformer_swin, resnet_backbone, torchvision_swin])
def test_subclass_without_its_own_forward_runs_ours(make: Callable[[], Any]) -> None:
    model = make()
    block_of(model).__class__ = type("Same", (type(block_of(model)),), {"extra": 1})
    report = fastbb.accelerate(model, mode="eager")
    assert_close(infer(model), infer(make()))
    assert ("Same", "fastbb") in {(was, runs) for _, was, runs, _ in report.rows()}


@pytest.mark.parametrize("which", [block_of, lambda model: model], ids=["block", "model"])
def test_patched_forward_is_kept(make: Callable[[], Any], which: Any) -> None:
    def patch(model: Any) -> Any:
        own = which(model).forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else result

        which(model).forward = patched
        return patched

    model, twin = make(), make()
    patched = patch(model)
    patch(twin)
    report = fastbb.accelerate(model, mode="eager")
    assert_close(infer(model), infer(twin))
    fastbb.restore(model)
    assert which(model).forward is patched
    assert_bit_equal(infer(model), infer(twin))
    fastbb.restore(model)
    model = make()
    fastbb.accelerate(model, mode="eager")
    patch(model)  # after it
    assert_close(infer(model), infer(twin))
    reasons = {left.why for left in report.left_alone}
    assert make is swin_classifier or "something else was put over its forward" in reasons
