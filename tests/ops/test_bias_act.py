"""bias_act: its kernel against torch in float64, its addresses, and what it refuses."""

from typing import Any

import pytest
import torch
from conv_reference import (
    BATCH,
    DTYPES,
    activated,
    compiled_and_exported,
    image,
    meta_image,
    run_traced,
)
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS, bias_act
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import binary_facts, corners, fake_gpu, interpret, trace

OP = find_op("bias_act")
CUSTOM_OP = OP.custom_op
SHAPES = {
    "whole": (2, 64, 8, 8),
    "rows and columns left over": (3, 200, 7, 5),
    "few channels": (2, 3, 9, 4),
    "odd": (1, 33, 5, 3),
    "one element": (1, 1, 1, 1),
    "many rows": (2, 16, 23, 29),
}


def upstream(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    y = x + bias.view(1, -1, 1, 1)
    y = y if residual is None else y + residual
    return activated(y, activation)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, other = (image(*shape, dtype=dtype) for _ in range(2))
    return x, torch.randn(shape[1]).to(dtype), other if residual else None


def assert_right(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None) -> None:
    y = run_traced(OP, x, bias, residual=residual, activation=activation)
    assert y.dtype == x.dtype
    wide: Any = [None if tensor is None else tensor.double() for tensor in (x, bias, residual)]
    exact = upstream(*wide, activation=activation)
    assert_as_accurate_as_eager("y", y, upstream(x, bias, residual, activation), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_as_accurate_as_eager(
    shape: tuple[int, ...], residual: bool, dtype: torch.dtype
) -> None:
    assert_right(*arguments(shape, dtype, residual), "relu")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
def test_every_activation_is_as_accurate_as_eager(activation: str | None) -> None:
    assert_right(*arguments((2, 24, 3, 5), torch.float32, True), activation)


def test_inputs_in_other_layouts_equal_upstream() -> None:
    x, bias, residual = (torch.randn(shape) for shape in ((2, 8, 6, 7), (16,), (2, 8, 12, 7)))
    bias, residual = bias[::2], residual[:, :, ::2]
    with torch.no_grad(), interpret():
        y = bias_act(x, bias, residual=residual, activation="relu", impl="triton")
    torch.testing.assert_close(y, upstream(x, bias, residual, "relu"))


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 0, 3, 3)], ids=str)
def test_empty_input_gives_an_empty_result(shape: tuple[int, ...]) -> None:
    x, bias, _ = arguments(shape, torch.bfloat16, False)
    with torch.no_grad(), interpret():
        assert bias_act(x, bias, impl="triton").shape == shape


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    shape = (8, 64, 2100, 2100)
    x = meta_image(*shape)
    assert x.numel() > 2**31
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        bias_act(x, torch.empty(64, device="meta"), residual=x, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


def test_bf16_maps_are_loaded_with_wide_accesses() -> None:
    x = meta_image(8, 64, 9, 9, dtype=torch.bfloat16)
    with torch.no_grad(), fake_gpu(90) as gpu:
        bias_act(x, x[0, :, 0, 0], residual=x, activation="relu", impl="triton")
    facts = binary_facts(gpu.kernels[0])
    assert facts.spills == 0 and facts.narrow_accesses == 0


@pytest.mark.parametrize("op", [bias_act, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return op(x, bias, residual=residual, activation="relu")

    small: Any = arguments((2, 6, 3, 5), torch.float32, True)
    large: Any = arguments((7, 6, 3, 5), torch.float32, True)
    compiled, exported = compiled_and_exported(Model(), small, (BATCH, None, BATCH))
    assert torch.equal(compiled(*small), upstream(*small, activation="relu"))
    assert torch.equal(exported(*large), upstream(*large, activation="relu"))


@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
def test_custom_op_passes_opcheck(residual: bool) -> None:
    for shape in ((2, 6, 3, 5), (0, 6, 3, 5)):
        torch.library.opcheck(CUSTOM_OP, (*arguments(shape, torch.float32, residual), "relu"))


def test_gradients_equal_upstream() -> None:
    args = arguments((2, 6, 3, 5), torch.float32, True)
    tensors = [tensor.requires_grad_() for tensor in args if tensor is not None]
    x, bias, residual = tensors
    got = bias_act(x, bias, residual=residual, activation="silu").square().sum()
    want = upstream(x, bias, residual, "silu").square().sum()
    for ours, theirs in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 8), (3,)], r"x must be \[B, C, H, W\] floating point, got \[2, 3, 8\]"),
        ([(1, 2, 3, 8), (3,)], r"bias must be \[2\], got \[3\]"),
        ([(1, 2, 3, 8), (2,), (1, 2, 3, 7)], r"residual must be \[1, 2, 3, 8\], got .*7\]"),
    ],
    ids=["x", "bias", "residual"],
)
def test_wrong_shapes_raise_value_error(shapes: list[tuple[int, ...]], message: str) -> None:
    x, bias, *residual = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"bias_act: {message}"):
        bias_act(x, bias, residual=residual[0] if residual else None)


def test_wrong_dtypes_raise_value_error() -> None:
    x, bias, _ = arguments((2, 6, 3, 5), torch.float32, False)
    with pytest.raises(ValueError, match="bias must be torch.float32 as x, got torch.float16"):
        bias_act(x, bias.half())
    with pytest.raises(ValueError, match="residual must be torch.float32 as x, got torch.bfl"):
        bias_act(x, bias, residual=x.bfloat16())
    with pytest.raises(ValueError, match="x must be .* floating point, got .* torch.int32"):
        bias_act(x.int(), bias.int())


def test_unknown_activation_and_impl_triton_on_a_cpu_are_refused() -> None:
    x, bias, _ = arguments((2, 6, 3, 5), torch.float32, False)
    with pytest.raises(ValueError, match="bias_act: activation must be None or one of"):
        bias_act(x, bias, activation="tanh")
    with pytest.raises(NotImplementedError, match="bias_act: .* CUDA or ROCm .* got cpu"):
        bias_act(x, bias, impl="triton")
