"""Swin's blocks on a CPU: windows in parts, packed weights, and calls that use neither."""

from typing import Any

import pytest
import torch
from reference_models import hf_pair, hf_swin, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor

from fastbb.models import swin_cpu, swin_forward
from fastbb_kernels import ACTIVATIONS, WindowGeometry, onednn, use_impl
from fastbb_kernels.accuracy import FP32_REL

GEOMETRIES = [
    WindowGeometry((7, 7)),
    WindowGeometry((7, 7), (3, 3)),
    WindowGeometry((7, 7), (3, 3), roll_first=True),
    WindowGeometry((4, 6), (0, 3)),
    WindowGeometry((4, 6), (2, 0), roll_first=True),
]


@pytest.mark.parametrize("n_windows", [1, 3, 1000])
@pytest.mark.parametrize("size", [(14, 21), (5, 9), (1, 1), (20, 7)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_parts_hold_every_token_once(
    geometry: WindowGeometry, size: tuple[int, int], n_windows: int
) -> None:
    batch, (height, width) = 3, size
    parts = swin_cpu._parts(batch, height, width, geometry, n_windows)
    rows = torch.cat([part.rows for part in parts])
    assert sorted(rows.tolist()) == list(range(batch * height * width))
    per_window = geometry.window[0] * geometry.window[1]
    for part in parts:
        assert len(part.tokens) % per_window == 0
        assert len(part.tokens) <= max(1, n_windows) * per_window
        kept = part.tokens if part.kept is None else part.tokens[part.kept]
        assert torch.equal(kept, part.rows)


def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the shapes of maps whose blocks run in parts from now on."""
    shapes: list[tuple[int, ...]] = []
    own = swin_forward.swin_block_on_cpu

    def recorded(x: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return own(x, *args)

    monkeypatch.setattr(swin_forward, "swin_block_on_cpu", recorded)
    return shapes


@pytest.mark.parametrize("part_bytes", [1, 2**16, 2**30])
@torch.no_grad()
def test_parts_of_any_size_equal_upstream(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin_cpu, "PART_BYTES", part_bytes)
    shapes = blocks_run(monkeypatch)
    pair = hf_pair(hf_swin())
    pixels = images(70, 61, 3)
    assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    assert len(shapes) == sum(pair.ours.config.depths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_low_precision_loses_no_more_than_eager(dtype: torch.dtype) -> None:
    if not onednn.packs(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    pair = hf_pair(hf_swin())
    pixels = images(70, 61, 2)
    exact = hf_pair(hf_swin().double()).maps(pixels.double())
    low = hf_pair(hf_swin().to(dtype))
    eager = low.maps(pixels.to(dtype))
    got = low.ours(pixels.to(dtype)).feature_maps
    assert pair.ours.dtype == torch.float32
    for index, (ours, theirs, true) in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(f"map {index}", ours, theirs, true)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((8, 16), 3, 2, 1, 1, 1),
        ((3, 8), 7, 2, 3, 1, 1),
        ((8, 16), 1, 1, 0, 1, 1),
        ((8, 16), 1, 2, 0, 1, 2),
        ((8, 8), 3, 1, 2, 2, 8),
    ],
    ids=str,
)
@torch.no_grad()
def test_packed_products_equal_torch(
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    dtype: torch.dtype,
    activation: str | None,
) -> None:
    if not onednn.packs(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    act = ACTIVATIONS[activation] if activation else lambda x: x
    rel = FP32_REL if dtype == torch.float32 else 2e-2
    inputs, outputs = channels
    x = images(13, 11, 2, inputs).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = images(kernel, kernel, outputs, inputs // groups, seed=2).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = weight[:, 0, 0, 0].clone()
    geometry: Any = {
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (dilation, dilation),
        "groups": groups,
    }
    plain = torch.conv2d(x, weight, bias, **geometry)
    for shape in (tuple(x.shape), (1, inputs, 40, 40)):  # or packed for another shape
        packed = onednn.pack_conv(weight, shape, **geometry)
        got = onednn.packed_conv(x, packed, bias, activation=activation, **geometry)
        assert_equals_upstream(got, act(plain), rel)
        got = onednn.packed_conv(x, packed, bias, activation=activation, hidden=True, **geometry)
        assert_equals_upstream(got, act(plain), rel)
        if groups == 1:
            got = onednn.packed_conv(
                x, packed, bias, activation=activation, residual=plain, **geometry
            )
            assert_equals_upstream(got, act(plain + plain), rel)
    rows, matrix = images(1, 24, 1, 9)[0, :, 0].to(dtype), images(16, 24, 1, 1)[0, 0].to(dtype)
    product = torch.nn.functional.linear(rows, matrix, bias=None)
    packed = onednn.pack_linear(matrix)
    got = onednn.packed_linear(rows, packed, None, activation=activation)
    assert_equals_upstream(got, act(product), rel)
    got = onednn.packed_linear(rows, packed, None, residual=product)
    assert_equals_upstream(got, product + product, rel)


@torch.no_grad()
def test_a_packed_convolution_of_one_pixel_adds_its_residual() -> None:
    x, weight = images(1, 1, 2, 16), images(1, 1, 8, 16, seed=2)
    geometry: Any = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    packed = onednn.pack_conv(weight, tuple(x.shape), **geometry)
    bias = weight[:, 0, 0, 0].clone()
    plain = torch.conv2d(x, weight, bias)
    got = onednn.packed_conv(x, packed, bias, residual=plain, **geometry)
    assert_equals_upstream(got, plain + plain, FP32_REL)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@torch.no_grad()
def test_packed_products_keep_nan(activation: str | None) -> None:
    x, matrix = images(5, 16, 1, 1)[0, 0], images(8, 16, 1, 1)[0, 0]
    x[2, 3] = torch.nan
    packed = onednn.pack_linear(matrix)
    got = onednn.packed_linear(x, packed, None, activation=activation)
    assert got.isnan().any(1).tolist() == [False, False, True, False, False]
    geometry: Any = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    packed = onednn.pack_conv(matrix[:, :, None, None], (1, 16, 5, 1), **geometry)
    rows = x.t()[None, :, :, None]
    for residual in (None, torch.zeros(1, 8, 5, 1)):
        for hidden in (False, True):
            got = onednn.packed_conv(
                rows,
                packed,
                torch.zeros(8),
                activation=activation,
                residual=residual,
                hidden=hidden,
                **geometry,
            )
            assert got.isnan().any(1).flatten().tolist() == [False, False, True, False, False]


@torch.no_grad()
def test_unsupported_calls_run_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = blocks_run(monkeypatch)
    pair = hf_pair(hf_swin())
    pixels = images(64, 64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    with torch.enable_grad():
        pair.ours(pixels)
    pair.ours(pixels, output_attentions=True)
    double = hf_pair(hf_swin().double())
    double.ours(pixels.double())
    n_last_blocks = len(pair.ours.config.depths)
    assert len(shapes) == sum(pair.ours.config.depths) - n_last_blocks  # of output_attentions
    with pytest.raises(NotImplementedError), use_impl("triton"):
        pair.ours(pixels)


@torch.no_grad()
def test_a_onednn_op_with_other_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    own = onednn.pack_linear
    onednn._packs.cache_clear()
    monkeypatch.setattr(onednn, "pack_linear", lambda weight: own(weight * 2))
    assert not onednn.packs(torch.float32)
    monkeypatch.undo()
    onednn._packs.cache_clear()
    assert onednn.packs(torch.float32) == torch.backends.mkldnn.is_available()
