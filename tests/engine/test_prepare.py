"""`prepare`: its arguments, the unchanged original, and calls that must run eager."""

import copy
import io
import json
import pickle
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, assert_right, resnet_pair, swin_pair
from pretended_device import (
    Compiler,
    explained,
    no_warning,
    only_row,
)
from reference_models import Pair, gradients, images
from tolerance import assert_as_accurate_as_eager, assert_equal_gradients, assert_equals_upstream
from torch import Tensor

from fastbb.engine.settings import EngineWarning

pytestmark = pytest.mark.usefixtures("compiler")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=[resnet_pair, swin_pair], ids=["resnet", "swin"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param()


# arguments

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "fast"}, r"mode must be one of 'auto', .*'triton\+compile', got 'fast'"),
    "mode-none": ({"mode": None}, "mode must be one of .*, got None"),
    "precision": ({"precision": "fp64"}, "precision must be one of 'fp32', .*, got 'fp64'"),
    "precision-dtype": ({"precision": torch.half}, "precision must be .*, got torch.float16"),
    "graph": ({"cuda_graph": "yes"}, "cuda_graph must be one of 'auto', True, False, got 'yes'"),
    "graph-number": ({"cuda_graph": 1}, "cuda_graph must be one of 'auto', True, False, got 1"),
    "images-negative": ({"expected_images": -1}, "expected_images must be a number .*, got -1"),
    "images-float": ({"expected_images": 1e6}, "expected_images must be .* or None, got 1000000.0"),
    "images-bool": ({"expected_images": True}, "expected_images must be .*, got True"),
    "example-text": ({"example": "224"}, r"example must be pixels \[B, C, H, W\] or .*, got '224'"),
    "example-two": ({"example": (64, 64)}, r"three numbers \(batch, height, width\), got \(64, 64"),
    "example-empty": ({"example": (0, 64, 64)}, r"example must be .*, got \(0, 64, 64\)"),
    "example-float": ({"example": (1, 64, 64.0)}, r"example must be .*, got \(1, 64, 64.0\)"),
    "example-channels": ({"example": images(64, 64, channels=4)}, "Expected 3 channels"),
    "example-image": ({"example": PIXELS[0]}, r"must be a tensor \[batch, channels, height, wid"),
    "triton": ({"mode": "triton"}, "mode='triton' needs a CUDA or ROCm device, .* is on cpu"),
    "triton+compile": ({"mode": "triton+compile"}, "needs a CUDA or ROCm device.*mode='auto'"),
    "tf32": ({"precision": "tf32"}, "precision='tf32' needs an NVIDIA GPU, .* take 'fp32'"),
    "graph-cpu": ({"cuda_graph": True}, "cuda_graph=True needs a GPU, .* is on cpu; take 'auto'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_raises_value_error(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        resnet_pair().ours.prepare(**arguments)


def test_a_backbone_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the backbone is training: call \.eval\(\) first"):
        resnet_pair().ours.train().prepare()


@pytest.mark.parametrize(
    "example",
    [PIXELS, PIXELS.double(), (2, 64, 64), [2, 64, 64]],
    ids=["pixels", "double", "tuple", "list"],
)
def test_prepare_with_an_example_compiles_at_once(example: Any, compiler: Compiler) -> None:
    """Compiles also with grad mode on."""
    pair = resnet_pair()
    with no_warning():
        backbone = pair.ours.prepare("compile", example=example)
        assert compiler.compiled == [(2, 3, 64, 64)]
        assert only_row(backbone).runs == "compile, 2 images at once"
        assert_right(backbone, pair)
    assert len(compiler.compiled) == 1


# precision and shared weights


@pytest.mark.parametrize("precision", [None, "fp32", *DTYPES])
def test_prepare_leaves_the_original_unchanged(precision: str | None, pair: Pair) -> None:
    before = {name: (id(tensor), tensor.clone()) for name, tensor in state(pair.ours).items()}
    prepared = pair.ours.prepare("eager", precision, example=PIXELS)
    assert type(prepared) is type(pair.ours) and prepared is not pair.ours
    assert prepared.dtype == DTYPES.get(precision or "", torch.float32)
    prepared.out_indices = [1]
    assert pair.ours.out_indices == [0, 1, 2] and "not prepared" in str(pair.ours.explain())
    after = state(pair.ours)
    assert list(after) == list(before) == list(state(prepared))
    assert list(prepared.state_dict()) == list(pair.ours.state_dict())
    is_copy = precision in DTYPES
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value)
        assert (state(prepared)[name] is not after[name]) == is_copy
    assert_right(pair.ours, pair)


