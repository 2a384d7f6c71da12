"""ViTBackbone on the Triton kernels in the interpreter, against upstream."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from reference_models import Pair, hf_pair, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor
from vit_models import hf_vit

from fastbb_kernels import use_impl
from fastbb_kernels.testing import interpret

pytest.importorskip("transformers")

# in order on one model: the trained size, more tokens, fewer tokens of another ratio
SIZES = [(28, 28), (35, 42), (7, 28)]
MODELS: dict[str, dict[str, Any]] = {
    "dinov2": {"use_swiglu_ffn": True},
    "dinov2_with_registers": {"hidden_size": 24, "mlp_ratio": 2},  # heads of 12
    "clip_vision_model": {"apply_layernorm": True},
    "dinov3_vit": {},
    "beit": {},
}


def build(kind: str) -> Pair:
    fields = {"num_hidden_layers": 2, "out_indices": [0, 1, 2], **MODELS[kind]}
    return hf_pair(hf_vit(kind, **fields))


def kernel_maps(model: Any, pixels: Tensor) -> Sequence[Tensor]:
    """The maps with every op forced onto its kernel."""
    with ExitStack() as stack:
        for block in [torch.no_grad(), use_impl("triton"), interpret()]:
            stack.enter_context(block)
        return model(pixels).feature_maps


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_fp32_equals_upstream(kind: str) -> None:
    pair = build(kind)
    for size in SIZES:
        pixels = images(*size, batch=1)
        assert_equals_upstream(kernel_maps(pair.ours, pixels), pair.maps(pixels))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dinov2", torch.bfloat16), ("dinov3_vit", torch.bfloat16), ("dinov3_vit", torch.float16)],
    ids=str,
)
@torch.no_grad()
def test_low_precision_is_as_accurate_as_upstream(kind: str, dtype: torch.dtype) -> None:
    # the truth is the same rounded weights in float64, computed by upstream
    pair = build(kind)
    pair.ours.to(dtype)
    pair.upstream.to(dtype)
    for size in SIZES[:2]:
        pixels = images(*size, batch=1).to(dtype)
        eager = pair.maps(pixels)
        pair.upstream.double()
        exact = pair.maps(pixels.double())
        pair.upstream.to(dtype)
        got = kernel_maps(pair.ours, pixels)
        for i, maps in enumerate(zip(got, eager, exact)):
            assert_as_accurate_as_eager(f"{size}, map {i}", *maps)
