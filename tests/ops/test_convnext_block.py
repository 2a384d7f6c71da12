"""convnext_block: its kernel against transformers in float64, and what it refuses."""
# pyright: reportArgumentType=false
# arguments travel in dicts

import copy
from typing import Any

import pytest
import torch
from conv_reference import BATCH, DTYPES, compiled_and_exported, image, meta_image, run_traced
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, channels_last, nn

from fastbb_kernels import depthwise_conv_bn_act, mlp_block, use_impl
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.convnext_block import convnext_block
from fastbb_kernels.testing import (
    ARCHITECTURES,
    corners,
    interpret,
    record_launches,
    trace,
)
from fastbb_kernels.triton_kernels import convnext_block as kernel_module

OP = find_op("convnext_block")
CUSTOM_OP = OP.custom_op
NAMES = (
    "x", "conv_weight", "conv_bias", "norm_weight", "norm_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "scale",
)  # fmt: skip


def layer(
    channels: int, k: int = 7, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """transformers' ConvNextLayer with random weights."""
    convnext = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    made = convnext.ConvNextLayer(convnext.ConvNextConfig(**config), channels)
    made.dwconv = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)
    for parameter in made.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return made.requires_grad_(False).to(dtype)


def arguments_of(layer: Any, x: Tensor) -> dict[str, Any]:
    tensors = [
        tensor
        for module in (layer.dwconv, layer.layernorm, layer.pwconv1, layer.pwconv2)
        for tensor in (module.weight, module.bias)
    ]
    return dict(zip(NAMES, (x, *tensors, layer.layer_scale_parameter)))


