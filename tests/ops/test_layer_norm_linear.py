"""layer_norm_linear: its kernel against torch in float64, its addresses, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from timm.layers import QuickGELU
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, layer_norm_linear
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import ARCHITECTURES, corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels import layer_norm_linear as kernel_module
from fastbb_kernels.triton_kernels.config import GemmConfig
from fastbb_kernels.triton_kernels.layer_norm_linear import LayerNormLinearConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("layer_norm_linear")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2

# upstream's modules by the name of their activation
MODULES: dict[str | None, nn.Module] = {
    None: nn.Identity(),
    "gelu": nn.GELU(),
    "gelu_new": nn.GELU("tanh"),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "quick_gelu": QuickGELU(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def upstream(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return MODULES[activation](F.linear(y, weight, bias))


def exactly(args: Arguments, activation: str | None = None) -> Tensor:
    exact: Any = [None if t is None else t.double() for t in args]
    return upstream(*exact, activation=activation)


def arguments(
    rows: tuple[int, ...], features: int, out_features: int, dtype: torch.dtype, bias: bool = True
) -> Arguments:
    return (
        (torch.randn(*rows, features) * 2 + 1).to(dtype),
        torch.randn(features).to(dtype),
        torch.randn(features).to(dtype),
        (torch.randn(out_features, features) * features**-0.5).to(dtype),
        torch.randn(out_features).to(dtype) if bias else None,
    )


def run(args: Arguments, activation: str | None = None) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = layer_norm_linear(*args, eps=EPS, activation=activation, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args, activation=activation)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments, activation: str | None = None) -> None:
    eager, exact = upstream(*args, activation), exactly(args, activation)
    assert_as_accurate_as_eager("y", run(args, activation), eager, exact)


@pytest.fixture(params=["resident", "streamed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test for both paths of the kernel, with tiles so small that several are needed."""
    gemm = GemmConfig(32, 16, 32, num_warps=4, num_stages=1)
    resident = request.param == "resident"
    config = LayerNormLinearConfig(gemm, tiles_per_program=2 if resident else 1, resident=resident)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("rows", "features", "out_features"),
    [
        ((1, 5, 7), 96, 80),
        ((33,), 64, 16),
        ((1,), 40, 17),
        ((2, 32), 33, 33),
        ((3,), 1, 1),
    ],
    ids=["three-steps", "one-row-over", "one-row", "odd", "smallest"],
)
@pytest.mark.usefixtures("path")
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...],
    features: int,
    out_features: int,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    assert_right(arguments(rows, features, out_features, dtype), activation)


@pytest.mark.parametrize(
    ("features", "out_features", "activation", "dtype"),
    [
        (96, 288, None, torch.float32),
        (96, 384, "gelu", torch.float16),
        (384, 1152, None, torch.bfloat16),
        (768, 130, "gelu", torch.bfloat16),
    ],
    ids=["qkv-stage1-fp32", "fc1-stage1-fp16", "qkv-stage3-bf16", "wide-bf16"],
)
def test_kernel_is_as_accurate_as_eager_at_model_sizes(
    features: int, out_features: int, activation: str | None, dtype: torch.dtype
) -> None:
    assert_right(arguments((49,), features, out_features, dtype), activation)


@pytest.mark.usefixtures("path")
def test_without_bias_is_as_accurate_as_eager() -> None:
    assert_right(arguments((40,), 48, 24, torch.bfloat16, bias=False))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("features", [96, 100])
