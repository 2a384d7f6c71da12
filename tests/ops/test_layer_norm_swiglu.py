"""layer_norm_swiglu: its kernel against transformers in float64, its addresses, its refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.layer_norm_swiglu import layer_norm_swiglu
from fastbb_kernels.testing import ARCHITECTURES, corners, interpret, trace
from fastbb_kernels.triton_kernels import layer_norm_swiglu as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("layer_norm_swiglu")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def upstream(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
) -> Tensor:
    """The MLP of transformers without its last layer."""
    mlp = SimpleNamespace(
        gate_proj=lambda y: F.linear(y, gate_weight, gate_bias),
        up_proj=lambda y: F.linear(y, up_weight, up_bias),
        act_fn=nn.SiLU(),
        down_proj=nn.Identity(),
    )
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    return dinov3.DINOv3ViTGatedMLP.forward(mlp, y)


def exactly(args: Arguments) -> Tensor:
    exact: Any = [None if t is None else t.double() for t in args]
    return upstream(*exact)


def arguments(
    rows: tuple[int, ...],
    features: int,
    out_features: int,
    dtype: torch.dtype = torch.float32,
    gate_bias: bool = True,
    up_bias: bool = True,
) -> Arguments:
    def weight() -> Tensor:
        return (torch.randn(out_features, features) * features**-0.5).to(dtype)

    return (
        (torch.randn(*rows, features) * 2 + 1).to(dtype),
        torch.randn(features).to(dtype),
        torch.randn(features).to(dtype),
        weight(),
        torch.randn(out_features).to(dtype) if gate_bias else None,
        weight(),
        torch.randn(out_features).to(dtype) if up_bias else None,
    )


def run(args: Arguments) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = layer_norm_swiglu(*args, eps=EPS, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments) -> None:
    assert_as_accurate_as_eager("y", run(args), upstream(*args), exactly(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "out_features"),
    [((2, 17), 96, 256), ((65,), 40, 17), ((1,), 33, 72), ((3,), 1, 1)],
    ids=["dinov2", "one-row-over", "odd", "smallest"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], features: int, out_features: int, dtype: torch.dtype
) -> None:
    assert_right(arguments(rows, features, out_features, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kernel_module.launch_config(10**6, 64, 192, dtype, arch)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    assert_right(arguments((config.block_m + 3,), 64, config.block_n + 8, dtype))


@pytest.mark.parametrize(("gate_bias", "up_bias"), [(True, False), (False, True), (False, False)])
def test_missing_biases_are_as_accurate_as_eager(gate_bias: bool, up_bias: bool) -> None:
    assert_right(arguments((9,), 32, 24, torch.bfloat16, gate_bias, up_bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    columns = torch.randn(40, 70).to(dtype).t()[3:23]  # the stride of a column is 70
    copied = torch.randn(4, 9, 2, 77).to(dtype)[:, 3:8, 1, 5:45]  # rows at two strides
    norm_weight, norm_bias = torch.randn(80, 3).to(dtype)[1::2].unbind(1)[:2]
    gate_weight = (torch.randn(40, 61) / 8).to(dtype).t()[5:35]
    up_weight = (torch.randn(60, 80) / 8).to(dtype)[::2, ::2]
    gate_bias, up_bias = torch.randn(2, 61).to(dtype)[:, 1::2]
    for x in (columns.view(4, 5, 40), copied):
        args = x, norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias
        with torch.no_grad(), trace() as t:
            y = layer_norm_swiglu(*args, eps=EPS, impl="triton")
        t.assert_written_once("y_ptr")
        assert_as_accurate_as_eager("y", y, upstream(*args), exactly(args))


@pytest.mark.parametrize("rows", [(0,), (3, 0), ()], ids=str)
def test_no_rows_and_a_single_vector_are_as_accurate_as_eager(rows: tuple[int, ...]) -> None:
    args = arguments(rows, 24, 40, torch.bfloat16)
    with torch.no_grad(), interpret():
        y = layer_norm_swiglu(*args, eps=EPS, impl="triton")
    assert y.shape == (*rows, 40)
    assert_as_accurate_as_eager("y", y, upstream(*args), exactly(args))


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    with torch.device("meta"):
        args = arguments((2**25 + 3,), 96, 200, torch.bfloat16)
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        layer_norm_swiglu(*args, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("op", [layer_norm_swiglu, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor | None) -> Tensor:
            return op(*args, eps=EPS)

    small, large = (arguments((batch, 3), 16, 24, up_bias=False) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    shapes = (({0: torch.export.Dim("batch", min=1, max=64)}, *(None,) * 6),)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    assert torch.equal(compiled(*small), upstream(*small))
    assert torch.equal(exported(*large), upstream(*large))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_custom_op_passes_opcheck(bias: bool) -> None:
    args = arguments((2, 3), 16, 24, gate_bias=bias, up_bias=bias)
    torch.library.opcheck(CUSTOM_OP, (*args, EPS))


def test_gradients_equal_upstream() -> None:
    args: Any = [t.requires_grad_() for t in arguments((3,), 8, 5) if t is not None]
    got = torch.autograd.grad(layer_norm_swiglu(*args, eps=EPS).square().sum(), args)
    want = torch.autograd.grad(upstream(*args).square().sum(), args)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (), r"gate_weight must be \[F, C\] for x \[..., C\], got .* x \[\]"),
        (0, (2, 9), r"gate_weight must be \[F, C\] .* got gate_weight \[6, 8\] and x \[2, 9\]"),
        (1, (6,), r"norm_weight must be \[8\], got \[6\]"),
        (2, (8, 1), r"norm_bias must be \[8\], got \[8, 1\]"),
        (3, (6,), r"gate_weight must be \[F, C\] .* got gate_weight \[6\]"),
        (4, (8,), r"gate_bias must be \[6\], got \[8\]"),
        (5, (5, 8), r"up_weight must be \[6, 8\], got \[5, 8\]"),
        (6, (8,), r"up_bias must be \[6\], got \[8\]"),
    ],
)
def test_wrong_shapes_raise_value_error(index: int, shape: tuple[int, ...], message: str) -> None:
    args: list[Any] = list(arguments((2,), 8, 6))
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=f"layer_norm_swiglu: {message}"):
        layer_norm_swiglu(*args)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (5, torch.Tensor.half, "all tensors in torch.float32, got up_weight in torch.float16"),
        (6, lambda b: b.to("meta"), "all tensors on cpu, got up_bias on meta"),
        (3, lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args: list[Any] = list(arguments((2,), 8, 6))
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        layer_norm_swiglu(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="layer_norm_swiglu: .* CUDA or ROCm .* got cpu"):
        layer_norm_swiglu(*arguments((2,), 8, 6), impl="triton")
