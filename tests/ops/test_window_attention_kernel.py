"""Kernel of window_attention: against plain torch in float64, its addresses and its sizes."""

from typing import Any, NamedTuple

import pytest
import torch
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn

from fastbb_kernels import WindowGeometry, window_attention
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import corners, interpret, record_launches, trace
from fastbb_kernels.triton_kernels.window_attention import launch_config

OP = find_op("window_attention")
CUSTOM_OP = OP.custom_op

Arguments = tuple[Tensor, Tensor, Tensor | None]


class Case(NamedTuple):
    """A call: image size, geometry, heads and their size, columns of the bias (0: of wide rows)."""

    size: tuple[int, int]
    window: tuple[int, int] = (7, 7)
    shift: tuple[int, int] = (0, 0)
    roll_first: bool = False
    num_heads: int = 2
    head_dim: int = 32
    n_bias_cols: int = 0
    pad: bool = True
    batch: int = 1

    @property
    def geometry(self) -> WindowGeometry:
        return WindowGeometry(self.window, self.shift, self.roll_first)

    def arguments(self, dtype: torch.dtype) -> Arguments:
        """Random tensors; the columns of the bias that are no keys hold NaN."""
        n_tokens = self.window[0] * self.window[1]
        channels = 3 * self.num_heads * self.head_dim
        qkv = torch.randn(self.batch, *self.size, channels)
        bias = torch.randn(self.num_heads, n_tokens, self.n_bias_cols or -(-n_tokens // 16) * 16)
        bias[..., n_tokens:] = torch.nan
        pad = torch.randn(channels).to(dtype) if self.pad else None
        return qkv.to(dtype), bias.to(dtype), pad


CASES = {
    "whole-windows": Case((14, 14), batch=2),
    "shifted": Case((14, 21), shift=(3, 3), num_heads=3, head_dim=16, n_bias_cols=80),
    "padded": Case((9, 13)),
    "padded-shifted": Case((9, 13), shift=(3, 3), batch=2),
    "padded-shifted-as-timm": Case((9, 13), shift=(3, 3), roll_first=True, batch=2),
    "padded-below": Case((10, 14), shift=(3, 3), pad=False),
    "padded-right-as-timm": Case((14, 10), shift=(3, 3), roll_first=True),
    "below-a-window": Case((3, 5), shift=(3, 3)),
    "below-the-shift-as-timm": Case((2, 5), shift=(3, 3), roll_first=True),
    "one-token": Case((1, 1), shift=(3, 3)),
    "one-token-as-timm": Case((1, 1), shift=(3, 3), roll_first=True),
    "shifted-down": Case((14, 14), shift=(0, 2)),
    "shifted-right": Case((14, 14), shift=(5, 0)),
    "rectangular": Case((10, 9), window=(4, 7), shift=(1, 4), n_bias_cols=28),
    "odd-heads": Case((9, 8), shift=(3, 3), num_heads=2, head_dim=12),
    "tiny-windows": Case((5, 6), window=(2, 2), shift=(1, 1), head_dim=16, n_bias_cols=7),
    "one-token-windows": Case((2, 3), window=(1, 1), head_dim=64),
    "window-8": Case((8, 16), window=(8, 8), shift=(4, 4), head_dim=64),
    "window-9": Case((9, 11), window=(9, 9), shift=(4, 4), num_heads=1),
    "window-10-narrow-rows": Case((9, 10), window=(10, 10), num_heads=1, n_bias_cols=100),
    "window-12": Case((12, 12), window=(12, 12), shift=(6, 6), num_heads=1),
    "window-16": Case((15, 16), window=(16, 16), shift=(8, 8), num_heads=1),
}


def reference(arguments: Arguments, geometry: WindowGeometry) -> Tensor:
    """Attention of Swin in float64 with every tensor made: rolled, padded, cut, masked.

    The regions of the mask are numbered as in Microsoft's code.
    """
    qkv, bias, pad = arguments
    (h, w), shift, roll_first = geometry
    (B, H, W, _), num_heads = qkv.shape, bias.shape[0]
    x = qkv.double()
    if roll_first:
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    canvas = torch.zeros(B, H + -H % h, W + -W % w, x.shape[-1], dtype=torch.float64)
    canvas += 0 if pad is None else pad.double()
    canvas[:, :H, :W] = x
    if not roll_first:
        canvas = canvas.roll((-shift[0], -shift[1]), dims=(1, 2))

    regions = torch.zeros(1, *canvas.shape[1:3], 1)
    ends_h = (slice(0, -h), slice(-h, -shift[0]), slice(-shift[0], None))
    ends_w = (slice(0, -w), slice(-w, -shift[1]), slice(-shift[1], None))
    for i, rows in enumerate(ends_h if shift[0] else (slice(None),)):
        for j, columns in enumerate(ends_w if shift[1] else (slice(None),)):
            regions[:, rows, columns] = 3 * i + j

    def cut(x: Tensor) -> Tensor:
        """[B, rows * h, columns * w, C] -> [B, rows * columns, h * w, C]."""
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    q, k, v = cut(canvas).unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    region = cut(regions)[:, :, None, :, 0]
    mask = torch.where(region[..., :, None] == region[..., None, :], 0.0, -100.0)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias[..., : h * w].double() + mask
    y = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)  # [B, rows * columns, h * w, C]

    y = y.unflatten(2, (h, w)).unflatten(1, (canvas.shape[1] // h, -1)).transpose(2, 3)
    y = y.flatten(3, 4).flatten(1, 2)
    if roll_first:
        return y[:, :H, :W].roll(shift, dims=(1, 2))
    return y.roll(shift, dims=(1, 2))[:, :H, :W]


def run(arguments: Arguments, geometry: WindowGeometry) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    call: dict[str, Any] = {"num_heads": arguments[1].shape[0], "geometry": geometry}
    with torch.no_grad(), trace() as t:
        y = window_attention(*arguments, **call, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(*arguments, **call)
    return y


def assert_right(arguments: Arguments, geometry: WindowGeometry) -> None:
    eager = OP.eager(*arguments, num_heads=arguments[1].shape[0], geometry=geometry)
    y = run(arguments, geometry)
    assert y.is_contiguous()
    assert_as_accurate_as_eager("y", y, eager, reference(arguments, geometry))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32_kernel_is_as_accurate_as_eager(case: Case) -> None:
    assert_right(case.arguments(torch.float32), case.geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["whole-windows", "padded-shifted-as-timm", "window-8", "window-12", "window-16"]
)
def test_low_precision_kernel_is_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert_right(case.arguments(dtype), case.geometry)


def test_large_scores_do_not_overflow_and_stay_masked() -> None:
    """Scores of some hundreds: softmax subtracts the maximum, and masked scores get -100 only."""
    case = CASES["padded-shifted"]
    qkv, bias, pad = case.arguments(torch.float32)
    qkv[..., :128] *= 8  # queries and keys
    assert_right((qkv, bias, pad), case.geometry)


def test_infinite_padding_affects_only_its_own_windows() -> None:
    case = CASES["padded"]
    qkv, bias, _ = case.arguments(torch.float32)
    with torch.no_grad(), interpret():
        pad = torch.full((qkv.shape[-1],), torch.inf)
        y = window_attention(qkv, bias, pad, num_heads=2, geometry=case.geometry, impl="triton")
    assert y[:, :7, :7].isfinite().all()
    assert not y[:, 7:, 7:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    case = CASES["padded-shifted"]
    qkv, bias, pad = case.arguments(dtype)
    assert pad is not None
    gaps = torch.full((2, 20, 27, 197), torch.nan, dtype=dtype)
    gaps[:, 1:19:2, 1::2, 5:] = qkv
    rows = torch.full((49, 2, 70), torch.nan, dtype=dtype)
    rows[..., 3:67] = bias.transpose(0, 1)
    views = {
        "gaps everywhere, an odd offset": gaps[:, 1:19:2, 1::2, 5:],
        "NCHW": qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "one image for the batch": qkv[:1].expand(2, -1, -1, -1),
    }
    bias, pad = rows[..., 3:67].transpose(0, 1), torch.stack([pad, pad * 2], dim=1)[:, 0]
    for name, view in views.items():
        y = OP.eager(view, bias, pad, num_heads=2, geometry=case.geometry)
        with torch.no_grad(), trace() as t:
            got = window_attention(
                view, bias, pad, num_heads=2, geometry=case.geometry, impl="triton"
            )
        t.assert_written_once("y_ptr")
        assert_as_accurate_as_eager(name, got, y, reference((view, bias, pad), case.geometry))


@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=str)
def test_empty_batch_gives_an_empty_map(shift: tuple[int, int]) -> None:
    case = Case((9, 13), shift=shift, batch=0)
    with torch.no_grad(), interpret():
        y = window_attention(
            *case.arguments(torch.bfloat16), num_heads=2, geometry=case.geometry, impl="triton"
        )
    assert y.shape == (0, 9, 13, 64)


@pytest.mark.parametrize("layout", ["one-large-map", "many-maps", "nchw", "columns-first"])
def test_offsets_beyond_32_bits_stay_in_bounds(layout: str) -> None:
    batch, side, channels = (30_000, 32, 96) if layout == "many-maps" else (1, 6000, 96)
    if layout == "nchw":
        qkv = torch.empty(batch, 3 * channels, side, side, device="meta").permute(0, 2, 3, 1)
    else:
        qkv = torch.empty(batch, side, side, 3 * channels, device="meta")
        qkv = qkv.transpose(1, 2) if layout == "columns-first" else qkv
    bias, pad = torch.empty(3, 49, 64, device="meta"), torch.empty(3 * channels, device="meta")
    geometry = WindowGeometry((7, 7), (3, 3))
    with torch.no_grad(), trace(programs=corners, data=False) as t:
        y = window_attention(qkv, bias, pad, num_heads=3, geometry=geometry, impl="triton")
    assert y.numel() > 2**31
    assert [launch.n_programs for launch in t.launches] == [2]


def test_one_binary_serves_all_sizes_and_stages() -> None:
    def specializations(*calls: tuple[int, tuple[int, int], int]) -> set[str]:
        """Specializations for shifted windows of 7 over `batch` maps of [height, width]."""
        with torch.no_grad(), record_launches() as recording:
            for batch, size, num_heads in calls:
                qkv, bias, pad = (
                    torch.empty(shape, dtype=torch.bfloat16, device="meta")
                    for shape in (
                        (batch, *size, 96 * num_heads),
                        (num_heads, 49, 64),
                        (96 * num_heads,),
                    )
                )
                geometry = WindowGeometry((7, 7), (3, 3))
                window_attention(
                    qkv, bias, pad, num_heads=num_heads, geometry=geometry, impl="triton"
                )
        return {launch.specialization for launch in recording.launches}

    whole = [
        (1, (56, 56), 3),
        (64, (28, 28), 6),
        (2, (14, 14), 12),
        (1, (7, 7), 32),
        (1, (7, 14), 1),
    ]
    padded = [(1, (57, 56), 3), (64, (16, 16), 16), (1, (1, 1), 24), (2, (200, 272), 4)]
    assert len(specializations(*whole)) == 1
    assert len(specializations(*padded)) == 1
    assert len(specializations(*whole, *padded)) == 2


def test_tiles_hold_every_token() -> None:
    for n_tokens in range(1, 257):
        for dtype in (torch.float32, torch.bfloat16):
            for arch in (None, 80, 90, "gfx942"):
                config = launch_config(n_tokens, 32, False, dtype, arch)
                assert config.block_n + config.block_tail >= n_tokens
    assert launch_config(49, 32, False, torch.bfloat16, 90)[:3] == (64, 64, 0)
    assert launch_config(144, 32, False, torch.bfloat16, 90)[:3] == (64, 128, 16)


@pytest.mark.parametrize("op", ["public", "custom"])
def test_compiled_and_exported_op_equals_eager(op: str) -> None:
    case = CASES["padded-shifted"]
    geometry = case.geometry

    class Model(nn.Module):
        def forward(self, qkv: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
            if op == "custom":
                return CUSTOM_OP(qkv, bias, pad, 2, *geometry, 0.0, None, -100.0)
            return window_attention(qkv, bias, pad, num_heads=2, geometry=geometry)

    def eager(*arguments: Any) -> Tensor:
        return OP.eager(*arguments, num_heads=2, geometry=geometry)

    small = case.arguments(torch.float32)
    large = case._replace(batch=5).arguments(torch.float32)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Model(), small, dynamic_shapes=({0: batch}, None, None)).module()
    torch.testing.assert_close(compiled(*small), eager(*small))
    torch.testing.assert_close(exported(*large), eager(*large))


@pytest.mark.parametrize("roll_first", [False, True])
def test_custom_op_passes_opcheck(roll_first: bool) -> None:
    geometry = WindowGeometry((4, 4), (2, 1), roll_first)
    qkv, bias, pad = Case((5, 9), window=(4, 4), head_dim=16).arguments(torch.float32)
    bias = bias[..., :16]
    torch.library.opcheck(CUSTOM_OP, (qkv, bias, pad, 2, *geometry, 0.0, None, -100.0))
    cosines = torch.ones(2), -200.0
    torch.library.opcheck(CUSTOM_OP, (qkv[:, 1:, 1:], bias, None, 2, *geometry, 0.0, *cosines))


def test_gradients_equal_eager() -> None:
    case = CASES["padded-shifted"]
    arguments = [x.requires_grad_() for x in case.arguments(torch.float32) if x is not None]
    call: dict[str, Any] = {"num_heads": 2, "geometry": case.geometry}
    with interpret():
        got = torch.autograd.grad(window_attention(*arguments, **call).square().sum(), arguments)
    y = OP.eager(*arguments, **call)
    for ours, theirs in zip(got, torch.autograd.grad(y.square().sum(), arguments)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "needs fp32, fp16 or bf16, got torch.float64"),
        (1, torch.Tensor.half, "all tensors in torch.float32, got bias in torch.float16"),
        (2, torch.Tensor.bfloat16, "all tensors in torch.float32, got qkv_pad in torch.bfloat16"),
        (1, lambda bias: bias.to("meta"), "all tensors on cpu, got bias on meta"),
        (0, lambda qkv: qkv.requires_grad_(), "no backward and a gradient is needed"),
    ],
    ids=["dtype", "bias-dtype", "pad-dtype", "device", "gradient"],
)
def test_impl_triton_refuses_unsupported_tensors(index: int, change: Any, message: str) -> None:
    case = CASES["padded"]
    arguments: list[Any] = list(case.arguments(torch.float32))
    arguments[index] = change(arguments[index])
    with interpret(), pytest.raises(NotImplementedError, match=message):
        window_attention(*arguments, num_heads=2, geometry=case.geometry, impl="triton")


@pytest.mark.parametrize(
    ("case", "dropout_p", "message"),
    [
        (Case((7, 7)), 0.1, "the kernel has no dropout, got dropout_p=0.1"),
        (Case((7, 7), window=(17, 16)), 0.0, "windows of at most 256 tokens, got 272"),
        (Case((7, 7), head_dim=72), 0.0, "a head dimension of at most 64, got 72"),
        (Case((7, 7), window=(13, 13), head_dim=64), 0.0, "in fp32 .* at most 144 tokens, got 169"),
    ],
    ids=["dropout", "window", "head-dim", "fp32"],
)
def test_calls_without_a_launch_config_run_eager(
    case: Case, dropout_p: float, message: str
) -> None:
    arguments, call = case.arguments(torch.float32), {"num_heads": 2, "geometry": case.geometry}
    with torch.no_grad(), interpret():
        with pytest.raises(NotImplementedError, match=message):
            window_attention(*arguments, **call, dropout_p=dropout_p, impl="triton")
        window_attention(*arguments, **call, dropout_p=dropout_p)
