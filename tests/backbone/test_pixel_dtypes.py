"""Pixels of any floating dtype: maps equal those of pixels in the dtype of the weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb import (
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
)

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float32)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32).sin()


def swin() -> SwinBackbone:
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    return SwinBackbone(SwinConfig(**sizes, drop_path_rate=0.0, out_indices=[1, 2]))


def resnet() -> ResNetBackbone:
    return ResNetBackbone(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], out_indices=[1, 2])
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "swin": swin,
    "resnet": resnet,
    "timm": lambda: TimmBackbone(TimmBackboneConfig("test_resnet")),
}


@pytest.fixture(params=MAKERS)
def backbone(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return len(got) == len(want) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(got, want)
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_floating_pixels_are_converted_to_the_dtype_of_the_weights(
    backbone: Any, dtype: torch.dtype, weights: torch.dtype, prepared: bool
) -> None:
    backbone = backbone.to(weights)
    backbone = backbone.prepare("eager") if prepared else backbone
    got = backbone(PIXELS.to(dtype)).feature_maps
    assert {x.dtype for x in got} == {weights}
    assert equal(got, backbone(PIXELS.to(dtype).to(weights)).feature_maps)


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_pixels_are_converted_for_hidden_states_and_attentions(
    backbone: Any, prepared: bool
) -> None:
    backbone = backbone.prepare("eager") if prepared else backbone
    has_attentions = isinstance(backbone, SwinBackbone)
    asked = {"output_hidden_states": True, "output_attentions": has_attentions}
    got, want = backbone(PIXELS, **asked), backbone(PIXELS.float(), **asked)
    assert equal(got.feature_maps, want.feature_maps)
    assert equal(got.hidden_states, want.hidden_states)
    if has_attentions:
        assert equal(got.attentions, want.attentions)
    (maps,) = backbone.forward_with_filtered_kwargs(PIXELS, return_dict=False)
    assert equal(maps, backbone(PIXELS.float()).feature_maps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients_flow_through_the_conversion(backbone: Any, training: bool) -> None:
    found = []
    for pixels in (PIXELS.half(), PIXELS.half().float()):
        pixels.requires_grad_()
        backbone.train(training).zero_grad()
        torch.stack([x.square().mean() for x in backbone(pixels).feature_maps]).sum().backward()
        assert pixels.grad is not None and pixels.grad.dtype == pixels.dtype
        weights = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
        found.append((pixels.grad, weights))
    (half, got), (single, want) = found
    assert torch.equal(half, single.half()) and equal(tuple(got), tuple(want))


@torch.no_grad()
def test_autocast_keeps_the_pixels_as_they_are(backbone: Any) -> None:
    seen: list[torch.dtype] = []
    stages = backbone.forward_stages

    def watching(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(pixel_values.dtype)
        return stages(pixel_values, *args, **kwargs)

    backbone.forward_stages = watching
    with torch.autocast("cpu", torch.bfloat16):
        backbone(PIXELS.bfloat16())
    backbone(PIXELS.bfloat16())
    assert seen == [torch.bfloat16, torch.float32]


@torch.no_grad()
def test_meta_pixels_are_converted_to_the_dtype_of_the_weights() -> None:
    maps = resnet().to("meta").eval()(PIXELS.half().to("meta")).feature_maps
    assert {x.dtype for x in maps} == {torch.float32}
