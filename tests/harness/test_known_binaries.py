"""Binaries that were launched before get what Triton would give them, without Triton's look-up."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from fastbb_kernels.case import Case
from fastbb_kernels.cases import small_cases
from fastbb_kernels.check import launch_of
from fastbb_kernels.op import op_names
from fastbb_kernels.pretend_gpu import CountingDriver, counting_gpu, fake_gpu
from fastbb_kernels.triton_kernels import kernel
from fastbb_kernels.triton_kernels.linear_residual import _linear_residual_fwd_kernel as KERNEL

C = 32


class Launches:
    """Launches that reached the driver, and look-ups of Triton."""

    def __init__(self, driver: CountingDriver) -> None:
        self.driver = driver
        self.args: list[tuple[Any, ...]] = []
        self.n_lookups = 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    find = JITFunction.__getitem__
    with torch.no_grad(), counting_gpu(90) as driver:
        launches = Launches(driver)

        def counted(fn: JITFunction, grid: Any) -> Any:
            launches.n_lookups += 1
            return find(fn, grid)

        monkeypatch.setattr(driver, "launched", launches.args.append)
        monkeypatch.setattr(JITFunction, "__getitem__", counted)
        monkeypatch.setattr(KERNEL, "_binaries", {})
        yield launches


def a_case(op: str) -> Case:
    return next(case for case in small_cases() if case.op == op)


def is_same(a: Any, b: Any) -> bool:
    """Whether arguments are equal; results are new tensors at every launch."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("op", op_names())
def test_known_binaries_get_the_arguments_that_triton_passes(op: str, launches: Launches) -> None:
    launch, args = launch_of(a_case(op), "cpu", torch.bfloat16)
    launch.run(*args)
    n_first, before = len(launches.args), launches.n_lookups
    launch.run(*args)
    assert launches.n_lookups == before and len(launches.args) == 2 * n_first > 0
    for first, second in zip(launches.args[:n_first], launches.args[n_first:]):
        # after the grid, the stream, the function and its metadata come three for hooks
        assert first[:6] == second[:6] and second[6:9] == (None, None, None)
        assert len(first) == len(second) and all(map(is_same, first[9:], second[9:]))


def linear(x: Tensor, weight: Tensor | None = None) -> None:
    launch, _ = launch_of(a_case("linear_residual"), "cpu", x.dtype)
    weight = torch.zeros(C, x.shape[1], dtype=x.dtype) if weight is None else weight
    launch.run(x, weight, None, torch.zeros(len(x), C, dtype=x.dtype), None)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(64 * C + 1).bfloat16()[1:].view(64, C),
        torch.zeros(64, C).half(),
        torch.zeros(64, 2 * C).bfloat16(),
        torch.zeros(64, 2 * C).bfloat16()[:, :C],
    ],
    ids=["misaligned", "dtype", "features", "stride"],
)
def test_another_form_goes_through_triton(other: Tensor, launches: Launches) -> None:
    x = torch.zeros(64, C).bfloat16()
    for _ in range(3):
        linear(x)
    assert launches.n_lookups == 1
    linear(other)
    assert launches.n_lookups == 2
    linear(x)
    assert launches.n_lookups == 2 and len(launches.args) == 5


def test_the_number_of_rows_is_no_form(launches: Launches) -> None:
    for n_rows in (64, 80, 65):
        linear(torch.zeros(n_rows, C).bfloat16())
    assert launches.n_lookups == 1
    n_rows = [args[9 + 8] for args in launches.args]
    assert n_rows == [64, 80, 65]


def test_hooks_of_triton_see_every_launch(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(64, C).bfloat16()
    linear(x)
    hooks: Any = knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hooks, "calls", [lambda metadata: None])
    linear(x)
    assert launches.n_lookups == 2


def test_versions_of_triton_that_nobody_tried_are_left_alone(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_IS_TESTED", False)
    for _ in range(2):
        linear(torch.zeros(64, C).bfloat16())
    assert launches.n_lookups == 2 and not KERNEL._binaries


def test_forms_are_bounded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_MOST_BINARIES", 1)
    one, other = torch.zeros(64, C).bfloat16(), torch.zeros(64, C).half()
    for x in (one, other, one):
        linear(x)
    assert launches.n_lookups == 3 and len(KERNEL._binaries) == 1


def test_the_harness_sees_every_launch() -> None:
    x = torch.zeros(64, C).bfloat16()
    with torch.no_grad(), fake_gpu(90) as gpu:
        for _ in range(2):
            linear(x)
    assert len(gpu.launches) == 2


def test_triton_calls_binaries_as_this_does() -> None:
    """Versions differ in what is around this call."""
    source = " ".join(inspect.getsource(JITFunction.run).split())
    start = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    end = "knobs.runtime.launch_exit_hook, *bound_args.values())"
    assert start in source and end in source
    assert triton.__version__.startswith(kernel._TESTED)
