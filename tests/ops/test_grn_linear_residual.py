"""grn_linear_residual: its kernels against transformers in float64, and what it refuses."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels.op import find_op
from fastbb_kernels.ops.grn_linear_residual import grn_linear_residual, n_parts
from fastbb_kernels.testing import corners, interpret, record_launches, trace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = find_op("grn_linear_residual")
CUSTOM_OP = OP.custom_op
NAMES = ("x", "grn_weight", "grn_bias", "weight", "bias", "residual")


def upstream(x: Tensor, grn_weight: Tensor, grn_bias: Tensor, *last: Tensor) -> Tensor:
    convnextv2 = pytest.importorskip("transformers.models.convnextv2.modeling_convnextv2")
    grn = convnextv2.ConvNextV2GRN(x.shape[-1]).to(x.dtype)
    with torch.no_grad():
        grn.weight.copy_(grn_weight.expand_as(grn.weight))
        grn.bias.copy_(grn_bias.expand_as(grn.bias))
        weight, bias, residual = last
        return residual + F.linear(grn(x), weight, bias)


def arguments(
    *shape: int, out_features: int = 24, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    features = shape[-1]
    tensors = (
        # images and channels of other magnitudes, so that a norm over the wrong axis differs
        torch.randn(shape) * torch.rand(shape[0], 1, 1, features) * 2,
        torch.randn(features),
        torch.randn(features),
        torch.randn(out_features, features) * features**-0.5,
        torch.randn(out_features),
        torch.randn(*shape[:3], out_features),
    )
    return {name: tensor.to(dtype) for name, tensor in zip(NAMES, tensors)}


def run(args: dict[str, Any]) -> Tensor:
    """The kernels' result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = grn_linear_residual(**args, impl="triton")
    assert len(t.launches) == 3
    t.assert_written_once()
    assert t.unique_bytes == OP.n_bytes(**args)
    return y


def assert_right(args: dict[str, Any]) -> None:
    exact = upstream(*(tensor.double() for tensor in args.values()))
    assert_as_accurate_as_eager("y", run(args), upstream(*args.values()), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_features"),
    [((2, 5, 7, 96), 24), ((3, 7, 7, 40), 17), ((1, 20, 33, 80), 32), ((5, 1, 1, 64), 64)],
    ids=["images-in-a-tile", "odd-channels", "parts", "one-pixel"],
)
def test_kernels_are_as_accurate_as_eager(
    shape: tuple[int, ...], out_features: int, dtype: torch.dtype
) -> None:
    assert_right(arguments(*shape, out_features=out_features, dtype=dtype))


def test_eager_equals_upstream_and_eps_counts() -> None:
    args = arguments(2, 3, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(grn_linear_residual(**args), upstream(*args.values()))
    other = {**args, "x": 1e-3 * args["x"]}
    single: Any = {name: tensor.float() for name, tensor in other.items()}
    for eps in (1e-6, 1e-2):
        want = grn_linear_residual(**other, eps=eps)
        torch.testing.assert_close(run({**single, "eps": eps}), want.float())


def test_an_image_does_not_depend_on_others() -> None:
    args = arguments(4, 5, 5, 32)
    args["x"][2] = torch.nan
    y = run(args)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()
    alone: Any = {n: t[:1] if t.ndim == 4 else t for n, t in args.items()}
    assert torch.equal(run(alone)[0], y[0])


def test_channels_without_a_signal_equal_upstream() -> None:
    args = arguments(2, 4, 4, 32)
    args["x"][0] = 0.0
    assert_right(args)


def test_views_and_no_bias_give_the_same_result() -> None:
    args = arguments(2, 6, 5, 32) | {"bias": torch.zeros(24)}
    want = run(args)
    views: Any = {
        name: torch.stack([value, value], -1)[..., 1]
        for name, value in args.items()
        if name != "bias"
    }
    with torch.no_grad(), interpret():
        y = grn_linear_residual(**views, bias=None, impl="triton")
    assert torch.equal(y, want) and y.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 6, 32), (2, 0, 6, 32)], ids=str)
def test_empty_maps_launch_nothing(shape: tuple[int, ...]) -> None:
    with torch.no_grad(), trace() as t:
        y = grn_linear_residual(**arguments(*shape), impl="triton")
    assert y.shape == (*shape[:3], 24) and t.launches == []


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    args = {name: tensor.to("meta") for name, tensor in arguments(1, 1, 1, 64).items()}
    args["x"] = torch.empty(2**13, 64, 65, 64, device="meta")
    args["residual"] = torch.empty(2**13, 64, 65, 24, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        grn_linear_residual(**args, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2, 2, 2]


def test_parts_of_the_pixels() -> None:
    assert [n_parts(n) for n in (1, 256, 257, 3136, 10**6)] == [1, 1, 2, 13, 16]


@pytest.mark.parametrize("op", [grn_linear_residual, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_eager(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return op(*tensors, **({} if op is grn_linear_residual else {"eps": 1e-6}))

    args = tuple(arguments(2, 3, 4, 16).values())
    more = tuple(arguments(5, 3, 4, 16).values())
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, *[None] * 4, {0: batch}),)
    exported = torch.export.export(Model(), args, dynamic_shapes=shapes).module()
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    for tensors in (args, more):
        want = OP.eager(*tensors)
        assert torch.equal(exported(*tensors), want) and torch.equal(compiled(*tensors), want)


def test_custom_op_passes_opcheck_and_has_gradients() -> None:
    for shape in ((2, 3, 4, 16), (0, 3, 4, 16)):
        torch.library.opcheck(CUSTOM_OP, (*arguments(*shape).values(), 1e-6))
    args = arguments(2, 3, 4, 16, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in args.values()]
    assert torch.autograd.gradcheck(grn_linear_residual, leaves)


def test_a_gpu_runs_the_kernels_by_default() -> None:
    args = arguments(2, 3, 4, 16, dtype=torch.bfloat16)
    with torch.no_grad(), record_launches() as recording:
        grn_linear_residual(**args)
    kernels = ("_grn_sums", "_grn_factors", "_linear_residual")
    assert [launch.name for launch in recording.launches] == [f"{k}_fwd_kernel" for k in kernels]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("grn_weight", torch.Tensor.half, "got grn_weight in torch.float16"),
        ("residual", lambda t: t.to("meta"), "tensors on cpu, got residual on meta"),
        ("grn_bias", lambda t: t.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    args = arguments(1, 2, 2, 16)
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        grn_linear_residual(**args, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 32)}, r"weight must be \[C_out, C\] for x \[B, H, W, C\], .* x \[6, 32\]"),
        ({"weight": (24, 31)}, r"weight must be .* got weight \[24, 31\]"),
        ({"grn_weight": (1, 32)}, r"grn_weight must be \[32\], got \[1, 32\]"),
        ({"grn_bias": (24,)}, r"grn_bias must be \[32\], got \[24\]"),
        ({"bias": (32,)}, r"bias must be \[24\], got \[32\]"),
        ({"residual": (2, 3, 4, 32)}, r"residual must be \[2, 3, 4, 24\]"),
    ],
    ids=str,
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    args = arguments(2, 3, 4, 32)
    args |= {name: torch.randn(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"grn_linear_residual: {message}"):
        grn_linear_residual(**args)