def test_large_mean_loses_no_precision(features: int) -> None:
    def assert_close(x: Tensor) -> None:
        args = x, *arguments((1,), features, 20, torch.float32)[1:]
        exact = exactly(args)
        assert max_error(run(args), exact) <= 2 * max_error(upstream(*args), exact)

    noise = torch.randn(8, features)
    assert_close(100 + 0.01 * noise)
    # each step of the statistics sees another mean
    assert_close(noise + 1e3 * torch.arange(features).div(32, rounding_mode="floor"))
    assert_close(noise.mul(1e3).index_fill(1, torch.tensor([0]), 1e6))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_equals_torch_at_extreme_values(activation: str) -> None:
    values = [*torch.linspace(-12, 12, 90).tolist(), 1e4, -1e4, 1e30, -1e30, math.inf, math.nan]
    bias = torch.tensor(values)
    zeros = torch.zeros(bias.numel(), 8)
    # a product of zeros leaves the bias alone
    y = run((torch.randn(2, 8), torch.ones(8), torch.ones(8), zeros, bias), activation)
    exact = MODULES[activation](bias.double()).expand(2, -1)
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_low_precision_equals_torch_at_extreme_values(dtype: torch.dtype) -> None:
    """Its approximation is off by 2.6e-5 at most, before the result is rounded."""
    values = [*torch.linspace(-12, 12, 900).tolist(), 1e4, -1e4, 1e30, -1e30, math.inf, math.nan]
    bias = torch.tensor(values).to(dtype)  # 1e30 is infinite in fp16
    ones, zeros = torch.ones(8, dtype=dtype), torch.zeros(bias.numel(), 8, dtype=dtype)
    y = run((torch.randn(2, 8).to(dtype), ones, ones.clone(), zeros, bias), "gelu")
    exact = F.gelu(bias.double()).expand(2, -1)
    rounding = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=2.6e-5, equal_nan=True)


