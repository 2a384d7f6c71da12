"""swin_attention_block: its kernel against timm and torchvision, its addresses, what it refuses."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportPrivateImportUsage=false
# upstream types the children of its modules as tensors, and arguments travel in dicts

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import WindowGeometry, relative_position_index, use_impl
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.swin_attention_block import swin_attention_block
from fastbb_kernels.testing import corners, interpret, record_launches, trace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OP = find_op("swin_attention_block")
CUSTOM_OP = OP.custom_op
PLAIN = None, -100.0, False  # no cosines, the usual mask, the norm first

NAMES = (
    "x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "bias", "proj_weight", "proj_bias",
)  # fmt: skip


class Reference:
    """The attention half of a block of timm, which rolls before it pads, or of torchvision."""

    def __init__(
        self,
        channels: int = 32,
        num_heads: int = 2,
        window: tuple[int, int] = (7, 7),
        shift: tuple[int, int] = (0, 0),
        roll_first: bool = False,
        qkv_bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.options: dict[str, Any] = {
            "num_heads": num_heads,
            "geometry": WindowGeometry(window, shift, roll_first),
        }
        if roll_first:
            from timm.models.swin_transformer import SwinTransformerBlock as TimmBlock

            self.block = TimmBlock(
                channels, (56, 56), num_heads, window_size=window, shift_size=shift,
                qkv_bias=qkv_bias, dynamic_mask=True,
            )  # fmt: skip
            self.block.shift_size = (
                shift  # (timm drops the shift of an axis that one window covers)
            )
        else:
            from torchvision.models.swin_transformer import SwinTransformerBlock

            self.block = SwinTransformerBlock(channels, num_heads, [*window], [*shift])
        for name, parameter in self.block.named_parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else channels**-0.5)
            if "norm" in name or "table" in name:
                nn.init.normal_(parameter)
        self.block.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        attention = self.block._attn if hasattr(self.block, "_attn") else self.block.attn
        with torch.no_grad():
            return x + attention(self.block.norm1(x))

    def exactly(self, x: Tensor) -> Tensor:
        double = copy.copy(self)
        double.block = copy.deepcopy(self.block).double()
        return double(x.double())

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Arguments of our op; columns of the bias that it must not use are NaN."""
        norm, attention = self.block.norm1, self.block.attn
        window = self.options["geometry"].window
        n_tokens = window[0] * window[1]
        index = relative_position_index(window, torch.device("cpu"))
        bias = attention.relative_position_bias_table[index].view(n_tokens, n_tokens, -1)
        bias = F.pad(bias.permute(2, 0, 1), (0, -n_tokens % 16), value=float("nan"))
        tensors = (
            x, norm.weight, norm.bias, attention.qkv.weight, attention.qkv.bias, bias,
            attention.proj.weight, attention.proj.bias,
        )  # fmt: skip
        detached = [None if tensor is None else tensor.detach() for tensor in tensors]
        return {**dict(zip(NAMES, detached)), **self.options}


def arguments(dtype: torch.dtype = torch.float32, batch: int = 1, **options: Any) -> dict[str, Any]:
    return Reference(**options, dtype=dtype).arguments(torch.randn(batch, 8, 9, 32).to(dtype))


