"""Layers by name, heads that a checkpoint lacks, and shapes that a model does not take."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from feature_models import PICTURES, SMALL_VIT, gap, pixels_of, save_processor, save_timm
from reference_models import hf_maskformer_swin, torchvision_swin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbb import AutoBackbone, AutoImageProcessor
from fastbb.cli import main
from fastbb.extraction import FeatureExtractor
from fastbb.extraction.layers import LayerModel
from fastbb.models.timm_full import load_full

SWIN = "nano-swin-digits"


def edit(directory: Path, change: Any) -> None:
    """Replaces the weights of a checkpoint."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(("fc.", "head."))}


def test_the_head_of_a_checkpoint_without_one_is_an_error(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    expected = FeatureExtractor(tmp_path, "layer:layer1")(PICTURES)["layer:layer1"]
    edit(tmp_path, without_head)
    got = FeatureExtractor(tmp_path, ("embedding", "layer:layer1"))(PICTURES)
    assert torch.equal(got["layer:layer1"], expected)
    for layer in ("fc", "layer1"):
        with pytest.raises(OSError, match="lack fc.weight, fc.bias"):
            FeatureExtractor(tmp_path, ("layer:fc", f"layer:{layer}"))


def test_a_damaged_checkpoint_is_an_error_for_every_layer(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_resnet", 64)
    edit(tmp_path, lambda state: {**state, "fc.weight": state["fc.weight"][:5].clone()})
    for layer in ("fc", "layer1"):
        with pytest.raises(OSError, match=r"do not load: [^.]*size mismatch for fc.weight"):
            FeatureExtractor(tmp_path, f"layer:{layer}")
    edit(tmp_path, lambda state: {n: t for n, t in without_head(state).items() if n != "bn1.bias"})
    with pytest.raises(OSError, match=r"lack bn1.bias, fc.weight"):
        FeatureExtractor(tmp_path, "layer:layer1")


def test_a_module_around_a_head_needs_the_head(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_convnext", 64)
    edit(tmp_path, lambda s: {n: t for n, t in s.items() if not n.startswith("head.fc")})
    with pytest.raises(OSError, match="lack head.fc.weight"):
        FeatureExtractor(tmp_path, "layer:head")
    assert FeatureExtractor(tmp_path, "layer:head.norm")(PICTURES)["layer:head.norm"].shape[0] == 3


def test_torchvisions_head_is_an_error() -> None:
    pytest.importorskip("torchvision")
    backbone = AutoBackbone.from_torchvision(None, torchvision_swin())
    processor = AutoImageProcessor.from_pretrained("nano-resnet-digits")
    with pytest.raises(ValueError, match="layer:head: a SwinBackbone has no head"):
        FeatureExtractor(backbone, "layer:head", processor=processor)


def test_the_hint_is_for_missing_weights_only(tmp_path: Path) -> None:
    save_timm(tmp_path / "black", "test_resnet", 64)
    (tmp_path / "black" / "model.safetensors").unlink()
    with pytest.raises(OSError) as raised:
        load_full(tmp_path / "black")
    assert "need no final norm" not in str(raised.value)


def test_the_model_runs_only_to_the_last_layer() -> None:
    pytest.importorskip("transformers")
    # SwinModel fails in a later stage, whose map is smaller than a window
    got = FeatureExtractor(SWIN, ("layer:encoder.layers.0", "layer:embeddings"))(PICTURES)
    assert list(got) == ["layer:embeddings", "layer:encoder.layers.0"]
    with pytest.raises(ValueError, match="SwinModel does not take pixel_values of shape"):
        FeatureExtractor(SWIN, "layer:layernorm")


def test_a_layer_that_runs_twice_is_an_error() -> None:
    act, conv = nn.ReLU(), nn.Conv2d(3, 4, 1)
    module = nn.Sequential(OrderedDict(act=act, conv=conv, again=act)).eval()
    model = LayerModel(module, ["act"])
    with pytest.raises(ValueError, match="layer:act: the module gives 2 tensors in one forward"):
        model.check(torch.zeros(2, 3, 4, 4))


def test_unknown_modules_are_said_before_a_final_norm(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hf_maskformer_swin().save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match="layer:model.encoder: .* has no such module; .*encoder"):
        FeatureExtractor(tmp_path, "layer:model.encoder")


def test_a_size_that_the_model_does_not_take_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_timm(tmp_path / "model", "vit_tiny_patch16_224", 64, **SMALL_VIT)
    images = tmp_path / "images"
    images.mkdir()
    PICTURES[0].save(images / "0.png")
    for feature in ("embedding", "layer:blocks.0"):
        out = tmp_path / feature.partition(":")[0]
        arguments = ["extract", str(images), "--out", str(out), "--size", "70x70"]
        arguments += ["--model", str(tmp_path / "model"), "--features", feature]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "VisionTransformer does not take pixel_values of shape [" in message


def test_images_of_a_size_that_the_model_does_not_take_are_failed_rows(
    tmp_path: Path, aspect_model: Path
) -> None:
    save_timm(tmp_path / "model", "vit_tiny_patch16_224", 64, **SMALL_VIT)
    processor = AutoImageProcessor.from_pretrained(aspect_model)
    ex = FeatureExtractor(tmp_path / "model", processor=processor)
    paths = []
    for i, picture in enumerate(PICTURES):
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    errors = [error for batch in ex.stream(paths) for error in batch.errors]
    assert [error.kind for error in errors] == ["transform"] * 3
    assert "does not take pixel_values of shape" in errors[0].message


@torch.no_grad()
def test_projection_is_that_of_the_original_only(tmp_path: Path) -> None:
    clip, siglip = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"
    save_timm(tmp_path / "ten", clip, 64, "openai", **SMALL_VIT, num_classes=10, head_bias=False)
    save_timm(tmp_path / "avg", siglip, 64, "webli", **SMALL_VIT, global_pool="avg")
    options = {**SMALL_VIT, "num_classes": 512, "head_bias": False}
    save_timm(tmp_path / "own", clip, 64, "mine", **options)
    for name, message in (
        ("ten", "timm's description of .* is not that of one"),
        ("own", "timm's description of .* is not that of one"),
        ("avg", "avg' has not SigLIP's pooling by attention"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureExtractor(tmp_path / name, "projection")
    save_timm(tmp_path / "headless", clip, 64, "openai", **options)
    edit(tmp_path / "headless", without_head)
    with pytest.raises(OSError, match="projection: The weights .* lack head.weight"):
        FeatureExtractor(tmp_path / "headless", "projection")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "tag", "options"),
    [
        ("convnext_base", "clip_laion2b", {"depths": (1,) * 4, "dims": (8,) * 4}),
        ("eva02_base_patch16_clip_224", "merged2b", SMALL_VIT),
    ],
)
def test_projection_of_other_clip_towers(
    name: str, tag: str, options: dict[str, Any], tmp_path: Path
) -> None:
    original: Any = timm.get_pretrained_cfg(f"{name}.{tag}")
    model = save_timm(tmp_path, name, 64, tag, **options, num_classes=original.num_classes)
    with pytest.raises(ValueError, match="is not one linear layer without bias"):
        FeatureExtractor(tmp_path, "projection")
    bias = model.get_classifier().bias.zero_()
    edit(tmp_path, lambda state: {**state, **{n: model.state_dict()[n] for n in state}})
    assert not bias.any()
    got = FeatureExtractor(tmp_path, ("projection", "embedding"))(PICTURES)
    assert gap(got["projection"], model(pixels_of(tmp_path))) < 1e-4


@torch.no_grad()
def test_overflow_is_not_called_a_lack_of_tokens(tmp_path: Path) -> None:
    state = save_timm(tmp_path, "vit_tiny_patch16_224", 64, **SMALL_VIT).state_dict()
    state["patch_embed.proj.weight"] *= 1e7
    save_timm(tmp_path, "vit_tiny_patch16_224", 64, state=state, **SMALL_VIT)
    with pytest.raises(ValueError, match="precision: .* gives NaN or infinite values in float16"):
        FeatureExtractor(tmp_path, "tokens", precision="fp16")
    save_timm(tmp_path / "grey", "test_resnet", 64, in_chans=1)
    with pytest.raises(ValueError, match="model: timm's ResNet does not run in float32"):
        FeatureExtractor(tmp_path / "grey")


def test_construction_runs_the_model_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm.models.vision_transformer import VisionTransformer

    forward, calls = VisionTransformer.forward_features, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward_features", counted)
    save_timm(tmp_path, "vit_tiny_patch16_224", 64, **SMALL_VIT)
    FeatureExtractor(tmp_path, "tokens")
    assert len(calls) == 2  # the whole, and its halves
