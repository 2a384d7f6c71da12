"""A compiled Swin whose images change their size: one artefact, other sizes run eager."""

import warnings

import torch
from reference_models import hf_pair, hf_swin, images
from tolerance import assert_equals_upstream
from torch._dynamo.utils import counters

from fastbb.engine.settings import EngineWarning


def test_sizes_that_come_and_go_are_compiled_once() -> None:
    # relu and one map: fewer kernels to compile
    pair = hf_pair(hf_swin(depths=(2, 1), num_heads=(2, 4), out_indices=[2], hidden_act="relu"))
    before = counters["stats"]["unique_graphs"]
    prepared = pair.ours.prepare(mode="compile", expected_images=10**9)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        for height, width in ((224, 224), (256, 256), (192, 320), (224, 224), (75, 101)):
            x = images(height, width)
            assert_equals_upstream(prepared(x).feature_maps, pair.maps(x))
    assert counters["stats"]["unique_graphs"] == before + 1
    runs = {row.what: row.runs for row in prepared.explain().rows}
    assert runs == {
        "2x224x224": "compile, 2 images at once",
        "2x256x256": "eager",
        "2x192x320": "eager",
        "2x75x101": "eager",
    }


def test_another_size_is_not_compiled_for_without_a_reason() -> None:
    pair = hf_pair(hf_swin(depths=(1,), num_heads=(2,), out_indices=[1], hidden_act="relu"))
    before = counters["stats"]["unique_graphs"]
    prepared = pair.ours.prepare(mode="compile", example=(1, 32, 32))
    with torch.inference_mode():
        x = images(40, 56)
        assert_equals_upstream(prepared(x).feature_maps, pair.maps(x))
    assert counters["stats"]["unique_graphs"] == before + 1
    row = prepared.explain().rows[-1]
    assert row.runs == "eager" and "say expected_images=" in row.why
