"""conv3x3_bn_act: its kernel against upstream's modules in float64, and what it refuses."""

from typing import Any

import pytest
import torch
from conv_reference import (
    BATCH,
    DTYPES,
    ConvReference,
    compiled_and_exported,
    folded,
    image,
    meta_image,
    run_traced,
)
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, conv3x3_bn_act
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import ARCHITECTURES, binary_facts, corners, fake_gpu, interpret, trace
from fastbb_kernels.triton_kernels import conv3x3_bn_act as kernel_module
from fastbb_kernels.triton_kernels.config import GemmConfig

OP = find_op("conv3x3_bn_act")
CUSTOM_OP = OP.custom_op


class Reference(ConvReference):
    def __init__(
        self,
        channels: int = 16,
        out_channels: int = 16,
        dtype: torch.dtype = torch.float32,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: str | None = "relu",
    ) -> None:
        conv = nn.Conv2d(channels, out_channels, 3, stride, dilation, dilation=dilation, bias=False)
        norm = nn.BatchNorm2d(out_channels)
        options = {"stride": stride, "dilation": dilation}
        super().__init__(conv, norm, dtype=dtype, activation=activation, **options)

    def arguments(self, x: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
        """Returns the op's arguments, with the norm folded in float64."""
        weight, bias = (tensor.to(x.dtype) for tensor in folded(self.block))
        tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
        return {**tensors, **self.options}


def arguments(
    shape: tuple[int, int, int, int] = (2, 5, 6, 7),
    out_channels: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = True,
    **options: Any,
) -> dict[str, Any]:
    reference = Reference(shape[1], out_channels, dtype, **options)
    x = image(*shape, dtype=dtype)
    return reference.arguments(x, torch.randn_like(reference(x)) if residual else None)


def positional(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the custom op."""
    names = ("x", "weight", "bias", "stride", "dilation", "residual", "activation")
    return tuple(kwargs[name] for name in names)


def run(kwargs: dict[str, Any]) -> Tensor:
    return run_traced(OP, **kwargs)


def assert_right(reference: Reference, x: Tensor, residual: bool = False) -> None:
    tensors = [x]
    if residual:
        tensors.append(torch.randn_like(reference(x)))
    y = run(reference.arguments(*tensors))
    assert_as_accurate_as_eager("y", y, reference(*tensors), reference.exactly(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        ((2, 16, 9, 7), 24),
        ((1, 33, 5, 4), 17),
        ((3, 64, 7, 7), 64),
        ((1, 40, 1, 1), 8),
        ((2, 8, 1, 11), 3),
        ((1, 1, 2, 3), 1),
    ],
    ids=["plain", "odd", "res5", "one-pixel", "one-row", "smallest"],
)
def test_kernel_is_as_accurate_as_eager(
    shape: tuple[int, int, int, int], out_channels: int, dtype: torch.dtype
) -> None:
    assert_right(Reference(shape[1], out_channels, dtype), image(*shape, dtype=dtype), True)


@pytest.mark.parametrize("dilation", [1, 2, 4, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strides_and_dilations_are_as_accurate_as_eager(stride: int, dilation: int) -> None:
    for size in (8, 9, 10):
        reference = Reference(8, 8, stride=stride, dilation=dilation)
        assert_right(reference, image(2, 8, size, 11))


@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation_is_as_accurate_as_eager(activation: str | None, residual: bool) -> None:
    reference = Reference(8, 8, torch.bfloat16, activation=activation)
    assert_right(reference, image(1, 8, 5, 5, dtype=torch.bfloat16), residual)


def test_relu_keeps_nan() -> None:
    x = torch.full((1, 4, 2, 2), torch.nan)
    assert run(Reference(4, 4).arguments(x)).isnan().all()


def every_config(dtype: torch.dtype) -> list[GemmConfig]:
    """The tiles of every architecture, for many and for few pixels and channels."""
    sizes = ((10**6, 512), (10**6, 64), (10**4, 64), (49, 64))
    chosen = (
        kernel_module.launch_config(n_rows, 64, out_channels, dtype, arch)
        for arch in ARCHITECTURES
        for n_rows, out_channels in sizes
    )
    return list(dict.fromkeys(chosen))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(dtype, c) for dtype in (torch.float32, torch.bfloat16) for c in every_config(dtype)],
    ids=str,
)
def test_every_launch_config_is_as_accurate_as_eager(
    config: GemmConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.num_warps == 4  # such loops have miscompiled with 8
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    # two tiles each way and two steps per tap, the second ones cut; two images in the first tile
    channels = config.block_k + 8
    x = image(2, channels, 2, config.block_m // 4 + 2, dtype=dtype)
    assert_right(Reference(channels, config.block_n + 8, dtype), x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_pixels_get_small_tiles(arch: Architecture) -> None:
    def area(batch: int) -> int:
        config = kernel_module.launch_config(49 * batch, 512, 512, torch.bfloat16, arch)
        return config.block_m * config.block_n

    assert area(1) < area(64) <= area(1024)


@pytest.mark.parametrize("channels", [40, 48])
def test_channel_counts_between_tile_sizes_do_not_spill(channels: int) -> None:
    x, weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((64, channels, 56, 56), (160, channels, 3, 3), (160,))
    )
    with torch.no_grad(), fake_gpu(90) as gpu:
        conv3x3_bn_act(x, weight, bias, activation="relu", impl="triton")
    assert binary_facts(gpu.kernels[0]).spills == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_strides_give_the_same_result(dtype: torch.dtype) -> None:
    def at(name: str, view: Tensor) -> Tensor:
        """The argument `name`, with the strides of a view."""
        return view.copy_(kwargs[name])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    kwargs = arguments((3, 12, 6, 5), 20, dtype)
    want = run(kwargs)
    for views in (
        {name: kwargs[name].contiguous() for name in ("x", "weight", "residual")},
        {"x": at("x", empty(3, 12, 5, 6).mT), 
         "residual": at("residual", empty(6, 3, 5, 20).permute(1, 3, 0, 2))},
        {"x": at("x", empty(5, 24, 6, 9)[1:4, ::2, :, 2:7]), "bias": at("bias", empty(40)[::2])},
        {"weight": at("weight", empty(20, 12, 6, 3)[:, :, ::2])},
    ):  # fmt: skip
        assert torch.equal(run({**kwargs, **views}), want)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_empty_batch_gives_an_empty_map(impl: Any) -> None:
    kwargs = arguments((0, 5, 6, 7), 4, stride=2)
    with torch.no_grad(), interpret():
        assert conv3x3_bn_act(**kwargs, impl=impl).shape == (0, 4, 3, 4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2**13, 64, 64, 65), (1, 64, 5800, 5801)], ids=["many", "large"])
def test_offsets_beyond_32_bits_stay_in_bounds(shape: tuple[int, ...], stride: int) -> None:
    residual = meta_image(shape[0], 64, *(-(-size // stride) for size in shape[2:]))
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        conv3x3_bn_act(
            meta_image(*shape),
            meta_image(64, 64, 3, 3),
            torch.empty(64, device="meta"),
            stride=stride,
            residual=residual,
            impl="triton",
        )
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("custom", [False, True], ids=["public", "custom"])
@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
def test_compiled_and_exported_op_equals_eager(custom: bool, residual: bool) -> None:
    class Model(nn.Module):
        def forward(
            self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
        ) -> Tensor:
            if custom:
                return CUSTOM_OP(x, weight, bias, 2, 1, residual, "relu")
            return conv3x3_bn_act(x, weight, bias, stride=2, residual=residual, activation="relu")

    def inputs(batch: int) -> tuple[Any, ...]:
        kwargs = arguments((batch, 5, 6, 7), stride=2, residual=residual)
        return tuple(kwargs[name] for name in ("x", "weight", "bias", "residual"))

    small, large = inputs(2), inputs(7)
    shapes = (BATCH, None, None, BATCH if residual else None)
    compiled, exported = compiled_and_exported(Model(), small, shapes)
    for model, (x, weight, bias, other) in ((compiled, small), (exported, large)):
        want = OP.eager(x, weight, bias, stride=2, residual=other, activation="relu")
        assert torch.equal(model(x, weight, bias, other), want)


def test_custom_op_passes_opcheck() -> None:
    for kwargs in (
        arguments(dilation=2),
        arguments((1, 5, 3, 3), stride=2, dtype=torch.bfloat16, residual=False),
        arguments((2, 3, 1, 1), 1),  # where strides are ambiguous
        arguments((0, 5, 6, 7)),
    ):
        for x in (kwargs["x"], kwargs["x"].contiguous()):
            torch.library.opcheck(CUSTOM_OP, positional({**kwargs, "x": x}))


def test_gradients_equal_torch() -> None:
    kwargs = arguments((1, 3, 4, 5), 2)
    tensors = [kwargs[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    x, weight, bias, residual = tensors
    want = (F.conv2d(x, weight, bias, padding=1) + residual).relu()
    for ours, theirs in zip(
        torch.autograd.grad(conv3x3_bn_act(**kwargs).square().sum(), tensors),
        torch.autograd.grad(want.square().sum(), tensors),
    ):
        assert max_error(ours, theirs) <= 1e-5


def test_eager_runs_fp64_and_leaves_its_residual_unchanged() -> None:
    kwargs = arguments(dtype=torch.float64)
    before = kwargs["residual"].clone()
    assert conv3x3_bn_act(**kwargs).dtype == torch.float64
    assert torch.equal(kwargs["residual"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(4, 6, 3, 3)}, r"weight must be \[C, C_in, 3, 3\] .*\[4, 6, 3, 3\]"),
        ({"weight": torch.randn(4, 5, 1, 1)}, r"got weight \[4, 5, 1, 1\] and x \[2, 5, 6, 7\]"),
        ({"x": torch.randn(5, 6, 7)}, r"and x \[5, 6, 7\]"),
        ({"bias": torch.randn(5)}, r"bias must be \[4\], got \[5\]"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": -1}, "dilation must be at least 1, got -1"),
        ({"stride": 2}, r"residual must be \[2, 4, 3, 4\], got \[2, 4, 6, 7\]"),
        ({"activation": "tanh"}, r"activation must be None or one of \[.*\], got 'tanh'"),
    ],
    ids=["channels", "kernel", "x-ndim", "bias", "stride", "dilation", "residual", "activation"],
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"conv3x3_bn_act: .*{message}"):
        conv3x3_bn_act(**{**arguments(), **change})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("weight", Tensor.half, "all tensors in torch.float32, got weight in torch.float16"),
        ("bias", Tensor.bfloat16, "got bias in torch.bfloat16"),
        ("residual", lambda r: r.to("meta"), "all tensors on cpu, got residual on meta"),
        ("weight", lambda w: w.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "bias-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    kwargs = arguments()
    kwargs[name] = change(kwargs[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        conv3x3_bn_act(**kwargs, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(NotImplementedError, match="conv3x3_bn_act: .* CUDA or ROCm .* got cpu"):
        conv3x3_bn_act(**arguments(), impl="triton")
