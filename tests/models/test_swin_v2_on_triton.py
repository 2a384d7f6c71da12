"""Swinv2Backbone on the Triton kernels in the interpreter, and bugs that it is prone to."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from reference_models import Pair, from_hf, hf_pair, images
from swin_v2_models import hf_swinv2, timm_swinv2_pair
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor

from fastbb.models import swin_v2_forward, swin_v2_parts
from fastbb_kernels import use_impl
from fastbb_kernels.testing import interpret

pytest.importorskip("transformers")

BLOCK_OPS = ("swin_attention_block", "mlp_block", "linear_norm_residual")

# maps of 4x4 windows; in order on one model: whole windows, padding at the bottom and right of
# several stages, a map below the window, and large again
SIZES = [(64, 32), (36, 52), (12, 12), (28, 60), (64, 64)]
TINY = {"depths": (2, 2), "embed_dim": 32, "num_heads": (1, 2), "window_size": 4}
OUT = {"pretrained_window_sizes": (0, 3), "out_indices": (0, 1)}


def build_pair(source: str) -> Pair:
    if source == "hf":
        return hf_pair(hf_swinv2(**{**TINY, **OUT, "out_indices": [0, 1, 2]}))
    if source == "hf-odd-widths":
        # nothing is a multiple of 16: channels 24, heads of 12, hidden width 60
        odd = {"embed_dim": 24, "num_heads": (2, 4), "window_size": 3, "mlp_ratio": 2.5}
        return hf_pair(hf_swinv2(**{**TINY, **OUT, **odd, "out_indices": [0, 1, 2]}))
    return timm_swinv2_pair(**TINY, **OUT)


def kernel_maps(model: Any, pixels: Tensor, blocks: bool = True) -> Sequence[Tensor]:
    """The maps with every op forced onto its kernel."""
    with ExitStack() as stack:
        for block in [torch.no_grad(), use_impl("triton"), interpret()]:
            stack.enter_context(block)
        if not blocks:
            stack.enter_context(use_impl("eager", ops=BLOCK_OPS))
        return model(pixels).feature_maps


@pytest.mark.parametrize("blocks", [True, False], ids=["block-kernels", "separate-kernels"])
@pytest.mark.parametrize("source", ["hf", "timm"])
def test_fp32_equals_upstream(source: str, blocks: bool) -> None:
    pair = build_pair(source)
    for height, width in SIZES:
        pixels = images(height, width, batch=1)
        with torch.no_grad():
            want = pair.maps(pixels)
        assert_equals_upstream(kernel_maps(pair.ours, pixels, blocks), want)


def test_fp32_equals_upstream_at_odd_widths() -> None:
    pair, pixels = build_pair("hf-odd-widths"), images(28, 36, batch=1)
    with torch.no_grad():
        want = pair.maps(pixels)
    assert_equals_upstream(kernel_maps(pair.ours, pixels), want)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", ["hf", "timm"])
def test_low_precision_is_as_accurate_as_upstream(source: str, dtype: torch.dtype) -> None:
    # the truth is the same rounded weights in float64, computed by upstream
    pair = build_pair(source)
    pair.ours.to(dtype)
    pair.upstream.to(dtype)
    sizes = [(64, 32), (64, 64)] if dtype == torch.float16 else SIZES  # padding is NaN upstream
    for height, width in sizes:
        pixels = images(height, width, batch=1).to(dtype)
        eager = pair.maps(pixels)
        pair.upstream.double()
        exact = pair.maps(pixels.double())
        pair.upstream.to(dtype)
        got = kernel_maps(pair.ours, pixels)
        for i, maps in enumerate(zip(got, eager, exact)):
            assert_as_accurate_as_eager(f"{height}x{width}, map {i}", *maps)


# --- bugs


def scale_not_clamped(logit_scale: Tensor) -> Tensor:
    return logit_scale.exp().flatten()


def bias_of_another_window(
    window: tuple[int, int], pretrained: tuple[int, int], device: torch.device
) -> Tensor:
    return coords(window, (0, 0), device)


def keys_with_the_bias_of_queries(names: Any, *args: Any) -> Any:
    weight, bias, *others = tensors(names, *args)
    assert bias is not None
    q, _, v = bias.chunk(3)
    return weight, torch.cat([q, q, v]), *others


def norm_before_the_layers(*args: Any, post_norm: bool, **options: Any) -> Tensor:
    return mlp(*args, **options)


def rows_first(x: Tensor) -> Tensor:
    return neighbours(x).unflatten(-1, (2, 2, -1)).transpose(-2, -3).flatten(-3)


coords, tensors = swin_v2_parts.relative_coords_table, swin_v2_parts._attention_tensors
mlp = swin_v2_forward.mlp_block
neighbours = swin_v2_forward.neighbours

BUGS: dict[Callable[..., Any], tuple[Any, str]] = {
    scale_not_clamped: (swin_v2_parts, "scale_of_cosines"),
    bias_of_another_window: (swin_v2_parts, "relative_coords_table"),
    keys_with_the_bias_of_queries: (swin_v2_parts, "_attention_tensors"),
    norm_before_the_layers: (swin_v2_forward, "mlp_block"),
    rows_first: (swin_v2_forward, "neighbours"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@torch.no_grad()
def test_a_bug_is_caught(bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = BUGS[bug]
    monkeypatch.setattr(swin_v2_forward, "runs_on_cpu", lambda *_: False)  # the ops run
    upstream, pixels = hf_swinv2(pretrained_window_sizes=[6] * 4).double(), images(96, 96).double()
    for parameter in (p for n, p in upstream.named_parameters() if n.endswith("logit_scale")):
        parameter.fill_(5.0)
    want = upstream(pixels).feature_maps
    assert_equals_upstream(from_hf(upstream)(pixels).feature_maps, want)
    monkeypatch.setattr(module, name, bug)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equals_upstream(from_hf(upstream)(pixels).feature_maps, want)
