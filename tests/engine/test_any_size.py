"""One artefact for every size of image: what it computes, and that nothing is traced again."""

from typing import Any

import pytest
import torch
from reference_models import (
    Pair,
    from_hf,
    hf_maskformer_swin,
    hf_pair,
    hf_resnet,
    hf_swin,
    images,
    timm_pair,
    torchvision_pair,
    torchvision_swin,
)
from tolerance import assert_equals_upstream
from torch._dynamo.utils import counters

from fastbb.engine.any_size import compile_any_size
from fastbb.models.swin_any_size import MAX_REMEMBERED_SIZES, SwinAnySize

# (batch, height, width): no padding; padding; odd maps; one window; maps below the window; a token
SIZES = [(2, 224, 224), (1, 224, 160), (3, 50, 70), (1, 64, 96), (2, 33, 47), (1, 5, 7)]
SWINS = {
    "hf": lambda: hf_pair(hf_swin()),
    "w12": lambda: hf_pair(hf_swin("w12")),
    "no_qkv_bias": lambda: hf_pair(hf_swin(qkv_bias=False)),
    "maskformer": lambda: hf_pair(hf_maskformer_swin()),
    "torchvision": lambda: torchvision_pair(torchvision_swin()),
}


def computed(form: SwinAnySize, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return form.maps(form.forward(*form.inputs(x)), x)


@pytest.mark.parametrize("name", SWINS)
@torch.no_grad()
def test_equals_upstream(name: str) -> None:
    pair: Pair = SWINS[name]()
    form = SwinAnySize(pair.ours)
    for batch, height, width in SIZES:
        x = images(height, width, batch)
        got = computed(form, x)
        assert_equals_upstream(got, pair.maps(x))
        strides = [m.stride() for m in pair.ours(x).feature_maps]
        assert [m.stride() for m in got] == strides


@pytest.mark.parametrize("out_indices", [[0], [1], [0, 2], [2, 4]], ids=str)
@torch.no_grad()
def test_selected_stages(out_indices: list[int]) -> None:
    pair = hf_pair(hf_swin(out_indices=out_indices))
    x = images(50, 70)
    assert_equals_upstream(computed(SwinAnySize(pair.ours), x), pair.maps(x))


@torch.no_grad()
def test_pixels_beyond_the_last_patch() -> None:
    pair = torchvision_pair(torchvision_swin())
    form = SwinAnySize(pair.ours)
    x = images(67, 101)
    assert_equals_upstream(computed(form, x), computed(form, x[..., :64, :100]))
    with pytest.raises(ValueError, match="at least one patch of 4x4 pixels, got 3x64"):
        form.inputs(images(3, 64))


@torch.no_grad()
def test_double_and_bfloat16() -> None:
    upstream = hf_swin()
    x = images(50, 70)
    exact = [m.double() for m in upstream.double()(x.double()).feature_maps]
    got = computed(SwinAnySize(from_hf(upstream)), x.double())
    assert_equals_upstream(got, exact)
    low = from_hf(upstream, dtype=torch.bfloat16)
    got = computed(SwinAnySize(low), x.bfloat16())
    eager = upstream.bfloat16()(x.bfloat16()).feature_maps
    for ours, theirs, truth in zip(got, eager, exact):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).square().mean() <= 1.5 * (theirs - truth).square().mean()


def test_remembered_sizes_are_bounded() -> None:
    form = SwinAnySize(from_hf(hf_swin()))
    for width in range(1, MAX_REMEMBERED_SIZES + 4):
        form.inputs(images(8, 4 * width, batch=1))
    first, second = (form.inputs(images(8, 8, batch=1)) for _ in range(2))
    assert all(a is b for a, b in zip(first[1:], second[1:]))
    assert form.indices.cache_info().currsize == MAX_REMEMBERED_SIZES


@torch.no_grad()
def test_one_artefact_of_inductor() -> None:
    # relu and one map: fewer kernels to compile
    pair = hf_pair(hf_swin(depths=(2, 1), num_heads=(2, 4), out_indices=[2], hidden_act="relu"))
    before = counters["stats"]["unique_graphs"]
    run = compile_any_size(pair.ours)
    assert callable(run)
    for batch, height, width in [*SIZES, (3, 50, 70)]:
        x = images(height, width, batch)
        assert_equals_upstream(run(x), pair.maps(x))
    with torch.inference_mode():
        x = images(90, 90)
        assert_equals_upstream(run(x), pair.maps(x))
    assert counters["stats"]["unique_graphs"] == before + 1
    assert [m.shape for m in run(images(64, 64, batch=0))] == [(0, 32, 8, 8)]


@torch.no_grad()
def test_resnet_has_one_artefact_for_batches_and_one_for_single_images() -> None:
    pair = hf_pair(hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]))
    before = counters["stats"]["unique_graphs"]
    run = compile_any_size(pair.ours, backend="aot_eager")
    assert callable(run)
    for batch, height, width in [(2, 64, 64), (3, 96, 96), (2, 50, 70), (1, 33, 47), (1, 70, 50)]:
        x = images(height, width, batch)
        assert_equals_upstream(run(x), pair.maps(x))
    # torch 2.11 also asks whether the map under the max pool is even: once more on each axis
    asks = torch.__version__.startswith("2.11.")
    assert counters["stats"]["unique_graphs"] == before + (4 if asks else 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm_pair("resnet18").ours, "a TimmBackbone has no form"),
        (lambda: from_hf(hf_swin(use_absolute_embeddings=True)), "for one size"),
        (lambda: from_hf(hf_swin()).train(), "training"),
    ],
    ids=["timm", "absolute_embeddings", "training"],
)
def test_reasons(make: Any, reason: str) -> None:
    got = compile_any_size(make())
    assert isinstance(got, str) and reason in got
