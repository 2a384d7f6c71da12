"""ResNetBackbone on the Triton kernels in the interpreter, against upstream."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference_models import Pair, hf_pair, hf_resnet, images, timm_pair
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastbb_kernels import use_impl
from fastbb_kernels.testing import interpret

pytest.importorskip("transformers")

# one odd image; maps of 57x41, 29x21, 15x11, 8x6 pixels
SIZE = (225, 161)
TINY = {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [2, 2], "out_indices": [0, 1, 2]}
# inner widths of 64, which `bottleneck_tail` has a kernel for
WIDE = {**TINY, "hidden_sizes": [256], "depths": [2], "out_indices": [0, 1]}
TIMM = {"layers": (2, 1, 1, 1), "channels": (16, 16, 16, 16), "stem_width": 16}


def build_pair(source: str) -> Pair:
    match source:
        case "hf-basic":
            return hf_pair(hf_resnet("basic", **TINY))
        case "hf-bottleneck":
            return hf_pair(hf_resnet("bottleneck", **TINY))
        case "hf-tails":
            return hf_pair(hf_resnet("bottleneck", **WIDE))
        case "hf-stride-in-1x1":
            return hf_pair(hf_resnet("downsample_in_bottleneck", **TINY))
        case "hf-gelu":
            return hf_pair(hf_resnet("basic", **TINY, hidden_act="gelu"))
        case "timm-dilated":
            return timm_pair("resnet26", **TIMM, output_stride=8)
        case "timm-deep-stem":
            return timm_pair("resnet26d", **{**TIMM, "layers": (1, 1, 1, 1)})
        case "timm-basic":
            return timm_pair("resnet18", **TIMM)
    raise AssertionError(source)


class OnlyKernels(TorchDispatchMode):
    """Refuses PyTorch's own convolutions and batch norms."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert "convolution" not in name and "batch_norm" not in name, func
        return func(*args, **(kwargs or {}))


def kernel_maps(model: Any, pixels: Tensor) -> Sequence[Tensor]:
    """The maps with every op forced onto its kernel."""
    with torch.no_grad(), use_impl("triton"), interpret(), OnlyKernels():
        return model(pixels).feature_maps


SOURCES = [
    *("hf-basic", "hf-bottleneck", "hf-tails", "hf-stride-in-1x1", "hf-gelu"),
    *("timm-dilated", "timm-deep-stem", "timm-basic"),
]


@pytest.mark.parametrize("source", SOURCES)
def test_fp32_equals_upstream(source: str) -> None:
    pair, pixels = build_pair(source), images(*SIZE, batch=1)
    with torch.no_grad():
        want = pair.maps(pixels)
    assert_equals_upstream(kernel_maps(pair.ours, pixels), want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(source, torch.bfloat16) for source in SOURCES] + [("hf-bottleneck", torch.float16)],
    ids=str,
)
def test_low_precision_is_as_accurate_as_upstream(source: str, dtype: torch.dtype) -> None:
    pair = build_pair(source)
    # the truth is the same rounded weights in float64, computed by upstream
    pair.ours.to(dtype)
    pair.upstream.to(dtype)
    pixels = images(97, 65, batch=1).to(dtype)
    eager = pair.maps(pixels)
    pair.upstream.double()
    exact = pair.maps(pixels.double())
    for i, maps in enumerate(zip(kernel_maps(pair.ours, pixels), eager, exact)):
        assert_as_accurate_as_eager(f"map {i}", *maps)
