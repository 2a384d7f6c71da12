"""depthwise_conv_bn_act: its kernel against upstream's modules in float64, and what it refuses."""

from typing import Any

import pytest
import torch
from conv_reference import (
    BATCH,
    DTYPES,
    ConvReference,
    activated,
    compiled_and_exported,
    folded,
    image,
    meta_image,
    run_traced,
)
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, channels_last, nn

from fastbb_kernels import ACTIVATIONS, depthwise_conv_bn_act
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
from fastbb_kernels.triton_kernels import depthwise_conv_bn_act as kernel_module

OP = find_op("depthwise_conv_bn_act")
CUSTOM_OP = OP.custom_op


class Reference(ConvReference):
    def __init__(
        self,
        channels: int,
        k: int,
        dtype: torch.dtype = torch.float32,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: str | None = None,
    ) -> None:
        padding = dilation * (k // 2)
        conv = nn.Conv2d(
            channels, channels, k, stride, padding, dilation, groups=channels, bias=False
        )
        norm = nn.BatchNorm2d(channels)
        options = {"stride": stride, "dilation": dilation}
        super().__init__(conv, norm, dtype=dtype, activation=activation, **options)

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Returns the op's arguments, with the norm folded in float64."""
        weight, bias = (tensor.to(x.dtype) for tensor in folded(self.block))
        return {"x": x, "weight": weight, "bias": bias, **self.options}


def some_arguments(*shape: int, k: int = 3, **options: Any) -> dict[str, Any]:
    return Reference(shape[1], k, **options).arguments(image(*shape))


def run(args: dict[str, Any]) -> Tensor:
    return run_traced(OP, **args)


def assert_right(reference: Reference, x: Tensor) -> None:
    y = run(reference.arguments(x))
    assert_as_accurate_as_eager("y", y, reference(x), reference.exactly(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "stride"),
    [
        ((2, 24, 9, 11), 3, 1),
        ((1, 33, 8, 7), 5, 2),
        ((3, 72, 7, 7), 5, 1),
        ((2, 16, 14, 5), 3, 2),
        ((1, 8, 10, 9), 7, 1),
        ((1, 20, 9, 12), 7, 2),
        ((2, 1, 5, 6), 3, 1),
        ((2, 8, 1, 1), 3, 2),
        ((1, 8, 1, 9), 5, 1),
    ],
    ids=str,
)
def test_kernel_is_as_accurate_as_eager(
    shape: tuple[int, ...], k: int, stride: int, dtype: torch.dtype
) -> None:
    reference = Reference(shape[1], k, dtype, stride=stride, activation="silu")
    assert_right(reference, image(*shape, dtype=dtype))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation_is_as_accurate_as_eager(activation: str | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        reference = Reference(8, 3, dtype, activation=activation)
        assert_right(reference, image(1, 8, 5, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("k", "stride", "dilation"),
    # strides and dilations that leave pixels out, and windows larger than the map
    [(3, 1, 2), (3, 2, 2), (5, 1, 3), (3, 4, 1), (5, 4, 2), (3, 3, 3), (7, 1, 4), (3, 20, 1)],
)
def test_strides_and_dilations_are_as_accurate_as_eager(k: int, stride: int, dilation: int) -> None:
    assert_right(Reference(8, k, stride=stride, dilation=dilation), image(2, 8, 13, 10))


@pytest.mark.parametrize("channels", [16, 32, 40, 96])
def test_every_channel_tile_is_as_accurate_as_eager(channels: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(Reference(channels, 3, dtype), image(1, channels, 6, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_memory_formats_and_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    reference = Reference(8, 3, dtype, stride=2)
    views = (
        torch.randn(2, 8, 7, 6).to(dtype),
        image(2, 20, 9, 11, dtype=dtype)[:, 3:11, 1:8, 2:8],
        image(2, 16, 7, 12, dtype=dtype)[:, ::2, :, ::2],
        torch.randn(6, 7, 8, 2).to(dtype).permute(3, 2, 1, 0),
        image(1, 8, 7, 6, dtype=dtype).expand(2, -1, -1, -1),
        image(4, 8, 7, 6, dtype=dtype)[1:3],
    )
    for x in views:
        assert_right(reference, x)


def test_weights_and_bias_of_any_strides_give_the_same_result() -> None:
    args = some_arguments(1, 8, 6, 5, k=5)
    weight, bias = args["weight"], args["bias"]
    want = run(args)
    for view in (
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        weight.to(memory_format=channels_last),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
        weight.repeat(2, 3, 1, 1)[:8, 1:2],
        weight.repeat_interleave(2, 0)[::2],
    ):
        assert torch.equal(run({**args, "weight": view}), want)
    assert torch.equal(run({**args, "bias": bias.repeat_interleave(2)[::2]}), want)


def test_channels_last_maps_and_weights_are_not_copied() -> None:
    x = meta_image(2, 24, 6, 5)
    weight = torch.empty(3, 3, 1, 24, device="meta").permute(3, 2, 0, 1)
    with torch.no_grad(), record_launches() as recording:
        depthwise_conv_bn_act(x, weight, weight[:, 0, 0, 0], impl="triton")
    (launch,) = recording.launches
    storages = [launch.tensors[name].storage for name in ("x_ptr", "weight_ptr")]
    assert storages == [tensor.untyped_storage()._cdata for tensor in (x, weight)]


def test_nan_in_one_image_leaves_the_others_unchanged() -> None:
    x = image(3, 8, 4, 4)
    x[0::2] = torch.nan
    x[1] = 0.0
    args = Reference(8, 5).arguments(x)
    assert torch.equal(run(args)[1], args["bias"][:, None, None].expand(8, 4, 4))


def test_nan_and_infinity_spread_as_in_eager() -> None:
    args = some_arguments(1, 8, 9, 9, activation="relu")
    args["x"][0, 2, 4, 4], args["x"][0, 5, 0, 8] = torch.nan, torch.inf
    got, want = run(args), OP.eager(**args)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want.isnan().any() and want.isinf().any()


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch_gives_an_empty_map(stride: int) -> None:
    reference = Reference(8, 3, stride=stride)
    x = image(0, 8, 5, 6)
    with torch.no_grad(), trace() as t:
        y = depthwise_conv_bn_act(**reference.arguments(x), impl="triton")
    assert y.shape == reference(x).shape
    assert t.launches == []


@pytest.mark.parametrize(
    "shape",
    [(2**19, 32, 16, 16), (1, 64, 6, 2**23), (2**20, 8, 96, 128)],
    ids=["images", "map", "strips"],
)
def test_offsets_beyond_32_bits_stay_in_bounds(shape: tuple[int, ...]) -> None:
    x = meta_image(*shape)
    weight, bias = torch.empty(shape[1], 1, 3, 3, device="meta"), x.new_empty(shape[1])
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        depthwise_conv_bn_act(x, weight, bias, activation="silu", impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_a_thread_loads_128_bits_and_a_pixel_once_per_column(arch: Architecture) -> None:
    # 72 channels: a multiple of 8, but not of the 16 that Triton looks for
    x, weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((64, 72, 28, 28), (72, 1, 3, 3), (72,))
    )
    with torch.no_grad(), fake_gpu(arch) as gpu:
        depthwise_conv_bn_act(x, weight, bias, activation="silu", impl="triton")
    facts = binary_facts(gpu.kernels[0])
    rows = gpu.launches[0].constexprs["ROWS"]
    # in the loop over columns rows + 2 pixels and 3 weights; the bias; the strip
    assert facts.wide_accesses == (rows + 2) + 3 + 1 + rows
    assert facts.medium_accesses == facts.narrow_accesses == facts.spills == 0


@pytest.mark.parametrize("arch", [None, *ARCHITECTURES])
def test_tiles_fill_the_channels(arch: Architecture | None) -> None:
    for channels, block in ((16, 16), (32, 32), (64, 64), (144, 32), (240, 64), (1152, 64)):
        config = kernel_module.launch_config(channels, torch.bfloat16, arch)
        assert (config.block_c, config.block_n * config.block_c) == (block, 1024)


@pytest.mark.parametrize("op", [depthwise_conv_bn_act, CUSTOM_OP], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_eager(op: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return op(x, weight, bias, **options)

    options = {"stride": 2, "dilation": 1, "activation": "hardswish"}
    small, large = (some_arguments(n, 6, 7, 5, k=5, **options) for n in (2, 7))
    tensors = [tuple(args[name] for name in ("x", "weight", "bias")) for args in (small, large)]
    compiled, exported = compiled_and_exported(Model(), tensors[0], (BATCH, None, None))
    assert torch.equal(compiled(*tensors[0]), OP.eager(**small))
    assert torch.equal(exported(*tensors[1]), OP.eager(**large))


@pytest.mark.parametrize(
    "shape", [(2, 8, 5, 6), (2, 8, 1, 1), (3, 1, 4, 5), (1, 1, 1, 1), (0, 8, 5, 6)], ids=str
)
def test_custom_op_passes_opcheck(shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape), image(*shape)):
        args = Reference(shape[1], 3, stride=2, activation="silu").arguments(x)
        torch.library.opcheck(CUSTOM_OP, tuple(args.values()))
        y = CUSTOM_OP(*args.values())
        with torch.no_grad(), interpret():
            assert depthwise_conv_bn_act(**args, impl="triton").stride() == y.stride()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradients_equal_torch(activation: str | None) -> None:
    args = some_arguments(2, 4, 5, 6, activation=activation)
    inputs = [args[name].requires_grad_() for name in ("x", "weight", "bias")]
    got = torch.autograd.grad(depthwise_conv_bn_act(**args).square().sum(), inputs)
    want = activated(nn.functional.conv2d(*inputs, padding=1, groups=4), activation)
    for ours, theirs in zip(got, torch.autograd.grad(want.square().sum(), inputs)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (5, 1, 3, 3)}, r"weight must be \[C, 1, k, k\], k odd, .* weight \[5, 1, 3, 3"),
        ({"weight": (4, 2, 3, 3)}, r"weight must be .* got weight \[4, 2, 3, 3\]"),
        ({"weight": (4, 1, 3, 5)}, r"weight must be .* got weight \[4, 1, 3, 5\]"),
        ({"weight": (4, 1, 2, 2)}, r"weight must be .* k odd, .* got weight \[4, 1, 2, 2\]"),
        ({"weight": (4, 9)}, r"weight must be .* got weight \[4, 9\] and x \[2, 4, 6, 7\]"),
        ({"x": (4, 6, 7)}, r"weight must be .* and x \[4, 6, 7\]"),
        ({"x": (2, 4, 0, 7)}, "x must have pixels, got 0x7"),
        ({"bias": (5,)}, r"bias must be \[4\], got \[5\]"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"activation": "softmax"}, "activation must be None or one of .* got 'softmax'"),
    ],
    ids=str,
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    shapes = {"x": (2, 4, 6, 7), "weight": (4, 1, 3, 3), "bias": (4,)}
    args = {name: torch.randn(change.get(name, shape)) for name, shape in shapes.items()}
    options = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError, match=f"depthwise_conv_bn_act: {message}"):
        depthwise_conv_bn_act(**args, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("weight", torch.Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        ("bias", lambda b: b.to("meta"), "all tensors on cpu, got bias on meta"),
        ("weight", lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
        ("weight", lambda w: w.repeat(1, 1, 3, 3), r"needs k in \(3, 5, 7\), got 9"),
        ("weight", lambda w: w[..., 1:2, 1:2], r"needs k in \(3, 5, 7\), got 1"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient", "9x9", "1x1"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    args = some_arguments(1, 4, 5, 5)
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        depthwise_conv_bn_act(**args, impl="triton")


def test_eager_runs_any_odd_kernel_size() -> None:
    for k in (1, 9):
        reference = Reference(4, k, torch.float64)
        x = image(2, 4, 6, 5, dtype=torch.float64)
        torch.testing.assert_close(depthwise_conv_bn_act(**reference.arguments(x)), reference(x))


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="depthwise_conv_bn_act: .* ROCm .* got cpu"):
        depthwise_conv_bn_act(**some_arguments(1, 4, 5, 5), impl="triton")
