"""Supported GPUs: kernels run if there is a launch table, else PyTorch's own ops with a reason."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastbb.engine.prepare import explain
from fastbb.engine.ways import Ways
from fastbb_kernels import _dispatch as dispatch
from fastbb_kernels._dispatch import architecture, common_unsupported
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.linear_residual import LinearResidual
from fastbb_kernels.supported_gpus import LAUNCH_TABLES, gpu_problem, named
from fastbb_kernels.testing import ARCHITECTURES

SUPPORTED = {
    "8.0": 80,
    "8.6": 86,
    "8.7": 86,
    "8.9": 89,
    "9.0": 90,
    "10.0": 100,
    "10.1": 120,
    "10.3": 100,
    "11.0": 120,
    "12.0": 120,
    "12.1": 120,
    "gfx90a": "gfx90a",
    "gfx942": "gfx942",
}
UNSUPPORTED = ["3.5", "7.0", "7.5", "13.0", "gfx908", "gfx950", "gfx1100", "gfx1201"]

Gpu = Callable[[str], mock.Mock]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Sets the capability of all devices; returns the mock of their properties."""
    monkeypatch.setattr(dispatch, "_gpus", {})
    monkeypatch.setattr(dispatch, "current_check", lambda: None)

    def install(capability: str) -> mock.Mock:
        properties = SimpleNamespace()
        if capability.startswith("gfx"):
            properties.gcnArchName = f"{capability}:sramecc+:xnack-"
        else:
            properties.major, properties.minor = map(int, capability.split("."))
        monkeypatch.setattr(torch.version, "hip", "7.0" if capability.startswith("gfx") else None)
        asked = mock.Mock(return_value=properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", asked)
        return asked

    with FakeTensorMode():
        yield install


def arguments() -> Any:
    x = torch.empty(4, 64, device="cuda:0")
    return x, torch.empty(64, 64, device="cuda:0"), None, x


def ran(impl: Any = "auto") -> bool:
    """Whether the kernel was chosen."""
    op = find_op("linear_residual")
    with mock.patch.multiple(op, kernel=mock.DEFAULT, library=None) as parts, torch.no_grad():
        op.call(*arguments(), impl=impl)
        return parts["kernel"].called


@pytest.mark.parametrize("capability", SUPPORTED)
def test_supported_gpu_runs_kernels_with_its_launch_table(gpu: Gpu, capability: str) -> None:
    gpu(capability)
    assert architecture(torch.device("cuda:0")) == SUPPORTED[capability]
    assert common_unsupported(LinearResidual(*arguments())) is None and ran() and ran("triton")


@pytest.mark.parametrize("capability", UNSUPPORTED)
def test_unsupported_gpu_runs_pytorchs_own_ops_with_a_reason(gpu: Gpu, capability: str) -> None:
    gpu(capability)
    kind = "" if capability.startswith("gfx") else "compute capability "
    message = (
        "needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.1, 10.3, "
        f"11.0, 12.0, 12.1, or AMD's gfx90a or gfx942, got {kind}{capability}, where "
        "impl='auto' runs PyTorch's own ops"
    )
    assert common_unsupported(LinearResidual(*arguments())) == message
    assert not ran() and not ran("eager")
    with pytest.raises(NotImplementedError, match="linear_residual: .* " + message):
        ran("triton")


def test_explain_says_that_no_kernel_runs_on_an_unsupported_gpu(gpu: Gpu) -> None:
    backbone: Any = SimpleNamespace(
        _engine=None, device=torch.device("cuda:0"), dtype=torch.float16, modules=list
    )
    for capability, runs in (("7.5", "eager"), ("9.0", "triton")):
        dispatch._gpus.clear()
        gpu(capability)
        (row,) = explain(backbone).rows
        assert row.runs == runs and ("got compute capability" in row.why) == (runs == "eager")
        way = Ways(backbone).build("triton", arguments()[0])
        assert ("got compute capability" in way.why) == (runs == "eager")


def test_the_capability_of_a_device_is_read_once(gpu: Gpu) -> None:
    asked = gpu("9.0")
    for _ in range(3):
        assert ran() and architecture(torch.device("cuda:0")) == 90
    asked.assert_called_once()
    other: Any = (tensor if tensor is None else tensor.to("cuda:1") for tensor in arguments())
    assert common_unsupported(LinearResidual(*other)) is None and asked.call_count == 2


def test_the_current_device_is_not_remembered(gpu: Gpu) -> None:
    for capability in ("9.0", "8.0"):
        gpu(capability)
        assert architecture(torch.device("cuda")) == SUPPORTED[capability]


def test_every_compiled_architecture_has_a_launch_table() -> None:
    assert set(LAUNCH_TABLES.values()) == set(ARCHITECTURES)
    assert all(LAUNCH_TABLES[name] == name for name in ARCHITECTURES)


def test_capabilities_map_to_launch_tables() -> None:
    assert {named(capability): table for capability, table in SUPPORTED.items()} == LAUNCH_TABLES
    assert all(gpu_problem(named(capability)) for capability in UNSUPPORTED)
