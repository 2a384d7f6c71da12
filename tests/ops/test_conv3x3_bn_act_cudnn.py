"""conv3x3_bn_act on a pretended GPU: what runs, and the arguments of cuDNN."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from broken_kernels import PretendedHardware, correct, launching, self_check
from torch import Tensor, channels_last, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastbb_kernels import KernelWarning, conv3x3_bn_act, use_impl
from fastbb_kernels.launching import forced
from fastbb_kernels.op import find_op
from fastbb_kernels.ops import conv3x3_bn_act as op_module
from fastbb_kernels.ops.conv3x3_bn_act import Conv3x3Way
from fastbb_kernels.self_check import use
from fastbb_kernels.testing import record_launches

OP = find_op("conv3x3_bn_act")
CUSTOM_OP = torch.ops.fastbb.fastest_conv3x3_bn_act.default
TRITON, EPILOGUE = "conv3x3_bn_act", "bias_act"


def arguments(
    residual: bool = False, batch: int = 2, stride: int = 2, channels: int = 6
) -> tuple[Any, ...]:
    """The arguments of the custom op, none of them channels-last."""
    x, weight = torch.randn(batch, channels, 9, 8), torch.randn(6, channels, 3, 3)
    y = torch.randn(batch, 6, -(-9 // stride), 8 // stride)
    return x, weight, torch.randn(12)[::2], stride, 3, y if residual else None, "relu"


def expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    return OP.eager(
        x,
        weight,
        bias,
        stride=stride,
        dilation=dilation,
        residual=residual,
        activation=activation,
    )


class Cudnn:
    """Computes what cuDNN's fused op does, on the CPU, and keeps its arguments.

    Attributes:
        calls: arguments of each call.
        error: is raised instead, if there is one.
        spoil: is added to the last element.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.spoil = 0.0

    def add_relu(
        self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        self.calls.append((x, weight, z, alpha, bias, *geometry))
        if self.error is not None:
            raise self.error
        y = (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu()
        y[-1, -1, -1, -1] += self.spoil
        return y


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    cudnn = Cudnn()
    # on in these tests, see conftest.py
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", cudnn.add_relu)
    uninitialized = mock.Mock(side_effect=AssertionError("reads its uninitialized result"))
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", uninitialized)
    return cudnn


@contextmanager
def kernels() -> Iterator[dict[str, mock.Mock]]:
    """Our two kernels, right on the CPU."""
    with launching(conv3x3_bn_act=correct(TRITON), bias_act=correct(EPILOGUE)) as launches:
        yield launches


both = pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])


@both
def test_cudnn_gets_the_arguments_of_the_op(cudnn: Cudnn, residual: bool) -> None:
    args = arguments(residual, stride=1)
    with kernels() as launches:
        y = op_module._run_fastest(*args)
        assert not any(launch.called for launch in launches.values())
    assert_close(y, expected(*args))
    assert y.is_contiguous(memory_format=channels_last)
    ((x, weight, z, alpha, bias, *geometry),) = cudnn.calls
    assert all(tensor.is_contiguous(memory_format=channels_last) for tensor in (x, weight))
    # the tensor that stands in for a residual is initialised
    assert (z is args[5] and alpha == 1.0) if residual else (z is x and alpha == 0.0)
    assert bias.is_contiguous() and torch.equal(bias, args[2])
    assert geometry == [[1, 1], [3, 3], [3, 3], 1]


WITHOUT_FUSED = {
    "no map of the shape of y": arguments(stride=2),
    "other channels": arguments(stride=1, channels=5),
    "silu": (*arguments(stride=1)[:6], "silu"),
    "no activation": (*arguments(True, stride=1)[:6], None),
}


@pytest.mark.parametrize("args", WITHOUT_FUSED.values(), ids=WITHOUT_FUSED)
def test_plain_convolution_and_our_epilogue_run_if_the_fused_op_cannot(
    cudnn: Cudnn, args: Any
) -> None:
    with kernels() as launches:
        assert_close(op_module._run_fastest(*args), expected(*args))
        assert launches[EPILOGUE].call_count == 1 and not launches[TRITON].called
    assert not cudnn.calls


