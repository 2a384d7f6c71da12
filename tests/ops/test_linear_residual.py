"""linear_residual: its kernel against torch in float64, its addresses, and what it refuses."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import linear_residual
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import ARCHITECTURES, binary_facts, corners, fake_gpu, interpret, trace
from fastbb_kernels.triton_kernels import linear_residual as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("linear_residual")
CUSTOM_OP = OP.custom_op

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def upstream(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None
) -> Tensor:
    y = F.linear(x, weight, bias)
    if scale is not None:
        dinov2 = pytest.importorskip("transformers.models.dinov2.modeling_dinov2")
        y = dinov2.Dinov2LayerScale.forward(Mock(lambda1=scale), y)
    return residual + y


def exactly(args: Arguments) -> Tensor:
    exact: Any = [None if t is None else t.double() for t in args]
    return upstream(*exact)


def arguments(
    rows: tuple[int, ...],
    features: int,
    out_features: int,
    dtype: torch.dtype,
    bias: bool = True,
    scale: bool = False,
) -> Arguments:
    return (
        torch.randn(*rows, features).to(dtype),
        (torch.randn(out_features, features) * features**-0.5).to(dtype),
        torch.randn(out_features).to(dtype) if bias else None,
        torch.randn(*rows, out_features).to(dtype),
        torch.randn(out_features).to(dtype) if scale else None,
    )


def run(args: Arguments) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = linear_residual(*args, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args)
    return y


def assert_right(args: Arguments) -> None:
    assert_as_accurate_as_eager("y", run(args), upstream(*args), exactly(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "out_features"),
    [
        ((2, 5, 7), 96, 96),
        ((1, 7, 7), 384, 96),
        ((65,), 128, 32),
        ((1,), 40, 100),
        ((130,), 33, 17),
        ((3,), 1, 1),
    ],
    ids=["proj", "fc2", "one-row-over", "one-row", "odd", "smallest"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], features: int, out_features: int, dtype: torch.dtype
) -> None:
    assert_right(arguments(rows, features, out_features, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_large_tiles_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes in ((96, 96), (128, 128)):
        config = kernel_module.launch_config(10**6, *sizes, dtype, arch)
        with monkeypatch.context() as patch:
            patch.setattr(kernel_module, "launch_config", lambda *_, config=config: config)
            assert_right(arguments((config.block_m + 3,), 128, config.block_n + 32, dtype))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_rows_get_small_tiles(arch: Architecture) -> None:
    def area(n_rows: int) -> int:
        config = kernel_module.launch_config(n_rows, 3072, 768, torch.bfloat16, arch)
        return config.block_m * config.block_n

    assert area(49) < area(49 * 32) <= area(49 * 64)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("arch", "tile"), [(80, (256, 128)), (90, (256, 128)), (100, (128, 128))])
def test_largest_tiles_spill_nothing(
    arch: Architecture, tile: tuple[int, int], scale: bool
) -> None:
    shapes = (50_176, 1536), (384, 1536), (384,), (50_176, 384), *([(384,)] if scale else [])
    args = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with torch.no_grad(), fake_gpu(arch) as gpu:
        linear_residual(*args, impl="triton")
    (launch,) = gpu.launches
    assert (launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"]) == tile
    assert binary_facts(gpu.kernels[0]).spills == 0


@pytest.mark.parametrize("arch", [90, 120, "gfx90a", "gfx942"])
def test_two_programs_with_large_tiles_fit_a_multiprocessor(arch: Architecture) -> None:
    args = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((200_704, 384), (96, 384), (96,), (200_704, 96))
    ]
    with torch.no_grad(), fake_gpu(arch) as gpu:
        linear_residual(*args, impl="triton")
    (launch,) = gpu.launches
    assert launch.constexprs["BLOCK_M"] == launch.constexprs["BLOCK_N"] == 128
    facts = binary_facts(gpu.kernels[0])
    assert facts.spills == 0
    assert facts.ctas_per_sm >= 2


def test_without_bias_is_as_accurate_as_eager() -> None:
    assert_right(arguments((50,), 32, 48, torch.bfloat16, bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_layer_scale_is_as_accurate_as_eager(bias: bool, dtype: torch.dtype) -> None:
    assert_right(arguments((3, 23), 64, 40, dtype, bias, scale=True))


def test_large_residual_loses_no_precision() -> None:
    # adding the residual first would round every product to its last place
    args = arguments((8,), 512, 32, torch.float32)
    args = *args[:3], args[3] + 1e4, None
    exact = exactly(args)
    assert max_error(run(args), exact) <= 2 * max_error(upstream(*args), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    x = torch.randn(4, 9, 2, 77).to(dtype)[:, 3:8, 1, 5:45]  # rows at two strides: copied
    columns = torch.randn(40, 70).to(dtype).t()[3:23]  # the stride of a column is 70
    sliced = torch.randn(20, 99).to(dtype)[:, 7:47]  # rows of 99
    weight = (torch.randn(40, 61) / 8).to(dtype).t()[5:55]
    bias, scale = torch.randn(2, 101).to(dtype)[:, 1::2]
    residual = torch.randn(4, 60, 11).to(dtype)[:, 4:54, 3:8].transpose(1, 2)
    for view in (x, columns.view(4, 5, 40), sliced.view(4, 5, 40)):
        args = view, weight, bias, residual, scale
        with torch.no_grad(), trace() as t:
            y = linear_residual(*args, impl="triton")
        t.assert_written_once("y_ptr")
        assert y.is_contiguous()
        assert_as_accurate_as_eager("y", y, upstream(*args), exactly(args))


@pytest.mark.parametrize("rows", [(0,), (2, 0, 7), ()], ids=str)
def test_no_rows_and_a_single_vector_are_as_accurate_as_eager(rows: tuple[int, ...]) -> None:
    args = arguments(rows, 16, 24, torch.bfloat16)
    with torch.no_grad(), interpret():
        y = linear_residual(*args, impl="triton")
    assert y.shape == (*rows, 24)
    assert_as_accurate_as_eager("y", y, upstream(*args), exactly(args))


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits_stay_in_bounds(transposed: bool) -> None:
    residual = torch.empty(2**31 // 64, 96, device="meta")
    weight, bias = torch.empty(96, 96, device="meta"), torch.empty(96, device="meta")
    x = residual.t().contiguous().t() if transposed else residual
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        linear_residual(x, weight, bias, residual, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("op", [linear_residual, CUSTOM_OP], ids=["public", "custom"])
@pytest.mark.parametrize(("bias", "scale"), [(True, False), (False, True)], ids=["bias", "scale"])
def test_compiled_and_exported_op_equals_upstream(op: Any, bias: bool, scale: bool) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor | None) -> Tensor:
            return op(*args)

    small, large = (arguments((batch, 5), 16, 24, torch.float32, bias, scale) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, None, None, {0: batch}, None),)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    assert torch.equal(compiled(*small), upstream(*small))
    assert torch.equal(exported(*large), upstream(*large))


def test_custom_op_passes_opcheck() -> None:
    for args in (
        arguments((2, 5), 16, 24, torch.float32),
        arguments((3,), 16, 24, torch.bfloat16, bias=False, scale=True),
        arguments((0, 5), 16, 24, torch.float32),
    ):
        torch.library.opcheck(CUSTOM_OP, args)
    x, weight, bias, residual, _ = arguments((2, 3, 5), 16, 24, torch.float32)
    y = CUSTOM_OP(x, weight, bias, residual.transpose(0, 1).contiguous().transpose(0, 1), None)
    assert y.is_contiguous()


def test_gradients_equal_upstream() -> None:
    tensors = arguments((4,), 8, 6, torch.float32, scale=True)
    args: Any = [a.requires_grad_() for a in tensors if a is not None]
    got = torch.autograd.grad(linear_residual(*args).square().sum(), args)
    want = torch.autograd.grad(upstream(*args).square().sum(), args)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (4, 9)}, r"weight must be \[C_out, C\] .* weight \[4, 9\] and x \[2, 3, 8\]"),
        ({"weight": (4,)}, r"weight must be \[C_out, C\] .* got weight \[4\]"),
        ({"x": ()}, r"weight must be \[C_out, C\] .* and x \[\]"),
        ({"bias": (5,)}, r"bias must be \[4\], got \[5\]"),
        ({"scale": (1,)}, r"scale must be \[4\], got \[1\]"),
        ({"residual": (3, 4)}, r"residual must be \[2, 3, 4\], got \[3, 4\]"),
    ],
    ids=["features", "weight-ndim", "x-ndim", "bias", "scale", "residual"],
)
def test_wrong_shapes_raise_value_error(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 3, 8), "weight": (4, 8), "bias": (4,), "residual": (2, 3, 4), **change}
    args: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"linear_residual: {message}"):
        linear_residual(**args)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("weight", torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        ("bias", torch.Tensor.bfloat16, "got bias in torch.bfloat16"),
        ("scale", torch.Tensor.half, "all tensors in torch.float32, got scale in torch.float16"),
        ("residual", lambda r: r.to("meta"), "all tensors on cpu, got residual on meta"),
        ("weight", lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "bias-dtype", "scale-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    names = ("x", "weight", "bias", "residual", "scale")
    args: dict[str, Any] = dict(zip(names, arguments((3,), 8, 4, torch.float32, scale=True)))
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        linear_residual(**args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="linear_residual: .* CUDA or ROCm .* got cpu"):
        linear_residual(*arguments((3,), 8, 4, torch.float32), impl="triton")
