"""stem_conv_bn_relu_pool: its kernel against upstream's modules in float64, and its addresses."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import triton
from conv_reference import BATCH, DTYPES, activated, compiled_and_exported, folded, run_traced
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, stem_conv_bn_relu_pool
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import ARCHITECTURES, binary_facts, corners, fake_gpu, interpret, trace
from fastbb_kernels.triton_kernels import stem_conv_bn_relu_pool as kernel_module
from fastbb_kernels.triton_kernels.config import GemmConfig

CHANNELS_LAST = torch.channels_last

OP = find_op("stem_conv_bn_relu_pool")
CUSTOM_OP = OP.custom_op


class Stem(nn.Module):
    """A stem as upstream builds it, whose batch norm has seen data."""

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 16,
        activation: str | None = "relu",
        pool: bool = True,
        normalization: tuple[list[float], list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation, self.pool, self.normalization = activation, pool, normalization
        with torch.no_grad():
            for name, tensor in self.norm.state_dict().items():
                if tensor.ndim:
                    tensor.copy_(torch.randn(channels) if "mean" in name or "bias" in name else 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.conv.weight.dtype
        if self.normalization is not None:
            exact = torch.promote_types(dtype, torch.float32)
            mean, std = (torch.tensor(v, dtype=exact)[:, None, None] for v in self.normalization)
            x = (x.to(exact) / 255 - mean) / std
        x = activated(self.norm(self.conv(x.to(dtype))), self.activation)
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pool else x

    def arguments(self, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the op's arguments, with the batch norm folded in."""
        weight, bias = (tensor.detach() for tensor in folded((self.conv, self.norm)))
        mean, std = self.normalization or (None, None)
        return {
            "pixel_values": x,
            "weight": weight.to(dtype, memory_format=CHANNELS_LAST),
            "bias": bias.to(dtype),
            "mean": mean,
            "std": std,
            "activation": self.activation,
            "pool": self.pool,
        }


def photo(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def run(arguments: dict[str, Any]) -> Tensor:
    return run_traced(OP, **arguments)


def assert_right(stem: Stem, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = run(stem.arguments(x, dtype))
    with torch.no_grad():
        eager, exact = deepcopy(stem).to(dtype)(x), deepcopy(stem).double()(x.double())
    assert_as_accurate_as_eager("y", y, eager, exact)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no-pool"])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((2, 3, 12, 16), 16),
        ((1, 3, 13, 18), 24),
        ((3, 1, 9, 11), 8),
        ((1, 4, 6, 7), 33),
        ((1, 2, 1, 1), 1),
    ],
    ids=["even", "odd", "grey", "four-channels", "one-pixel"],
)
def test_kernel_is_as_accurate_as_eager(
    shape: tuple[int, ...], channels: int, pool: bool, dtype: torch.dtype
) -> None:
    assert_right(Stem(shape[1], channels, pool=pool), torch.randn(shape).to(dtype), dtype)


@pytest.mark.parametrize("height", range(2, 10))
def test_every_pixel_is_read_at_every_size(height: int) -> None:
    for pool in (True, False):
        run(Stem(1, 4, pool=pool).arguments(torch.randn(1, 1, height, 11 - height), torch.float32))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_is_applied_before_the_pool(activation: str | None) -> None:
    assert_right(Stem(1, 8, activation), torch.randn(1, 1, 11, 14).bfloat16(), torch.bfloat16)


def every_config() -> list[tuple[torch.dtype, str, GemmConfig]]:
    """The tiles of every architecture."""
    chosen = (
        (dtype, activation, kernel_module.launch_config(1, 72, dtype, dtype, activation, arch))
        for arch in ARCHITECTURES
        for dtype in (torch.float32, torch.bfloat16)
        for activation in ("relu", "gelu")
    )
    return list(dict.fromkeys(chosen))


