"""patch_embed: its kernel against torch in float64, its addresses, and what it refuses."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import patch_embed
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import binary_facts, corners, fake_gpu, interpret, trace
from fastbb_kernels.triton_kernels import patch_embed as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("patch_embed")
CUSTOM_OP = OP.custom_op

# not the default, so that a lost eps shows
EPS = 1e-2

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def upstream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    ceil_mode: bool = False,
) -> Tensor:
    """The embeddings of transformers (padded) and torchvision (pixels dropped)."""
    p, q = weight.shape[2:]
    if ceil_mode:
        x = F.pad(x, (0, -x.shape[3] % q, 0, -x.shape[2] % p))
    y = F.conv2d(x, weight, bias, stride=(p, q)).permute(0, 2, 3, 1)
    if norm_weight is None:
        return y
    return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, EPS)


def exactly(args: Arguments, ceil_mode: bool) -> Tensor:
    x, weight, *vectors = args
    vectors = [None if vector is None else vector.double() for vector in vectors]
    return upstream(x.double(), weight.double(), *vectors, ceil_mode=ceil_mode)


def arguments(
    pixels: tuple[int, int, int, int],
    channels: int,
    patch: tuple[int, int] = (4, 4),
    dtype: torch.dtype = torch.float32,
    vectors: tuple[bool, bool, bool] = (True, True, True),
) -> Arguments:
    """Pixels [B, C_in, H, W] and parameters; `vectors`: with bias, norm_weight, norm_bias."""
    fan_in = pixels[1] * patch[0] * patch[1]
    weight = torch.randn(channels, pixels[1], *patch) * fan_in**-0.5
    bias, norm_weight, norm_bias = (
        torch.randn(channels).to(dtype) if wanted else None for wanted in vectors
    )
    return (torch.randn(pixels) + 1).to(dtype), weight.to(dtype), bias, norm_weight, norm_bias


def run(args: Arguments, ceil_mode: bool) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = patch_embed(*args, eps=EPS, ceil_mode=ceil_mode, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*args, ceil_mode=ceil_mode)
    assert y.is_contiguous()
    return y


def assert_right(args: Arguments, ceil_mode: bool = True) -> None:
    eager = upstream(*args, ceil_mode=ceil_mode)
    assert_as_accurate_as_eager("y", run(args, ceil_mode), eager, exactly(args, ceil_mode))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["dropped", "padded"])
@pytest.mark.parametrize(
    ("pixels", "channels", "patch"),
    [
        ((1, 3, 32, 36), 96, (4, 4)),
        ((2, 3, 33, 30), 96, (4, 4)),
        ((3, 3, 27, 28), 20, (4, 4)),
        ((1, 2, 35, 23), 33, (7, 3)),
        ((1, 3, 16, 17), 192, (16, 16)),
        ((5, 1, 2, 1), 1, (2, 1)),
    ],
    ids=["whole", "both-sides", "rows-left-over", "odd-patch", "large-patch", "smallest"],
)
def test_kernel_is_as_accurate_as_eager(
    pixels: tuple[int, int, int, int],
    channels: int,
    patch: tuple[int, int],
    ceil_mode: bool,
    dtype: torch.dtype,
) -> None:
    assert_right(arguments(pixels, channels, patch, dtype), ceil_mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["dropped", "padded"])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (2, 1)], ids=str)
def test_channels_last_maps_are_as_accurate_as_eager(
    size: tuple[int, int], ceil_mode: bool, dtype: torch.dtype
) -> None:
    if size[1] == 1 and not ceil_mode:
        pytest.skip("there is no patch")
    map_, own, *rest = arguments((2, 24, *size), 40, (2, 2), dtype, (True, False, False))
    rows = torch.randn(2, size[0], size[1] + 3, 24).to(dtype)[:, :, 2:-1]  # a view with gaps
    rows.copy_(map_.permute(0, 2, 3, 1))
    results = []
    for x in (map_.contiguous(memory_format=torch.channels_last), rows.permute(0, 3, 1, 2)):
        for weight in (own, own.contiguous(memory_format=torch.channels_last)):
            args: Any = (x, weight, *rest)
            assert_right(args, ceil_mode)
            results.append(run(args, ceil_mode))
    assert all(torch.equal(y, results[0]) for y in results)


def test_rows_of_channels_last_maps_are_loaded_wide() -> None:
    x = torch.empty(64, 56, 56, 96, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    weight = x.new_empty(192, 96, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fake_gpu(90) as gpu:
        patch_embed(x, weight, x.new_empty(192), None, None, impl="triton")
    facts = binary_facts(gpu.kernels[0])
    assert facts.wide_accesses >= 2 * facts.narrow_accesses and not facts.medium_accesses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_channel_count_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    assert_right(arguments((1, 3, 20, 22), 500, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [200, 640])
def test_columns_without_a_norm_are_as_accurate_as_eager(channels: int, dtype: torch.dtype) -> None:
    assert_right(arguments((2, 20, 9, 8), channels, (2, 2), dtype, (True, False, False)))


def test_an_image_smaller_than_a_patch_is_padded() -> None:
    assert_right(arguments((2, 3, 3, 1), 24))


@pytest.mark.parametrize(
    "vectors",
    [(False, True, True), (True, True, False), (True, False, False), (False, False, False)],
    ids=["no-bias", "no-norm-bias", "no-norm", "nothing"],
)
def test_missing_bias_and_norm_are_as_accurate_as_eager(vectors: tuple[bool, bool, bool]) -> None:
    assert_right(arguments((1, 3, 10, 13), 24, dtype=torch.bfloat16, vectors=vectors))


def test_large_mean_loses_no_precision() -> None:
    x, weight, bias, norm_weight, norm_bias = arguments((1, 3, 8, 12), 96)
    assert bias is not None
    args = x / 100, weight, bias / 100 + 100, norm_weight, norm_bias
    exact = exactly(args, False)
    # the accumulator rounds to 4e-6 here, which the norm multiplies by about 10
    assert (run(args, False) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    x, weight, *vectors = arguments((2, 3, 13, 18), 24, dtype=dtype)
    wide = torch.randn(2, 7, 31, 51).to(dtype)
    views = {
        "channels-last": x.to(memory_format=torch.channels_last),
        "a crop": wide[:, 2:5, 5:18, 9:27],
        "every second pixel": wide[:, ::3, 4:30:2, 3:39:2],
        "height and width swapped": wide[:, 1:4, 3:21, 7:20].transpose(2, 3),
        "one image for all": x[:1].expand(3, -1, -1, -1),
        "from right to left": torch.randn(2, 3, 18, 13).to(dtype).transpose(2, 3),
    }
    spread = torch.stack([v for v in vectors if v is not None], dim=1)
    weight = weight.to(memory_format=torch.channels_last)
    for name, view in views.items():
        args = view, weight, spread[:, 0], spread[:, 1], spread[:, 2]
        with torch.no_grad(), trace() as t:
            y = patch_embed(*args, eps=EPS, ceil_mode=True, impl="triton")
        t.assert_written_once("y_ptr")
        eager = upstream(*args, ceil_mode=True)
        assert_as_accurate_as_eager(name, y, eager, exactly(args, True))


@pytest.mark.parametrize("pixels", [(0, 3, 8, 8), (2, 3, 8, 8)], ids=str)
def test_empty_input_gives_an_empty_result(pixels: tuple[int, int, int, int]) -> None:
    with torch.no_grad(), interpret():
        y = patch_embed(*arguments(pixels, 24), impl="triton")
    assert y.shape == (pixels[0], 2, 2, 24)


@pytest.mark.parametrize(
    ("pixels", "strides"),
    [
        ((5000, 3, 384, 384), None),
        ((1, 3, 40_000, 40_000), None),
        ((1, 3, 40_000, 40_001), (1, 1, 120_003, 3)),
        ((1, 3, 8, 9), (1, 16, 2**30, 1)),
        ((1, 3, 9, 8), (1, 16, 1, 2**30)),
    ],
    ids=["many-images", "huge-image", "channels-last", "rows-far-apart", "columns-far-apart"],
)
def test_offsets_beyond_32_bits_stay_in_bounds(
    pixels: tuple[int, int, int, int], strides: tuple[int, ...] | None
) -> None:
    x = torch.empty(pixels, device="meta")
    if strides is not None:
        x = torch.empty_strided(pixels, strides, device="meta")
    weight, vector = torch.empty(96, 3, 4, 4, device="meta"), torch.empty(96, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        patch_embed(x, weight, vector, vector, vector, ceil_mode=True, impl="triton")
    (launch,) = t.launches
    assert launch.n_programs == min(launch.grid[0], 2)


@pytest.mark.parametrize("size", [(8, 12), (9, 12), (8, 13)], ids=str)
def test_eager_pads_only_partial_patches(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments((2, 3, *size), 16)
    assert_equals_upstream(patch_embed(*args, eps=EPS, ceil_mode=True), upstream(*args, True))
    monkeypatch.delattr(F, "pad")
    if size == (8, 12):
        patch_embed(*args, ceil_mode=True)
    else:
        with pytest.raises(AttributeError):
            patch_embed(*args, ceil_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_hold_whole_rows(dtype: torch.dtype) -> None:
    for channels in (1, 16, 96, 128, 192, 512):
        config = kernel_module.launch_config(48, channels, dtype, 90)
        assert channels <= config.block_n < max(2 * channels, 17)
        assert 48 % config.block_k == 0  # no multiplication with padding


@pytest.mark.parametrize("size", [(252, 332), (801, 1088)], ids=str)
def test_aligned_rows_are_loaded_as_wide_as_those_of_224_pixels(size: tuple[int, int]) -> None:
    def accesses(height: int, width: int) -> tuple[int, int, int]:
        shapes = [(1, 3, height, width), (96, 3, 4, 4), (96,), (96,), (96,)]
        args = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
        with torch.no_grad(), fake_gpu(90) as gpu:
            patch_embed(*args, ceil_mode=True, impl="triton")
        facts = binary_facts(gpu.kernels[0])
        return facts.wide_accesses, facts.medium_accesses, facts.narrow_accesses

    assert accesses(*size) == accesses(224, 224)


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["dropped", "padded"])
@pytest.mark.parametrize("op", [patch_embed, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_upstream(op: Any, ceil_mode: bool) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor | None) -> Tensor:
            return op(*args, eps=EPS, ceil_mode=ceil_mode)

    small, large = (arguments((batch, 3, 9, 14), 12) for batch in (2, 7))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, None, None, None, None),)
    exported = torch.export.export(Model(), small, dynamic_shapes=shapes).module()
    assert torch.equal(compiled(*small), upstream(*small, ceil_mode=ceil_mode))
    assert torch.equal(exported(*large), upstream(*large, ceil_mode=ceil_mode))


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["dropped", "padded"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_custom_op_passes_opcheck(norm: bool, ceil_mode: bool) -> None:
    args = arguments((2, 3, 9, 14), 12, vectors=(norm, norm, norm))
    torch.library.opcheck(CUSTOM_OP, (*args, EPS, ceil_mode))


def test_gradients_equal_upstream() -> None:
    args = [a.requires_grad_() for a in arguments((1, 3, 9, 9), 8) if a is not None]
    got = torch.autograd.grad(patch_embed(*args, eps=EPS, ceil_mode=True).square().sum(), args)
    want = torch.autograd.grad(upstream(*args, ceil_mode=True).square().sum(), args)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


SHAPES = [(1, 3, 8, 8), (6, 3, 4, 4), (6,), (6,), (6,)]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (3, 8, 8), r"weight must be \[C, C_in, p, q\] .* pixel_values \[3, 8, 8\]"),
        (1, (6, 4, 4, 4), r"weight must be \[C, C_in, p, q\] .* got weight \[6, 4, 4, 4\]"),
        (2, (5,), r"bias must be \[6\], got \[5\]"),
        (3, (1, 6), r"norm_weight must be \[6\], got \[1, 6\]"),
        (4, (7,), r"norm_bias must be \[6\], got \[7\]"),
        (3, None, "norm_bias needs a norm_weight, got None"),
        (0, (1, 3, 3, 8), "the image must be at least 4x4 pixels, got 3x8"),
        (0, (1, 3, 8, 3), "the image must be at least 4x4 pixels, got 8x3"),
    ],
    ids=["pixels", "weight", "bias", "norm_weight", "norm_bias", "no-norm", "height", "width"],
)
def test_wrong_shapes_raise_value_error(
    index: int, shape: tuple[int, ...] | None, message: str
) -> None:
    args: list[Any] = [torch.randn(shape) for shape in SHAPES]
    args[index] = None if shape is None else torch.randn(shape)
    with pytest.raises(ValueError, match=f"patch_embed: {message}"):
        patch_embed(*args)


def test_an_empty_image_is_refused() -> None:
    args = arguments((1, 3, 8, 8), 6)
    with pytest.raises(ValueError, match="at least 1x1 pixels, got 0x8"):
        patch_embed(args[0][:, :, :0], *args[1:], ceil_mode=True)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        (2, torch.Tensor.half, "all tensors in torch.float32, got bias in torch.float16"),
        (3, lambda w: w.to("meta"), "all tensors on cpu, got norm_weight on meta"),
        (4, lambda b: b.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "bias-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args: list[Any] = list(arguments((1, 3, 8, 8), 6))
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        patch_embed(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors_and_too_many_channels() -> None:
    with pytest.raises(NotImplementedError, match="patch_embed: .* CUDA or ROCm .* got cpu"):
        patch_embed(*arguments((1, 3, 8, 8), 6), impl="triton")
    with interpret(), pytest.raises(NotImplementedError, match="at most 512 .* got 513"):
        patch_embed(*arguments((1, 3, 8, 8), 513), impl="triton")
