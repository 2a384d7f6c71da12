"""Wrong input of the backbone API: errors say what was wanted and what came."""

import json
from typing import Any

import pytest
import torch

from fastbb import (
    AutoBackbone,
    AutoConfig,
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
)

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}


def swin(**kwargs) -> Any:
    return SwinBackbone(SwinConfig(**SWIN, **kwargs)).eval()


BACKBONES = {
    "swin": swin,
    "resnet": lambda: ResNetBackbone(ResNetConfig(**RESNET)).eval(),
    "timm": lambda: TimmBackbone(TimmBackboneConfig("test_resnet")).eval(),
}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 32, 32), r"tensor \[batch, channels, height, width\], got \[3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), r"Expected 3 channels .* got .*\[1, 4, 32, 32\]"),
        (torch.zeros(1, 3, 0, 32), r"must have pixels, got shape \[1, 3, 0, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch\.uint8, the weights torch\.float32"),
        (torch.zeros(1, 3, 32, 32).bool(), r"are torch\.bool, .*; rescale and normalize them"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
            r"torch\.complex64, the weights",
        ),
        (torch.zeros(1, 3, 32, 32, device="meta"), "on meta, the weights on cpu; move"),
        (None, "got NoneType; AutoImageProcessor makes one"),
        ([1, 2], "got list"),
    ],
    ids=["3-D", "channels", "no-pixels", "uint8", "bool", "complex", "device", "None", "list"],
)
def test_wrong_pixels_raise_value_error(backbone, pixels, message):
    with pytest.raises(ValueError, match=message):
        backbone(pixels)


def test_empty_batch_gives_empty_maps(backbone):
    maps = backbone(torch.zeros(0, 3, 32, 32)).feature_maps
    assert [m.shape[0] for m in maps] == [0] and maps[0].shape[1] == backbone.channels[0]


def test_no_stage_selected_computes_nothing(backbone):
    backbone.out_indices = []
    assert backbone(torch.zeros(1, 3, 32, 32)).feature_maps == ()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 7)], ids=str)
def test_images_smaller_than_a_patch_give_one_pixel_maps(size):
    pixels = torch.zeros(1, 3, *size)
    assert swin()(pixels).feature_maps[0].shape == (1, 16, 1, 1)
    assert BACKBONES["resnet"]()(pixels).feature_maps[0].shape == (1, 32, 1, 1)


@pytest.mark.parametrize(
    ("out_indices", "message"),
    [
        ([9], "valid indices"),
        ([-9], "valid indices"),
        ([2, 1], "same order"),
        ([1, 1], "duplicates"),
        (1, "must be a list"),
        ("1", "must be a list"),
        ([1.0], "valid indices"),
    ],
    ids=str,
)
def test_wrong_out_indices_raise_and_leave_the_backbone_unchanged(backbone, out_indices, message):
    before = backbone.out_indices, backbone.out_features
    with pytest.raises(ValueError, match=message):
        backbone.out_indices = out_indices
    assert (backbone.out_indices, backbone.out_features) == before


def test_unknown_name_error_suggests_close_names():
    with pytest.raises(OSError, match="Did you mean .*nano-swin-digits"):
        AutoBackbone.from_pretrained("nano-swin-digit", local_files_only=True)
    with pytest.raises(OSError, match="Did you mean .*resnet50"):
        AutoBackbone.from_pretrained("resnet5O", local_files_only=True)
    with pytest.raises(ValueError, match="timm has no model 'resnet5O'; did you mean .*resnet50"):
        TimmBackbone(TimmBackboneConfig("resnet5O"))
    with pytest.raises(ValueError, match="backbone is not set in the config"):
        TimmBackbone(TimmBackboneConfig())


def test_directory_without_config_raises_os_error(tmp_path):
    with pytest.raises(OSError, match="has no config.json, so it is not a saved model"):
        AutoBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""], ids=repr)
def test_config_that_is_no_json_object_raises_value_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON obj)"):
        AutoBackbone.from_pretrained(tmp_path)


def test_unsupported_model_type_error_lists_supported_types(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    wanted = (
        "model_type 'bert' is not supported: .*maskformer-swin, .*resnet, .*swin, .*timm_backbone"
    )
    for auto in (AutoBackbone, AutoConfig):
        with pytest.raises(ValueError, match=wanted):
            auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SwinBackbone loads model_type swin .*'bert'"):
        SwinBackbone.from_pretrained(tmp_path)


def test_wrong_configuration_class_is_refused():
    with pytest.raises(ValueError, match="SwinBackbone needs a SwinConfig, got ResNetConfig"):
        SwinBackbone.from_config(ResNetConfig(**RESNET))
    with pytest.raises(OSError, match="AutoBackbone is designed to be instantiated using"):
        AutoBackbone()
    with pytest.raises(ValueError, match="takes dtype and attn_implementation, got .'depths'"):
        AutoBackbone.from_config(SwinConfig(**SWIN), depths=[1])


def test_unknown_torchvision_model_is_refused():
    with pytest.raises(ValueError, match="torchvision's 'vit_b_16' is not supported; .* swin_t"):
        AutoBackbone.from_torchvision("vit_b_16", {})
    for name in ("swin_t", "resnet18"):
        with pytest.raises(ValueError, match="wanted the state dict of torchvision's"):
            AutoBackbone.from_torchvision(name, {"weight": torch.zeros(1)})


def test_options_that_a_timm_model_does_not_take_are_refused():
    pytest.importorskip("timm", minversion="1.0.31")  # Swin takes anything before
    bad: list[dict[str, Any]] = [{"output_stride": 8}, {"backbone_kwargs": {"no_such_option": 1}}]
    for options in bad:
        with pytest.raises(ValueError, match="'swin_tiny_patch4_window7_224' cannot be built with"):
            TimmBackbone(TimmBackboneConfig("swin_tiny_patch4_window7_224", **options))
    with pytest.raises(ValueError, match="subset of stage_names"):
        TimmBackbone(TimmBackboneConfig("test_resnet", out_features=["layer9"]))


def test_image_size_that_timm_does_not_take_raises_value_error():
    backbone = TimmBackbone(TimmBackboneConfig("test_vit", out_indices=[-1])).eval()
    with pytest.raises(ValueError, match="timm's 'test_vit' does not take .*63"):
        backbone(torch.zeros(1, 3, 63, 63))
