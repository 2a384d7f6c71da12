"""Kernels are launched on the device of their tensors, not on the current one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.runtime.jit import JITFunction

from fastbb_kernels import _dispatch
from fastbb_kernels.case import Case
from fastbb_kernels.cases import small_cases
from fastbb_kernels.check import launch_of
from fastbb_kernels.op import op_names

SECOND = torch.device("cuda:1")


class Driver:
    """Two GPUs, of which the first is current; records where kernels are launched.

    Attributes:
        current: index of the current device.
        launched_on: the current device of each launch.
    """

    def __init__(self) -> None:
        self.current = 0
        self.launched_on: list[int] = []

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index
        return before

    def launch(self, *args: Any, **options: Any) -> None:
        self.launched_on.append(self.current)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "_exchange_device", driver.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", driver.exchange)
    monkeypatch.setattr(JITFunction, "run", driver.launch)
    for module in ("fastbb_kernels.launching", "fastbb_kernels._dispatch"):
        monkeypatch.setattr(f"{module}.architecture", lambda device: 90)
    monkeypatch.setattr("fastbb_kernels.measured._measured_config", lambda *args: None)
    yield driver
    assert driver.current == 0


@contextmanager
def on_second_gpu() -> Iterator[None]:
    """Makes fake tensors on a second GPU that does not exist."""
    with FakeTensorMode(), torch.no_grad():
        yield


def a_case(op: str) -> Case:
    return next(case for case in small_cases() if case.op == op)


@pytest.mark.parametrize("op", op_names())
def test_every_launch_is_on_the_device_of_its_tensors(op: str, driver: Driver) -> None:
    launch, args = launch_of(a_case(op), "cpu", torch.bfloat16)
    with on_second_gpu():
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=SECOND)
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        y = launch(*moved)
    assert y.device == SECOND
    assert set(driver.launched_on) == {1}


def test_failed_launch_keeps_the_current_device(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(JITFunction, "run", fail)
    launch, _ = launch_of(a_case("linear_residual"), "cpu", torch.bfloat16)
    with on_second_gpu(), pytest.raises(RuntimeError, match="resources"):
        x = torch.empty(4, 8, device=SECOND)
        launch(x, torch.empty(8, 8, device=SECOND), None, x, None)


def test_these_tests_do_not_launch_directly() -> None:
    """Control for the tests above: launches take the path of a GPU."""
    assert not _dispatch.launches_directly()


def test_kernels_launch_only_on_gpus_and_pretended_gpus() -> None:
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "meta")]
    assert [_dispatch.launches_on(device) for device in devices] == [True, False, False]
    with _dispatch.pretend(90):
        assert all(_dispatch.launches_on(device) for device in devices)
