"""conv3x3_bn_act on a GPU that is not there: what runs, and what cuDNN is asked for."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, channels_last, nn
from torch.nn import functional as F

from fastbb_kernels import conv3x3_bn_act, use_impl
from fastbb_kernels._dispatch import pretend
from fastbb_kernels.ops import conv3x3_bn_act as op_module
from fastbb_kernels.ops.conv3x3_bn_act import conv3x3_bn_act_eager

CUSTOM_OP = torch.ops.fastbb.cudnn_conv3x3_bn_relu.default


def arguments(residual: bool, batch: int = 2) -> tuple[Any, ...]:
    """The arguments of the custom op, none of them channels-last."""
    maps = torch.randn(batch, 5, 9, 8), torch.randn(batch, 6, 5, 4) if residual else None
    return maps[0], torch.randn(6, 5, 3, 3), torch.randn(12)[::2], 2, 3, maps[1]


def expected(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
) -> Tensor:
    return conv3x3_bn_act_eager(
        x, weight, bias, stride=stride, dilation=dilation, residual=residual, activation="relu"
    )


class CudnnStandIn:
    """Computes what cuDNN's fused ops do, on the CPU, and keeps their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def relu(self, x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        self.calls.append((x, weight, bias, *geometry))
        return F.conv2d(x, weight, bias, *geometry).relu()

    def add_relu(
        self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        self.calls.append((x, weight, z, alpha, bias, *geometry))
        return (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu()


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> CudnnStandIn:
    stand_in = CudnnStandIn()
    aten = torch.ops.aten
    # on in these tests, see conftest.py
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(aten, "cudnn_convolution_relu", stand_in.relu)
    monkeypatch.setattr(aten, "cudnn_convolution_add_relu", stand_in.add_relu)
    return stand_in


both = pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])


@both
def test_cudnn_is_asked_for_the_same(cudnn: CudnnStandIn, residual: bool) -> None:
    args = arguments(residual)
    y = op_module._call_cudnn(*args)
    torch.testing.assert_close(y, expected(*args))
    assert y.is_contiguous(memory_format=channels_last)
    ((x, weight, *rest),) = cudnn.calls
    assert all(tensor.is_contiguous(memory_format=channels_last) for tensor in (x, weight))
    if residual:
        z, alpha, *rest = rest
        assert z is args[-1] and alpha == 1.0
    bias, *geometry = rest
    assert bias.is_contiguous()
    assert geometry == [[2, 2], [3, 3], [3, 3], 1]


@both
@pytest.mark.parametrize("flag", ["enabled", "deterministic"])
def test_flags_that_the_fused_ops_ignore(
    cudnn: CudnnStandIn, flag: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, flag, flag == "deterministic")
    args = arguments(residual)
    assert torch.equal(op_module._call_cudnn(*args), expected(*args))
    assert not cudnn.calls


def test_failures_of_cudnn_are_not_hidden(
    cudnn: CudnnStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = mock.Mock(side_effect=RuntimeError("Unable to find an engine"))
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", failing)
    with pytest.raises(RuntimeError, match="engine"):
        op_module._call_cudnn(*arguments(False))


def test_the_fused_ops_have_the_arguments_of_the_stand_in() -> None:
    names = {
        name: [
            argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments
        ]
        for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
    }
    geometry = ["stride", "padding", "dilation", "groups"]
    assert names == {
        "cudnn_convolution_relu": ["self", "weight", "bias", *geometry],
        "cudnn_convolution_add_relu": ["self", "weight", "z", "alpha", "bias", *geometry],
    }


@both
def test_custom_op_is_registered_rightly(residual: bool) -> None:
    for batch in (2, 0):
        torch.library.opcheck(CUSTOM_OP, arguments(residual, batch))


@both
def test_compiles_and_exports(residual: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
            return CUSTOM_OP(x, *parameters, residual)

    _, *parameters, _ = arguments(residual)
    small, large = ((args[0], args[-1]) for args in (arguments(residual), arguments(residual, 7)))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch} if residual else None)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    for model, (x, other) in ((compiled, small), (exported, large)):
        args: Any = x, *parameters, other
        assert torch.equal(model(x, other), expected(*args))


@pytest.mark.parametrize(
    ("hip", "impl", "activation", "taken"),
    [
        (None, "auto", "relu", "_cudnn_conv3x3_bn_relu"),
        (None, "auto", "silu", "conv3x3_bn_act_eager"),
        (None, "triton", "relu", "_conv3x3_bn_act"),
        (None, "eager", "relu", "conv3x3_bn_act_eager"),
        ("7.0", "auto", "relu", "conv3x3_bn_act_eager"),
        ("7.0", "auto", "silu", "conv3x3_bn_act_eager"),
        ("7.0", "triton", "relu", "_conv3x3_bn_act"),
        ("7.0", "eager", "relu", "conv3x3_bn_act_eager"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "use_impl"])
def test_what_runs_on_a_gpu(
    by: str,
    hip: str | None,
    impl: Any,
    activation: str,
    taken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(op_module, "common_unsupported", lambda *_, **__: None)
    names = ("_cudnn_conv3x3_bn_relu", "_conv3x3_bn_act", "conv3x3_bn_act_eager", "_launch")
    ran = {name: mock.Mock() for name in names}
    for name, function in ran.items():
        monkeypatch.setattr(op_module, name, function)
    x, weight, bias, *_ = arguments(False)
    if by == "argument":
        conv3x3_bn_act(x, weight, bias, activation=activation, impl=impl)
    else:
        with use_impl(impl):
            conv3x3_bn_act(x, weight, bias, activation=activation)
    assert [name for name, function in ran.items() if function.called] == [taken]


def test_pretended_gpus_launch_the_kernel() -> None:
    with mock.patch.object(op_module, "_launch") as launch, pretend(90), torch.no_grad():
        conv3x3_bn_act(*arguments(False)[:3], activation="relu")
    launch.assert_called_once()
