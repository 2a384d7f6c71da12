"""What holds for every native family alike, against the library its weights come from.

A new family adds its tiny upstream model to `UPSTREAM` (and its sources to `SOURCES`).
"""

import copy
from typing import Any

import pytest
import torch
from reference_models import family_pair, from_hf, hf_resnet, hf_swin, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream

transformers = pytest.importorskip("transformers")

UPSTREAM = {
    "swin": hf_swin,
    "resnet_basic": lambda **options: hf_resnet("basic", **options),
    "resnet_bottleneck": hf_resnet,
}
SOURCES = [
    *(("swin", "w7", source) for source in ("hf", "timm", "torchvision")),
    *(("resnet", "bottleneck", source) for source in ("hf", "timm", "torchvision")),
]


@pytest.fixture(params=UPSTREAM)
def upstream_of(request: pytest.FixtureRequest) -> Any:
    """Builds the family's tiny upstream model, all stages selected unless told otherwise."""
    return UPSTREAM[request.param]


def test_no_stage_selected_gives_no_maps(upstream_of: Any) -> None:
    assert from_hf(upstream_of(), out_indices=[])(images(32, 32)).feature_maps == ()


@torch.no_grad()
def test_hidden_states_are_the_stages_before_any_norm(upstream_of: Any) -> None:
    upstream, pixels = upstream_of(out_indices=[1]), images(60, 44)
    theirs = upstream(pixels, output_hidden_states=True)
    out = from_hf(upstream)(pixels, output_hidden_states=True)
    assert len(out.hidden_states) == 5 and out.hidden_states[0].ndim == 4
    assert_equals_upstream(out.hidden_states, theirs.hidden_states)
    assert_equals_upstream(out.feature_maps, theirs.feature_maps)


@torch.no_grad()
def test_hidden_states_can_be_selected(upstream_of: Any) -> None:
    upstream, pixels = upstream_of(), images(32, 32)
    theirs = upstream(pixels, output_hidden_states=[1, -1]).hidden_states
    ours = from_hf(upstream)(pixels, output_hidden_states=[1, -1]).hidden_states
    if all(h is not None for h in theirs):
        pytest.skip("this transformers gives all of them")
    assert [h is None for h in ours] == [h is None for h in theirs]
    assert_equals_upstream([ours[1], ours[-1]], [theirs[1], theirs[-1]])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_loses_no_more_than_eager_upstream(
    upstream_of: Any, dtype: torch.dtype
) -> None:
    upstream, pixels = upstream_of(), images(60, 44)
    ours = from_hf(upstream, dtype=dtype)
    assert ours.dtype == dtype
    exact = copy.deepcopy(upstream).double()(pixels.double()).feature_maps
    eager = upstream.to(dtype)(pixels.to(dtype)).feature_maps
    got = ours(pixels.to(dtype)).feature_maps
    for stage, *maps in zip(ours.out_features, got, eager, exact):
        assert_as_accurate_as_eager(stage, *maps)


@torch.no_grad()
def test_autocast_gives_upstreams_dtype_and_accuracy(upstream_of: Any) -> None:
    upstream, pixels = upstream_of(), images(60, 44)
    ours = from_hf(upstream)
    exact = copy.deepcopy(upstream).double()(pixels.double()).feature_maps
    with torch.autocast("cpu", torch.bfloat16):
        eager, got = upstream(pixels).feature_maps, ours(pixels).feature_maps
    for stage, *maps in zip(ours.out_features, got, eager, exact):
        assert_as_accurate_as_eager(stage, *maps)


@torch.no_grad()
@pytest.mark.parametrize("family, variant, source", SOURCES)
def test_views_channels_last_and_empty_batches(family: str, variant: str, source: str) -> None:
    pair = family_pair(family, variant, source)
    view = images(64, 131)[..., 1:97:2].transpose(2, 3)  # odd offset, strided, H and W swapped
    assert not view.is_contiguous()
    want = pair.maps(view.contiguous())
    assert_equals_upstream(pair.ours(view).feature_maps, want)
    channels_last = view.contiguous(memory_format=torch.channels_last)
    assert_equals_upstream(pair.ours(channels_last).feature_maps, want)
    empty = pair.ours(view[:0]).feature_maps
    assert [m.shape for m in empty] == [(0, *m.shape[1:]) for m in want]
