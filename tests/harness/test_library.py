"""Ops computed by a library: when it is chosen, and that it computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from broken_kernels import self_check
from tolerance import assert_as_accurate_as_eager
from torch import Tensor

from fastbb_kernels import KernelWarning, linear_residual
from fastbb_kernels.launching import forced, noting
from fastbb_kernels.library import KERNEL, LIBRARY, Way, usual_way
from fastbb_kernels.op import find_op, in_float64
from fastbb_kernels.self_check import use
from fastbb_kernels.testing import interpret, record_launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chosen(op: str, name: str = LIBRARY) -> Any:
    """Makes an op take a way."""
    return forced({f"{op}_way": Way(name)})


def linear(dtype: torch.dtype, scale: bool = False) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 5, 24).to(dtype),
        "weight": torch.randn(40, 24).to(dtype),
        "bias": torch.randn(40).to(dtype),
        "residual": torch.randn(2, 5, 40).to(dtype),
        "scale": torch.randn(40).to(dtype) if scale else None,
    }


def norm_linear(dtype: torch.dtype, features: int = 24) -> dict[str, Any]:
    return {
        "x": torch.randn(7, features).to(dtype),
        "norm_weight": torch.randn(features).to(dtype),
        "norm_bias": torch.randn(features).to(dtype),
        "weight": torch.randn(40, features).to(dtype),
        "bias": torch.randn(40).to(dtype),
        "activation": "gelu",
    }


def conv(
    dtype: torch.dtype, stride: int = 1, residual: bool = False, activation: str | None = "relu"
) -> dict[str, Any]:
    side = -(-9 // stride)
    return {
        "x": torch.randn(2, 16, 9, 9).to(dtype),
        "weight": torch.randn(24, 16, 1, 1).to(dtype),
        "bias": torch.randn(24).to(dtype),
        "stride": stride,
        "residual": torch.randn(2, 24, side, side).to(dtype) if residual else None,
        "activation": activation,
    }


CALLS: dict[str, tuple[str, Any]] = {
    "residual": ("linear_residual", linear),
    "scaled": ("linear_residual", lambda dtype: linear(dtype, scale=True)),
    "norm": ("layer_norm_linear", norm_linear),
    "conv-relu": ("conv1x1_bn_act", conv),
    "conv": ("conv1x1_bn_act", lambda dtype: conv(dtype, activation=None)),
    "conv-silu": ("conv1x1_bn_act", lambda dtype: conv(dtype, activation="silu")),
    "conv-strided": ("conv1x1_bn_act", lambda dtype: conv(dtype, stride=2)),
    "conv-residual": ("conv1x1_bn_act", lambda dtype: conv(dtype, residual=True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_library_is_as_accurate_as_eager_and_has_the_strides_of_the_kernel(
    name: str, dtype: torch.dtype
) -> None:
    op, make = CALLS[name]
    arguments = make(dtype)
    call: Any = find_op(op).bind(**arguments)
    got = call.library()
    exact = find_op(op).eager(**in_float64(arguments))
    assert_as_accurate_as_eager("y", got, find_op(op).eager(**arguments), exact)
    assert got.stride() == call.empty_result().stride()


def ran(op: str, arguments: dict[str, Any], impl: Any = None) -> list[str]:
    """What ran on a pretended GPU."""
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with torch.no_grad(), record_launches(90) as recording, noting() as launched:
        find_op(op).call(**meta, impl=impl)
    kernels = [launch.name for launch in recording.launches]
    return [*kernels, *(name for name in launched.binaries if name == LIBRARY)]


@pytest.mark.parametrize("op", ["linear_residual", "layer_norm_linear", "conv1x1_bn_act"])
def test_kernels_run_unless_the_library_is_chosen(op: str) -> None:
    arguments = dict(CALLS.values())[op](torch.bfloat16)
    kernel = [f"_{op}_fwd_kernel"]
    assert ran(op, arguments) == kernel
    with chosen(op, KERNEL):
        assert ran(op, arguments) == kernel
    with chosen(op):
        others = ["_bias_act_fwd_kernel"] if op == "conv1x1_bn_act" else []
        assert ran(op, arguments) == [*others, LIBRARY]
        assert ran(op, arguments, impl="triton") == kernel


def test_measured_choices_have_the_sizes_of_the_product() -> None:
    sizes = find_op("linear_residual").bind(**linear(torch.bfloat16)).library_sizes()  # pyright: ignore[reportAttributeAccessIssue] - it has one
    assert sizes == (10, 24, 40, 1, True, None, torch.bfloat16)
    assert usual_way(*sizes, arch=90) == Way(KERNEL)
    sizes = find_op("conv1x1_bn_act").bind(**conv(torch.half, stride=2)).library_sizes()  # pyright: ignore[reportAttributeAccessIssue] - it has one
    assert sizes == (50, 16, 24, 2, False, "relu", torch.half)


def test_interpreter_and_tracers_see_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = linear(torch.float32)
    with chosen("linear_residual"), torch.no_grad(), interpret(), noting() as launched:
        linear_residual(**arguments)
    assert LIBRARY not in launched.binaries
    library, call = find_op("linear_residual").library, find_op("linear_residual").bind(**arguments)
    assert library is not None
    of_call: Any = call
    with chosen("linear_residual"), record_launches(90):
        assert library.is_faster(of_call)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not library.is_faster(of_call)
        monkeypatch.undo()
        monkeypatch.setattr("fastbb_kernels.library.get_proxy_mode", lambda: True)
        assert not library.is_faster(of_call)


@pytest.mark.parametrize("factor", [1.0, 1.1], ids=["right", "wrong"])
def test_the_first_call_of_a_library_is_checked(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = find_op("layer_norm_linear")
    call: Any = op.bind(**norm_linear(torch.bfloat16))
    library = op.library
    assert library is not None
    monkeypatch.setattr(library._launch, "run", lambda *args: factor * library.run(*args))
    monkeypatch.setattr("fastbb_kernels.library.architecture", lambda _: 90)
    with chosen(op.name), use(self_check(tmp_path)), torch.no_grad():
        if factor == 1:
            assert library.is_faster(call)
        else:
            with pytest.warns(KernelWarning, match="by a library"):
                assert not library.is_faster(call)