def state(backbone: Any) -> dict[str, Tensor]:
    return dict([*backbone.named_parameters(), *backbone.named_buffers()])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_a_lower_precision_is_as_accurate_as_upstreams(
    mode: str, precision: str, pair: Pair
) -> None:
    backbone = pair.ours.prepare(mode, precision)
    with torch.no_grad():
        got = backbone(PIXELS).feature_maps
        exact = copy.deepcopy(pair.upstream).double()(PIXELS.double()).feature_maps
        low = pair.upstream.to(DTYPES[precision])
        eager = low(PIXELS.to(DTYPES[precision])).feature_maps
    for name, *maps in zip(backbone.out_features, got, eager, exact):
        assert_as_accurate_as_eager(name, *maps)


def test_a_backbone_in_low_precision_can_be_prepared_in_fp32() -> None:
    pair = resnet_pair()
    half = pair.ours.half()
    backbone = half.prepare("eager", "fp32")
    assert (half.dtype, backbone.dtype) == (torch.float16, torch.float32)
    pair.upstream.half().float()
    assert_right(backbone, pair)


def test_weights_converted_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        backbone = resnet_pair().ours.prepare("eager", "bf16")
    assert not any(p.is_inference() for p in backbone.parameters())


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_pixels_of_another_dtype_are_converted(precision: str | None) -> None:
    pair = resnet_pair()
    backbone = pair.ours.prepare("eager", precision)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        pixels = PIXELS.to(dtype)
        with torch.no_grad():
            got = backbone(pixels).feature_maps
        assert_equals_upstream(got, pair.maps(pixels.float()))
    with pytest.raises(ValueError, match="pixel_values are torch.uint8, the weights"):
        backbone(PIXELS.byte())


# requested outputs


@torch.no_grad()
def test_hidden_states_and_attentions_equal_upstream(pair: Pair) -> None:
    backbone = pair.ours.prepare("compile", example=PIXELS)
    asked = {"output_hidden_states": True, "output_attentions": backbone.has_attentions}
    pair.upstream.set_attn_implementation("eager")  # others return no weights
    got, want = backbone(PIXELS, **asked), pair.upstream(PIXELS, **asked)
    assert_equals_upstream(got.feature_maps, want.feature_maps)
    assert_equals_upstream(got.hidden_states, want.hidden_states)
    if backbone.has_attentions:
        assert_equals_upstream(got.attentions, want.attentions)
    assert backbone(PIXELS).hidden_states is None
    (maps,) = backbone(PIXELS, return_dict=False)
    assert_equals_upstream(maps, pair.maps(PIXELS))


@pytest.mark.parametrize("by", ["out_indices", "out_features", "config"])
def test_out_indices_set_after_prepare_are_followed(
    by: str, pair: Pair, compiler: Compiler
) -> None:
    backbone = pair.ours.prepare("compile", example=PIXELS)
    if by == "out_features":
        backbone.out_features = backbone.stage_names[1:2]
    else:
        (backbone.config if by == "config" else backbone).out_indices = [1]
    with torch.no_grad():
        for _ in range(2):
            assert_equals_upstream(backbone(PIXELS).feature_maps, pair.maps(PIXELS)[1:2])
    assert len(compiler.compiled) == 2


@pytest.mark.parametrize("mode", ["auto", "eager", "compile"])
@torch.no_grad()
def test_empty_batch_runs_eager_and_gives_empty_maps(
    mode: str, pair: Pair, compiler: Compiler
) -> None:
    backbone = pair.ours.prepare(mode)
    maps = backbone(PIXELS[:0]).feature_maps
    assert_equals_upstream(maps, [x[:0] for x in pair.maps(PIXELS)])  # upstream's Swin takes none
    row = only_row(backbone)
    assert (row.what, row.runs, row.why) == ("0x64x64", "eager", "an empty batch")
    assert not compiler.compiled
    assert_right(backbone, pair)


def test_wrong_input_raises_the_error_of_the_unprepared_backbone() -> None:
    pair = swin_pair()
    for pixels in (PIXELS[0], PIXELS[:, :2], PIXELS.to("meta")):
        with pytest.raises(ValueError) as plain:
            pair.ours(pixels)
        with no_warning(), pytest.raises(ValueError) as prepared:
            pair.ours.prepare("compile")(pixels)
        assert str(prepared.value) == str(plain.value)


# calls that must run the backbone's own forward


def test_a_gradient_is_computed_eager_with_one_warning(pair: Pair) -> None:
    backbone = pair.ours.double().prepare("compile", example=(2, 64, 64))
    exact = PIXELS.double()
    reason = "a gradient is needed here, so it runs eager: call it under torch.no_grad()"
    with pytest.warns(EngineWarning, match=re.escape(reason)) as warned:
        found = gradients(backbone, exact)
    assert len(warned) == 1
    with no_warning():
        assert_equal_gradients(gradients(backbone, exact), found)
        assert_equal_gradients(found, gradients(pair.upstream.double(), exact))
    assert reason in explained(backbone).rows[-1].why


