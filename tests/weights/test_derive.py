"""`derive`: values kept for one module, until a source changes or its memory is released."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbb.weights.derived import derive, derived_bytes, forget_derived
from fastbb_kernels.onednn import pack_linear, packs


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(3, 2, bias=False).requires_grad_(False)


def doubled(weight: Tensor) -> tuple[Tensor]:
    return (weight * 2,)


@pytest.mark.parametrize("traceless", [False, True])
def test_source_changed_during_derive_is_derived_again(linear: nn.Linear, traceless: bool) -> None:
    def interrupted(weight: Tensor) -> tuple[Tensor]:
        value = doubled(weight)
        (weight.data if traceless else weight).zero_()  # as another thread might
        if traceless:
            forget_derived(linear)
        return value

    derive(linear, "doubled", interrupted, linear.weight)
    assert not derive(linear, "doubled", doubled, linear.weight)[0].any()


def test_reused_memory_is_recognised_as_another_parameter_or_dtype(linear: nn.Linear) -> None:
    old = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    derive(linear, "doubled", doubled, old)
    old.data.zero_()
    new = nn.Parameter(old.data, requires_grad=False)
    assert not derive(linear, "doubled", doubled, new)[0].any()
    new.data = new.data.view(torch.bfloat16)
    assert derive(linear, "doubled", doubled, new)[0].dtype == torch.bfloat16


def test_functional_transforms_leave_no_derived_values(linear: nn.Linear) -> None:
    def run(weight: Tensor, x: Tensor) -> Tensor:
        return (derive(linear, "doubled", doubled, weight)[0] @ x).sum()

    x = torch.ones(3)
    assert torch.func.vmap(run, (0, None))(torch.ones(4, 2, 3), x).eq(12).all()
    torch.func.grad(lambda x: run(linear.weight, x))(x)
    # a wrapper that outlived its transform has no memory
    assert derive(linear, "doubled", doubled, linear.weight)[0].data_ptr()


def test_derived_values_carry_no_autograd_graph(linear: nn.Linear) -> None:
    linear.requires_grad_(True)
    with torch.inference_mode():
        (value,) = derive(linear, "doubled", doubled, linear.weight)
    assert not value.requires_grad and not value.is_inference()


@pytest.mark.parametrize(
    "release",
    [
        forget_derived,
        lambda linear: delattr(linear, "weight"),
        lambda linear: derive(linear, "doubled", doubled, nn.Parameter(torch.ones(1))),
        lambda linear: derive(linear.requires_grad_(True), "doubled", doubled, linear.weight),
    ],
    ids=["forget", "dead_source", "same_name", "gradient"],
)
def test_memory_is_released_when_a_value_becomes_invalid(
    linear: nn.Linear, release: Callable[[Any], Any]
) -> None:
    with torch.enable_grad():
        value = weakref.ref(derive(linear, "doubled", doubled, linear.weight)[0])
        assert value() is derive(linear, "doubled", doubled, linear.weight)[0]
        release(linear)
    assert value() is None


def test_memory_is_released_with_its_owner() -> None:
    owner, weight = nn.Module(), nn.Parameter(torch.ones(2), requires_grad=False)
    value = weakref.ref(derive(owner, "doubled", doubled, weight)[0])
    del owner
    assert value() is None  # at once, not when cycles are collected


def test_derived_bytes_count_what_is_kept_beside_the_parameters(linear: nn.Linear) -> None:
    model = nn.Sequential(linear, nn.Linear(3, 5).requires_grad_(False))
    assert derived_bytes([model]) == 0
    derive(linear, "doubled", doubled, linear.weight)
    assert derived_bytes([model]) == derived_bytes([linear, model]) == 2 * 3 * 4
    derive(linear, "halved", lambda weight: (weight[:1].half(), None), linear.weight)
    assert derived_bytes([model]) == 2 * 3 * 4 + 3 * 2
    forget_derived(model)
    assert derived_bytes([model]) == 0


def test_derived_bytes_count_memory_once_and_none_of_a_parameter(linear: nn.Linear) -> None:
    derive(linear, "transposed", lambda weight: (weight.T,), linear.weight)
    assert derived_bytes([linear]) == 0

    def twice(weight: Tensor) -> tuple[Tensor, Tensor]:
        value = weight * 2
        return value, value.T

    derive(linear, "doubled", twice, linear.weight)
    assert derived_bytes([linear]) == 2 * 3 * 4


def test_derived_bytes_count_packed_weights(linear: nn.Linear) -> None:
    if not packs(torch.float32):
        pytest.skip("this PyTorch or CPU packs no weights")
    derive(linear, "packed", lambda weight: (pack_linear(weight),), linear.weight)
    assert derived_bytes([linear]) == 2 * 3 * 4
