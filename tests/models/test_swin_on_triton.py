"""SwinBackbone on the Triton kernels in the interpreter, against upstream."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import Pair, hf_pair, hf_swin, images, timm_pair
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor

import fastbb
from fastbb_kernels import use_impl
from fastbb_kernels.testing import interpret

transformers = pytest.importorskip("transformers")

BUNDLED = Path(fastbb.__file__).parent / "assets" / "nano-swin-digits"
BLOCK_OPS = ("swin_attention_block", "mlp_block")

# maps of 4x4 windows; in order on one model: whole windows, padding at the bottom and right of
# several stages, a map below the window, and large again
SIZES = [(64, 32), (36, 52), (12, 12), (28, 60), (64, 64)]
TINY = {"depths": (2, 2), "embed_dim": 32, "num_heads": (1, 2), "window_size": 4}


def build_pair(source: str) -> Pair:
    if source == "hf":
        return hf_pair(hf_swin("w7", **TINY, out_indices=[0, 1, 2]))
    if source == "hf-odd-widths":
        # nothing is a multiple of 16: channels 24, heads of 12, hidden width 60
        odd = {"embed_dim": 24, "num_heads": (2, 4), "window_size": 3, "mlp_ratio": 2.5}
        return hf_pair(hf_swin("w7", **{**TINY, **odd}, out_indices=[0, 1, 2]))
    if source == "bundled":
        upstream = transformers.SwinBackbone.from_pretrained(BUNDLED, out_indices=[0, 1, 2, 3, 4])
        ours = fastbb.SwinBackbone.from_pretrained(BUNDLED, out_indices=[0, 1, 2, 3, 4])
        return Pair(ours, upstream.eval(), lambda x: list(upstream(x).feature_maps))
    return timm_pair("swin_tiny_patch4_window7_224", img_size=64, out_indices=(0, 1), **TINY)


def kernel_maps(model: Any, pixels: Tensor, blocks: bool) -> Sequence[Tensor]:
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


@pytest.mark.parametrize("source", ["hf-odd-widths", "bundled"])
def test_fp32_equals_upstream_at_odd_widths(source: str) -> None:
    pair = build_pair(source)
    pixels = images(28, 36, batch=1)
    with torch.no_grad():
        want = pair.maps(pixels)
    assert_equals_upstream(kernel_maps(pair.ours, pixels, blocks=True), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", [True, False], ids=["block-kernels", "separate-kernels"])
@pytest.mark.parametrize("source", ["hf", "timm"])
def test_low_precision_is_as_accurate_as_upstream(
    source: str, blocks: bool, dtype: torch.dtype
) -> None:
    if dtype == torch.float16 and blocks:
        pytest.skip("fp16 runs once per source")
    check_low_precision(build_pair(source), SIZES, dtype, blocks)


def test_bundled_model_in_bf16_is_as_accurate_as_upstream() -> None:
    check_low_precision(build_pair("bundled"), [(32, 32), (28, 36)], torch.bfloat16, blocks=True)


@torch.no_grad()
def check_low_precision(
    pair: Pair, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, blocks: bool
) -> None:
    # the truth is the same rounded weights in float64, computed by upstream
    pair.ours.to(dtype)
    pair.upstream.to(dtype)
    for height, width in sizes:
        pixels = images(height, width, batch=1).to(dtype)
        eager = pair.maps(pixels)
        pair.upstream.double()
        exact = pair.maps(pixels.double())
        pair.upstream.to(dtype)
        got = kernel_maps(pair.ours, pixels, blocks)
        for i, maps in enumerate(zip(got, eager, exact)):
            assert_as_accurate_as_eager(f"{height}x{width}, map {i}", *maps)
