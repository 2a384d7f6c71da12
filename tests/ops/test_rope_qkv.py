"""rope_qkv: its kernel against transformers in float64, its addresses, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.rope_qkv import rope_qkv
from fastbb_kernels.testing import ARCHITECTURES, corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels import rope_qkv as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("rope_qkv")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2

TENSORS = ("x", "norm_weight", "norm_bias", "weight", "bias", "cos", "sin")
Arguments = dict[str, Any]


def qkv_of(args: Arguments) -> Tensor:
    """q, k and v before the rotation, each [B, num_heads, N, head_dim], in one tensor."""
    x = args["x"]
    y = F.layer_norm(x, x.shape[-1:], args["norm_weight"], args["norm_bias"], EPS)
    y = F.linear(y, args["weight"], args["bias"])
    return y.unflatten(-1, (3, args["num_heads"], -1)).permute(2, 0, 3, 1, 4)


def upstream(args: Arguments) -> Tensor:
    q, k, v = qkv_of(args)
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    q, k = dinov3.apply_rotary_pos_emb(q, k, args["cos"], args["sin"])
    return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)


def exactly(args: Arguments) -> Tensor:
    return upstream({k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()})


def arguments(
    n_images: int,
    n_tokens: int,
    channels: int,
    num_heads: int,
    head_dim: int,
    n_prefix: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Arguments:
    out_features = 3 * num_heads * head_dim
    # another angle for each channel, so that no two are taken for each other
    angles = torch.randn(n_tokens - n_prefix, head_dim) * 2
    return {
        "x": (torch.randn(n_images, n_tokens, channels) * 2 + 1).to(dtype),
        "norm_weight": torch.randn(channels).to(dtype),
        "norm_bias": torch.randn(channels).to(dtype),
        "weight": (torch.randn(out_features, channels) * channels**-0.5).to(dtype),
        "bias": torch.randn(out_features).to(dtype) if bias else None,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "num_heads": num_heads,
        "n_prefix": n_prefix,
    }


SMALL = (2, 5, 16, 2, 4, 2)


def run(args: Arguments) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = rope_qkv(**args, eps=EPS, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(**args)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments) -> None:
    assert_as_accurate_as_eager("y", run(args), upstream(args), exactly(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 37, 96, 3, 32, 5),
        (5, 13, 40, 1, 64, 1),
        (1, 66, 33, 2, 20, 0),
        (3, 4, 16, 1, 10, 4),
        (1, 1, 1, 1, 2, 0),
    ],
    ids=["dinov3", "images-in-a-tile", "odd-no-prefix", "prefix-only", "smallest"],
)
def test_kernel_is_as_accurate_as_eager(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(arguments(*sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kernel_module.launch_config(10**6, 64, 192, dtype, arch)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    assert_right(arguments(1, config.block_m + 3, 64, 1, 80, 5, dtype))


def test_without_bias_is_as_accurate_as_eager() -> None:
    assert_right(arguments(2, 9, 32, 2, 16, 1, torch.bfloat16, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_tables_are_not_rounded(dtype: torch.dtype) -> None:
    args = arguments(2, 19, 48, 2, 16, 3, dtype)
    args |= {name: args[name].float() + 1e-3 for name in ("cos", "sin")}
    q, k, v = qkv_of(args)
    table = torch.cat((args["sin"], args["cos"]), -1)
    q, k = (
        torch.cat((t[:, :, :3], apply_rot_embed_cat(t[:, :, 3:], table, half=True)), 2)
        for t in (q, k)
    )
    eager = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)  # as timm's EvaAttention
    assert torch.equal(rope_qkv(**args, eps=EPS), eager)
    assert_as_accurate_as_eager("y", run(args), eager, exactly(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_equals_transformers(dtype: torch.dtype) -> None:
    for sizes in (SMALL, (2, 4, 16, 1, 6, 0), (2, 4, 16, 1, 6, 4), (0, *SMALL[1:])):
        args = arguments(*sizes, dtype=dtype)
        assert torch.equal(rope_qkv(**args, eps=EPS), upstream(args))


def test_infinities_do_not_spread() -> None:
    args = arguments(2, 7, 16, 1, 8, 3)
    # a channel of each of q, k and v
    args["bias"][[1, 12, 22]] = math.inf
    want = upstream(args)
    assert want.isinf().any()
    torch.testing.assert_close(run(args), want, equal_nan=True)


def test_large_mean_loses_no_precision() -> None:
    args = arguments(1, 9, 96, 1, 16, 1)
    args["x"] = 100 + 0.01 * args["x"]
    exact = exactly(args)
    assert max_error(run(args), exact) <= 2 * max_error(upstream(args), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    args = arguments(3, 8, 40, 2, 12, 2, dtype)
    args["weight"] = (torch.randn(40, 80) / 8).to(dtype).t()[5:77]
    args["bias"] = torch.randn(145).to(dtype)[1::2]
    args["norm_weight"], args["norm_bias"] = torch.randn(80, 3).to(dtype)[1::2].unbind(1)[:2]
    args["cos"], args["sin"] = torch.randn(2, 12, 9).to(dtype)[:, :, 2:8].transpose(1, 2)
    copied = torch.randn(4, 8, 2, 77).to(dtype)[1:, :, 1, 5:45]
    columns = torch.randn(40, 70).to(dtype).t()[3:27].view(3, 8, 40)
    every_other = torch.randn(3, 16, 40).to(dtype)[:, ::2]
    for x in (copied, columns, every_other):
        views = {**args, "x": x}
        with torch.no_grad(), trace() as t:
            y = rope_qkv(**views, eps=EPS, impl="triton")
        t.assert_written_once("y_ptr")
        assert_as_accurate_as_eager("y", y, upstream(views), exactly(views))


@pytest.mark.parametrize("sizes", [(0, 5, 16, 2, 4, 2), (3, 0, 16, 2, 4, 0)], ids=str)
def test_empty_input_gives_an_empty_result(sizes: tuple[int, ...]) -> None:
    with torch.no_grad(), interpret():
        y = rope_qkv(**arguments(*sizes, dtype=torch.bfloat16), impl="triton")
    assert y.shape == (*sizes[:2], 3, 2, 4)


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    with torch.device("meta"):
        args = arguments(2**17, 201, 96, 1, 32, 5, torch.bfloat16)
        args["x"] = torch.empty(96, 2**17 * 201, dtype=torch.bfloat16).t().view(2**17, 201, 96)
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        rope_qkv(**args, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


def test_batches_and_image_sizes_share_a_binary() -> None:
    def launched(batch: int, n_tokens: int, n_prefix: int = 5) -> Any:
        with torch.device("meta"):
            args = arguments(batch, n_tokens, 384, 6, 64, n_prefix, torch.bfloat16)
        with torch.no_grad(), record_launches(90) as recording:
            rope_qkv(**args, impl="triton")
        return recording.launches[0].specialization

    assert launched(64, 201) == launched(57, 197, 1) == launched(8, 1024, 0)


@pytest.mark.parametrize("op", [rope_qkv, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return op(*args, num_heads=2, n_prefix=2, eps=EPS)

    small, large = arguments(*SMALL), arguments(7, *SMALL[1:6])
    tensors, more = (tuple(args[name] for name in TENSORS) for args in (small, large))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    shapes = (({0: torch.export.Dim("batch", min=1, max=64)}, *(None,) * 6),)
    exported = torch.export.export(Model(), tensors, dynamic_shapes=shapes).module()
    assert torch.equal(compiled(*tensors), upstream(small))
    assert torch.equal(exported(*more), upstream(large))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_custom_op_passes_opcheck(bias: bool) -> None:
    torch.library.opcheck(CUSTOM_OP, (*arguments(*SMALL, bias=bias).values(), EPS))


def test_gradients_equal_upstream() -> None:
    args = arguments(*SMALL)
    inputs = [args[name].requires_grad_() for name in TENSORS[:5]]
    got = torch.autograd.grad(rope_qkv(**args, eps=EPS).square().sum(), inputs)
    want = torch.autograd.grad(upstream(args).square().sum(), inputs)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(5, 16)}, r"weight must be .* for x \[B, N, C\], got .* x \[5, 16\]"),
        ({"x": torch.ones(2, 5, 9)}, r"got weight \[24, 16\] and x \[2, 5, 9\]"),
        ({"num_heads": 8}, "an even head_dim, got 24 rows and num_heads 8"),
        ({"num_heads": 0}, "got 24 rows and num_heads 0"),
        ({"n_prefix": 6}, "n_prefix must be from 0 to 5, the number of tokens, got 6"),
        ({"n_prefix": -1}, "got -1"),
        ({"n_prefix": 1}, r"cos must be \[4, 4\], got \[3, 4\]"),
        ({"sin": torch.ones(3, 8)}, r"sin must be \[3, 4\], got \[3, 8\]"),
        ({"norm_weight": torch.ones(24)}, r"norm_weight must be \[16\], got \[24\]"),
        ({"norm_bias": torch.ones(24)}, r"norm_bias must be \[16\], got \[24\]"),
        ({"bias": torch.ones(16)}, r"bias must be \[24\], got \[16\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_shapes_raise_value_error(change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=f"rope_qkv: .*{message}"):
        rope_qkv(**arguments(*SMALL) | change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("norm_bias", torch.Tensor.half, "all tensors in torch.float32, got norm_bias in"),
        ("cos", torch.Tensor.half, "all tensors in torch.float32, got cos in torch.float16"),
        ("sin", lambda t: t.to("meta"), "all tensors on cpu, got sin on meta"),
        ("sin", lambda t: t.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "norm-dtype", "table-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    args = arguments(*SMALL)
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        rope_qkv(**args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="rope_qkv: .* CUDA or ROCm .* got cpu"):
        rope_qkv(**arguments(*SMALL), impl="triton")
