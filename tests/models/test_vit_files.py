"""Checkpoints that hold a ViT: other names of weights, heads around it, a text tower beside it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import from_hf, hf_pair, images, randomize_
from safetensors.torch import load_file, save_file
from tolerance import assert_equals_upstream
from vit_models import SHAPE, TYPES, hf_vit, hf_vit_model, patches, upstream_class, vit_config

from fastbb import AutoBackbone, AutoConfig
from fastbb.extraction.layers import LayerModel, upstream_model
from fastbb.extraction.models import BackboneModel
from fastbb.inspect.verify import verify

transformers = pytest.importorskip("transformers")

# a model with a head around it, and the prefix of its weights
HEADS = {
    "dinov2": ("ForImageClassification", "dinov2."),
    "dinov2_with_registers": ("ForImageClassification", "dinov2_with_registers."),
    "vit": ("ForImageClassification", "vit."),
    "deit": ("ForImageClassificationWithTeacher", "deit."),
    "clip_vision_model": ("ModelWithProjection", "vision_model."),
    "beit": ("ForImageClassification", "beit."),
}


@pytest.mark.parametrize("kind", TYPES)
def test_names_of_transformers_in_memory_load(kind: str, tmp_path: Path) -> None:
    pair, pixels = hf_pair(hf_vit(kind)), images(28, 28)
    pair.upstream.save_pretrained(tmp_path)
    save_file(pair.upstream.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    ours = AutoBackbone.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("outer", ["model.", "student.backbone."])
def test_names_of_files_load_under_any_prefix(kind: str, outer: str, tmp_path: Path) -> None:
    pair, pixels = hf_pair(hf_vit(kind)), images(28, 28)
    pair.upstream.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"{outer}{name}": tensor for name, tensor in load_file(file).items()}, file)
    ours, info = AutoBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert info.prefix.startswith(outer)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("kind", HEADS)
def test_a_model_with_a_head_gives_the_maps_of_the_model_inside(kind: str, tmp_path: Path) -> None:
    name, prefix = HEADS[kind]
    whole = randomize_(upstream_class(kind, name)(vit_config(kind)))
    whole.save_pretrained(tmp_path)
    ours, info = AutoBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert info.prefix == prefix
    pixels = images(28, 28)
    with torch.no_grad():
        inner = getattr(whole, prefix[:-1])(pixels, output_hidden_states=True)
        states = ours(pixels, output_hidden_states=True).hidden_states
        assert_equals_upstream(states, inner.hidden_states)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_without_weights_of_a_pooler_the_embedding_is_the_class_token(
    kind: str, tmp_path: Path
) -> None:
    whole = randomize_(upstream_class(kind, "ForImageClassification")(vit_config(kind)))
    ours, pixels = from_hf(whole), images(28, 28)
    assert ours.pooler is None
    with torch.no_grad():
        last = getattr(whole, kind)(pixels).last_hidden_state
        features = BackboneModel(ours, ["embedding", "cls"], "final").features(pixels)
        assert_equals_upstream(list(features.values()), [last[:, 0]] * 2)
    again = type(ours).from_config(ours.config)
    again.load_state_dict(ours.state_dict())
    assert again.pooler is None
    ours.save_pretrained(tmp_path)
    assert AutoBackbone.from_pretrained(tmp_path).pooler is None


def test_an_end_whose_weights_are_missing_is_dropped_or_left_but_never_ignored() -> None:
    state = from_hf(hf_vit_model("vit")).state_dict()
    lost = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    ours = from_hf(hf_vit_model("vit"))
    around = torch.nn.ModuleDict({"backbone": ours})
    part = {"backbone.layernorm.weight": state["layernorm.weight"]}
    embeddings = {f"backbone.{n}": t for n, t in state.items() if n.startswith("embeddings.")}
    around.load_state_dict({**part, **embeddings}, strict=False)
    assert ours.pooler is not None
    prepared = ours.prepare("eager")
    around.load_state_dict({f"backbone.{name}": tensor for name, tensor in lost.items()})
    assert ours.pooler is None
    tokens = torch.ones(1, 17, 32)
    assert torch.equal(prepared.embedding_of(tokens), tokens[:, 0])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"pooler\.dense\.weight"'):
        ours.load_state_dict(state)
    ours.load_state_dict(lost)


def two_towers(kind: str, projection: int = 24) -> Any:
    """transformers' tiny CLIPModel or SiglipModel."""
    vision = {**SHAPE, **TYPES[kind][2]}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    name = {"clip_vision_model": "CLIP", "siglip_vision_model": "Siglip"}[kind]
    fields = {"projection_dim": projection} if name == "CLIP" else {}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config={**text, "intermediate_size": 48}, **fields
    )
    return randomize_(getattr(transformers, f"{name}Model")(config))


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_a_tower_beside_one_for_text_gives_features_of_images(kind: str, tmp_path: Path) -> None:
    whole, pixels = two_towers(kind), images(28, 28)
    ours = from_hf(whole, out_indices=[0, 1, 2, 3])
    names = ["embedding", "projection", "patch_mean", "tokens"]
    with torch.no_grad():
        theirs = whole.vision_model(pixels, output_hidden_states=True)
        got = BackboneModel(ours, names, "none").features(pixels)
        last = theirs.hidden_states[-1]
        assert_equals_upstream(got["embedding"], theirs.pooler_output)
        assert_equals_upstream(got["projection"], whole.get_image_features(pixels).pooler_output)
        assert_equals_upstream(got["tokens"], last)
        assert_equals_upstream(got["patch_mean"], last[:, ours.n_prefix_tokens :].mean(1))
        ours.save_pretrained(tmp_path)
        again = AutoBackbone.from_pretrained(tmp_path)
        assert_equals_upstream(again(pixels).feature_maps, ours(pixels).feature_maps)
        if kind == "clip_vision_model":
            projects = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
            assert_equals_upstream(got["projection"], projects(pixels).image_embeds)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("tower", [{}, {"vision_config": None}], ids=["absent", "null"])
