"""patch_merging: its kernel against timm and transformers in float64, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import PatchMerging
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn

from fastbb_kernels import patch_merging
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels import layer_norm_linear as kernel_module
from fastbb_kernels.triton_kernels.config import GemmConfig
from fastbb_kernels.triton_kernels.layer_norm_linear import LayerNormLinearConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("patch_merging")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def upstream(channels: int, out_features: int, dtype: torch.dtype = torch.float32) -> PatchMerging:
    """timm's module with random parameters."""
    module = PatchMerging(channels, out_features)
    module.norm = nn.LayerNorm(4 * channels, eps=EPS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(dtype)


def arguments(module: PatchMerging, x: Tensor) -> Arguments:
    names = ("norm.weight", "norm.bias", "reduction.weight")
    norm_weight, norm_bias, weight = map(module.get_parameter, names)
    return x, norm_weight, norm_bias, weight


def run(args: Arguments) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = patch_merging(*args, eps=EPS, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args)
    assert y.is_contiguous()
    return y


@torch.no_grad()
def exactly(module: PatchMerging, x: Tensor) -> Tensor:
    return copy.deepcopy(module).double()(x.double())


@torch.no_grad()
def assert_right(module: PatchMerging, x: Tensor) -> None:
    y = run(arguments(module, x))
    assert_as_accurate_as_eager("y", y, module(x), exactly(module, x))


@pytest.fixture(params=["resident", "streamed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test for both paths of the kernel, with tiles so small that several are needed."""
    gemm = GemmConfig(16, 16, 32, num_warps=4, num_stages=1)
    resident = request.param == "resident"
    config = LayerNormLinearConfig(gemm, tiles_per_program=2 if resident else 1, resident=resident)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 10, 16), (3, 5, 4, 8), (2, 6, 3, 24), (2, 5, 7, 12), (1, 1, 1, 20), (3, 3, 1, 3)],
    ids=["even", "odd-height", "odd-width", "odd-both", "one-pixel", "odd-channels"],
)
@pytest.mark.usefixtures("path")
def test_kernel_is_as_accurate_as_eager(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    channels = shape[-1]
    x = (torch.randn(shape) + 1).to(dtype)
    assert_right(upstream(channels, 2 * channels + 1, dtype), x)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 8, 6, 96), torch.bfloat16), ((1, 3, 4, 192), torch.float16), ((1, 2, 2, 96), None)],
    ids=["stage2-bf16", "stage3-fp16", "stage2-fp32"],
)
def test_kernel_is_as_accurate_as_eager_at_model_sizes(
    shape: tuple[int, int, int, int], dtype: torch.dtype | None
) -> None:
    dtype = dtype or torch.float32
    assert_right(upstream(shape[-1], 2 * shape[-1], dtype), torch.randn(shape).to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 4), (5, 7)], ids=str)