def test_gradient_of_the_pixels_alone_runs_eager_with_a_warning() -> None:
    pair = resnet_pair()
    backbone = pair.ours.requires_grad_(False).prepare("compile", example=PIXELS)
    found = []
    for model in (backbone, pair.upstream.requires_grad_(False)):
        pixels = PIXELS.clone().requires_grad_()
        with nullcontext() if model is pair.upstream else pytest.warns(EngineWarning):
            model(pixels).feature_maps[-1].square().mean().backward()
        found.append(pixels.grad)
    assert_equals_upstream(*found)


def test_training_mode_runs_as_upstream() -> None:
    pair = resnet_pair()
    backbone = pair.ours.prepare("compile", example=PIXELS).train()
    pair.upstream.train()
    with no_warning(), torch.no_grad():
        maps = backbone(PIXELS).feature_maps
    assert_equals_upstream(maps, pair.maps(PIXELS))
    for ours, theirs in zip(backbone.buffers(), pair.upstream.buffers()):
        assert_equals_upstream(ours, theirs)
    assert "in training mode: call .eval()" in str(backbone.explain())


def test_autocast_runs_the_unprepared_forward(pair: Pair) -> None:
    backbone = pair.ours.prepare("compile", example=PIXELS)
    with torch.no_grad():
        exact = copy.deepcopy(pair.upstream).double()(PIXELS.double()).feature_maps
        with no_warning(), torch.autocast("cpu", torch.bfloat16):
            got, eager = backbone(PIXELS).feature_maps, pair.maps(PIXELS)
            unprepared = pair.ours(PIXELS).feature_maps
    for name, x, plain, *others in zip(backbone.out_features, got, unprepared, eager, exact):
        assert torch.equal(x, plain) and x.dtype == plain.dtype
        if x.dtype == others[0].dtype:
            assert_as_accurate_as_eager(name, x, *others)
    assert "under torch.autocast" in str(backbone.explain())


# copies


def saved_and_loaded(backbone: Any) -> Any:
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda backbone: pickle.loads(pickle.dumps(backbone)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("has_run", [True, False])
def test_a_copy_is_prepared_independently(
    make_copy: Callable[[Any], Any], has_run: bool, pair: Pair, compiler: Compiler
) -> None:
    backbone = pair.ours.prepare("compile", example=PIXELS if has_run else None)
    twin = make_copy(backbone)
    assert only_row(twin).runs == "not decided"
    with no_warning():
        assert_right(twin, pair)
        assert only_row(twin).runs == "compile, 2 images at once"
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert_right(backbone, pair)
    assert len(compiler.compiled) == 2
    with pytest.warns(EngineWarning, match="changed since they were compiled"), torch.no_grad():
        assert not torch.equal(twin(PIXELS).feature_maps[-1], pair.maps(PIXELS)[-1])


def test_preparing_again_replaces_the_mode(compiler: Compiler) -> None:
    pair = resnet_pair()
    compiled = pair.ours.prepare("compile", example=PIXELS)
    eager = compiled.prepare("eager", example=PIXELS)
    assert_right(eager, pair)
    assert "compile" not in str(eager.explain()) and "compile" in str(compiled.explain())


# threads


def test_threads_share_one_compilation(pair: Pair, compiler: Compiler) -> None:
    backbone = pair.ours.prepare("compile")
    pixels = [images(64, 64, batch, seed=batch) for batch in (2, 2, 5, 1)]
    want = [pair.maps(x) for x in pixels]
    found: list[Any] = [None] * len(pixels)
    start = threading.Barrier(len(pixels))

    def run(index: int) -> None:
        start.wait()
        with torch.no_grad():
            found[index] = [backbone(pixels[index]).feature_maps for _ in range(5)]

    threads = [threading.Thread(target=run, args=[index]) for index in range(len(pixels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for all_maps, theirs in zip(found, want):
        for maps in all_maps:
            assert_equals_upstream(maps, theirs)
    assert len(compiler.compiled) == 1


# explanations


def test_explain_of_an_unprepared_backbone_says_eager() -> None:
    backbone = resnet_pair().ours
    explanation = explained(backbone)
    assert explanation.title == "ResNetBackbone in torch.float32 on cpu, not prepared"
    assert [(row.what, row.runs) for row in explanation.rows] == [("any", "eager")]


def test_an_explanation_prints_as_a_table_and_becomes_json() -> None:
    pair = resnet_pair()
    backbone = pair.ours.prepare("eager", "bf16")
    row = only_row(backbone)
    assert (row.what, row.runs) == ("any", "not decided") and "nothing has run yet" in row.why
    with torch.no_grad():
        backbone(PIXELS)
    explanation = explained(backbone)
    title, header, first, *_ = str(explanation).splitlines()
    assert title == explanation.title == "ResNetBackbone in bf16 on cpu, mode eager"
    assert header.split() == ["what", "runs", "why"]  # nothing was measured
    assert first.startswith("2x64x64") and "mode='eager'" in first
    assert json.loads(json.dumps(explanation.to_dict()))["rows"][0]["what"] == "2x64x64"
