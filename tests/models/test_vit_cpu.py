"""Layers of a ViT on a CPU, which take packed weights, against transformers."""

from typing import Any

import pytest
import torch
from reference_models import Pair, from_hf, hf_pair, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor
from vit_models import TYPES, hf_vit

from fastbb.models import vit_cpu, vit_forward
from fastbb.weights import derived
from fastbb_kernels import onednn

pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in TYPES},
    "dinov2": {"use_swiglu_ffn": True, "qkv_bias": False},
    "clip_vision_model": {"hidden_act": "quick_gelu"},
}


def pair_of(kind: str, dtype: torch.dtype = torch.float32) -> Pair:
    return hf_pair(hf_vit(kind, **MODELS[kind]).to(dtype))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tokens of layers that run with packed weights from now on."""
    shapes: list[tuple[int, ...]] = []
    own = vit_forward.vit_block_on_cpu

    def recorded(x: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return own(x, *args)

    monkeypatch.setattr(vit_forward, "vit_block_on_cpu", recorded)
    return shapes


@pytest.mark.parametrize("part_bytes", [1, 2**15, 2**30])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_parts_of_any_size_equal_upstream(
    kind: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch, on_cpu: list[Any]
) -> None:
    monkeypatch.setattr(vit_cpu, "PART_BYTES", part_bytes)
    pair = pair_of(kind)
    for pixels in (images(28, 28, batch=3), images(20, 44, batch=2)):
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    assert len(on_cpu) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_low_precision_on_a_cpu_loses_no_more_than_eager(kind: str, dtype: torch.dtype) -> None:
    if not onednn.packs(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    pixels, low = images(28, 35), pair_of(kind, dtype)
    exact = hf_vit(kind, **MODELS[kind]).double()(pixels.double()).feature_maps
    eager, got = low.maps(pixels.to(dtype)), low.ours(pixels.to(dtype)).feature_maps
    for index, maps in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(f"map {index}", *maps)


def test_calls_that_packed_weights_do_not_cover_run_the_ops(on_cpu: list[Any]) -> None:
    ours, pixels = from_hf(hf_vit("dinov2")), images(28, 28)
    ours(pixels)  # a gradient is needed
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(pixels)
    with torch.no_grad():
        ours(pixels, output_attentions=True)
        ours.double()(pixels.double())
        assert not on_cpu
        ours.float()(pixels)
        assert len(on_cpu) == 3


def test_new_weights_count_on_a_cpu() -> None:
    upstream, pixels = hf_vit("dinov2"), images(28, 28)
    ours = from_hf(upstream)
    with torch.no_grad():
        ours(pixels)
        for model in (upstream, ours):
            first, second = model.encoder.layer[0], model.encoder.layer[1]
            first.layer_scale1.lambda1.mul_(2)
            first.attention.k_proj.weight.add_(0.1)
            second.mlp.fc2.bias.add_(1)
        assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)


@pytest.mark.parametrize("kind", MODELS)
def test_the_second_forward_derives_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    own = derived._DerivedWeights.get

    def recorded(self: Any, name: str, compute: Any, *rest: Any) -> Any:
        def noted(*sources: Tensor) -> Any:
            names.append(name)
            return compute(*sources)

        return own(self, name, noted, *rest)

    monkeypatch.setattr(derived._DerivedWeights, "get", recorded)
    ours, pixels = pair_of(kind).ours, images(28, 28)
    with torch.inference_mode():
        ours(pixels)
        assert names.count("packed") == 3
        names.clear()
        ours(pixels)
    assert not names