def run(kwargs: dict[str, Any]) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = swin_attention_block(**kwargs, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_swin_attention_block_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(**kwargs)
    assert y.is_contiguous()
    return y


def assert_right(reference: Reference, x: Tensor) -> None:
    y = run(reference.arguments(x))
    assert_as_accurate_as_eager("y", y, reference(x), reference.exactly(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
def test_padded_and_shifted_map_is_as_accurate_as_upstream(
    roll_first: bool, dtype: torch.dtype
) -> None:
    reference = Reference(shift=(3, 3), roll_first=roll_first, dtype=dtype)
    assert_right(reference, torch.randn(2, 9, 13, 32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_swin_t_are_as_accurate_as_upstream(dtype: torch.dtype) -> None:
    assert_right(Reference(96, 3, dtype=dtype), torch.randn(1, 7, 7, 96).to(dtype) * 2 + 1)


@pytest.mark.parametrize(
    ("size", "shift", "roll_first"),
    [
        ((14, 14), (3, 3), False),
        ((14, 8), (0, 2), False),
        ((1, 1), (0, 0), False),
        ((3, 5), (3, 3), True),
        ((10, 7), (3, 0), True),
    ],
    ids=["whole-windows", "one-axis", "one-token", "below-a-window", "padded-rows"],
)
def test_map_sizes_and_shifts_are_as_accurate_as_upstream(
    size: tuple[int, int], shift: tuple[int, int], roll_first: bool
) -> None:
    reference = Reference(shift=shift, roll_first=roll_first, dtype=torch.bfloat16)
    assert_right(reference, torch.randn(1, *size, 32).bfloat16())


@pytest.mark.parametrize(
    ("channels", "num_heads", "window"),
    [(32, 2, (4, 4)), (64, 1, (8, 8)), (64, 2, (2, 5)), (96, 6, (1, 1))],
    ids=["16-tokens", "64-tokens-head-64", "rectangular", "one-token-six-heads"],
)
def test_other_windows_and_heads_are_as_accurate_as_upstream(
    channels: int, num_heads: int, window: tuple[int, int]
) -> None:
    reference = Reference(channels, num_heads, window, dtype=torch.float16)
    assert_right(reference, torch.randn(1, window[0] + 1, window[1], channels).half())


def test_padded_shifted_map_without_biases_equals_eager() -> None:
    x = torch.randn(1, 5, 9, 32)
    args = arguments(window=(4, 3), shift=(1, 2)) | {"x": x, "qkv_bias": None, "proj_bias": None}
    exact = {name: value.double() if name in NAMES and value is not None else value
             for name, value in args.items()}  # fmt: skip
    assert_equals_upstream(run(args).double(), OP.eager(**exact))


def test_large_mean_loses_no_precision() -> None:
    reference, x = Reference(), 100 + 0.01 * torch.randn(1, 7, 7, 32)
    exact = reference.exactly(x)
    assert max_error(run(reference.arguments(x)), exact) <= 2 * max_error(reference(x), exact)


def test_eps_is_applied() -> None:
    args = arguments() | {"x": 1e-2 * torch.randn(1, 7, 7, 32)}
    for eps in (1e-5, 1e-3):
        y = run({**args, "eps": eps})
        assert_equals_upstream(y, OP.eager(**args, eps=eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views_give_the_same_result(dtype: torch.dtype) -> None:
    args = arguments(dtype)
    wide = torch.randn(2, 21, 19, 77).to(dtype)
    channels_first = torch.randn(1, 33, 9, 11).to(dtype)
    views = {
        name: torch.cat([value, value], -1).unflatten(-1, (2, -1)).movedim(-2, 0)[1]
        for name, value in args.items()
        if name in NAMES[1:]
    }
    for x in (wide[1:, 1:19:2, 3:12, 5:69:2], channels_first[:, 1:].permute(0, 2, 3, 1)):
        with torch.no_grad(), trace() as t:
            y = swin_attention_block(**{**args, **views, "x": x}, impl="triton")
        t.assert_written_once("y_ptr")
        assert torch.equal(y, run({**args, "x": x.contiguous()}))
        assert y.is_contiguous()


@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 7)], ids=str)
def test_empty_map_gives_an_empty_result(size: tuple[int, int, int]) -> None:
    with torch.no_grad(), interpret():
        y = swin_attention_block(**arguments() | {"x": torch.randn(*size, 32)}, impl="triton")
    assert y.shape == (*size, 32)


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    x = torch.empty(2**31 // (32 * 49 * 49) + 1, 49, 49, 32, device="meta")
    args = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in arguments(shift=(3, 3)).items()
    }
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        swin_attention_block(**{**args, "x": x}, impl="triton")
    assert [launch.n_programs for launch in t.launches] == [2]
    large = args | {"x": torch.empty(1, 8192, 8192, 32, device="meta")}
    with torch.no_grad(), interpret(), pytest.raises(NotImplementedError, match=r"2\*\*31 elem"):
        swin_attention_block(**large, impl="triton")


@pytest.mark.parametrize("custom", [False, True], ids=["public", "custom"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_compiled_and_exported_op_equals_eager(custom: bool, biases: bool) -> None:
    small, large = arguments(shift=(3, 3)), torch.randn(5, 8, 9, 32)
    if not biases:
        small |= {"qkv_bias": None, "proj_bias": None}
    options = {name: small[name] for name in ("num_heads", "geometry")}

    class Model(nn.Module):
        def forward(self, *tensors: Tensor | None) -> Tensor:
            if custom:
                geometry = [7, 7], [3, 3], False
                return CUSTOM_OP(*tensors, options["num_heads"], *geometry, 1e-5, *PLAIN)
            return swin_attention_block(*tensors, **options)  # type: ignore[arg-type]  # as they come

    tensors = [small[name] for name in NAMES]
    tensors[0] = torch.randn(2, 8, 9, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch}, *[None] * (len(NAMES) - 1)),)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Model(), tuple(tensors), dynamic_shapes=shapes).module()
    for x in (tensors[0], large):
        want = OP.eager(x, *tensors[1:], **options)
        assert torch.equal(compiled(x, *tensors[1:]), want)
        assert torch.equal(exported(x, *tensors[1:]), want)


def test_custom_op_passes_opcheck() -> None:
    for args in (
        arguments(shift=(3, 3)),
        arguments(torch.bfloat16) | {"qkv_bias": None, "proj_bias": None},
        arguments(batch=0),
        arguments() | {"x": torch.randn(1, 32, 7, 7).permute(0, 2, 3, 1)},
    ):
        geometry = args["geometry"]
        tensors = [args[name] for name in NAMES]
        options = args["num_heads"], *geometry, 1e-5
        torch.library.opcheck(CUSTOM_OP, (*tensors, *options, *PLAIN))
        scale = tensors[0].new_ones(args["num_heads"])
        assert CUSTOM_OP(*tensors, *options, scale, -200.0, True).is_contiguous()


def test_gradients_equal_upstream() -> None:
    reference, x = Reference(shift=(3, 3)), torch.randn(1, 9, 9, 32, requires_grad=True)
    args = reference.arguments(x)
    leaves = {name: args[name].requires_grad_() for name in NAMES if name != "x"}
    got = torch.autograd.grad(
        swin_attention_block(**{**args, "x": x}).square().sum(), [x, *leaves.values()]
    )
    block = reference.block.double()
    exact_x = x.detach().double().requires_grad_()
    y = exact_x + block.attn(block.norm1(exact_x))
    (want,) = torch.autograd.grad(y.square().sum(), [exact_x])
    assert_equals_upstream(got[0].double(), want)
    assert all(gradient.abs().max() > 0 for gradient in got)


BLOCK = ["_swin_attention_block_fwd_kernel"]
SEPARATE = [
    "_layer_norm_linear_fwd_kernel",
    "_window_attention_fwd_kernel",
    "_linear_residual_fwd_kernel",
]
OWN = ("swin_attention_block",)
LARGE = {"window": (9, 9)}  # more than the block's kernel takes
FEW = {"batch": 7}  # 28 windows


@pytest.mark.parametrize(
    ("set_impl", "ops", "impl", "options", "kernels"),
    [
        ("auto", (), None, {}, BLOCK),
        ("auto", (), None, FEW, SEPARATE),
        ("triton", (), None, FEW, BLOCK),
        ("triton", (), None, {}, BLOCK),
        ("eager", (), None, {}, []),
        ("eager", (), "triton", {}, BLOCK),
        ("eager", (), "auto", {}, BLOCK),
        ("triton", (), "eager", {}, []),
        ("eager", OWN, None, {}, SEPARATE),
        ("eager", OWN, "triton", {}, BLOCK),
        ("eager", ("window_attention",), None, {}, BLOCK),
        ("auto", (), None, LARGE, SEPARATE),
        ("triton", (), None, LARGE, SEPARATE),
        ("auto", OWN, None, LARGE, SEPARATE),
        ("eager", (), "auto", LARGE, SEPARATE),
        ("eager", (), None, LARGE, []),
    ],
    ids=str,
)
def test_impl_and_shape_decide_which_kernels_run(
    set_impl: Any, ops: tuple[str, ...], impl: Any, options: dict, kernels: list[str]
) -> None:
    args = arguments(torch.bfloat16, **{"batch": 8, **options})
    with torch.no_grad(), use_impl(set_impl, ops=ops), record_launches() as recording:
        swin_attention_block(**args, impl=impl)
    assert [launch.name for launch in recording.launches] == kernels


def test_impl_triton_raises_the_reason_for_unsupported_shapes() -> None:
    args = arguments(torch.bfloat16, **LARGE)
    message = "swin_attention_block: .* windows of at most 64 tokens, got 81"
    with record_launches(), torch.no_grad():
        with pytest.raises(NotImplementedError, match=message):
            swin_attention_block(**args, impl="triton")
        with use_impl("triton", ops=OWN), pytest.raises(NotImplementedError, match=message):
            swin_attention_block(**args)
        # a call that no op can run: the message is that of the block
        exact = {name: args[name].double() for name in NAMES}
        with (
            use_impl("triton"),
            pytest.raises(NotImplementedError, match="layer_norm_linear: .* got torch.float64"),
        ):
            swin_attention_block(**{**args, **exact})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        ("bias", torch.Tensor.half, "all tensors in torch.float32, got bias in torch.float16"),
        ("proj_bias", lambda t: t.to("meta"), "tensors on cpu, got proj_bias on meta"),
        ("qkv_weight", lambda t: t.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "bias-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    args = arguments()
    args[name] = change(args[name])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        swin_attention_block(**args, impl="triton")


@pytest.mark.parametrize(
    ("channels", "num_heads", "message"),
    [(32, 4, "head dimension of .*, got 8"), (48, 3, "multiple of 32 channels, got 48")],
)
def test_impl_triton_refuses_unsupported_channels(
    channels: int, num_heads: int, message: str
) -> None:
    args = Reference(channels, num_heads).arguments(torch.randn(1, 7, 7, channels))
    with interpret(), torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        swin_attention_block(**args, impl="triton")


def test_impl_triton_refuses_cpu_tensors() -> None:
    message = "swin_attention_block: impl='triton' .* CUDA or ROCm device, got cpu"
    with pytest.raises(NotImplementedError, match=message):
        swin_attention_block(**arguments(), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (7, 7, 32)}, r"x must be \[B, H, W, C\], got \[7, 7, 32\]"),
        ({"num_heads": 3}, r"A divisible by num_heads=3, got \[96, 32\]"),
        ({"num_heads": 0}, "divisible by num_heads=0"),
        ({"norm_weight": (31,)}, r"norm_weight must be \[32\] for x .*, got \[31\]"),
        ({"norm_bias": (1,)}, r"norm_bias must be \[32\]"),
        ({"qkv_weight": (32, 96)}, r"qkv_weight must be \[3A, C\] .* got \[32, 96\]"),
        ({"qkv_weight": (96, 31)}, r"qkv_weight must be \[96, 32\] .* got \[96, 31\]"),
        ({"qkv_bias": (32,)}, r"qkv_bias must be \[96\]"),
        ({"proj_weight": (32, 31)}, r"proj_weight must be \[32, 32\]"),
        ({"proj_bias": (96,)}, r"proj_bias must be \[32\]"),
        ({"bias": (2, 49, 48)}, r"bias must be \[2, 49, at least 49\] .* got \[2, 49, 48\]"),
        ({"bias": (49, 49)}, r"bias must be \[2, 49, at least 49\]"),
        ({"geometry": WindowGeometry((8, 8))}, r"bias must be \[2, 64, at least 64\]"),
        ({"geometry": WindowGeometry((0, 7))}, "at least 1x1, got 0x7"),
        ({"geometry": WindowGeometry((7, 7), (7, 0))}, r"below the window 7x7, got \(7, 0\)"),
        ({"geometry": WindowGeometry((7, 7), (0, -1))}, r"at least 0 .* got \(0, -1\)"),
    ],
)
def test_wrong_shapes_raise_value_error(change: dict[str, Any], message: str) -> None:
    args = arguments() | {"x": torch.randn(1, 7, 7, 32)}
    for name, value in change.items():
        args[name] = torch.randn(value) if name in NAMES else value
    with pytest.raises(ValueError, match=f"swin_attention_block: .*{message}"):
        swin_attention_block(**args)