def test_every_activation_is_tested() -> None:
    assert MODULES.keys() == {None, *ACTIVATIONS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("path")
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    copied = torch.randn(4, 9, 2, 77).to(dtype)[:, 3:8, 1, 5:45]  # rows at two strides
    columns = torch.randn(40, 70).to(dtype).t()[3:23]  # the stride of a column is 70
    sliced = torch.randn(20, 99).to(dtype)[:, 7:47]  # rows of 99
    weight = (torch.randn(40, 61) / 8).to(dtype).t()[5:35]
    norm_weight, norm_bias = torch.randn(80, 3).to(dtype)[1::2].unbind(1)[:2]
    bias = torch.randn(61).to(dtype)[1::2]
    for view in (copied, columns.view(4, 5, 40), sliced.view(4, 5, 40)):
        args = view, norm_weight, norm_bias, weight, bias
        with torch.no_grad(), trace() as t:
            y = layer_norm_linear(*args, eps=EPS, impl="triton")
        t.assert_written_once("y_ptr")
        assert_as_accurate_as_eager("y", y, upstream(*args), exactly(args))


@pytest.mark.parametrize("rows", [(0,), (0, 7, 7), (3, 0)], ids=str)
def test_empty_input_gives_an_empty_result(rows: tuple[int, ...]) -> None:
    with torch.no_grad(), interpret():
        y = layer_norm_linear(*arguments(rows, 24, 40, torch.float32), impl="triton")
    assert y.shape == (*rows, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits_stay_in_bounds(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    # the last rows of x and y; and the last columns of x, whose stride is the number of rows
    for x in (empty(2**26 + 3, 96), empty(96, 2**25 + 3).t()):
        args = x, empty(96), empty(96), empty(200, 96), empty(200)
        with torch.no_grad(), trace(programs=corners, data=False) as t:
            layer_norm_linear(*args, impl="triton")
        assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, 75, "gfx1100"])
def test_launches_fill_a_gpu(arch: Architecture, dtype: torch.dtype) -> None:
    for n_rows, features in ((49, 768), (196, 384), (784, 192), (3136, 96), (200704, 96)):
        args = (n_rows, features, 4 * features)
        gemm, tiles_per_program, resident = kernel_module.launch_config(*args, dtype, False, arch)
        tiles = math.ceil(n_rows / gemm.block_m) * math.ceil(4 * features / gemm.block_n)
        assert tiles / tiles_per_program >= 48, args
        short = features <= 256 and dtype != torch.float32 and arch in ARCHITECTURES
        assert resident == (short or tiles_per_program > 1)
        if n_rows == 200704 and arch in ARCHITECTURES:
            # every row is normalized once
            assert resident == (dtype != torch.float32)


def test_batch_sizes_share_a_binary() -> None:
    def launched(batch: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        tensors = [
            torch.empty(shape, device="meta", dtype=dtype)
            for shape in ((batch, 56, 56, 96), (96,), (96,), (288, 96), (288,))
        ]
        with torch.no_grad(), record_launches(90) as recording:
            layer_norm_linear(*tensors, impl="triton")
        return recording.launches[0].specialization

    assert launched(64) == launched(57) == launched(8)
    assert launched(64) != launched(64, torch.float16)


def test_each_row_is_read_twice_for_any_number_of_tiles() -> None:
    args = arguments((60,), 64, 300, torch.bfloat16)
    with torch.no_grad(), trace() as t:
        layer_norm_linear(*args, impl="triton")
    x = t.launches[0].tensors["x_ptr"]
    assert x.load.requested_bytes == 2 * x.load.unique_bytes


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("op", [layer_norm_linear, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any, activation: str | None) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor | None) -> Tensor:
            return op(*args, eps=EPS, activation=activation)

    small, large = (arguments((batch, 3), 16, 24, torch.float32) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, None, None, None, None),)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    assert torch.equal(compiled(*small), upstream(*small, activation))
    assert torch.equal(exported(*large), upstream(*large, activation))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_custom_op_passes_opcheck(bias: bool) -> None:
    args = arguments((2, 3), 16, 24, torch.float32, bias)
    torch.library.opcheck(CUSTOM_OP, (*args, EPS, "gelu" if bias else None))


def test_gradients_equal_upstream() -> None:
    args = [a.requires_grad_() for a in arguments((3,), 8, 5, torch.float32) if a is not None]
    y = layer_norm_linear(*args, eps=EPS, activation="gelu")
    got = torch.autograd.grad(y.square().sum(), args)
    want = torch.autograd.grad(upstream(*args, activation="gelu").square().sum(), args)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


SHAPES = [(2, 8), (8,), (8,), (6, 8), (6,)]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (), r"weight must be \[C_out, C\] for x \[..., C\], got .* x \[\]"),
        (0, (2, 9), r"weight must be \[C_out, C\] .* got weight \[6, 8\] and x \[2, 9\]"),
        (3, (6, 8, 1), r"weight must be \[C_out, C\] .* got weight \[6, 8, 1\]"),
        (1, (6,), r"norm_weight must be \[8\], got \[6\]"),
        (2, (8, 1), r"norm_bias must be \[8\], got \[8, 1\]"),
        (4, (8,), r"bias must be \[6\], got \[8\]"),
    ],
    ids=["no-rows", "columns", "weight", "norm_weight", "norm_bias", "bias"],
)
def test_wrong_shapes_raise_value_error(index: int, shape: tuple[int, ...], message: str) -> None:
    args: list[Any] = [torch.randn(shape) for shape in SHAPES]
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=f"layer_norm_linear: {message}"):
        layer_norm_linear(*args)


def test_unknown_activation_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"layer_norm_linear: activation must .* got 'mish'"):
        layer_norm_linear(*arguments((2,), 8, 6, torch.float32), activation="mish")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got norm_weight in torch.float16"),
        (2, torch.Tensor.half, "all tensors in torch.float32, got norm_bias in torch.float16"),
        (3, torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        (4, lambda b: b.to("meta"), "all tensors on cpu, got bias on meta"),
        (4, lambda b: b.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "norm_weight-dtype", "norm_bias-dtype", "weight-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args: list[Any] = list(arguments((2,), 8, 6, torch.float32))
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        layer_norm_linear(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="layer_norm_linear: .* CUDA or ROCm .* got cpu"):
        layer_norm_linear(*arguments((2,), 8, 6, torch.float32), impl="triton")
