"""layer_norm_residual: its kernel against torch in float64, its addresses, and what it refuses."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn

from fastbb_kernels.op import find_op
from fastbb_kernels.ops.layer_norm_residual import layer_norm_residual
from fastbb_kernels.testing import corners, interpret, trace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("layer_norm_residual")

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def upstream(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float = 1e-5
) -> Tensor:
    """As Swin V2 of timm adds a normalized branch."""
    norm = nn.LayerNorm(x.shape[-1], eps=eps, dtype=x.dtype)
    norm.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        return residual + norm(x)


def arguments(rows: tuple[int, ...], channels: int, dtype: torch.dtype) -> Arguments:
    return (
        (torch.randn(*rows, channels) * 2 + 1).to(dtype),
        torch.randn(channels).to(dtype),
        torch.randn(channels).to(dtype),
        torch.randn(*rows, channels).to(dtype),
    )


def run(args: Arguments, **options: Any) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = layer_norm_residual(*args, **options, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_layer_norm_residual_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments, **options: Any) -> None:
    x, weight, bias, residual = (tensor.double() for tensor in args)
    exact = upstream(x, weight, bias, residual, **options)
    assert_as_accurate_as_eager("y", run(args, **options), upstream(*args, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "channels"),
    [((2, 3, 7), 96), ((1,), 768), ((130,), 33), ((3,), 1), ((5, 1), 1536)],
    ids=["stage1", "one-row", "odd", "one-channel", "wide"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], channels: int, dtype: torch.dtype
) -> None:
    assert_right(arguments(rows, channels, dtype))


def test_a_large_mean_loses_no_digits() -> None:
    x, weight, bias, residual = arguments((9,), 96, torch.float32)
    assert_right((x + 30, weight, bias, residual))


def test_eps_is_added_to_the_variance() -> None:
    assert_right(arguments((4,), 40, torch.float32), eps=0.5)


def test_views_with_gaps_give_the_same_result() -> None:
    x, weight, bias, residual = arguments((4, 6), 48, torch.float32)
    views = (
        torch.full((4, 6, 97), torch.nan)[..., 1::2].copy_(x),
        torch.full((48, 3), torch.nan)[:, 1].copy_(weight),
        bias,
        torch.full((6, 4, 48), torch.nan).transpose(0, 1).copy_(residual),
    )
    with torch.no_grad(), interpret():
        got = layer_norm_residual(*views, impl="triton")
        want = layer_norm_residual(x, weight, bias, residual, impl="triton")
    assert torch.equal(got, want)


def test_empty_batches_give_empty_results() -> None:
    with torch.no_grad(), interpret():
        y = layer_norm_residual(*arguments((0, 7), 32, torch.bfloat16), impl="triton")
    assert y.shape == (0, 7, 32)


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    n_rows, channels = 2**25, 96
    vector = torch.empty(channels, device="meta")
    x, residual = (torch.empty(n_rows, channels, device="meta") for _ in range(2))
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        layer_norm_residual(x, vector, vector, residual, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.tensor(1.0), r"x must be \[\.\.\., C\], got one number"),
        (1, torch.zeros(31), r"norm_weight must be \[32\] for x \[4, 32\], got \[31\]"),
        (2, torch.zeros(1), r"norm_bias must be \[32\] for x \[4, 32\], got \[1\]"),
        (3, torch.zeros(4, 31), r"residual must be \[4, 32\], got \[4, 31\]"),
    ],
    ids=["number", "weight", "bias", "residual"],
)
def test_wrong_shapes_raise_an_error(position: int, tensor: Tensor, message: str) -> None:
    args: Any = list(arguments((4,), 32, torch.float32))
    args[position] = tensor
    with pytest.raises(ValueError, match=f"layer_norm_residual: {message}"):
        layer_norm_residual(*args)


def test_what_the_kernel_cannot_run_runs_eager() -> None:
    args = arguments((2,), 8200, torch.float32)
    with torch.no_grad(), interpret():
        with pytest.raises(NotImplementedError, match="at most 8192 channels, got 8200"):
            layer_norm_residual(*args, impl="triton")
        assert layer_norm_residual(*args).shape == (2, 8200)


def test_gradients_equal_upstreams() -> None:
    args = [tensor.double().requires_grad_() for tensor in arguments((3,), 32, torch.float32)]
    got = torch.autograd.grad(layer_norm_residual(*args).square().sum(), args)
    x, weight, bias, residual = args
    y = residual + nn.functional.layer_norm(x, (32,), weight, bias)
    for ours, theirs in zip(got, torch.autograd.grad(y.square().sum(), args)):
        assert torch.allclose(ours, theirs, rtol=1e-12)
