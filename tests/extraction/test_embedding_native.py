"""Features of the last stage of native families, held to transformers' and torchvision's models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_models import PICTURES, gap, pixels_of, save_processor
from reference_models import (
    hf_maskformer_swin,
    hf_resnet,
    hf_swin,
    randomize_,
    torchvision_resnet,
    torchvision_swin,
)
from torch import Tensor, nn

from fastbb import AutoBackbone, ImageProcessor
from fastbb.extraction import FeatureExtractor

LIMIT = 1e-5  # of the largest magnitude, in fp32
Upstream = Callable[[Tensor], Any]


def transformers_model(kind: str, directory: Path) -> Any:
    """A tiny model of transformers, saved with its processor."""
    import transformers

    like = (hf_swin(window_size=4) if kind == "Swin" else hf_resnet()).config
    config = type(like).from_dict({**like.to_dict(), "out_features": None, "out_indices": [4]})
    model = randomize_(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(directory)
    save_processor(directory)
    return model


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("swin")
    return directory, transformers_model("Swin", directory)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("resnet")
    return directory, transformers_model("ResNet", directory)


@torch.no_grad()
def test_features_of_swin_equal_transformers(swin: tuple[Path, Any]) -> None:
    directory, upstream = swin
    ex = FeatureExtractor(directory, ("embedding", "tokens", "patch_mean"))
    output = upstream(pixels_of(directory))
    got = ex(PICTURES)
    assert list(got) == ["embedding", "patch_mean", "tokens"] and ex.norm == "final"
    assert gap(got["embedding"], output.pooler_output) < LIMIT
    assert gap(got["tokens"], output.last_hidden_state) < LIMIT
    assert gap(got["patch_mean"], output.last_hidden_state.mean(1)) < LIMIT


@torch.no_grad()
def test_features_before_the_norm_equal_transformers(swin: tuple[Path, Any]) -> None:
    directory, upstream = swin
    upstream = copy.deepcopy(upstream)
    expected = upstream(pixels_of(directory))
    upstream.layernorm = nn.Identity()
    before = upstream(pixels_of(directory)).last_hidden_state
    ex = FeatureExtractor(directory, ("tokens", "embedding", "patch_mean"), norm="none")
    got = ex(PICTURES)
    assert gap(got["tokens"], before) < LIMIT
    assert gap(got["patch_mean"], before.mean(1)) < LIMIT
    assert gap(got["embedding"], expected.pooler_output) < LIMIT  # whatever norm tokens have


@torch.no_grad()
def test_embedding_of_a_resnet_equals_transformers(resnet: tuple[Path, Any]) -> None:
    directory, upstream = resnet
    expected = upstream(pixels_of(directory)).pooler_output.flatten(1)
    got = FeatureExtractor(directory)(PICTURES)
    assert list(got) == ["embedding"] and gap(got["embedding"], expected) < LIMIT


@torch.no_grad()
def test_maps_are_those_of_the_backbone_beside_an_embedding(swin: tuple[Path, Any]) -> None:
    directory, upstream = swin
    names = ("embedding", "pooled", "maps.stage2")
    ex = FeatureExtractor(directory, names, out_indices=(1, 3))
    assert ex.stages == ("stage3",)
    got = ex(PICTURES)
    backbone = AutoBackbone.from_pretrained(directory, out_indices=(2, 3))
    second, third = backbone(pixels_of(directory)).feature_maps
    assert list(got) == ["embedding", "pooled", "maps.stage2"]
    assert (
        gap(got["maps.stage2"], second) < LIMIT and gap(got["pooled"], third.mean((2, 3))) < LIMIT
    )
    assert gap(got["embedding"], upstream(pixels_of(directory)).pooler_output) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_embedding_equals_torchvision_before_its_classifier(kind: str, tmp_path: Path) -> None:
    upstream = {"swin": torchvision_swin, "resnet": torchvision_resnet}[kind]()
    backbone = AutoBackbone.from_torchvision(None, upstream)
    save_processor(tmp_path)
    processor = FeatureExtractor("nano-resnet-digits").processor
    ex = FeatureExtractor(backbone, processor=processor)
    setattr(upstream, {"swin": "head", "resnet": "fc"}[kind], nn.Identity())
    pixels = processor(PICTURES).pixel_values
    assert gap(ex(PICTURES)["embedding"], upstream(pixels)) < LIMIT
    if kind == "swin":
        ex = FeatureExtractor(backbone, ("tokens", "layer:features.1"), processor=processor)
        got = ex(PICTURES)
        expected = upstream.norm(upstream.features(pixels)).flatten(1, 2)
        assert gap(got["tokens"], expected) < LIMIT
        assert gap(got["layer:features.1"], upstream.features[:2](pixels)) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mode"), [("swin", "eager"), ("swin", "auto"), ("resnet", "compile")]
)
def test_prepared_modes_give_the_same_embedding(
    family: str, mode: str, request: pytest.FixtureRequest
) -> None:
    directory, upstream = request.getfixturevalue(family)
    ex = FeatureExtractor(directory, mode=mode, batch_size=3)
    expected = upstream(pixels_of(directory)).pooler_output.flatten(1)
    assert gap(ex(PICTURES)["embedding"], expected) < LIMIT
    assert ex.explain().rows[0].runs.startswith("compile" if mode == "compile" else "eager")


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_low_precision_loses_what_upstream_loses(
    family: str, precision: str, request: pytest.FixtureRequest
) -> None:
    directory, upstream = request.getfixturevalue(family)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    exact = copy.deepcopy(upstream).double()(pixels_of(directory).double()).pooler_output.flatten(1)
    low = copy.deepcopy(upstream).to(dtype)(pixels_of(directory).to(dtype)).pooler_output.flatten(1)
    got = FeatureExtractor(directory, precision=precision)(PICTURES)["embedding"]
    assert got.dtype == torch.float32
    assert gap(got, exact) <= 2 * gap(low, exact) + 1e-3
    if family == "swin":
        tokens = FeatureExtractor(directory, "tokens", precision=precision)(PICTURES)["tokens"]
        assert tokens.dtype == dtype


def test_a_final_norm_that_was_never_trained_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    upstream = hf_swin(window_size=4)  # a backbone, whose weights of the final norm nobody uses
    for tensor, value in ((upstream.swin.layernorm.weight, 1), (upstream.swin.layernorm.bias, 0)):
        tensor.data.fill_(value)
    upstream.save_pretrained(tmp_path)
    save_processor(tmp_path)
    for feature in ("embedding", "tokens", "patch_mean", "layer:layernorm"):
        with pytest.raises(ValueError, match=f"{feature}: .*no trained final norm.*pooled or maps"):
            FeatureExtractor(tmp_path, feature)
    # what needs no final norm is there
    names = ("pooled", "patch_mean", "layer:encoder.layers.0")
    assert len(FeatureExtractor(tmp_path, names, norm="none")(PICTURES)) == 3


def test_a_final_norm_that_is_not_in_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    for name, upstream in (("swin", hf_swin(window_size=4)), ("maskformer", hf_maskformer_swin())):
        directory = tmp_path / name
        upstream.save_pretrained(directory)
        file = directory / "model.safetensors"
        state = load_file(file)
        final = [n for n in state if "encoder" not in n and n.split(".")[-2] == "layernorm"]
        assert len(final) == 2
        for tensor_name in final:
            del state[tensor_name]
        save_file(state, file, metadata={"format": "pt"})
        save_processor(directory)
        with pytest.raises(ValueError, match="embedding: .*no trained final norm"):
            FeatureExtractor(directory)


@pytest.mark.parametrize(
    ("family", "feature", "message"),
    [
        ("swin", "cls", "cls: a SwinBackbone has no class token; .*embedding, patch_mean"),
        ("swin", "projection", "projection: a SwinBackbone has none, .*--features embedding"),
        ("resnet", "tokens", "tokens: a ResNetBackbone is a CNN .*pooled or maps"),
        ("resnet", "cls", "cls: a ResNetBackbone is a CNN and has no tokens"),
        ("resnet", "maps.stage9", "maps.stage9: there is no such stage; the model has stem, "),
        ("resnet", "layer:encoder.stage.0", "no such module; did you mean encoder.stages.0"),
    ],
)
def test_features_that_a_model_lacks_are_errors(
    family: str, feature: str, message: str, request: pytest.FixtureRequest
) -> None:
    directory, _ = request.getfixturevalue(family)
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(directory, feature)


def hooked(upstream: Any, layers: list[str], pixels: Tensor) -> dict[str, Any]:
    """What modules of upstream's model return."""
    outputs: dict[str, Any] = {}
    for layer in layers:
        upstream.get_submodule(layer).register_forward_hook(
            lambda _, args, out, layer=layer: outputs.update({layer: out})
        )
    upstream(pixels)
    return outputs