def test_a_tower_without_a_configuration_has_the_defaults(
    name: str, tower: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **tower}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).vision_config
    ours = AutoConfig.from_pretrained(tmp_path)
    assert ours.model_type == theirs.model_type and ours.hidden_size == theirs.hidden_size


def test_the_probe_of_siglip_is_random() -> None:
    ours = AutoBackbone.from_config(vit_config("siglip_vision_model"))
    assert ours.get_parameter("head.probe").std() > 0.01


def test_features_that_a_checkpoint_has_no_weights_for_are_errors() -> None:
    ours = from_hf(hf_vit_model("clip_vision_model"))
    with pytest.raises(ValueError, match="projection: a ViTBackbone has none"):
        BackboneModel(ours, ["projection"])
    ours = from_hf(hf_vit_model("siglip_vision_model", vision_use_head=False))
    with pytest.raises(ValueError, match="no class token"):
        BackboneModel(ours, ["cls"], "final")
    with pytest.raises(ValueError, match="no pooling head"):
        BackboneModel(ours, ["embedding"]).features(images(28, 28))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_embedding_of_beit_is_the_mean_or_the_class_token(shared: bool) -> None:
    pixels = images(28, 35)
    for is_mean in (True, False):
        fields = {"use_mean_pooling": is_mean, "use_shared_relative_position_bias": shared}
        fields |= {"use_relative_position_bias": not shared}
        upstream = hf_vit_model("beit", **fields)
        ours = from_hf(upstream)
        with torch.no_grad():
            got = BackboneModel(ours, ["embedding"]).features(pixels)["embedding"]
            assert_equals_upstream(got, upstream(pixels).pooler_output)
        report = verify(ours, batch=1)
        assert report.passed and "BeitModel" in report.reference
    # a backbone has no weights of a pooler; layers before it are there
    upstream = hf_vit("beit")
    module = upstream_model(from_hf(upstream), ["layers.1"])
    with torch.no_grad():
        got = LayerModel(module, ["layers.1"]).features(pixels)["layer:layers.1"]
        want = upstream(pixels, output_hidden_states=True).hidden_states[2]
        assert_equals_upstream(got, want)
    with pytest.raises(ValueError, match="no trained final norm"):
        BackboneModel(from_hf(hf_vit("beit")), ["embedding"])


