"""conv1x1_bn_act: its kernel against torch in float64, its addresses, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from conv_reference import (
    BATCH,
    DTYPES,
    activated,
    compiled_and_exported,
    conv_and_norm,
    folded,
    image,
    meta_image,
    run_traced,
)
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, conv1x1_bn_act
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op, in_float64
from fastbb_kernels.testing import (
    ARCHITECTURES,
    BinaryFacts,
    binary_facts,
    corners,
    fake_gpu,
    interpret,
    record_launches,
    trace,
)
from fastbb_kernels.triton_kernels import conv1x1_bn_act as kernel_module

OP = find_op("conv1x1_bn_act")
CUSTOM_OP = OP.custom_op


def arguments(
    pixels: tuple[int, int, int, int],
    out_channels: int,
    stride: int = 1,
    residual: bool = False,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    batch, channels, height, width = pixels
    y = (batch, out_channels, -(-height // stride), -(-width // stride))
    return {
        "x": image(*pixels, dtype=dtype),
        "weight": (torch.randn(out_channels, channels, 1, 1) * channels**-0.5).to(dtype),
        "bias": torch.randn(out_channels).to(dtype),
        "stride": stride,
        "residual": image(*y, dtype=dtype) if residual else None,
        "activation": activation,
    }


def run(args: dict[str, Any]) -> Tensor:
    return run_traced(OP, **args)


def eager(args: dict[str, Any]) -> Tensor:
    y = F.conv2d(args["x"], args["weight"], args["bias"], args["stride"])
    y = y if args["residual"] is None else y + args["residual"]
    return activated(y, args["activation"])


def exactly(args: dict[str, Any]) -> Tensor:
    return eager(in_float64(args))


def assert_right(args: dict[str, Any]) -> None:
    assert_as_accurate_as_eager("y", run(args), eager(args), exactly(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("pixels", "out_channels", "residual", "activation"),
    [
        ((2, 64, 7, 9), 32, False, "relu"),
        ((3, 32, 9, 11), 100, True, "relu"),
        ((1, 40, 5, 16), 24, True, "silu"),
        ((2, 33, 11, 7), 17, False, None),
        ((1, 16, 1, 1), 48, True, "relu"),
        ((5, 1, 2, 3), 1, True, None),
    ],
    ids=["reduce", "expand", "eights", "odd", "one-pixel", "smallest"],
)
def test_kernel_is_as_accurate_as_upstream(
    pixels: tuple[int, int, int, int],
    out_channels: int,
    residual: bool,
    activation: str | None,
    stride: int,
    dtype: torch.dtype,
) -> None:
    args = arguments(pixels, out_channels, stride, residual, activation, dtype)
    module = conv_and_norm(pixels[1], out_channels, stride).to(dtype)
    args["weight"], args["bias"] = (tensor.to(dtype) for tensor in folded(module))

    def upstream(dtype: torch.dtype) -> Tensor:
        y = module.to(dtype)(args["x"].to(dtype))
        y = y + args["residual"].to(dtype) if residual else y
        return activated(y, activation)

    assert_as_accurate_as_eager("y", run(args), upstream(dtype), upstream(torch.float64))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation_is_as_accurate_as_eager(activation: str | None, residual: bool) -> None:
    assert_right(arguments((1, 16, 5, 5), 16, 1, residual, activation, torch.bfloat16))


def test_the_residual_is_added_before_the_activation() -> None:
    args = arguments((1, 16, 3, 5), 8, 1, True, "relu")
    args["residual"] = args["residual"] - 100.0
    assert torch.equal(run(args), torch.zeros(1, 8, 3, 5))


@pytest.mark.parametrize("size", [(7, 5), (1, 9), (6, 7), (5, 8)], ids=str)
@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_starts_at_the_first_pixel_of_each_image(
    size: tuple[int, int], stride: int
) -> None:
    # every pixel holds its own number, and more images than one lie in a tile
    batch = 5
    args = arguments((batch, 16, *size), 16, stride)
    numbers = torch.arange(batch * size[0] * size[1]).view(batch, 1, *size)
    args["x"] = numbers.float().expand(-1, 16, -1, -1).contiguous(memory_format=torch.channels_last)
    args["weight"], args["bias"] = torch.eye(16).view(16, 16, 1, 1), torch.zeros(16)
    assert torch.equal(run(args), args["x"][:, :, ::stride, ::stride])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launch_configs_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        kernel_module.launch_config(n_rows, 64, out_channels, residual, dtype, not residual, arch)
        for n_rows, out_channels in ((10**6, 256), (10**6, 64), (49, 64))
        for residual in (False, True)
    }
    assert len(configs) >= 2
    for config in configs:
        monkeypatch.setattr(kernel_module, "launch_config", lambda *_, config=config: config)
        # two tiles each way, the second ones cut; the first one ends in the second image
        pixels = (2, 96, config.block_m // 2 + 1, 3)
        assert_right(arguments(pixels, config.block_n + 16, 2, True, "relu", dtype))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_rows_get_small_tiles(arch: Architecture) -> None:
    def area(n_rows: int) -> int:
        config = kernel_module.launch_config(n_rows, 512, 2048, True, torch.bfloat16, False, arch)
        return config.block_m * config.block_n

    assert area(49) < area(49 * 64)


@pytest.mark.parametrize(
    ("arch", "residual"), [(90, False), (100, False), (90, True), ("gfx942", True)]
)
def test_two_programs_fit_a_multiprocessor(arch: Architecture, residual: bool) -> None:
    # memory bounds few channels, and several programs hide its latency
    channels, out_channels = (64, 512) if residual else (512, 64)
    facts = facts_of(arch, channels, out_channels, residual)
    assert facts.spills == 0
    assert facts.ctas_per_sm >= 2


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_largest_tiles_spill_nothing(arch: Architecture, residual: bool) -> None:
    assert facts_of(arch, 256, 1024, residual).spills == 0


def facts_of(arch: Architecture, channels: int, out_channels: int, residual: bool) -> BinaryFacts:
    """The binary for 64 maps of 28x28."""
    with torch.no_grad(), torch.device("meta"), fake_gpu(arch) as gpu:
        pixels = (64, channels, 28, 28)
        args = arguments(pixels, out_channels, 1, residual, "relu", torch.bfloat16)
        conv1x1_bn_act(**args, impl="triton")
    return binary_facts(gpu.kernels[0])


def test_batches_and_image_sizes_share_a_binary() -> None:
    def launched(batch: int, size: int) -> str:
        with torch.no_grad(), torch.device("meta"), record_launches(90) as recording:
            conv1x1_bn_act(**arguments((batch, 256, size, size), 128, 2), impl="triton")
        return recording.launches[0].specialization

    assert launched(64, 56) == launched(63, 57) == launched(512, 17)


def test_x_is_requested_once_for_all_columns_of_a_tile() -> None:
    args = arguments((2, 64, 9, 9), 32, dtype=torch.bfloat16)
    with torch.no_grad(), trace() as t:
        conv1x1_bn_act(**args, impl="triton")
    x = t.launches[0].tensors["x_ptr"]
    assert x.load.requested_bytes == x.load.unique_bytes


def test_large_residual_loses_no_precision() -> None:
    # adding the residual first would round every product to its last place
    args = arguments((1, 512, 2, 4), 32, residual=True)
    args["residual"] = args["residual"] + 1e4
    exact = exactly(args)
    assert max_error(run(args), exact) <= 2 * max_error(eager(args), exact)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_that_are_not_channels_last_are_as_accurate_as_eager(
    dtype: torch.dtype, stride: int
) -> None:
    args = arguments((2, 24, 7, 9), 40, stride, True, "relu", dtype)
    wide = torch.randn(2, 70, 20, 20).to(dtype)
    views = (
        args["x"].contiguous(),
        image(2, 48, 7, 9, dtype=dtype)[:, ::2],
        wide[:, 3:27, 5:12, 2:11],
        wide[:, 3:27, 5:14, 2:9].transpose(2, 3),
        args["x"][:1].expand(2, -1, -1, -1),
    )
    weights = torch.randn(24, 99).to(dtype) / 5
    args["weight"] = weights[:, 7:47].t()[:, :, None, None]
    args["bias"] = torch.randn(80).to(dtype)[::2]
    args["residual"] = args["residual"].contiguous()
    for view in views:
        args["x"] = view
        assert_right(args)


def test_channels_last_maps_are_not_copied() -> None:
    args = arguments((2, 16, 5, 5), 16, 1, True)
    with torch.no_grad(), record_launches() as recording:
        conv1x1_bn_act(**args, impl="triton")
    tensors = recording.launches[0].tensors
    for name in ("x", "residual", "weight", "bias"):
        assert tensors[f"{name}_ptr"].storage == args[name].untyped_storage()._cdata


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch_gives_an_empty_map(stride: int) -> None:
    args = arguments((0, 16, 7, 7), 24, stride, True, "relu", torch.bfloat16)
    with torch.no_grad(), interpret():
        y = conv1x1_bn_act(**args, impl="triton")
    assert y.shape == (0, 24, -(-7 // stride), -(-7 // stride))


@pytest.mark.parametrize(
    ("pixels", "stride"),
    [((700, 64, 224, 224), 1), ((700, 64, 224, 225), 2), ((1, 64, 6000, 6001), 2)],
    ids=["stride-1", "many-images", "huge-image"],
)
def test_offsets_beyond_32_bits_stay_in_bounds(
    pixels: tuple[int, int, int, int], stride: int
) -> None:
    y = (pixels[0], 64, *(-(-side // stride) for side in pixels[2:]))
    weight, bias = meta_image(64, 64, 1, 1), torch.empty(64, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        conv1x1_bn_act(
            meta_image(*pixels), weight, bias, stride=stride, residual=meta_image(*y), impl="triton"
        )
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("op", [conv1x1_bn_act, CUSTOM_OP], ids=["public", "custom"])
@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_and_exported_op_equals_eager(op: Any, stride: int) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            options = {"stride": stride, "residual": residual, "activation": "relu"}
            return op(x, weight, bias, **options)

    def inputs(batch: int) -> tuple[tuple[Tensor, ...], Tensor]:
        args = arguments((batch, 8, 5, 7), 12, stride, True, "relu")
        return tuple(args[name] for name in ("x", "weight", "bias", "residual")), eager(args)

    (small, want_small), (large, want_large) = inputs(2), inputs(7)
    compiled, exported = compiled_and_exported(Model(), small, (BATCH, None, None, BATCH))
    assert_equals_upstream(compiled(*small), want_small)
    assert_equals_upstream(exported(*large), want_large)


@pytest.mark.parametrize(
    ("pixels", "out_channels"),
    [
        ((2, 8, 5, 7), 12),
        ((3, 8, 1, 1), 12),
        ((1, 8, 5, 7), 1),
        ((2, 1, 1, 5), 1),
        ((0, 8, 5, 7), 4),
    ],
    ids=["map", "one-pixel", "one-channel", "one-row", "empty"],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_custom_op_passes_opcheck(
    pixels: tuple[int, int, int, int], out_channels: int, stride: int
) -> None:
    args = arguments(pixels, out_channels, stride, True, "relu")
    torch.library.opcheck(CUSTOM_OP, (), args)
    torch.library.opcheck(CUSTOM_OP, (), {**args, "residual": None, "activation": None})
    # sizes of 1: strides count as channels-last but differ from those of the fake
    args["x"] = args["x"].clone(memory_format=torch.contiguous_format)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
    with torch.no_grad(), interpret():
        launched = conv1x1_bn_act(**args, impl="triton")
    assert CUSTOM_OP(**args).stride() == CUSTOM_OP(**meta).stride() == launched.stride()


def test_gradients_equal_eager() -> None:
    args = arguments((2, 8, 5, 5), 8, 2, True, "relu")
    tensors = [v.requires_grad_() for v in args.values() if isinstance(v, Tensor)]
    got = torch.autograd.grad(conv1x1_bn_act(**args).square().sum(), tensors)
    want = torch.autograd.grad(eager(args).square().sum(), tensors)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_eager_leaves_its_inputs_unchanged(activation: str | None) -> None:
    args = arguments((2, 8, 5, 5), 8, 1, True, activation)
    before = copy.deepcopy(args)
    assert_equals_upstream(conv1x1_bn_act(**args, impl="eager"), eager(before))
    assert torch.equal(args["x"], before["x"])
    assert torch.equal(args["residual"], before["residual"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6, 5, 5)}, r"weight must be \[C, C_in, 1, 1\] .* and x \[6, 5, 5\]"),
        ({"weight": torch.ones(4, 7, 1, 1)}, r"weight must be .* got weight \[4, 7, 1, 1\]"),
        ({"weight": torch.ones(4, 6, 3, 3)}, r"weight must be .* got weight \[4, 6, 3, 3\]"),
        (
            {"weight": torch.ones(4, 6)},
            r"weight must be .* got weight \[4, 6\] and x \[2, 6, 5, 5\]",
        ),
        ({"bias": torch.ones(5)}, r"bias must be \[4\], got \[5\]"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"residual": torch.ones(2, 4, 5, 5)}, r"residual must be \[2, 4, 3, 3\], got \[2, 4, 5"),
        ({"activation": "tanh"}, r"activation must be None or one of \[.*\], got 'tanh'"),
    ],
    ids=["x", "channels", "kernel", "ndim", "bias", "stride", "residual", "activation"],
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    args = {**arguments((2, 6, 5, 5), 4, 2, True, "relu"), **change}
    with pytest.raises(ValueError, match=f"conv1x1_bn_act: {message}"):
        conv1x1_bn_act(**args)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("weight", torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        ("bias", torch.Tensor.bfloat16, "got bias in torch.bfloat16"),
        ("residual", lambda r: r.to("meta"), "all tensors on cpu, got residual on meta"),
        ("weight", lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "bias-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    args = arguments((1, 8, 3, 3), 4, 1, True)
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        conv1x1_bn_act(**args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    args = arguments((1, 8, 3, 3), 4)
    with pytest.raises(NotImplementedError, match="conv1x1_bn_act: .* CUDA or ROCm .* got cpu"):
        conv1x1_bn_act(**args, impl="triton")
