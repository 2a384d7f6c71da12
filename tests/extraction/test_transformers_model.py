"""Features of the types that transformers computes, from its full models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import images, randomize_
from tiny_types import config, upstream
from tolerance import assert_equals_upstream

from fastbb import AutoBackbone, FeatureExtractor, ImageProcessor
from fastbb.images.spec import ImageProcessorSpec
from fastbb_kernels.accuracy import FP32_REL

transformers = pytest.importorskip("transformers")

PIXELS = images(32, 32)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "model"),
    [
        ("bit", "BitModel"),
        ("focalnet", "FocalNetModel"),
        ("hiera", "HieraModel"),
        ("pixio", "PixioModel"),
        ("sapiens2", "Sapiens2Model"),
        ("textnet", "TextNetModel"),
        ("tipsv2_vision_model", "Tipsv2VisionModel"),
    ],
)
def test_the_embedding_is_upstreams_pooler_output(
    model_type: str, model: str, tmp_path: Path
) -> None:
    made = randomize_(getattr(transformers, model)(config(model_type)))
    extractor = FeatureExtractor(saved(made, tmp_path), "embedding", processor=processor())
    with torch.no_grad():
        want = made(PIXELS).pooler_output.flatten(1)
        got = extractor._models[0].features(PIXELS)["embedding"]
    assert_equals_upstream(got, want, FP32_REL)


def processor() -> ImageProcessor:
    return ImageProcessor(
        ImageProcessorSpec(
            image_processor_type="ViTImageProcessor", reference="hf", resize="exact", size=(32, 32)
        )
    )


def test_tokens_and_the_class_token_are_upstreams(tmp_path: Path) -> None:
    made = randomize_(transformers.PixioModel(config("pixio")))
    names = ["cls", "patch_mean", "tokens"]
    extractor = FeatureExtractor(saved(made, tmp_path), names, processor=processor())
    with torch.no_grad():
        want = made(PIXELS).last_hidden_state
        got = extractor._models[0].features(PIXELS)
    assert_equals_upstream(got["tokens"], want, FP32_REL)
    assert_equals_upstream(got["cls"], want[:, 0], FP32_REL)
    assert_equals_upstream(got["patch_mean"], want[:, 2:].mean(1), FP32_REL)


@pytest.mark.parametrize(
    ("model_type", "features", "problem"),
    [
        (
            "hgnet_v2",
            "embedding",
            "embedding: transformers' hgnet_v2 is a backbone alone; .*pooled",
        ),
        ("pvt_v2", "embedding", "embedding: transformers' PvtV2Model has no pooler_output; .*pool"),
        ("hiera", "embedding", "embedding: the checkpoint lacks a trained part of .*layernorm"),
        ("focalnet", "cls", "cls: transformers' focalnet has no class token"),
        ("bit", "tokens", "tokens: transformers' BitModel is a CNN and has no tokens"),
        (
            "hiera",
            "tokens",
            "tokens of transformers' hiera are there before its norm only: --norm n",
        ),
        ("focalnet", "projection", "projection: transformers' focalnet has none"),
    ],
)
def test_missing_features_are_errors(
    model_type: str, features: str, problem: str, tmp_path: Path
) -> None:
    folder = saved(upstream(model_type), tmp_path)
    with pytest.raises(ValueError, match=problem):
        FeatureExtractor(folder, features, processor=processor())


def test_changed_weights_have_no_embedding_of_the_checkpoint(tmp_path: Path) -> None:
    made = randomize_(transformers.FocalNetModel(config("focalnet")))
    ours = AutoBackbone.from_pretrained(saved(made, tmp_path))
    FeatureExtractor(ours, "embedding", processor=processor())
    with torch.no_grad():
        next(ours.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="of this backbone is not its checkpoint's"):
        FeatureExtractor(ours, "embedding", processor=processor())


def test_a_loaded_backbone_is_not_changed(tmp_path: Path) -> None:
    made = randomize_(transformers.Sapiens2Model(config("sapiens2")))
    folder = saved(made, tmp_path)
    ours = AutoBackbone.from_pretrained(folder, dtype=torch.bfloat16)
    ours.out_indices = [0, 1]
    ours.save_pretrained(tmp_path / "again")
    settings = FeatureExtractor(ours, "embedding", processor=processor()).settings()
    assert "changes_sha256" not in settings["model"]
    assert settings["versions"]["transformers"] == transformers.__version__
    ours.model.embeddings.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="embedding: 'model.embeddings' of this .* has hooks"):
        FeatureExtractor(ours, "embedding", processor=processor())


def test_maps_that_are_tokens_are_pooled_or_refused(tmp_path: Path) -> None:
    vitpose = upstream("vitpose_backbone")
    extractor = FeatureExtractor(saved(vitpose, tmp_path / "1"), "pooled", processor=processor())
    with torch.no_grad():
        got = extractor._models[0].features(PIXELS)["pooled"]
        assert_equals_upstream(got, vitpose(PIXELS).feature_maps[0].mean(1), FP32_REL)
    detector = upstream("rf_detr_dinov2", reshape_hidden_states=False)
    with pytest.raises(
        ValueError, match="maps.stage3: .*no row for each; load it with reshape_hid"
    ):
        FeatureExtractor(saved(detector, tmp_path / "2"), "maps", processor=processor())
