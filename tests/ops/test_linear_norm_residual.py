"""linear_norm_residual: its kernel against torch in float64, its parts, and what it refuses."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn

from fastbb_kernels import use_impl
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.linear_norm_residual import linear_norm_residual
from fastbb_kernels.testing import ARCHITECTURES, corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels import linear_norm_residual as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("linear_norm_residual")

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def upstream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """As the end of a half of timm's SwinTransformerV2Block."""
    norm = nn.LayerNorm(weight.shape[0], eps=eps, dtype=x.dtype)
    norm.load_state_dict({"weight": norm_weight, "bias": norm_bias})
    with torch.no_grad():
        return residual + norm(nn.functional.linear(x, weight, bias))


def arguments(
    rows: tuple[int, ...],
    features: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Arguments:
    tensors = (
        torch.randn(*rows, features),
        torch.randn(channels, features) * features**-0.5,
        torch.randn(channels),
        torch.randn(channels),
        torch.randn(channels),
        torch.randn(*rows, channels),
    )
    x, weight, linear_bias, *others = (tensor.to(dtype) for tensor in tensors)
    return x, weight, linear_bias if bias else None, *others  # type: ignore[return-value]


def run(args: Arguments, **options: Any) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = linear_norm_residual(*args, **options, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_linear_norm_residual_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments, **options: Any) -> None:
    exact: Any = [None if tensor is None else tensor.double() for tensor in args]
    truth = upstream(*exact, **options)
    assert_as_accurate_as_eager("y", run(args, **options), upstream(*args, **options), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "channels"),
    [((2, 5, 7), 96, 96), ((65,), 128, 32), ((1,), 32, 384), ((130,), 64, 192), ((3,), 160, 32)],
    ids=["proj", "one-row-over", "one-row", "rows-over", "steps-of-32"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], features: int, channels: int, dtype: torch.dtype
) -> None:
    assert_right(arguments(rows, features, channels, dtype))


def test_no_bias_and_another_eps_are_as_accurate_as_eager() -> None:
    assert_right(arguments((7,), 64, 96, bias=False), eps=0.5)


def test_a_large_mean_of_the_product_loses_no_digits() -> None:
    x, weight, bias, *others = arguments((9,), 64, 96)
    assert bias is not None
    assert_right((x, weight, bias + 30, *others))  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("channels", [96, 384])
def test_launch_configs_of_every_architecture_are_as_accurate_as_eager(
    channels: int, arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kernel_module.launch_config(10**6, 64, channels, arch)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    assert_right(arguments((config.block_m + 3,), 64, channels, torch.bfloat16))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_rows_get_small_tiles(arch: Architecture) -> None:
    few, many = (kernel_module.launch_config(n, 96, 96, arch) for n in (4096, 64 * 4096))
    assert few.block_m < many.block_m


def test_views_with_gaps_give_the_same_result() -> None:
    args = arguments((4, 6), 64, 32)
    x, weight, bias, norm_weight, norm_bias, residual = args
    views = (
        torch.full((4, 6, 129), torch.nan)[..., 1::2].copy_(x),
        torch.full((64, 32), torch.nan).t().copy_(weight),
        bias,
        torch.full((32, 3), torch.nan)[:, 1].copy_(norm_weight),
        norm_bias,
        torch.full((6, 4, 32), torch.nan).transpose(0, 1).copy_(residual),
    )
    with torch.no_grad(), interpret():
        got = linear_norm_residual(*views, impl="triton")
        assert torch.equal(got, linear_norm_residual(*args, impl="triton"))


def test_empty_batches_give_empty_results() -> None:
    with torch.no_grad(), interpret():
        y = linear_norm_residual(*arguments((0, 7), 32, 64, torch.bfloat16), impl="triton")
    assert y.shape == (0, 7, 64)


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    rows, features, channels = 2**23, 384, 96
    vector = torch.empty(channels, device="meta")
    x, residual = (torch.empty(rows, n, device="meta") for n in (features, channels))
    weight = torch.empty(channels, features, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        linear_norm_residual(x, weight, vector, vector, vector, residual, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


def test_parts_run_where_the_kernel_does_not() -> None:
    args = arguments((5,), 40, 48, torch.bfloat16)  # no multiples of 32
    with torch.no_grad(), trace() as t:
        with pytest.raises(NotImplementedError, match="multiples of 32 channels, got 40 and 48"):
            linear_norm_residual(*args, impl="triton")
        with use_impl("triton"):
            y = linear_norm_residual(*args)
    assert [launch.kernel for launch in t.launches] == ["_layer_norm_residual_fwd_kernel"]
    exact: Any = [tensor.double() for tensor in args if tensor is not None]
    assert_as_accurate_as_eager("y", y, upstream(*args), upstream(*exact))


@pytest.mark.parametrize(
    ("rows", "features", "channels", "fused"),
    [(4096, 96, 96, True), (4096, 768, 192, True), (4096, 384, 384, True)]
    + [(4096, 1536, 384, False), (2047, 96, 96, False), (4096, 768, 768, False)],
)
def test_auto_takes_the_kernel_where_it_is_expected_to_pay(
    rows: int, features: int, channels: int, fused: bool
) -> None:
    tensors = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((rows, features), (channels, features), *[(channels,)] * 3, (rows, channels))
    ]
    with torch.no_grad(), record_launches(90) as record:
        linear_norm_residual(*tensors)
    op = "linear_norm_residual" if fused else "layer_norm_residual"
    assert [launch.name for launch in record.launches] == [f"_{op}_fwd_kernel"]


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (4, 63), r"weight must be \[C_out, C\] .* x \[4, 63\]"),
        (1, (32, 64, 1), r"weight must be \[C_out, C\] for x \[\.\.\., C\]"),
        (2, (31,), r"bias must be \[32\], got \[31\]"),
        (3, (1,), r"norm_weight must be \[32\], got \[1\]"),
        (4, (33,), r"norm_bias must be \[32\], got \[33\]"),
        (5, (4, 64), r"residual must be \[4, 32\], got \[4, 64\]"),
    ],
    ids=["features", "weight", "bias", "norm-weight", "norm-bias", "residual"],
)
def test_wrong_shapes_raise_an_error(position: int, shape: tuple[int, ...], message: str) -> None:
    args: Any = list(arguments((4,), 64, 32))
    args[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"linear_norm_residual: {message}"):
        linear_norm_residual(*args)


def test_gradients_equal_upstreams() -> None:
    args: Any = [
        tensor.double().requires_grad_() for tensor in arguments((3,), 64, 32) if tensor is not None
    ]
    got = torch.autograd.grad(linear_norm_residual(*args).square().sum(), args)
    x, weight, bias, norm_weight, norm_bias, residual = args
    y = nn.functional.linear(x, weight, bias)
    y = residual + nn.functional.layer_norm(y, (32,), norm_weight, norm_bias)
    for ours, theirs in zip(got, torch.autograd.grad(y.square().sum(), args)):
        assert torch.allclose(ours, theirs, rtol=1e-12)