def arguments(
    *shape: int, k: int = 7, hidden: int = 64, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The same without transformers."""
    channels = shape[1]
    tensors = (
        image(*shape),
        torch.randn(channels, 1, k, k) / k,
        *(torch.randn(channels) for _ in range(3)),
        torch.randn(hidden, channels) * channels**-0.5,
        torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        *(torch.randn(channels) for _ in range(2)),
    )
    return {name: tensor.to(dtype) for name, tensor in zip(NAMES, tensors)}


def run(args: dict[str, Any]) -> Tensor:
    return run_traced(OP, **args)


def assert_right(layer: nn.Module, x: Tensor, **options: Any) -> None:
    y = run(arguments_of(layer, x) | options)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_as_accurate_as_eager("y", y, layer(x), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 96, 9, 11),
        (3, 64, 5, 3),  # several images in a tile, a strip below the map
        (2, 32, 2, 13),  # lower than the kernel
        (1, 32, 12, 1),  # narrower
        (5, 32, 1, 1),
        (1, 192, 4, 4),
        (1, 256, 3, 5),
    ],
    ids=str,
)
def test_kernel_is_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(layer(shape[1], dtype=dtype), image(*shape, dtype=dtype) * 2 + 1)


@pytest.mark.parametrize("channels", [64, 96])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kernel_module.launch_config(10**6, channels, arch)._replace(compiler={})
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    # more strips than a program takes
    x = image(2, channels, 6, config.block_n // 2 - 3, dtype=torch.bfloat16)
    assert_right(layer(channels, dtype=torch.bfloat16), x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_pixels_get_small_tiles(arch: Architecture) -> None:
    few, many = (kernel_module.launch_config(n, 96, arch) for n in (8 * 3136, 64 * 3136))
    assert few.block_n < many.block_n


@pytest.mark.parametrize("k", [3, 5])
def test_other_kernels_are_as_accurate_as_eager(k: int) -> None:
    for dtype in DTYPES:
        assert_right(layer(32, k, dtype), image(2, 32, 7, 6, dtype=dtype))


@pytest.mark.parametrize("name", ["relu", "gelu_new"])
def test_activations_and_no_scale_are_as_accurate_as_eager(name: str) -> None:
    for dtype in DTYPES:
        unscaled = layer(32, dtype=dtype, hidden_act=name, layer_scale_init_value=0.0)
        assert_right(unscaled, image(1, 32, 5, 6, dtype=dtype), activation=name)


def test_eager_and_the_defaults_equal_upstream() -> None:
    upstream, x = layer(8), image(2, 8, 9, 10)
    assert_equals_upstream(convnext_block(**arguments_of(upstream, x)), upstream(x))
    quiet = layer(8)
    nn.init.zeros_(quiet.dwconv.bias)  # type: ignore[union-attr]  # it has one
    assert_equals_upstream(convnext_block(**arguments_of(quiet, 1e-3 * x)), quiet(1e-3 * x))


def test_eps_is_applied() -> None:
    args = arguments(1, 32, 4, 5) | {"conv_bias": torch.zeros(32)}
    args["x"] = 1e-3 * args["x"]
    for eps in (1e-6, 1e-3):
        assert_equals_upstream(run({**args, "eps": eps}), OP.eager(**args, eps=eps))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernel_rounds_as_the_kernels_of_its_ops(dtype: torch.dtype) -> None:
    args = arguments(2, 96, 9, 10, dtype=dtype)
    x, conv_weight, conv_bias, *mlp, scale = args.values()
    with torch.no_grad(), interpret():
        y = depthwise_conv_bn_act(x, conv_weight, conv_bias, impl="triton").permute(0, 2, 3, 1)
        options: Any = {"residual": x.permute(0, 2, 3, 1), "scale": scale, "eps": 1e-6}
        y = mlp_block(y, *mlp, **options, impl="triton").permute(0, 3, 1, 2)
    # a sum in another order rounds otherwise now and then; an unrounded map would in a third
    assert (run(args) != y).float().mean() < 0.01


def test_an_image_does_not_depend_on_others() -> None:
    args = arguments(4, 32, 3, 3)
    args["x"][2] = torch.nan
    y = run(args)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()
    assert torch.equal(run({**args, "x": args["x"][:1]})[0], y[0])


def test_views_and_no_biases_give_the_same_result() -> None:
    args = arguments(2, 32, 6, 5) | {"fc1_bias": torch.zeros(64), "fc2_bias": torch.zeros(32)}
    want = run(args)
    views = {name: torch.stack([tensor, tensor], -1)[..., 1] for name, tensor in args.items()} | {
        "fc1_bias": None,
        "fc2_bias": None,
    }
    fastest = args["conv_weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for change in (views, {"x": args["x"].contiguous()}, {"conv_weight": fastest}):
        with torch.no_grad(), interpret():
            y = convnext_block(**{**args, **change}, impl="triton")
        assert torch.equal(y, want) and y.is_contiguous(memory_format=channels_last)


def test_an_empty_batch_launches_nothing() -> None:
    with torch.no_grad(), trace() as t:
        y = convnext_block(**arguments(0, 32, 5, 6), impl="triton")
    assert y.shape == (0, 32, 5, 6) and t.launches == []


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    args = {name: tensor.to("meta") for name, tensor in arguments(1, 32, 1, 1).items()}
    for shape in ((2**14, 32, 65, 66), (1, 32, 8195, 8197)):
        with torch.no_grad(), trace(programs=corners, data=False) as t:
            convnext_block(**{**args, "x": meta_image(*shape)}, impl="triton")
        assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("custom", [False, True], ids=["public", "custom"])
def test_compiled_and_exported_op_equals_eager(custom: bool) -> None:
    class Model(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return CUSTOM_OP(*tensors, 1e-6, "gelu") if custom else convnext_block(*tensors)

    args = tuple(arguments(2, 8, 3, 4).values())
    compiled, exported = compiled_and_exported(Model(), args, ((BATCH, *[None] * 9),))
    for tensors in (args, (image(5, 8, 3, 4), *args[1:])):
        want = OP.eager(*tensors)
        assert torch.equal(compiled(*tensors), want) and torch.equal(exported(*tensors), want)


def test_custom_op_passes_opcheck_and_has_gradients() -> None:
    for shape in ((2, 8, 3, 4), (0, 8, 3, 4), (2, 8, 1, 1)):
        args = arguments(*shape)
        torch.library.opcheck(CUSTOM_OP, (*args.values(), 1e-6, "gelu"))
        without = {**args, "fc1_bias": None, "fc2_bias": None, "scale": None}
        torch.library.opcheck(CUSTOM_OP, (*without.values(), 1e-6, None))
    args = arguments(1, 4, 2, 3, k=3, hidden=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(convnext_block, [t.requires_grad_() for t in args.values()])


BLOCK = ["_convnext_block_fwd_kernel"]
SEPARATE = ["_depthwise_conv_bn_act_fwd_kernel", "_mlp_block_fwd_kernel"]
OWN = ("convnext_block",)


def meta_arguments(*shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    small = arguments(1, shape[1], 1, 1, hidden=4 * shape[1], dtype=dtype)
    return {n: t.to("meta") for n, t in small.items()} | {"x": meta_image(*shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("set_impl", "ops", "impl", "channels", "kernels"),
    [
        ("auto", (), None, 96, BLOCK),
        ("triton", (), None, 96, BLOCK),
        ("eager", (), None, 96, []),
        ("eager", (), "triton", 96, BLOCK),
        ("triton", (), "eager", 96, []),
        ("eager", OWN, None, 96, SEPARATE),
        ("eager", ("mlp_block",), None, 96, BLOCK),
        ("triton", (), None, 384, SEPARATE),
        ("auto", (), "auto", 384, SEPARATE),
        ("eager", (), None, 384, []),
    ],
    ids=str,
)
def test_impl_and_channels_decide_which_kernels_run(
    set_impl: Any, ops: tuple[str, ...], impl: Any, channels: int, kernels: list[str]
) -> None:
    args = meta_arguments(64, channels, 28, 28)
    with torch.no_grad(), use_impl(set_impl, ops=ops), record_launches() as recording:
        y = convnext_block(**args, impl=impl)
    assert [launch.name for launch in recording.launches] == kernels
    assert y.is_contiguous(memory_format=channels_last)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((1, 96, 96, 86), BLOCK),
        ((1, 96, 96, 85), SEPARATE),  # less than 8192 pixels
        ((9, 96, 30, 31), BLOCK),
        ((9, 96, 29, 32), SEPARATE),  # strips have 32 rows
    ],
    ids=str,
)
def test_auto_takes_the_kernel_where_it_pays(shape: tuple[int, ...], kernels: list[str]) -> None:
    for impl, expected in (("auto", kernels), ("triton", BLOCK)):
        with torch.no_grad(), record_launches() as recording:
            convnext_block(**meta_arguments(*shape), impl=impl)
        assert [launch.name for launch in recording.launches] == expected


@pytest.mark.parametrize(
    ("shape", "arch", "dtype", "message"),
    [
        ((64, 48, 28, 28), 90, torch.bfloat16, "multiple of 32 channels and .* got 48 and 192"),
        ((64, 256, 28, 28), 80, torch.bfloat16, "at most 192 channels on 80, got 256"),
        ((64, 288, 28, 28), 90, torch.bfloat16, "at most 256 channels on 90, got 288"),
        ((64, 96, 28, 28), 90, torch.float32, "needs fp16 or bf16"),
    ],
    ids=str,
)
def test_impl_triton_raises_the_reason_for_unsupported_calls(
    shape: tuple[int, ...], arch: Architecture, dtype: torch.dtype, message: str
) -> None:
    args = meta_arguments(*shape, dtype=dtype)
    message = f"convnext_block: impl='triton' cannot run this call: .*{message}"
    with record_launches(arch), torch.no_grad():
        with pytest.raises(NotImplementedError, match=message):
            convnext_block(**args, impl="triton")
        with use_impl("triton", ops=OWN), pytest.raises(NotImplementedError, match=message):
            convnext_block(**args)
        assert convnext_block(**args).shape == shape  # by the other ops


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("conv_weight", torch.Tensor.half, "got conv_weight in torch.float16"),
        ("conv_weight", lambda t: t.repeat(1, 1, 3, 3), r"needs k in \(3, 5, 7\), got 9"),
        ("scale", lambda t: t.to("meta"), "tensors on cpu, got scale on meta"),
        ("fc1_bias", lambda t: t.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "kernel-size", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(name: str, change: Any, message: str) -> None:
    args = arguments(1, 32, 2, 2, k=3)
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        convnext_block(**args, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 32)}, r"conv_weight must be \[C, 1, k, k\], .* and x \[6, 32\]"),
        ({"x": (1, 31, 4, 4)}, r"conv_weight must be .* and x \[1, 31, 4, 4\]"),
        ({"x": (1, 32, 0, 4)}, "x must have pixels, got 0x4"),
        ({"conv_weight": (32, 1, 4, 4)}, r"conv_weight must be .*, k odd, .* \[32, 1, 4, 4\]"),
        ({"conv_weight": (32, 1, 5, 7)}, r"conv_weight must be .* \[32, 1, 5, 7\]"),
        ({"conv_weight": (32, 32, 3, 3)}, r"conv_weight must be .* \[32, 32, 3, 3\]"),
        ({"conv_bias": (1, 32)}, r"conv_bias must be \[32\], got \[1, 32\]"),
        ({"norm_weight": (31,)}, r"norm_weight must be \[32\], got \[31\]"),
        ({"norm_bias": (1,)}, r"norm_bias must be \[32\], got \[1\]"),
        ({"fc1_weight": (64, 31)}, r"fc1_weight must be \[F, C\] .* got \[64, 31\]"),
        ({"fc1_bias": (32,)}, r"fc1_bias must be \[64\], got \[32\]"),
        ({"fc2_weight": (64, 32)}, r"fc2_weight must be \[32, 64\], got \[64, 32\]"),
        ({"fc2_bias": (64,)}, r"fc2_bias must be \[32\], got \[64\]"),
        ({"scale": (32, 1)}, r"scale must be \[32\], got \[32, 1\]"),
        ({"activation": "relu6"}, "activation must be None or one of .* got 'relu6'"),
    ],
    ids=str,
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = arguments(1, 32, 4, 4)
    for name, value in change.items():
        args[name] = torch.randn(value) if name in NAMES else value
    with pytest.raises(ValueError, match=f"convnext_block: {message}"):
        convnext_block(**args)
