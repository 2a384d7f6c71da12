"""Exports of native backbones: the exported programs compute upstream's maps, for any batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import (
    Pair,
    from_hf,
    hf_maskformer_swin,
    hf_resnet,
    hf_swin,
    images,
    randomize_,
)
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor
from vit_models import hf_vit

import fastbb
from fastbb import AutoBackbone

TWO: dict[str, Any] = {"depths": [2, 1], "num_heads": [2, 4]}
PIXELS, OTHER_BATCH = images(45, 51), images(45, 51, batch=5)
BATCH = {"pixel_values": {0: torch.export.Dim("batch")}}


def of_transformers(upstream: Any) -> Pair:
    return Pair(from_hf(upstream), upstream, lambda pixels: list(upstream(pixels).feature_maps))


def torchvision_pair() -> Pair:
    """torchvision's Swin, whose stages are the second, fourth ... of its features."""
    import torchvision

    upstream: Any = torchvision.models.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [7, 7])
    randomize_(upstream)

    def maps(pixels: Tensor) -> list[Tensor]:
        x, stages = pixels, []
        for index, layer in enumerate(upstream.features):
            x = layer(x)
            if index % 2:
                stages.append(x.permute(0, 3, 1, 2))
        return stages

    ours = AutoBackbone.from_torchvision(None, upstream, out_indices=(1, 2)).eval()
    return Pair(ours, upstream, maps)


PAIRS: dict[str, Callable[[], Pair]] = {
    "swin": lambda: of_transformers(hf_swin(**TWO, out_indices=[0, 1, 2])),
    "maskformer_swin": lambda: of_transformers(hf_maskformer_swin(**TWO, out_indices=[1, 2])),
    "torchvision_swin": torchvision_pair,
    "basic_resnet": lambda: of_transformers(hf_resnet()),
    "bottleneck_resnet": lambda: of_transformers(hf_resnet("bottleneck")),
    "dinov2": lambda: of_transformers(hf_vit("dinov2")),
    "dinov3": lambda: of_transformers(hf_vit("dinov3_vit", use_gated_mlp=True, hidden_act="silu")),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_onnx_runtime_computes_upstreams_maps_of_another_batch(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pair = PAIRS[name]()
    program = torch.onnx.export(pair.ours, (PIXELS,), dynamo=True, dynamic_shapes=BATCH)
    assert program is not None
    assert "fastbb" not in {node.domain for node in program.model.graph}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    got = session.run(None, {"pixel_values": OTHER_BATCH.numpy()})
    assert_equals_upstream([torch.from_numpy(m) for m in got], pair.maps(OTHER_BATCH))


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True], ids=["loaded", "prepared"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_exported_program_computes_upstreams_maps_of_another_batch(
    name: str, prepared: bool
) -> None:
    pair = PAIRS[name]()
    backbone = pair.ours.prepare() if prepared else pair.ours
    backbone(PIXELS)
    program = torch.export.export(backbone, (PIXELS,), dynamic_shapes=BATCH)
    got = program.module()(OTHER_BATCH).feature_maps
    assert_equals_upstream(list(got), pair.maps(OTHER_BATCH))


@torch.no_grad()
def test_a_backbone_with_a_converted_precision_exports_in_it() -> None:
    pair = PAIRS["bottleneck_resnet"]()
    backbone = pair.ours.prepare(precision="bf16")
    program = torch.export.export(backbone, (PIXELS,), dynamic_shapes=BATCH)
    dtypes = {value.dtype for value in program.state_dict.values() if value.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    got = program.module()(OTHER_BATCH).feature_maps
    exact = copy.deepcopy(pair.upstream).double()(OTHER_BATCH.double()).feature_maps
    eager = pair.upstream.bfloat16()(OTHER_BATCH.bfloat16()).feature_maps
    for stage, ours, lossy, true in zip(backbone.out_features, got, eager, exact):
        assert_as_accurate_as_eager(stage, ours, lossy, true)


@torch.no_grad()
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_scripting_an_accelerated_model_is_an_error_that_names_restore(library: str) -> None:
    if library == "timm":
        import timm

        model: Any = timm.create_model("resnet18").eval()
    else:
        import torchvision

        model = torchvision.models.resnet18().eval()
    fastbb.accelerate(model)
    model(PIXELS)
    with pytest.raises(RuntimeError, match=r"fastbb\.restore\(model\) first"):
        torch.jit.script(model)
    fastbb.restore(model)
    assert torch.jit.script(model)(PIXELS).shape == (2, 1000)
    assert not any("__prepare_scriptable__" in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_accelerated_model_is_exported_with_upstreams_forward() -> None:
    import torchvision

    model = torchvision.models.resnet18().eval()
    want = model(OTHER_BATCH)
    fastbb.accelerate(model)
    model(PIXELS)
    program = torch.export.export(model, (PIXELS,), dynamic_shapes={"x": BATCH["pixel_values"]})
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert_equals_upstream(program.module()(OTHER_BATCH), want)