def test_patch_merging_equals_transformers(size: tuple[int, int]) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    module = upstream(12, 24)
    theirs = swin.SwinPatchMerging(12)
    theirs.load_state_dict(module.state_dict())
    theirs.norm.eps = EPS
    x = torch.randn(2, *size, 12)
    want = theirs(x.flatten(1, 2), size).view(2, -(-size[0] // 2), -(-size[1] // 2), 24)
    assert_equals_upstream(run(arguments(module, x)), want)
    assert_equals_upstream(patch_merging(*arguments(module, x), eps=EPS), want)


@pytest.mark.usefixtures("path")
def test_large_mean_loses_no_precision() -> None:
    module, x = upstream(24, 20), 100 + 0.01 * torch.randn(1, 4, 4, 24)
    exact = exactly(module, x)
    assert max_error(run(arguments(module, x)), exact) <= 2 * max_error(module(x), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("path")
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    module = upstream(20, 24, dtype)
    wide = torch.randn(3, 31, 33, 51).to(dtype)
    views = {
        "a crop": wide[:, 2:7, 5:9, 9:29],
        "every second pixel": wide[1:, 1:13:2, 3:13:2, ::2][..., :20],
        "channels first": wide[:, 5:25, 3:8, 7:13].permute(0, 2, 3, 1),
        "height and width swapped": wide[:, 1:7, 20:25, 1:21].transpose(1, 2),
        "one image for all": wide[:1, :4, :5, :20].expand(3, -1, -1, -1),
    }
    weight = torch.randn(99, 50).to(dtype).t()[3:27, 5:85]
    norm_weight, norm_bias = torch.randn(160, 3).to(dtype)[1::2].unbind(1)[:2]
    parameters = {"norm.weight": norm_weight, "norm.bias": norm_bias, "reduction.weight": weight}
    module.load_state_dict(parameters)
    for name, x in views.items():
        with trace() as t:
            y = patch_merging(x, norm_weight, norm_bias, weight, eps=EPS, impl="triton")
        t.assert_written_once("y_ptr")
        assert_as_accurate_as_eager(name, y, module(x), exactly(module, x))


def test_odd_map_is_read_without_a_gather_or_pad() -> None:
    x = torch.empty(8, 7, 5, 96, device="meta")
    with torch.no_grad(), record_launches() as recording:
        patch_merging(*arguments(upstream(96, 192).to("meta"), x), impl="triton")
    assert [launch.tensors["x_ptr"].shape for launch in recording.launches] == [x.shape]


def test_map_sizes_share_a_binary() -> None:
    def launched(*size: int) -> str:
        x = torch.empty(8, *size, 96, device="meta")
        with torch.no_grad(), record_launches() as recording:
            patch_merging(*arguments(upstream(96, 192).to("meta"), x), impl="triton")
        return recording.launches[0].specialization

    assert launched(56, 56) == launched(64, 48) == launched(200, 272)
    assert launched(55, 56) == launched(64, 47) == launched(201, 273)


def test_empty_batch_gives_an_empty_map() -> None:
    with torch.no_grad(), interpret():
        y = patch_merging(*arguments(upstream(8, 16), torch.randn(0, 5, 6, 8)), impl="triton")
    assert y.shape == (0, 3, 3, 16)


@pytest.mark.parametrize(
    "shape",
    [(70_001, 18, 18, 96), (1, 60_001, 38_001, 8)],
    ids=["many-images", "huge-map"],
)
def test_offsets_beyond_32_bits_stay_in_bounds(shape: tuple[int, int, int, int]) -> None:
    module = upstream(shape[-1], 16).to("meta")
    nhwc = torch.empty(shape, device="meta")
    nchw = torch.empty(shape[0], *shape[3:], *shape[1:3], device="meta").permute(0, 2, 3, 1)
    for x in (nhwc, nchw):
        assert x.numel() > 2**31
        with torch.no_grad(), trace(programs=corners, data=False) as t:
            patch_merging(*arguments(module, x), impl="triton")
        assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("op", [patch_merging, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return op(*args, eps=EPS)

    module = upstream(8, 16)
    small, large = (arguments(module, torch.randn(batch, 5, 7, 8)) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, None, None, None),)
    with torch.no_grad():
        exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
        assert_equals_upstream(compiled(*small), module(small[0]))
        assert_equals_upstream(exported(*large), module(large[0]))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_custom_op_passes_opcheck(size: tuple[int, int]) -> None:
    args = [a.detach() for a in arguments(upstream(8, 16), torch.randn(2, *size, 8))]
    torch.library.opcheck(CUSTOM_OP, (*args, EPS))


def test_gradients_equal_upstream() -> None:
    module, x = upstream(8, 16), torch.randn(2, 5, 7, 8, requires_grad=True)
    args = arguments(module, x)
    got = torch.autograd.grad(patch_merging(*args, eps=EPS).square().sum(), args)
    want = torch.autograd.grad(module(x).square().sum(), args)
    assert_equals_upstream(got, want)


SHAPES = [(1, 2, 2, 4), (16,), (16,), (8, 16)]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 2, 4), r"x must be \[B, H, W, C\], got \[2, 2, 4\]"),
        (3, (8, 12), r"weight must be \[C_out, 16\] for x \[1, 2, 2, 4\], got \[8, 12\]"),
        (3, (16,), r"weight must be \[C_out, 16\] .* got \[16\]"),
        (1, (4,), r"norm_weight must be \[16\] for x \[1, 2, 2, 4\], got \[4\]"),
        (2, (16, 1), r"norm_bias must be \[16\] for x \[1, 2, 2, 4\], got \[16, 1\]"),
    ],
    ids=["map", "columns", "weight", "norm_weight", "norm_bias"],
)
def test_wrong_shapes_raise_value_error(index: int, shape: tuple[int, ...], message: str) -> None:
    args: list[Any] = [torch.randn(shape) for shape in SHAPES]
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=f"patch_merging: {message}"):
        patch_merging(*args)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got norm_weight in torch.float16"),
        (2, lambda b: b.to("meta"), "all tensors on cpu, got norm_bias on meta"),
        (3, torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        (0, lambda x: x.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "norm_weight-dtype", "device", "weight-dtype", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args: list[Any] = [torch.randn(shape) for shape in SHAPES]
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        patch_merging(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    args = [torch.randn(shape) for shape in SHAPES]
    with pytest.raises(NotImplementedError, match="patch_merging: .* CUDA or ROCm .* got cpu"):
        patch_merging(*args, impl="triton")
