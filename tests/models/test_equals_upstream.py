"""Matrix of families, variants, sources and image sizes: every map equals upstream's."""

from functools import cache

import pytest
import torch
from reference_models import RESNET, SWIN, Pair, family_pair, images
from tolerance import assert_equals_upstream

pytest.importorskip("transformers")

SOURCES = ("hf", "timm", "torchvision")
VARIANTS = [*(("swin", variant) for variant in SWIN), *(("resnet", variant) for variant in RESNET)]
SIZES = {
    "224x224": [(224, 224)],
    "256x256": [(256, 256)],
    "192x192": [(192, 192)],
    "252x332": [(252, 332)],
    "800x1088": [(800, 1088)],
    "below_window": [(20, 24)],
    "small_then_large": [(20, 24), (224, 160), (20, 24)],
}


def build_pair(family: str, variant: str, source: str) -> Pair:
    try:
        return family_pair(family, variant, source)
    except KeyError:
        pytest.skip(f"{source} cannot express {variant}")


cached_pair = cache(build_pair)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family, variant", VARIANTS, ids=["-".join(v) for v in VARIANTS])
def test_every_stage_equals_upstream(family: str, variant: str, source: str, size: str) -> None:
    # one window per kind, and one model of torchvision's full widths, are enough at this size
    if size == "800x1088" and variant in ("w8", "head_dim16"):
        pytest.skip("800x1088 runs with windows 7 and 12")
    if size == "800x1088" and family == "resnet" and source == "torchvision" and variant != "basic":
        pytest.skip("800x1088 runs with one torchvision model")
    # small-then-large needs a model that has seen no other size
    make = build_pair if size == "small_then_large" else cached_pair
    pair = make(family, variant, source)
    for height, width in SIZES[size]:
        pixels = images(height, width, batch=1 if height == 800 else 2)
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
