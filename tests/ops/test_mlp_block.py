"""mlp_block: its kernel against timm in float64, its addresses, and what it refuses."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportPrivateImportUsage=false
# upstream types the children of its modules as tensors, and arguments travel in dicts

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS, mlp_block, use_impl
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import ARCHITECTURES, corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels import mlp_block as kernel_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("mlp_block")
CUSTOM_OP = OP.custom_op

NAMES = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
ADDED = ("residual", "scale")


class Reference:
    """The MLP half of a block as timm computes it."""

    def __init__(
        self,
        channels: int = 32,
        hidden: int | None = None,
        dtype: torch.dtype = torch.float32,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        mlp = Mlp(channels, hidden or 4 * channels, act_layer=activation)
        self.block = nn.Sequential(nn.LayerNorm(channels), mlp)
        for parameter in self.block.parameters():
            nn.init.normal_(
                parameter, std=1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            )
        self.block.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x + self.block(x)

    def exactly(self, x: Tensor) -> Tensor:
        double = copy.copy(self)
        double.block = copy.deepcopy(self.block).double()
        return double(x.double())

    def arguments(self, x: Tensor) -> dict[str, Any]:
        norm, mlp = self.block
        tensors = (
            x, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        )  # fmt: skip
        return {name: tensor.detach() for name, tensor in zip(NAMES, tensors)}


def arguments(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (5,)) -> dict[str, Any]:
    return Reference(dtype=dtype).arguments(torch.randn(*rows, 32).to(dtype))


def run(kwargs: dict[str, Any]) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = mlp_block(**kwargs, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_mlp_block_fwd_kernel"]
    t.assert_written_once("y_ptr")
    tensors = {name: value for name, value in kwargs.items() if name in (*NAMES, *ADDED)}
    assert t.unique_bytes == OP.n_bytes(**tensors)
    assert y.is_contiguous()
    return y


def assert_right(reference: Reference, x: Tensor) -> None:
    y = run(reference.arguments(x))
    assert_as_accurate_as_eager("y", y, reference(x), reference.exactly(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"),
    [((2, 3, 7), 96, 384), ((1,), 32, 64), ((130,), 64, 192), ((3,), 256, 64)],
    ids=["swin-t", "one-row", "rows-over", "wide"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], channels: int, hidden: int, dtype: torch.dtype
) -> None:
    x = torch.randn(*rows, channels).to(dtype) * 2 + 1
    assert_right(Reference(channels, hidden, dtype), x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launch_configs_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kernel_module.launch_config(10**6, 64, arch)._replace(compiler={})
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)
    x = torch.randn(config.block_m + 3, 64).bfloat16()
    assert_right(Reference(64, 128, torch.bfloat16), x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_rows_get_small_tiles(arch: Architecture) -> None:
    few, many = (kernel_module.launch_config(n, 96, arch) for n in (3136, 64 * 3136))
    assert few.block_m < many.block_m


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_every_activation_equals_eager(name: str | None) -> None:
    args = arguments() | {"activation": name}
    exact = {key: args[key].double() for key in NAMES}
    y = OP.eager(**exact, activation=name)
    assert_equals_upstream(run(args).double(), y)


def test_the_default_activation_is_exact_gelu() -> None:
    reference, x = Reference(), torch.randn(9, 32)
    with torch.no_grad():
        assert_equals_upstream(mlp_block(**reference.arguments(x)), reference(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [32, 96, 384])
def test_another_residual_and_a_layer_scale_are_as_accurate_as_eager(
    channels: int, dtype: torch.dtype
) -> None:
    reference, x = Reference(channels, 64, dtype), torch.randn(2, 5, channels).to(dtype)
    residual = torch.randn(5, 2, channels).to(dtype).transpose(0, 1)  # a view with gaps
    scale = torch.randn(channels, 2).to(dtype)[:, 0]

    def upstream(block: nn.Module, x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        return residual + scale * block(x)  # as transformers' ConvNextLayer

    with torch.no_grad():
        eager = upstream(reference.block, x, residual, scale)
        doubles = (tensor.double() for tensor in (x, residual, scale))
        exact = upstream(copy.deepcopy(reference.block).double(), *doubles)
    args = reference.arguments(x) | {"residual": residual, "scale": scale}
    contiguous = args | {"residual": residual.contiguous(), "scale": scale.contiguous()}
    assert_as_accurate_as_eager("y", run(contiguous), eager, exact)
    with torch.no_grad(), interpret():
        assert torch.equal(mlp_block(**args, impl="triton"), run(contiguous))
        ones = torch.ones_like(scale)
        unscaled, by_ones = (
            mlp_block(**{**args, "scale": one}, impl="triton") for one in (None, ones)
        )
    assert torch.equal(unscaled, by_ones)


def test_without_biases_equals_eager() -> None:
    args = arguments() | {"fc1_bias": None, "fc2_bias": None}
    assert_equals_upstream(run(args), OP.eager(**args))


def test_large_mean_loses_no_precision() -> None:
    reference, x = Reference(), 100 + 0.01 * torch.randn(7, 32)
    exact = reference.exactly(x)
    assert max_error(run(reference.arguments(x)), exact) <= 2 * max_error(reference(x), exact)


def test_eps_is_applied() -> None:
    args = arguments() | {"x": 1e-2 * torch.randn(4, 32)}
    for eps in (1e-5, 1e-3):
        assert_equals_upstream(run({**args, "eps": eps}), OP.eager(**args, eps=eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views_give_the_same_result(dtype: torch.dtype) -> None:
    args = arguments(dtype)
    views = {
        name: torch.cat([value, value], -1).unflatten(-1, (2, -1)).movedim(-2, 0)[1]
        for name, value in args.items()
        if name != "x"
    }
    columns = torch.randn(33, 70).to(dtype).t()[3:23, 1:]  # channels 70 apart
    sliced = torch.randn(20, 99).to(dtype)[:, 7:39]  # rows of 99
    copied = torch.randn(4, 9, 2, 77).to(dtype)[:, 3:8, 1, 5:37]  # rows at two strides
    for x in (columns, sliced.view(4, 5, 32), copied):
        with torch.no_grad(), trace() as t:
            y = mlp_block(**{**args, **views, "x": x}, impl="triton")
        t.assert_written_once("y_ptr")
        assert torch.equal(y, run({**args, "x": x.contiguous()}))
        assert y.is_contiguous()


@pytest.mark.parametrize("rows", [(0,), (2, 0, 7), ()], ids=str)
def test_no_rows_and_a_single_vector_equal_upstream(rows: tuple[int, ...]) -> None:
    reference, x = Reference(), torch.randn(*rows, 32)
    with torch.no_grad(), interpret():
        y = mlp_block(**reference.arguments(x), impl="triton")
    assert_equals_upstream(y, reference(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits_stay_in_bounds(transposed: bool) -> None:
    x = torch.empty(2**31 // 32 + 100, 32, device="meta")
    x = x.t().contiguous().t() if transposed else x
    args = {name: value.to("meta") for name, value in arguments().items()}
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        mlp_block(**{**args, "x": x}, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("custom", [False, True], ids=["public", "custom"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_compiled_and_exported_op_equals_eager(custom: bool, biases: bool) -> None:
    args = arguments(rows=(2, 5))
    if not biases:
        args |= {"fc1_bias": None, "fc2_bias": None}

    class Model(nn.Module):
        def forward(self, *tensors: Tensor | None) -> Tensor:
            if custom:
                return CUSTOM_OP(*tensors, None, None, 1e-5, "gelu", False)
            return mlp_block(*tensors)  # type: ignore[arg-type]  # as they come

    tensors = [args[name] for name in NAMES]
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, *[None] * (len(NAMES) - 1)),)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Model(), tuple(tensors), dynamic_shapes=shapes).module()
    for x in (tensors[0], torch.randn(7, 5, 32)):
        want = OP.eager(x, *tensors[1:])
        assert torch.equal(compiled(x, *tensors[1:]), want)
        assert torch.equal(exported(x, *tensors[1:]), want)


def test_custom_op_passes_opcheck() -> None:
    for args in (
        arguments(rows=(2, 5)),
        arguments(torch.bfloat16) | {"fc1_bias": None, "fc2_bias": None},
        arguments(rows=(0, 5)),
        arguments() | {"x": torch.randn(3, 2, 32).transpose(0, 1)},
    ):
        tensors, x = [args[name] for name in NAMES], args["x"]
        added = torch.randn_like(x), torch.randn(32, dtype=x.dtype)
        torch.library.opcheck(CUSTOM_OP, (*tensors, *added, 1e-5, "gelu", False))
        assert CUSTOM_OP(*tensors, added[0], None, 1e-5, None, True).is_contiguous()


def test_gradients_equal_upstream() -> None:
    reference, x = Reference(dtype=torch.float64), torch.randn(4, 32).double()
    args = reference.arguments(x)
    leaves = [args[name].requires_grad_() for name in NAMES]
    got = torch.autograd.grad(mlp_block(**args).square().sum(), leaves)
    upstream_x = x.detach().clone().requires_grad_()
    y = upstream_x + reference.block(upstream_x)
    want = torch.autograd.grad(y.square().sum(), [upstream_x, *reference.block.parameters()])
    assert_equals_upstream(got, want)


BLOCK = ["_mlp_block_fwd_kernel"]
SEPARATE = ["_layer_norm_linear_fwd_kernel", "_linear_residual_fwd_kernel"]
OWN = ("mlp_block",)


@pytest.mark.parametrize(
    ("set_impl", "ops", "impl", "channels", "kernels"),
    [
        ("auto", (), None, 32, BLOCK),
        ("triton", (), None, 32, BLOCK),
        ("eager", (), None, 32, []),
        ("eager", (), "triton", 32, BLOCK),
        ("triton", (), "eager", 32, []),
        ("eager", OWN, None, 32, SEPARATE),
        ("eager", ("linear_residual",), None, 32, BLOCK),
        ("triton", (), None, 512, SEPARATE),
        ("eager", (), "auto", 512, SEPARATE),
        ("eager", (), None, 512, []),
    ],
    ids=str,
)
def test_impl_and_channels_decide_which_kernels_run(
    set_impl: Any, ops: tuple[str, ...], impl: Any, channels: int, kernels: list[str]
) -> None:
    x = torch.randn(2048, channels).bfloat16()
    args = Reference(channels, dtype=torch.bfloat16).arguments(x)
    with torch.no_grad(), use_impl(set_impl, ops=ops), record_launches() as recording:
        mlp_block(**args, impl=impl)
    assert [launch.name for launch in recording.launches] == kernels


@pytest.mark.parametrize(("n_rows", "kernels"), [(2048, BLOCK), (2047, SEPARATE)])
def test_few_rows_run_the_separate_kernels(n_rows: int, kernels: list[str]) -> None:
    args = Reference(32, dtype=torch.bfloat16).arguments(torch.randn(n_rows, 32).bfloat16())
    with torch.no_grad(), record_launches() as recording:
        mlp_block(**args)
        mlp_block(**args, impl="triton")
    assert [launch.name for launch in recording.launches] == [*kernels, *BLOCK]


def test_exports_hold_no_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    args = Reference(32, dtype=torch.bfloat16).arguments(torch.randn(5, 32).bfloat16())
    with torch.no_grad(), record_launches() as recording:
        mlp_block(**args)
    assert [launch.name for launch in recording.launches] == BLOCK


@pytest.mark.parametrize(
    ("n_rows", "added", "kernels"),
    [(8192, True, BLOCK), (8191, True, SEPARATE), (8192, False, SEPARATE)],
    ids=["many-rows", "few-rows", "no-residual"],
)
def test_wide_blocks_of_convnext_with_many_rows_are_one_kernel(
    n_rows: int, added: bool, kernels: list[str]
) -> None:
    shapes = ((n_rows, 384), (384,), (384,), (1536, 384), (1536,), (384, 1536), (384,))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    options = {"residual": tensors[0].clone(), "scale": tensors[1]} if added else {}
    for arch, expected in ((90, kernels), (80, SEPARATE)):
        with torch.no_grad(), record_launches(arch) as recording:
            mlp_block(*tensors, **options)
        assert [launch.name for launch in recording.launches] == expected


@pytest.mark.parametrize(
    ("channels", "hidden", "message"),
    [
        (512, 64, "at most 256 channels on 90, got 512"),
        (48, 64, "multiple of 32 channels and of 64 hidden channels, got 48 and 64"),
        (32, 96, "multiple of 32 channels and of 64 hidden channels, got 32 and 96"),
    ],
)
def test_impl_triton_raises_the_reason_for_unsupported_shapes(
    channels: int, hidden: int, message: str
) -> None:
    x = torch.randn(5, channels).bfloat16()
    args = Reference(channels, hidden, torch.bfloat16).arguments(x)
    message = f"mlp_block: impl='triton' cannot run this call: .*{message}"
    with record_launches(), torch.no_grad():
        with pytest.raises(NotImplementedError, match=message):
            mlp_block(**args, impl="triton")
        with use_impl("triton", ops=OWN), pytest.raises(NotImplementedError, match=message):
            mlp_block(**args)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("fc2_weight", torch.Tensor.half, "got fc2_weight in torch.float16"),
        ("fc1_bias", lambda t: t.to("meta"), "tensors on cpu, got fc1_bias on meta"),
        ("norm_weight", lambda t: t.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "weight-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    args = arguments()
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        mlp_block(**args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    message = "mlp_block: impl='triton' .* CUDA or ROCm device, got cpu"
    with pytest.raises(NotImplementedError, match=message):
        mlp_block(**arguments(), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ()}, r"fc1_weight must be \[F, C\] .* and x \[\]"),
        ({"fc1_weight": (128, 31)}, r"fc1_weight must be \[F, C\] .* fc1_weight \[128, 31\]"),
        ({"fc1_weight": (32,)}, r"fc1_weight must be \[F, C\] .* fc1_weight \[32\]"),
        ({"norm_weight": (31,)}, r"norm_weight must be \[32\] .* got \[31\]"),
        ({"norm_bias": (1, 32)}, r"norm_bias must be \[32\] .* got \[1, 32\]"),
        ({"fc1_bias": (32,)}, r"fc1_bias must be \[128\]"),
        ({"fc2_weight": (128, 32)}, r"fc2_weight must be \[32, 128\] .* got \[128, 32\]"),
        ({"fc2_bias": (128,)}, r"fc2_bias must be \[32\]"),
        ({"scale": (1, 32)}, r"scale must be \[32\] .* got \[1, 32\]"),
        ({"residual": (1, 32)}, r"residual must be \[5, 32\], got \[1, 32\]"),
        ({"activation": "relu6"}, "activation must be None or one of .* got 'relu6'"),
    ],
)
def test_wrong_arguments_raise_value_error(change: dict[str, Any], message: str) -> None:
    args = arguments()
    for name, value in change.items():
        args[name] = torch.randn(value) if name in (*NAMES, *ADDED) else value
    with pytest.raises(ValueError, match=f"mlp_block: {message}"):
        mlp_block(**args)
