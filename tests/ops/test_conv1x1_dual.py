"""conv1x1_dual: its kernel against torch in float64, its addresses, and what it refuses."""

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

from fastbb_kernels import ACTIVATIONS, conv1x1_dual
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import (
    ARCHITECTURES,
    binary_facts,
    corners,
    fake_gpu,
    interpret,
    record_launches,
    trace,
)
from fastbb_kernels.triton_kernels import conv1x1_dual as kernel_module

OP = find_op("conv1x1_dual")
CUSTOM_OP = OP.custom_op

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(
    pixels: tuple[int, int, int, int],
    channels: int,
    out_channels: int,
    stride: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """`pixels`: shape of the shortcut."""
    batch, shortcut_channels, height, width = pixels
    fan_in = channels + shortcut_channels
    return (
        image(batch, channels, -(-height // stride), -(-width // stride), dtype=dtype),
        (torch.randn(out_channels, channels, 1, 1) * fan_in**-0.5).to(dtype),
        image(*pixels, dtype=dtype),
        (torch.randn(out_channels, shortcut_channels, 1, 1) * fan_in**-0.5).to(dtype),
        torch.randn(out_channels).to(dtype),
    )


def eager(args: Tensors, stride: int, activation: str | None = None) -> Tensor:
    x, weight, shortcut, shortcut_weight, bias = args
    y = F.conv2d(x, weight, bias) + F.conv2d(shortcut, shortcut_weight, stride=stride)
    return activated(y, activation)


def run(args: Tensors, stride: int, activation: str | None = None) -> Tensor:
    return run_traced(OP, *args, stride=stride, activation=activation)


def assert_right(args: Tensors, stride: int, activation: str | None = None) -> None:
    x, weight, shortcut, shortcut_weight, bias = (tensor.double() for tensor in args)
    exact = eager((x, weight, shortcut, shortcut_weight, bias), stride, activation)
    got = run(args, stride, activation)
    assert_as_accurate_as_eager("y", got, eager(args, stride, activation), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("pixels", "channels", "out_channels"),
    [
        ((2, 64, 7, 9), 64, 96),
        ((3, 128, 5, 11), 32, 64),
        ((1, 24, 11, 6), 40, 100),
        ((2, 33, 7, 7), 16, 17),
        ((1, 16, 1, 1), 32, 48),
        ((5, 1, 2, 3), 1, 1),
    ],
    ids=["same", "more", "eights", "odd", "one-pixel", "smallest"],
)
def test_kernel_is_as_accurate_as_upstream(
    pixels: tuple[int, int, int, int],
    channels: int,
    out_channels: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    x, _, shortcut, _, _ = arguments(pixels, channels, out_channels, stride, dtype)
    main = conv_and_norm(channels, out_channels, 1).to(dtype)
    projection = conv_and_norm(pixels[1], out_channels, stride).to(dtype)
    (weight, bias), (shortcut_weight, shortcut_bias) = folded(main), folded(projection)
    parameters = weight, shortcut_weight, bias + shortcut_bias
    weight, shortcut_weight, bias = (tensor.to(dtype) for tensor in parameters)
    upstream = F.relu(main(x) + projection(shortcut))
    exact = F.relu(main.double()(x.double()) + projection.double()(shortcut.double()))
    got = run((x, weight, shortcut, shortcut_weight, bias), stride, "relu")
    assert_as_accurate_as_eager("y", got, upstream, exact)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation_is_as_accurate_as_eager(activation: str | None) -> None:
    assert_right(arguments((1, 16, 5, 5), 16, 24, 2, torch.bfloat16), 2, activation)


def test_both_products_are_added_before_the_activation() -> None:
    x, weight, shortcut, shortcut_weight, bias = arguments((1, 16, 5, 7), 16, 8, 2)
    shortcut, shortcut_weight = shortcut.abs(), -50 * shortcut_weight.abs()
    y = run((x, weight, shortcut, shortcut_weight, bias), 2, "relu")
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("size", [(7, 5), (1, 9), (6, 7), (5, 8)], ids=str)
@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_starts_at_the_first_pixel_of_each_image(
    size: tuple[int, int], stride: int
) -> None:
    # every pixel holds its own number, and more images than one lie in a tile
    x, weight, shortcut, _, bias = arguments((5, 16, *size), 16, 16, stride)
    numbers = torch.arange(5 * size[0] * size[1]).view(5, 1, *size).float()
    shortcut = numbers.expand_as(shortcut).contiguous(memory_format=torch.channels_last)
    identity = torch.eye(16).view(16, 16, 1, 1)
    y = run((x, 0 * weight, shortcut, identity, 0 * bias), stride)
    assert torch.equal(y, shortcut[:, :, ::stride, ::stride])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launch_configs_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        kernel_module.launch_config(n_rows, 64, 256, False, dtype, False, arch)
        for n_rows in (10**6, 49)
    }
    assert len(configs) == 2
    for config in configs:
        monkeypatch.setattr(kernel_module, "launch_config", lambda *_, config=config: config)
        # two tiles each way, the second ones cut; the first one ends in the second image
        pixels = (2, 32, config.block_m // 2 + 1, 3)
        assert_right(arguments(pixels, 96, config.block_n + 16, 2, dtype), 2, "relu")


@pytest.mark.parametrize(
    ("arch", "tile", "ctas"),
    [(80, (256, 128), 1), (90, (256, 128), 1), (100, (128, 128), 2), ("gfx942", (128, 128), 2)],
)
def test_large_tiles_spill_nothing(arch: Architecture, tile: tuple[int, int], ctas: int) -> None:
    shapes = (64, 128, 28, 28), (512, 128, 1, 1), (64, 256, 56, 56), (512, 256, 1, 1)
    x, weight, shortcut, shortcut_weight = (
        meta_image(*shape, dtype=torch.bfloat16) for shape in shapes
    )
    bias = torch.empty(512, dtype=torch.bfloat16, device="meta")
    args = (x, weight, shortcut, shortcut_weight, bias)
    with torch.no_grad(), fake_gpu(arch) as gpu:
        conv1x1_dual(*args, stride=2, activation="relu", impl="triton")
    (launch,) = gpu.launches
    assert (launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"]) == tile
    facts = binary_facts(gpu.kernels[0])
    assert facts.spills == 0
    assert facts.ctas_per_sm >= ctas


def test_both_maps_are_requested_once_for_all_columns_of_a_tile() -> None:
    args = arguments((2, 64, 9, 9), 32, 32, 2, torch.bfloat16)
    with torch.no_grad(), trace() as t:
        conv1x1_dual(*args, stride=2, impl="triton")
    for name in ("x_ptr", "shortcut_ptr"):
        load = t.launches[0].tensors[name].load
        assert load.requested_bytes == load.unique_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_that_are_not_channels_last_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    args = arguments((2, 24, 7, 9), 40, 32, 2, dtype)
    wide = torch.randn(2, 70, 20, 20).to(dtype)
    weights = torch.randn(24, 99).to(dtype) / 8
    shortcut_weight = weights[:, 7:39].t()[:, :, None, None]
    views = (
        (args[0].contiguous(), args[2].contiguous()),
        (wide[:, 3:43, 4:8, 5:10], wide[:, 3:27, 5:12, 2:11]),
        (wide[:, 3:43, 5:10, 4:8].transpose(2, 3), wide[:, 3:27, 5:14, 2:9].transpose(2, 3)),
        (args[0][:1].expand(2, -1, -1, -1), image(2, 48, 7, 9, dtype=dtype)[:, ::2]),
    )
    for x, shortcut in views:
        assert_right((x, args[1], shortcut, shortcut_weight, args[4]), 2, "relu")


def test_channels_last_maps_are_not_copied() -> None:
    args = arguments((2, 16, 5, 5), 16, 16, 2)
    with torch.no_grad(), record_launches() as recording:
        conv1x1_dual(*args, stride=2, impl="triton")
    tensors = recording.launches[0].tensors
    for name, tensor in zip(("x", "weight", "shortcut", "shortcut_weight", "bias"), args):
        assert tensors[f"{name}_ptr"].storage == tensor.untyped_storage()._cdata


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch_gives_an_empty_map(stride: int) -> None:
    args = arguments((0, 16, 7, 7), 24, 32, stride, torch.bfloat16)
    with torch.no_grad(), interpret():
        y = conv1x1_dual(*args, stride=stride, impl="triton")
    assert y.shape == (0, 32, -(-7 // stride), -(-7 // stride))


@pytest.mark.parametrize(
    ("pixels", "stride"),
    [((700, 64, 224, 224), 1), ((700, 64, 224, 225), 2), ((1, 64, 6000, 6001), 2)],
    ids=["stride-1", "many-images", "huge-image"],
)
def test_offsets_beyond_32_bits_stay_in_bounds(
    pixels: tuple[int, int, int, int], stride: int
) -> None:
    x = meta_image(pixels[0], 64, *(-(-side // stride) for side in pixels[2:]))
    weight, bias = meta_image(64, 64, 1, 1), torch.empty(64, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        conv1x1_dual(x, weight, meta_image(*pixels), weight, bias, stride=stride, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("op", [conv1x1_dual, CUSTOM_OP], ids=["public", "custom"])
@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_and_exported_op_equals_eager(op: Any, stride: int) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return op(*args, stride=stride, activation="relu")

    # fixed maps: h = ceil(H / stride) relates the two, and only the batch is dynamic
    small, large = (arguments((batch, 8, 5, 7), 12, 16, stride) for batch in (2, 7))
    shapes = ((BATCH, None, BATCH, None, None),)
    compiled, exported = compiled_and_exported(Model(), small, shapes)
    assert_equals_upstream(compiled(*small), eager(small, stride, "relu"))
    assert_equals_upstream(exported(*large), eager(large, stride, "relu"))


@pytest.mark.parametrize(
    ("pixels", "out_channels"),
    [((2, 8, 5, 7), 12), ((3, 8, 1, 1), 12), ((1, 8, 5, 7), 1), ((0, 8, 5, 7), 4)],
    ids=["map", "one-pixel", "one-channel", "empty"],
)
def test_custom_op_passes_opcheck(pixels: tuple[int, int, int, int], out_channels: int) -> None:
    args = arguments(pixels, 16, out_channels, 2)
    torch.library.opcheck(CUSTOM_OP, (*args, 2, "relu"))
    # sizes of 1: strides count as channels-last but differ from those of the fake
    args = [tensor.clone(memory_format=torch.contiguous_format) for tensor in args]
    torch.library.opcheck(CUSTOM_OP, (*args, 2, None))
    on_meta = [tensor.to("meta") for tensor in args]
    with torch.no_grad(), interpret():
        launched = conv1x1_dual(*args, stride=2, impl="triton")
    assert CUSTOM_OP(*args, 2, None).stride() == launched.stride()
    assert CUSTOM_OP(*on_meta, 2, None).stride() == launched.stride()


def test_gradients_equal_eager() -> None:
    args = arguments((2, 8, 5, 5), 8, 6, 2)
    for tensor in args:
        tensor.requires_grad_()
    ours = conv1x1_dual(*args, stride=2, activation="relu")
    got = torch.autograd.grad(ours.square().sum(), args)
    want = torch.autograd.grad(eager(args, 2, "relu").square().sum(), args)
    for theirs, tensor in zip(want, got):
        assert torch.equal(tensor, theirs)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, (6, 5, 5), r"weight must be \[C, C_in, 1, 1\] .* and x \[6, 5, 5\]"),
        (1, (4, 6, 3, 3), r"weight must be .* got weight \[4, 6, 3, 3\]"),
        (2, (2, 8, 7, 5), r"shortcut must be \[2, C_s, H, W\] with .* = 3 .* got \[2, 8, 7, 5\]"),
        (2, (2, 8, 5, 4), r"shortcut must be .* ceil\(W / 2\) = 3, got \[2, 8, 5, 4\]"),
        (2, (1, 8, 5, 5), r"shortcut must be \[2, C_s, H, W\] .* got \[1, 8, 5, 5\]"),
        (2, (8, 5, 5), r"shortcut must be .* got \[8, 5, 5\]"),
        (3, (4, 7, 1, 1), r"shortcut_weight must be \[4, 8, 1, 1\], got \[4, 7, 1, 1\]"),
        (4, (5,), r"bias must be \[4\], got \[5\]"),
    ],
    ids=["x", "weight", "height", "width", "batch", "ndim", "shortcut_weight", "bias"],
)
def test_wrong_shapes_raise_value_error(index: int, change: tuple[int, ...], message: str) -> None:
    args = list(arguments((2, 8, 5, 5), 6, 4, 2))
    args[index] = torch.ones(change)
    with pytest.raises(ValueError, match=f"conv1x1_dual: {message}"):
        conv1x1_dual(*args, stride=2)


def test_wrong_options_raise_value_error() -> None:
    args = arguments((2, 8, 5, 5), 6, 4)
    with pytest.raises(ValueError, match="conv1x1_dual: stride must be at least 1, got 0"):
        conv1x1_dual(*args, stride=0)
    with pytest.raises(ValueError, match="conv1x1_dual: activation must be .*, got 'tanh'"):
        conv1x1_dual(*args, activation="tanh")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        (2, lambda s: s.to("meta"), "all tensors on cpu, got shortcut on meta"),
        (3, lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
        (4, torch.Tensor.bfloat16, "got bias in torch.bfloat16"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient", "bias-dtype"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    args = list(arguments((1, 8, 3, 3), 4, 4))
    args[index] = change(args[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        conv1x1_dual(*args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    args = arguments((1, 8, 3, 3), 4, 4)
    with pytest.raises(NotImplementedError, match="conv1x1_dual: .* CUDA or ROCm .* got cpu"):
        conv1x1_dual(*args, impl="triton")
