"""Features of timm models, held to timm's own full models with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from feature_models import (
    PICTURES,
    SMALL_VIT,
    TIMM_MODELS,
    gap,
    pixels_of,
    save_timm,
    without_classifier,
)
from reference_models import randomize_

from fastbb import AutoBackbone
from fastbb.extraction import FeatureExtractor

LIMIT = 1e-4  # of the largest magnitude, in fp32


@torch.no_grad()
@pytest.mark.parametrize("name", list(TIMM_MODELS))
def test_embedding_equals_the_output_without_a_classifier(name: str, tmp_path: Path) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    size, options = TIMM_MODELS[name]
    model = save_timm(tmp_path, name, size, **options)
    bare = without_classifier(model, name, **options)
    ex = FeatureExtractor(tmp_path)
    got = ex(PICTURES)["embedding"]
    assert ex.processor.output_size == (size, size)
    assert gap(got, bare(pixels_of(tmp_path))) < LIMIT
    assert got.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "n_prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_base_patch16_siglip_224", 0),
        ("swin_tiny_patch4_window7_224", 0),
    ],
)
def test_tokens_equal_the_features_of_the_full_model(
    name: str, n_prefix: int, tmp_path: Path
) -> None:
    size, options = TIMM_MODELS[name]
    model = save_timm(tmp_path, name, size, **options)
    pixels = pixels_of(tmp_path)
    names = ["tokens", "patch_mean", *(["cls"] if n_prefix else [])]
    tokens = model.forward_features(pixels)
    final = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    model.norm = torch.nn.Identity()
    tokens = model.forward_features(pixels)
    before = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    for norm, expected in (("final", final), ("none", before)):
        ex = FeatureExtractor(tmp_path, [*names, "embedding"], norm=norm)
        got = ex(PICTURES)
        assert gap(got["tokens"], expected) < LIMIT
        assert gap(got["patch_mean"], expected[:, n_prefix:].mean(1)) < LIMIT
        if n_prefix:
            assert gap(got["cls"], expected[:, 0]) < LIMIT
        embedding = FeatureExtractor(tmp_path)(PICTURES)["embedding"]
        assert gap(got["embedding"], embedding) < LIMIT
        assert ex.settings()["norm"] == norm


def test_a_norm_after_pooling_has_no_normed_tokens(tmp_path: Path) -> None:
    save_timm(tmp_path, "beit_base_patch16_224", 64, **SMALL_VIT)
    with pytest.raises(ValueError, match="tokens: timm's Beit normalizes only after .*norm none"):
        FeatureExtractor(tmp_path, "tokens")
    assert FeatureExtractor(tmp_path, "cls", norm="none")(PICTURES)["cls"].shape == (3, 48)


@pytest.mark.parametrize(
    ("name", "feature", "message"),
    [
        ("test_resnet", "tokens", "tokens: timm's ResNet has no tokens; .*pooled or maps"),
        ("test_resnet", "cls", "cls: timm's ResNet has no tokens"),
        ("vit_base_patch16_siglip_224", "cls", "cls: timm's VisionTransformer has no class token"),
        ("test_resnet", "projection", "projection: wanted the image tower of a CLIP or SigLIP"),
        ("test_resnet", "layer:layer1.conv1", "no such module; did you mean layer1.0.conv1"),
    ],
)
def test_features_that_a_timm_model_lacks_are_errors(
    name: str, feature: str, message: str, tmp_path: Path
) -> None:
    size, options = TIMM_MODELS[name]
    save_timm(tmp_path, name, size, **options)
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(tmp_path, feature)


@torch.no_grad()
def test_projection_of_clip_is_the_head_of_the_original(tmp_path: Path) -> None:
    name, options = "vit_base_patch16_clip_224", {**SMALL_VIT, "num_classes": 512}
    save_timm(tmp_path / "plain", name, 64, "openai", **options)
    with pytest.raises(ValueError, match="the head of .*plain' is not one linear layer without"):
        FeatureExtractor(tmp_path / "plain", "projection")  # it has a bias, as classifiers have
    tuned = tmp_path / "tuned"
    save_timm(tuned, name, 64, "laion2b_ft_in1k", **options, head_bias=False)
    with pytest.raises(ValueError, match="timm's description of .* is not that of one"):
        FeatureExtractor(tuned, "projection")
    model = save_timm(tmp_path, name, 64, "openai", **options, head_bias=False)
    got = FeatureExtractor(tmp_path, ("projection", "embedding"))(PICTURES)
    assert gap(got["projection"], model(pixels_of(tmp_path))) < LIMIT
    bare = without_classifier(model, name, **options)
    assert gap(got["embedding"], bare(pixels_of(tmp_path))) < LIMIT


@torch.no_grad()
def test_projection_of_siglip_is_its_pooled_output(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "vit_base_patch16_siglip_224", 64, "webli", **SMALL_VIT)
    got = FeatureExtractor(tmp_path, ("projection", "embedding"))(PICTURES)
    assert gap(got["projection"], model(pixels_of(tmp_path))) < LIMIT
    assert torch.equal(got["projection"], got["embedding"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_layers_equal_hooks_on_the_full_model(name: str, tmp_path: Path) -> None:
    size, options = TIMM_MODELS[name]
    model = save_timm(tmp_path, name, size, **options)
    layers = {"test_resnet": ["layer1.0.bn1", "layer3", "fc"]}.get(name, ["blocks.0", "head"])
    outputs: dict[str, Any] = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _, args, out, layer=layer: outputs.update({layer: out.clone()})
        )
    model(pixels_of(tmp_path))
    got = FeatureExtractor(tmp_path, [f"layer:{layer}" for layer in layers])(PICTURES)
    for layer in layers:
        assert gap(got[f"layer:{layer}"], outputs[layer]) < LIMIT


@torch.no_grad()
def test_maps_come_from_the_backbone_beside_the_full_model(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "test_resnet", 64)
    ex = FeatureExtractor(tmp_path, ("embedding", "pooled", "maps.layer2"))
    got = ex(PICTURES)
    backbone = AutoBackbone.from_pretrained(tmp_path, out_indices=[2, 4])
    second, fourth = backbone(pixels_of(tmp_path)).feature_maps
    assert gap(got["maps.layer2"], second) < LIMIT
    assert gap(got["pooled"], fourth.mean((2, 3))) < LIMIT
    bare = without_classifier(model, "test_resnet")
    assert gap(got["embedding"], bare(pixels_of(tmp_path))) < LIMIT
    assert ex.settings()["stages"] == ["layer4"]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_low_precision_loses_what_timm_loses(name: str, precision: str, tmp_path: Path) -> None:
    size, options = TIMM_MODELS[name]
    bare = without_classifier(save_timm(tmp_path, name, size, **options), name, **options)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pixels = pixels_of(tmp_path)
    exact, low = bare.double()(pixels.double()), bare.to(dtype)(pixels.to(dtype))
    got = FeatureExtractor(tmp_path, precision=precision)(PICTURES)["embedding"]
    assert gap(got, exact) <= 2 * gap(low, exact) + 1e-3


@torch.no_grad()
def test_a_compiled_full_model_gives_the_same(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "test_resnet", 64)
    ex = FeatureExtractor(tmp_path, mode="compile", batch_size=3)
    bare = without_classifier(model, "test_resnet")
    assert gap(ex(PICTURES)["embedding"], bare(pixels_of(tmp_path))) < LIMIT
    assert ex.explain().rows[0].runs.startswith("compile")
    assert ex.choose_mode("eager", 3) == "eager"


def test_a_checkpoint_without_the_final_norm_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_timm(tmp_path, "vit_tiny_patch16_224", 64, **SMALL_VIT)
    file = tmp_path / "model.safetensors"
    state = {n: t for n, t in load_file(file).items() if not n.startswith("norm.")}
    save_file(state, file)
    with pytest.raises(OSError, match="lack norm.weight, norm.bias; --features pooled and maps"):
        FeatureExtractor(tmp_path)
    assert FeatureExtractor(tmp_path, "pooled")(PICTURES)["pooled"].shape == (3, 48)


def test_a_timm_backbone_saved_alone_has_no_embedding(tmp_path: Path) -> None:
    save_timm(tmp_path / "full", "test_resnet", 64)
    backbone = AutoBackbone.from_pretrained(tmp_path / "full")
    backbone.save_pretrained(tmp_path / "alone")
    ex = FeatureExtractor(tmp_path / "full", "pooled")
    ex.processor.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="saved alone, .*--features pooled or maps"):
        FeatureExtractor(tmp_path / "alone")
    assert FeatureExtractor(tmp_path / "alone", "pooled")(PICTURES)["pooled"].shape[0] == 3


@torch.no_grad()
def test_a_timm_backbone_object_finds_its_full_model(tmp_path: Path) -> None:
    save_timm(tmp_path, "vit_tiny_patch16_224", 64, **SMALL_VIT)
    backbone = AutoBackbone.from_pretrained(tmp_path)
    expected = FeatureExtractor(tmp_path)(PICTURES)["embedding"]
    assert torch.equal(FeatureExtractor(backbone)(PICTURES)["embedding"], expected)
    randomize_(backbone, seed=3)
    with pytest.raises(ValueError, match="is not its checkpoint's, .*pooled or maps"):
        FeatureExtractor(backbone)
    assert FeatureExtractor(backbone, "pooled")(PICTURES)["pooled"].shape == (3, 48)


def test_settings_depend_on_weights_and_not_on_their_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_timm(tmp_path / name, "test_resnet", 64)
    first, second = (FeatureExtractor(tmp_path / name).settings() for name in ("a", "b"))
    assert first["model"].pop("name") != second["model"].pop("name") and first == second
    save_timm(tmp_path / "c", "test_resnet", 64, layers=(2, 1, 1, 1))
    other = FeatureExtractor(tmp_path / "c").settings()["model"]
    assert other["weights_sha256"] != first["model"]["weights_sha256"]


def test_the_test_size_is_timms(tmp_path: Path) -> None:
    ex = FeatureExtractor("nano-resnet-digits")
    with pytest.raises(ValueError, match="size: 'test' is the test size of timm models"):
        FeatureExtractor("nano-resnet-digits", size="test")
    with pytest.raises(ValueError, match="size: 'test' chooses a processor, and processor="):
        FeatureExtractor("nano-resnet-digits", size="test", processor=ex.processor)
    save_timm(tmp_path, "resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    assert FeatureExtractor(tmp_path).processor.output_size == (224, 224)
    assert FeatureExtractor(tmp_path, size="test").processor.output_size == (288, 288)
