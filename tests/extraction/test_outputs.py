"""How features are stored and described, and extractors made of backbones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_models import PICTURES, save_timm
from torch import nn
from torch.nn import functional as F

from fastbb import AutoBackbone, AutoImageProcessor, ResNetBackbone, ResNetConfig
from fastbb.extraction import FeatureExtractor
from fastbb.extraction.outputs import Storage

SWIN, RESNET = "nano-swin-digits", "nano-resnet-digits"


def test_vectors_are_normalized_and_others_are_not() -> None:
    names = ("embedding", "patch_mean", "pooled", "tokens")
    plain = FeatureExtractor(SWIN, names)(PICTURES)
    got = FeatureExtractor(SWIN, names, normalize=True)(PICTURES)
    for name in ("embedding", "patch_mean", "pooled"):
        assert torch.equal(got[name], F.normalize(plain[name], dim=1))
        torch.testing.assert_close(got[name].norm(dim=1), torch.ones(3))
    assert torch.equal(got["tokens"], plain["tokens"])


def test_normalizing_needs_a_vector() -> None:
    with pytest.raises(ValueError, match="normalize: none of tokens, maps is a vector"):
        FeatureExtractor(SWIN, ("tokens", "maps"), normalize=True)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="normalize: no feature is a vector, shapes are"):
        FeatureExtractor(RESNET, "layer:encoder.stages.0", normalize=True)


@pytest.mark.parametrize(
    ("precision", "feature_dtype", "vector", "tokens"),
    [
        ("fp32", None, "float32", "float32"),
        ("bf16", None, "float32", "bfloat16"),
        ("fp16", None, "float32", "float16"),
        ("fp32", "fp16", "float16", "float16"),
        ("bf16", "fp32", "float32", "float32"),
    ],
)
def test_dtype_of_what_is_stored(
    precision: str, feature_dtype: str | None, vector: str, tokens: str
) -> None:
    names = ("embedding", "tokens", "maps")
    ex = FeatureExtractor(SWIN, names, precision=precision, feature_dtype=feature_dtype)
    outputs, got = ex.outputs(), ex(PICTURES)
    dtypes = {name: output["dtype"] for name, output in outputs.items()}
    assert dtypes == {"embedding": vector, "tokens": tokens, "maps.stage4": tokens}
    assert {name: str(x.dtype).removeprefix("torch.") for name, x in got.items()} == dtypes
    assert {name: list(x.shape[1:]) for name, x in got.items()} == {
        name: output["shape"] for name, output in outputs.items()
    }


def test_a_value_that_the_stored_dtype_cannot_hold_is_a_failed_row(
    make_images: Callable[..., Path],
) -> None:
    backbone = AutoBackbone.from_pretrained(SWIN)
    with torch.no_grad():
        backbone.swin.layernorm.weight.mul_(1e5)
    paths = sorted(make_images(2).iterdir())
    (batch,) = FeatureExtractor(backbone, feature_dtype="fp16").stream(paths)
    assert [error.kind for error in batch.errors] == ["nonfinite_output"] * 2
    assert "as torch.float16 stores it" in batch.errors[0].message
    (batch,) = FeatureExtractor(backbone).stream(paths)
    assert not batch.errors and batch.features["embedding"].abs().max() > 65504
    (batch,) = FeatureExtractor(backbone, feature_dtype="fp16", normalize=True).stream(paths)
    assert not batch.errors  # the length is divided by before the cast


def test_settings_describe_what_decides_values() -> None:
    ex = FeatureExtractor(SWIN, ("tokens", "pooled", "maps.stage1"), normalize=True)
    settings = ex.settings()
    assert settings["features"] == ["tokens", "pooled", "maps.stage1"]
    assert (settings["norm"], settings["normalize"]) == ("final", True)
    assert settings["stages"] == ["stage4"]
    assert settings["outputs"]["tokens"] == {"shape": [4, 96], "dtype": "float32"}
    model = settings["model"]
    assert (model["name"], model["class"]) == (SWIN, "SwinBackbone")
    assert model["config"]["embed_dim"] == 12
    for name in ("out_features", "hidden_dropout_prob", "initializer_range", "id2label", "dtype"):
        assert name not in model["config"]
    settings = FeatureExtractor(SWIN).settings()
    assert settings["norm"] is None and "stages" not in settings
    assert "timm" not in settings["versions"]


def test_labels_and_paths_change_no_settings(tmp_path: Path) -> None:
    backbone = AutoBackbone.from_pretrained(RESNET)
    processor = AutoImageProcessor.from_pretrained(RESNET)
    for name, labels in (("a", {"0": "cat"}), ("b", {"0": "dog"})):
        backbone.config.id2label = labels
        backbone.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    first, second = (FeatureExtractor(tmp_path / name).settings() for name in ("a", "b"))
    assert first["model"].pop("name") != second["model"].pop("name") and first == second


def test_out_indices_without_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out_indices: \[1\] is for pooled and maps, and neither"):
        FeatureExtractor(RESNET, out_indices=[1])


@pytest.mark.parametrize("name", [SWIN, RESNET])
def test_a_backbone_finds_its_processor_and_stays_as_it_is(name: str) -> None:
    backbone = AutoBackbone.from_pretrained(name, out_indices=[1, 2])
    names = ("embedding", "pooled", "maps")
    expected = FeatureExtractor(name, names, out_indices=[1, 2])
    ex = FeatureExtractor(backbone, names)
    got, wanted = ex(PICTURES), expected(PICTURES)
    assert list(got) == list(wanted) and all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert ex.settings() == expected.settings()
    FeatureExtractor(backbone, "maps", out_indices=[3], precision="bf16")
    assert backbone.out_indices == [1, 2] and backbone.dtype == torch.float32
    prepared = backbone.prepare("eager")
    assert torch.equal(FeatureExtractor(prepared, names)(PICTURES)["pooled"], wanted["pooled"])


def test_a_backbone_that_was_not_loaded_needs_a_processor() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    backbone = ResNetBackbone(config).eval()
    with pytest.raises(ValueError, match="not loaded by from_pretrained, .*give processor="):
        FeatureExtractor(backbone)
    processor = AutoImageProcessor.from_pretrained(RESNET)
    ex = FeatureExtractor(backbone, processor=processor)
    assert ex(PICTURES)["embedding"].shape == (3, 16)
    assert ex.settings()["model"]["name"] == "ResNetBackbone"
    with pytest.raises(ValueError, match="in training mode: call .eval"):
        FeatureExtractor(backbone.train(), processor=processor)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "model: wanted a name, a directory or a backbone .*got Linear"),
        (7, {}, "model: wanted a name, a directory or a backbone .*got int"),
        (RESNET, {"processor": "vit"}, "processor: wanted an ImageProcessor .*got str"),
    ],
    ids=["module", "number", "processor"],
)
def test_other_objects_are_type_errors(model: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FeatureExtractor(model, **options)


def test_tokens_need_a_size_where_images_keep_their_aspect_ratio(aspect_model: Path) -> None:
    with pytest.raises(ValueError, match="do not stack, nor do tokens and layers; .*embedding"):
        FeatureExtractor(aspect_model, "layer:encoder")
    assert FeatureExtractor(aspect_model)(PICTURES)["embedding"].shape == (3, 16)


def test_several_kinds_of_timm_features_run_op_by_op(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    ex = FeatureExtractor(tmp_path, ("embedding", "pooled", "layer:layer1"))
    assert ex.choose_mode("auto", 10) == "eager" and len(ex._models) == 3
    assert list(ex(PICTURES)) == ["embedding", "pooled", "layer:layer1"]
    assert [row.runs for row in ex.explain().rows][-1] == "upstream"


def test_long_vectors_are_normalized(make_images: Callable[..., Path]) -> None:
    vectors = torch.tensor([[3e25, 4e25], [3e-25, 4e-25], [0.0, 0.0], [3e38, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(Storage(torch.float32, True).stored(vectors), expected)


def test_a_value_is_not_said_to_be_the_casts_unless_it_is(make_images: Callable[..., Path]) -> None:
    paths = sorted(make_images(1).iterdir())
    for value in (float("nan"), float("inf")):
        backbone = AutoBackbone.from_pretrained(SWIN)
        with torch.no_grad():
            backbone.swin.layernorm.weight.fill_(value)
        (batch,) = FeatureExtractor(backbone, feature_dtype="fp16").stream(paths)
        assert batch.errors[0].message == "a feature is NaN or infinite"


def test_the_order_of_names_changes_no_settings(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    first = FeatureExtractor(tmp_path, ("layer:layer1", "layer:layer2", "embedding"))
    second = FeatureExtractor(tmp_path, ("layer:layer2", "embedding", "layer:layer1"))
    assert first.settings() == second.settings()
