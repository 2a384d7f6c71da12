"""torchvision's weights: by name, model, state dict and enum."""

from typing import Any
from urllib.error import URLError

import pytest
import torch
from reference_models import torchvision_resnet, torchvision_swin

from fastbb import AutoBackbone, ResNetBackbone, SwinBackbone

models = pytest.importorskip("torchvision.models")
SHAPES = {
    "resnet18": [64, 64, 128, 256, 512],
    "resnet34": [64, 64, 128, 256, 512],
    "resnet50": [64, 256, 512, 1024, 2048],
    "resnet101": [64, 256, 512, 1024, 2048],
    "resnet152": [64, 256, 512, 1024, 2048],
    "swin_t": [96, 96, 192, 384, 768],
    "swin_s": [96, 96, 192, 384, 768],
    "swin_b": [128, 128, 256, 512, 1024],
}


def weights_of(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):  # names and shapes decide
        return getattr(models, name)().state_dict()


@pytest.mark.parametrize("name", SHAPES)
def test_every_known_model_loads_by_its_name_and_no_other(name: str) -> None:
    weights = weights_of(name)
    backbone = AutoBackbone.from_torchvision(name, weights, device="meta")
    assert backbone.num_features == SHAPES[name]
    for other in SHAPES.keys() - {name}:
        wanted = rf"weights of torchvision's {name}, not of {other}: say from_torchvision\('{name}'"
        with pytest.raises(ValueError, match=wanted):
            AutoBackbone.from_torchvision(other, weights)


TINY = {
    "resnet18": (torchvision_resnet, r"depths \[2, 1, 1, 1\] instead of \[2, 2, 2, 2\]:"),
    "swin_t": (torchvision_swin, r"depths \[2, 1, 1, 2\] .*, embed_dim 16 instead of 96, num_h"),
    "swin_b": (torchvision_resnet, "the names of a ResNetBackbone:"),
}


@pytest.mark.parametrize("name", TINY)
def test_models_of_other_depths_and_widths_need_no_name(name: str) -> None:
    make, difference = TINY[name]
    upstream = make()
    wanted = rf"not the weights of torchvision's {name}, but have {difference}"
    with pytest.raises(ValueError, match=rf"{wanted}.* say from_torchvision\(None"):
        AutoBackbone.from_torchvision(name, upstream)
    family = SwinBackbone if make is torchvision_swin else ResNetBackbone
    assert isinstance(AutoBackbone.from_torchvision(None, upstream), family)


def test_a_model_with_one_input_channel_loads() -> None:
    upstream = models.resnet18()
    upstream.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    backbone = AutoBackbone.from_torchvision("resnet18", upstream).eval()
    assert backbone(torch.zeros(1, 1, 32, 32)).feature_maps[0].shape[1] == 512


@pytest.mark.parametrize("relative", ["wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", None])
def test_wide_and_grouped_resnets_are_refused(relative: str, name: str | None) -> None:
    with pytest.raises(ValueError, match="weights of a wide or grouped ResNet"):
        AutoBackbone.from_torchvision(name, weights_of(relative))


def test_a_model_and_its_state_dict_load_alike() -> None:
    upstream = models.resnet18().eval()
    loaded = [
        AutoBackbone.from_torchvision("resnet18", w) for w in (upstream, upstream.state_dict())
    ]
    states = [backbone.state_dict() for backbone in loaded]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "got NoneType"),
        ("IMAGENET1K_V1", "got str"),
        ("ResNet18_Weights", "got Enum"),
        ({"conv1.weight": 3}, "its entry 'conv1.weight' is of type int"),
        ({"state_dict": {}}, "its entry 'state_dict' is of type dict"),
        ({1: torch.ones(1)}, "the name of its entry 1 is of type int"),
    ],
    ids=repr,
)
def test_weights_of_another_type_raise_type_error(weights: Any, message: str) -> None:
    if weights == "ResNet18_Weights":
        weights = models.ResNet18_Weights
    with pytest.raises(TypeError, match=f"or a member of its enum of weights such as.*{message}"):
        AutoBackbone.from_torchvision("resnet18", weights)


@pytest.mark.parametrize("name", ["resnet18", "swin_t", None])
def test_incomplete_weights_raise_value_error(name: str | None) -> None:
    weights = weights_of("resnet18")
    del weights["layer1.0.conv2.weight"]
    with pytest.raises(ValueError, match="wanted the state dict|lack 'layer1.0.conv2.weight'"):
        AutoBackbone.from_torchvision(name, weights)


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records each download and returns the weights of a new model in its place."""
    asked: list[Any] = []

    def get_state_dict(member: Any, **options: Any) -> dict[str, torch.Tensor]:
        asked.append((member, options))
        return models.get_model(type(member).__name__.removesuffix("_Weights").lower()).state_dict()

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)
    return asked


@pytest.mark.parametrize("name", ["resnet18", None])
def test_a_member_of_the_enum_is_downloaded(name: str | None, download: list[Any]) -> None:
    member = models.ResNet18_Weights.DEFAULT
    assert AutoBackbone.from_torchvision(name, member).channels == [512]
    assert download == [(member, {"progress": False, "check_hash": True})]


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("resnet18", models.ResNet34_Weights.DEFAULT),
        ("swin_t", models.Swin_V2_T_Weights.DEFAULT),
        (None, models.ViT_B_16_Weights.DEFAULT),
    ],
    ids=str,
)
def test_another_models_enum_is_refused_before_the_download(
    name: str | None, member: Any, download: list[Any]
) -> None:
    model = type(member).__name__.removesuffix("_Weights").lower()
    with pytest.raises(ValueError, match=f"weights of torchvision's {model}, wanted {name or ''}"):
        AutoBackbone.from_torchvision(name, member)
    assert not download


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("invalid hash value")], ids=str
)
def test_failed_download_raises_os_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(OSError, match="download of torchvision's ResNet18_Weights.* failed: .*"):
        AutoBackbone.from_torchvision("resnet18", models.ResNet18_Weights.DEFAULT)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_that_are_not_floating_are_refused(dtype: torch.dtype) -> None:
    weights = models.resnet18().state_dict()
    weights["layer1.0.conv1.weight"] = weights["layer1.0.conv1.weight"].to(dtype)
    wanted = rf"must be float32, .* but .*layer\.0\.convolution\.weight is {dtype}:"
    with pytest.raises(ValueError, match=wanted):
        AutoBackbone.from_torchvision("resnet18", weights, dtype="float32")