@pytest.mark.parametrize(("dtype", "activation", "config"), every_config(), ids=str)
def test_every_launch_config_is_as_accurate_as_eager(
    config: GemmConfig, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    # two tiles each way, the second ones cut; one of them ends in the second image
    assert_right(Stem(1, 72, activation), torch.randn(2, 1, 22, 22).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no-pool"])
def test_uint8_is_normalized_before_it_is_padded(pool: bool, dtype: torch.dtype) -> None:
    # a black border, or one of any uint8, is far from the zeros that upstream pads with
    stem = Stem(activation=None, pool=pool, normalization=([0.9, 0.1, 0.5], [0.1, 0.2, 0.3]))
    assert_right(stem, photo(2, 3, 9, 12), dtype)
    assert_right(stem, photo(1, 12, 9, 3).permute(0, 3, 2, 1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (10, 13), (11, 14), (1, 3)], ids=str)
def test_the_pool_ignores_padding(size: tuple[int, int], dtype: torch.dtype) -> None:
    stem = Stem(1, 8, activation=None)
    nn.init.constant_(stem.norm.bias, -50.0)  # where everything is negative, a zero would win
    assert assert_right(stem, torch.randn(1, 1, *size).to(dtype), dtype).max() < -1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pixels_in_other_layouts_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    stem = Stem()
    channels_last = torch.randn(2, 3, 9, 12).to(dtype, memory_format=CHANNELS_LAST)
    sliced = torch.randn(3, 5, 12, 17).to(dtype)[1:, 1:4, 2:11, 3:15:2]
    transposed = torch.randn(12, 9, 3, 2).to(dtype).permute(3, 2, 1, 0)
    for x in (channels_last, sliced, transposed):
        assert_right(stem, x, dtype)


def test_weights_in_other_layouts_give_the_same_result() -> None:
    arguments = Stem().arguments(torch.randn(1, 3, 9, 12).bfloat16(), torch.bfloat16)
    weight, bias = arguments["weight"], arguments["bias"]
    strided = torch.zeros(7, 16, 7, 5).to(weight).permute(1, 3, 0, 2)[:, 1:4].copy_(weight)
    spread = torch.zeros(16, 2).to(bias)[:, 1].copy_(bias)
    want = run(arguments)
    for change in ({"weight": weight.contiguous()}, {"weight": strided}, {"bias": spread}):
        assert torch.equal(run({**arguments, **change}), want)


def test_nan_and_infinity_spread_as_in_upstream() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 1, 26, 26)
        x[..., 12, 12:14] = value
        stem = Stem(1, 8)
        with torch.no_grad():
            want = stem(x)
        got = run(stem.arguments(x, torch.float32))
        assert want.isnan().any() and not want.isnan().all()
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no-pool"])
def test_empty_batch_gives_an_empty_map(pool: bool) -> None:
    arguments = Stem(pool=pool).arguments(torch.randn(0, 3, 9, 12).bfloat16(), torch.bfloat16)
    with torch.no_grad(), trace() as t:
        y = stem_conv_bn_relu_pool(**arguments, impl="triton")
    assert y.shape == ((0, 16, 3, 3) if pool else (0, 16, 5, 6))
    assert not t.launches


@pytest.mark.parametrize("channels_first", [False, True])
def test_offsets_beyond_32_bits_stay_in_bounds(channels_first: bool) -> None:
    batch = 2**30 // (64 * 64) + 2  # so that the last of three channels begins beyond
    x = torch.empty(batch, 3, 64, 64, device="meta")
    if channels_first:
        x = torch.empty(3, batch, 64, 64, device="meta").transpose(0, 1)
    weight, bias = torch.empty(32, 3, 7, 7, device="meta"), torch.empty(32, device="meta")
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        stem_conv_bn_relu_pool(x, weight, bias, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("arch", [80, "gfx942"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_strided_pixels_do_not_spill_registers(arch: Architecture, dtype: torch.dtype) -> None:
    if (arch, dtype) == (80, torch.bfloat16) and triton.__version__.startswith("3.6."):
        pytest.skip("triton 3.6 keeps 64 bytes of stack here")
    x = torch.empty(8, 224, 225, 3, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64, 3, 7, 7), (64,))
    )
    statistic = [0.5] * 3 if dtype == torch.uint8 else None
    with torch.no_grad(), fake_gpu(arch) as gpu:
        stem_conv_bn_relu_pool(x, weight, bias, mean=statistic, std=statistic, impl="triton")
    assert binary_facts(gpu.kernels[0]).spills == 0


@pytest.mark.parametrize("op", [stem_conv_bn_relu_pool, CUSTOM_OP], ids=["public", "custom"])
@pytest.mark.parametrize("normalization", [None, ([0.5] * 3, [0.2] * 3)], ids=["float", "uint8"])
def test_compiled_and_exported_op_equals_eager(op: Any, normalization: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean, std = normalization or (None, None)
            if op is CUSTOM_OP:
                return op(x, weight, bias, mean, std, "relu", True)
            return op(x, weight, bias, mean=mean, std=std)

    stem = Stem(normalization=normalization)
    small, large = (
        torch.randn(batch, 3, 9, 12) if normalization is None else photo(batch, 3, 9, 12)
        for batch in (2, 5)
    )
    _, weight, bias, *_ = stem.arguments(small, torch.float32).values()
    example = (small, weight, bias)
    compiled, exported = compiled_and_exported(Model(), example, (BATCH, None, None))
    for model, x in ((compiled, small), (exported, large)):
        want = stem_conv_bn_relu_pool(**stem.arguments(x, torch.float32))
        assert torch.equal(model(x, weight, bias), want)


@pytest.mark.parametrize(
    ("shape", "channels"),
    # the last ones where strides are ambiguous
    [
        ((2, 3, 9, 12), 8),
        ((0, 3, 9, 12), 8),
        ((2, 3, 9, 12), 1),
        ((2, 3, 1, 1), 8),
        ((1, 3, 4, 1), 1),
    ],
    ids=str,
)
def test_custom_op_passes_opcheck(shape: tuple[int, ...], channels: int) -> None:
    normalization = [0.5] * 3, [0.2] * 3
    for x, stem in (
        (torch.randn(shape), Stem(3, channels)),
        (photo(*shape), Stem(3, channels, None, False, normalization)),
    ):
        arguments = stem.arguments(x, torch.float32)
        torch.library.opcheck(CUSTOM_OP, tuple(arguments.values()))
        with interpret():
            launched = stem_conv_bn_relu_pool(**arguments, impl="triton")
        assert CUSTOM_OP(*arguments.values()).stride() == launched.stride()


def test_gradients_equal_torch() -> None:
    stem = Stem(activation="gelu").double()
    arguments = stem.arguments(torch.randn(2, 3, 9, 12).double(), torch.float64)
    inputs = [arguments[name].requires_grad_() for name in ("pixel_values", "weight", "bias")]
    x, weight, bias = inputs
    want = F.max_pool2d(F.gelu(F.conv2d(x, weight, bias, 2, 3)), 3, 2, 1)
    got = stem_conv_bn_relu_pool(**arguments)
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 2, 7, 7)}, r"weight must be .* got weight \[4, 2, 7, 7\] and"),
        (
            {"weight": torch.zeros(4, 3, 7, 5)},
            r"weight must be \[C, C_in, 7, 7\] .* \[4, 3, 7, 5\]",
        ),
        ({"pixel_values": torch.zeros(3, 8, 8)}, r"weight must be .* pixel_values \[3, 8, 8\]"),
        (
            {"pixel_values": torch.zeros(1, 3, 0, 8)},
            r"pixel_values must have .* pixels, got \[1, 3",
        ),
        ({"bias": torch.zeros(5)}, r"bias must be \[4\], got \[5\]"),
        ({"activation": "tanh"}, r"activation must be None or one of .* got 'tanh'"),
        ({"mean": [0.5] * 3}, r"mean must be None for pixel_values in torch.float32"),
        ({"pixel_values": photo(1, 3, 8, 8)}, r"mean must have 3 numbers for uint8 .* got None"),
        (
            {"pixel_values": photo(1, 3, 8, 8), "mean": [0.5] * 3, "std": [0.5]},
            r"std must have 3 numbers for uint8 pixel_values, got \[0.5\]",
        ),
        (
            {"pixel_values": photo(1, 3, 8, 8), "mean": [0.5] * 3, "std": [0.5, 0.0, 1.0]},
            r"std must not contain 0, got \[0.5, 0.0, 1.0\]",
        ),
    ],
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    arguments = Stem(3, 4).arguments(torch.zeros(1, 3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=f"stem_conv_bn_relu_pool: {message}"):
        stem_conv_bn_relu_pool(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3, 7, 7).half()}, "got weight in torch.float16"),
        ({"bias": torch.zeros(4).bfloat16()}, "got bias in torch.bfloat16"),
        ({"weight": torch.zeros(4, 3, 7, 7, device="meta")}, "got weight on meta"),
        ({"weight": torch.zeros(4, 3, 7, 7, requires_grad=True)}, "a gradient is needed"),
        (
            {"pixel_values": torch.zeros(1, 5, 8, 8), "weight": torch.zeros(4, 5, 7, 7)},
            "needs at most 4 channels of pixels, got 5",
        ),
        (
            {
                "pixel_values": photo(1, 3, 8, 8),
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "weight": torch.zeros(4, 3, 7, 7, device="meta"),
            },
            "got weight on meta",
        ),
    ],
)
def test_impl_triton_refuses_unsupported_tensors(change: dict[str, Any], message: str) -> None:
    arguments = Stem(3, 4).arguments(torch.zeros(1, 3, 8, 8), torch.float32)
    with interpret(), pytest.raises(NotImplementedError, match=message):
        stem_conv_bn_relu_pool(**{**arguments, **change}, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    arguments = Stem(3, 4).arguments(torch.zeros(1, 3, 8, 8), torch.float32)
    with pytest.raises(NotImplementedError, match="CUDA or ROCm .* got cpu"):
        stem_conv_bn_relu_pool(**arguments, impl="triton")