@both
@pytest.mark.parametrize("flag", ["enabled", "deterministic"])
def test_the_fused_op_does_not_run_under_flags_that_it_ignores(
    cudnn: Cudnn, flag: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, flag, flag == "deterministic")
    args = arguments(residual, stride=1)
    with kernels() as launches:
        assert_close(op_module._run_fastest(*args), expected(*args))
        assert launches[EPILOGUE].call_count == 1
    assert not cudnn.calls


@pytest.mark.parametrize("name", ["fused", "plain", "triton"])
def test_fastest_measured_way_runs(cudnn: Cudnn, name: str) -> None:
    args = arguments(stride=1)
    with kernels() as launches, forced({"conv3x3_way": Conv3x3Way(name)}):
        assert_close(op_module._run_fastest(*args), expected(*args))
        ran = {
            "fused": len(cudnn.calls),
            "plain": launches[EPILOGUE].call_count,
            "triton": launches[TRITON].call_count,
        }
    assert ran.pop(name) == 1 and not any(ran.values())


# its first calls are checked as those of kernels are


@pytest.mark.parametrize("fault", ["refuses", "is wrong"])
def test_our_kernel_runs_for_sizes_where_cudnn_fails(
    cudnn: Cudnn, fault: str, tmp_path: Path
) -> None:
    """Our kernel replaces cuDNN for the sizes that failed, and not for others."""
    if fault == "refuses":
        cudnn.error = RuntimeError("Unable to find an engine")
        reason = "RuntimeError: Unable to find an engine"
    else:
        cudnn.spoil, reason = 1e3, "error "
    args, others = arguments(stride=1), arguments(batch=3, stride=1)
    with kernels() as launches, use(self_check(tmp_path)):
        wanted = f"cuDNN's fused 3x3.* for 2x6x9x8 in fp32, and our own kernel runs.*{reason}"
        with pytest.warns(KernelWarning, match=wanted):
            y = op_module._run_fastest(*args)
        assert_close(y, expected(*args))
        assert launches[TRITON].call_count == 3  # of which two are its own check
        n_calls = len(cudnn.calls)
        cudnn.error, cudnn.spoil = None, 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_close(op_module._run_fastest(*args), expected(*args))
            assert len(cudnn.calls) == n_calls <= 2 and launches[TRITON].call_count == 4
            assert_close(op_module._run_fastest(*others), expected(*others))
        assert len(cudnn.calls) == n_calls + 3 and launches[TRITON].call_count == 4


