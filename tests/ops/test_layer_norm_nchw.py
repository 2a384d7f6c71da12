"""layer_norm_nchw: its kernel against torch in float64, its addresses, and what it refuses."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import layer_norm_nchw
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import binary_facts, corners, fake_gpu, interpret, trace
from fastbb_kernels.triton_kernels.layer_norm_nchw import launch_config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("layer_norm_nchw")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2


def upstream(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)


def arguments(
    size: tuple[int, int, int], channels: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        (torch.randn(*size, channels) * scale + 0.5).to(dtype),
        (torch.randn(channels) * 0.2 + 1).to(dtype),
        torch.randn(channels).to(dtype),
    )


def run(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = layer_norm_nchw(x, weight, bias, eps=eps, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(x, weight, bias)
    return y


def assert_right(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> None:
    got, eager = run(x, weight, bias, eps), upstream(x, weight, bias, eps)
    assert got.stride() == eager.stride()
    exact = upstream(x.double(), weight.double(), bias.double(), eps)
    assert_as_accurate_as_eager("y", got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "channels"),
    [
        ((1, 7, 7), 768),
        ((2, 5, 9), 96),
        ((1, 1, 1), 192),
        ((3, 5, 7), 20),
        ((1, 3, 3), 33),
        ((2, 2, 1), 1),
        ((1, 1, 2), 8192),
    ],
    ids=["stage4", "rows-left-over", "one-row", "few-channels", "odd", "one-channel", "widest"],
)
def test_kernel_is_as_accurate_as_eager(
    size: tuple[int, int, int], channels: int, dtype: torch.dtype
) -> None:
    assert_right(*arguments(size, channels, dtype))


def test_many_rows_in_a_program_are_as_accurate_as_eager() -> None:
    assert_right(*arguments((2, 61, 37), 16, torch.bfloat16))


def test_large_mean_loses_no_precision() -> None:
    x, weight, bias = arguments((1, 4, 4), 96, torch.float32, scale=1e-2)
    x = x + 100
    exact = upstream(x.double(), weight.double(), bias.double(), 1e-12)
    # the mean rounds to 4e-6, which is 4e-4 of the deviation
    assert (run(x, weight, bias, 1e-12) - exact).abs().max() < 5e-3


def test_a_constant_row_gives_the_bias() -> None:
    x, weight, bias = arguments((1, 2, 3), 100, torch.float32)
    y = run(torch.full_like(x, 3.0), weight, bias)
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    _, weight, bias = arguments((1, 1, 1), 24, dtype)
    wide = torch.randn(2, 9, 11, 77).to(dtype)
    views = {
        "channels of a wider map": wide[..., 5:29],
        "a crop, whose rows are copied": wide[:, 2:5, 3:7, 5:29],
        "every second column": wide[:, :, ::2, 5:29],
        "a map in NCHW": torch.randn(1, 24, 5, 7).to(dtype).permute(0, 2, 3, 1),
    }
    weight, bias = torch.stack([weight, bias], dim=1).unbind(1)
    for name, x in views.items():
        with torch.no_grad(), trace() as t:
            y = layer_norm_nchw(x, weight, bias, eps=EPS, impl="triton")
        t.assert_written_once("y_ptr")
        eager = upstream(x, weight, bias)
        assert y.stride() == eager.stride(), name
        exact = upstream(x.double(), weight.double(), bias.double())
        assert_as_accurate_as_eager(name, y, eager, exact)


@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 3)], ids=str)
def test_empty_input_gives_an_empty_result(size: tuple[int, int, int]) -> None:
    with torch.no_grad(), interpret():
        y = layer_norm_nchw(*arguments(size, 24, torch.bfloat16), impl="triton")
    batch, height, width = size
    assert y.shape == (batch, 24, height, width)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_offsets_beyond_32_bits_stay_in_bounds(layout: str) -> None:
    side, channels = 6000, 96
    weight = torch.empty(channels, device="meta")
    if layout == "nhwc":
        x = torch.empty(1, side, side, channels, device="meta")
    else:
        x = torch.empty(1, channels, side, side, device="meta").permute(0, 2, 3, 1)
    assert x.numel() > 2**31
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        layer_norm_nchw(x, weight, weight, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


def test_tiles_hold_whole_rows() -> None:
    for channels in (1, 24, 96, 192, 768, 1024, 8192):
        for n_rows in (1, 49, 3136, 200704):
            config = launch_config(n_rows, channels, 90)
            assert channels <= config.block_n < 2 * channels
            assert config.block_m * config.block_n <= max(4096, config.block_n)


def test_loads_are_wide_if_channels_are_a_multiple_of_eight() -> None:
    args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in [(8, 9, 9, 24), (24,)]]
    with torch.no_grad(), fake_gpu(90) as gpu:
        layer_norm_nchw(args[0], args[1], args[1], impl="triton")
    facts = binary_facts(gpu.kernels[0])
    # x, y, weight and bias are wide; another layout may share out the two vectors
    assert facts.medium_accesses + facts.narrow_accesses <= 2 <= facts.wide_accesses


@pytest.mark.parametrize("op", [layer_norm_nchw, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return op(x, weight, bias, eps=EPS)

    small, large = (arguments((batch, 3, 5), 12, torch.float32) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Model(), small, dynamic_shapes=({0: batch}, None, None)).module()
    for y, want in ((compiled(*small), upstream(*small)), (exported(*large), upstream(*large))):
        assert torch.equal(y, want)
        assert y.stride() == want.stride()


@pytest.mark.parametrize("layout", ["contiguous", "nchw", "crop"])
def test_custom_op_passes_opcheck(layout: str) -> None:
    x, weight, bias = arguments((2, 5, 6), 12, torch.float32)
    if layout == "nchw":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "crop":
        x = x[:, 1:4, 1:4, 2:]
        weight, bias = weight[2:], bias[2:]
    torch.library.opcheck(CUSTOM_OP, (x, weight, bias, EPS))


def test_gradients_equal_upstream() -> None:
    args = arguments((2, 3, 3), 8, torch.float32)
    for tensor in args:
        tensor.requires_grad_()
    got = torch.autograd.grad(layer_norm_nchw(*args, eps=EPS).square().sum(), args)
    want = torch.autograd.grad(upstream(*args).square().sum(), args)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 8), (8,), (8,)], r"x must be \[B, H, W, C\], got \[2, 3, 8\]"),
        ([(1, 2, 3, 8), (7,), (8,)], r"weight must be \[8\] for x \[1, 2, 3, 8\], got \[7\]"),
        ([(1, 2, 3, 8), (8,), (1, 8)], r"bias must be \[8\] .* got \[1, 8\]"),
    ],
    ids=["x", "weight", "bias"],
)
def test_wrong_shapes_raise_value_error(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=f"layer_norm_nchw: {message}"):
        layer_norm_nchw(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        (2, lambda bias: bias.to("meta"), "all tensors on cpu, got bias on meta"),
        (2, lambda bias: bias.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args = list(arguments((1, 2, 2), 8, torch.float32))
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        layer_norm_nchw(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors_and_too_many_channels() -> None:
    with pytest.raises(NotImplementedError, match="layer_norm_nchw: .* CUDA or ROCm .* got cpu"):
        layer_norm_nchw(*arguments((1, 2, 2), 8, torch.float32), impl="triton")
    wide = arguments((1, 1, 1), 8193, torch.float32)
    with interpret(), pytest.raises(NotImplementedError, match="at most 8192 channels, got 8193"):
        layer_norm_nchw(*wide, impl="triton")