@pytest.mark.parametrize("name", ["cls", "tokens", "patch_mean"])
def test_tokens_of_a_beit_that_normalizes_their_mean_have_no_norm(name: str) -> None:
    upstream, pixels = hf_vit_model("beit"), images(28, 28)
    ours = from_hf(upstream)
    with pytest.raises(ValueError, match=f"{name}: .* --norm none, or for --features embedding"):
        BackboneModel(ours, ["embedding", name], "final")
    with torch.no_grad():
        got = BackboneModel(ours, ["embedding", name], "none").features(pixels)
        theirs = upstream(pixels)
        last = theirs.last_hidden_state
        want = {"cls": last[:, 0], "tokens": last, "patch_mean": last[:, 1:].mean(1)}[name]
        assert_equals_upstream([*got.values()], [theirs.pooler_output, want])


def test_a_segmentation_model_of_beit_gives_the_maps_of_its_backbone(tmp_path: Path) -> None:
    config = vit_config("beit", auxiliary_channels=8, add_fpn=True)
    whole = randomize_(upstream_class("beit", "ForSemanticSegmentation")(config))
    whole.save_pretrained(tmp_path)
    ours, pixels = AutoBackbone.from_pretrained(tmp_path), images(28, 28)
    with torch.no_grad():
        states = whole.beit(pixels, output_hidden_states=True).hidden_states
        maps = [states[index][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2) for index in range(4)]
        assert_equals_upstream(ours(pixels).feature_maps, whole.fpn(maps))
    ours.out_indices = [3]
    with pytest.raises(ValueError, match="got 1: .* ask for --features maps of all four"):
        BackboneModel(ours, pooled="stage3").features(pixels)
    ours.out_indices = [1, 2]
    with pytest.raises(ValueError, match="computed of four maps, got 2"):
        ours(pixels)


@pytest.mark.parametrize("kind", ["dinov2", "beit"])
def test_the_backbone_of_a_depth_model_gives_its_tokens(kind: str, tmp_path: Path) -> None:
    inner = vit_config(kind, reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_config": inner}
    if kind == "dinov2":
        config = transformers.DepthAnythingConfig(reassemble_hidden_size=32, patch_size=7, **sizes)
        whole = randomize_(transformers.DepthAnythingForDepthEstimation(config))
    else:
        config = transformers.ZoeDepthConfig(backbone_hidden_size=32, **sizes)
        whole = randomize_(transformers.ZoeDepthForDepthEstimation(config))
    whole.save_pretrained(tmp_path)
    ours, pixels = AutoBackbone.from_pretrained(tmp_path), images(28, 28)
    with torch.no_grad():
        tokens = whole.backbone(pixels).feature_maps
        assert_equals_upstream(ours(pixels).feature_maps, tokens)
        ours.out_indices = [2, 3]
        model = BackboneModel(ours, stored=["stage2"], pooled="stage3")
        model.prepare("eager", None)
        got = model.features(pixels)
        assert_equals_upstream([got["pooled"]], [tokens[3][:, -16:].mean(1)])
        assert_equals_upstream([got["maps.stage2"]], [patches(tokens[2][:, -16:], 0, (4, 4))])
        assert_equals_upstream(ours(pixels).feature_maps, tokens[2:])


def test_an_untrained_final_norm_is_an_error() -> None:
    upstream = hf_vit("dinov2")
    torch.nn.init.ones_(upstream.layernorm.weight)
    torch.nn.init.zeros_(upstream.layernorm.bias)
    with pytest.raises(ValueError, match="no trained final norm.*head; ask for --features pooled"):
        BackboneModel(from_hf(upstream), ["embedding"])
    with pytest.raises(ValueError, match="no trained final norm.*; ask for --norm none, or"):
        BackboneModel(from_hf(upstream), ["cls", "tokens"], "final")


@pytest.mark.parametrize("kind", TYPES)
def test_the_saved_file_has_the_names_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    upstream = hf_vit(kind)
    upstream.save_pretrained(tmp_path / "theirs")
    from_hf(upstream).save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    outer = (
        "vision_model.",
        "beit.",
    )  # transformers writes them in some cases and reads them in all
    names = [{re.sub("|".join(outer), "", n, count=1) for n in state} for state in (ours, theirs)]
    assert names[0] == names[1]