def test_each_choice_of_cudnn_is_checked_with_all_of_its_images(
    cudnn: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels(), use(self_check(tmp_path)):
        for batch in (5, 7, 5):
            op_module._run_fastest(*arguments(batch=batch, stride=1))
        assert [len(call[0]) for call in cudnn.calls] == [5] * 3 + [7] * 3 + [5]
        # with other flags cuDNN chooses other engines, which are checked again
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        op_module._run_fastest(*arguments(batch=5, stride=1))
        monkeypatch.setattr(op_module, "convolution_precision", lambda: "another")
        op_module._run_fastest(*arguments(batch=5, stride=1))
        assert len(cudnn.calls) == 7 + 3 + 3
    # a new process may choose other engines, so they are checked again
    with kernels(), use(self_check(tmp_path)):
        op_module._run_fastest(*arguments(batch=5, stride=1))
        assert len(cudnn.calls) == 13 + 3


def test_wrong_last_image_is_found_by_the_check(cudnn: Cudnn, tmp_path: Path) -> None:
    cudnn.spoil = 1e3  # of the last image alone
    with kernels(), use(self_check(tmp_path)), pytest.warns(KernelWarning, match="error "):
        op_module._run_fastest(*arguments(batch=5, stride=1))


def test_cudnn_does_not_run_unchecked_while_a_graph_is_captured(
    cudnn: Cudnn, tmp_path: Path
) -> None:
    hardware = PretendedHardware()
    args = arguments(stride=1)
    with kernels(), use(self_check(tmp_path, hardware)):
        hardware.capturing = True
        assert_close(op_module._run_fastest(*args), expected(*args))
        assert not cudnn.calls
        hardware.capturing = False
        op_module._run_fastest(*args)
        hardware.capturing = True
        op_module._run_fastest(*args)
        assert len(cudnn.calls) == 3 + 1


def test_number_of_remembered_cudnn_choices_is_limited(
    cudnn: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbb_kernels.self_check._LIBRARY_CALLS", 2)
    check = self_check(tmp_path)
    with kernels(), use(check):
        for batch in (1, 2, 3, 3):
            op_module._run_fastest(*arguments(batch=batch, stride=1))
    assert len(check._libraries) == 2 and len(cudnn.calls) == 3 * 3 + 1


def test_fused_op_of_torch_has_the_arguments_of_our_fake() -> None:
    schema = torch.ops.aten.cudnn_convolution_add_relu.default._schema
    names = ["self", "weight", "z", "alpha", "bias", "stride", "padding", "dilation", "groups"]
    assert [argument.name for argument in schema.arguments] == names


# the real schema in torch


@both
def test_custom_op_passes_opcheck(residual: bool) -> None:
    for batch in (2, 0):
        torch.library.opcheck(CUSTOM_OP, arguments(residual, batch))


@both
def test_compiled_and_exported_op_equals_eager(residual: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
            return CUSTOM_OP(x, *parameters, residual, "relu")

    _, *parameters, _, _ = arguments(residual)
    small, large = ((args[0], args[5]) for args in (arguments(residual), arguments(residual, 7)))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch} if residual else None)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    for model, (x, other) in ((compiled, small), (exported, large)):
        args: Any = x, *parameters, other, "relu"
        assert torch.equal(model(x, other), expected(*args))


@pytest.mark.parametrize(
    ("hip", "impl", "activation", "taken"),
    [
        (None, "auto", "relu", "fastest"),
        (None, "auto", "silu", "fastest"),
        (None, "triton", "relu", "triton"),
        (None, "eager", "relu", "eager"),
        ("7.0", "auto", "relu", "fastest"),
        ("7.0", "triton", "relu", "triton"),
        ("7.0", "eager", "relu", "eager"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "use_impl"])
def test_impl_and_platform_decide_which_way_runs_on_a_gpu(
    by: str,
    hip: str | None,
    impl: Any,
    activation: str,
    taken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(op_module, "common_unsupported", lambda _: None)
    # as on a GPU, though these are CPU tensors
    monkeypatch.setattr("fastbb_kernels.op.is_plainly_eager", lambda *_: False)
    monkeypatch.setattr(op_module, "architecture", lambda _: 90)
    ran = {name: mock.Mock() for name in ("fastest", "triton", "eager")}
    monkeypatch.setattr(op_module, "_fastest", ran["fastest"])
    monkeypatch.setattr(OP, "kernel", ran["triton"])
    monkeypatch.setattr(op_module.Conv3x3BnAct, "eager", ran["eager"])
    x, weight, bias, *_ = arguments(False)
    if by == "argument":
        conv3x3_bn_act(x, weight, bias, activation=activation, impl=impl)
    else:
        with use_impl(impl):
            conv3x3_bn_act(x, weight, bias, activation=activation)
    assert [name for name, function in ran.items() if function.called] == [taken]


@pytest.mark.parametrize(
    ("arch", "impl", "stride", "launched"),
    [
        (90, "triton", 2, ["_conv3x3_bn_act_fwd_kernel"]),
        (90, "auto", 1, []),
        (90, "auto", 2, ["_bias_act_fwd_kernel"]),
        ("gfx942", "auto", 1, ["_bias_act_fwd_kernel"]),
    ],
    ids=str,
)
def test_pretended_gpus_launch_the_same_kernels_as_a_gpu(
    arch: Any, impl: Any, stride: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    x, weight, bias, *_ = (
        arg.to("meta") if isinstance(arg, Tensor) else arg for arg in arguments()
    )
    with record_launches(arch) as recording, torch.no_grad():
        y = conv3x3_bn_act(x, weight, bias, stride=stride, activation="relu", impl=impl)
    assert y.shape == (2, 6, -(-9 // stride), 8 // stride)
    assert [launch.name for launch in recording.launches] == launched