@torch.no_grad()
def test_layers_equal_hooks_on_transformers(
    swin: tuple[Path, Any], resnet: tuple[Path, Any]
) -> None:
    for (directory, upstream), layers in (
        (swin, ["encoder.layers.1", "encoder.layers.0.blocks.1.mlp.fc1", "pooler", "layernorm"]),
        (resnet, ["embedder", "encoder.stages.2.layers.0.layer.1.convolution", "pooler"]),
    ):
        expected = hooked(upstream, layers, pixels_of(directory))
        ex = FeatureExtractor(directory, [f"layer:{layer}" for layer in layers])
        got = ex(PICTURES)
        assert set(got) == {f"layer:{layer}" for layer in layers}
        for layer in layers:
            first = expected[layer]
            first = first[0] if isinstance(first, tuple) else first
            assert got[f"layer:{layer}"].shape == first.shape
            assert gap(got[f"layer:{layer}"], first) < LIMIT, layer


def test_a_layer_without_a_row_for_each_image_is_an_error(swin: tuple[Path, Any]) -> None:
    for batch_size in (1, 4):
        with pytest.raises(ValueError, match="q_proj: the module gives .* no row for each"):
            FeatureExtractor(
                swin[0],
                "layer:encoder.layers.0.blocks.0.attention.q_proj",
                batch_size=batch_size,
            )


def test_layers_without_the_library_are_an_error(
    swin: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastbb.extraction.layers.import_module", lambda name: __import__("no_such_library")
    )
    with pytest.raises(ValueError, match=r"not installed .*pip install 'fastbb\[transformers\]'"):
        FeatureExtractor(swin[0], "layer:encoder.layers.0")


def test_the_bundled_models_have_embeddings() -> None:
    for name, channels in (("nano-swin-digits", 96), ("nano-resnet-digits", 80)):
        ex = FeatureExtractor(name)
        assert isinstance(ex.processor, ImageProcessor)
        assert ex(PICTURES)["embedding"].shape == (3, channels)
