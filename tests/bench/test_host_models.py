"""Models of other libraries by name, their inputs and their outputs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import HOSTS, SWIN
from torch import Tensor, nn

from fastbb.bench import host_models
from fastbb.bench.host_models import (
    build_host,
    default_size,
    make_inputs,
    named_outputs,
    outermost,
)

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """A worker runs without gradients."""
    with torch.no_grad():
        yield


# --- names


def write_config(folder: Path, **fields: Any) -> str:
    config = {"model_type": "swin", "architectures": ["SwinForImageClassification"], **SWIN}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return str(folder)


def test_directory_with_a_configuration_is_its_class(tmp_path: Path) -> None:
    module = build_host(write_config(tmp_path), random_weights=True)
    assert type(module).__name__ == "SwinForImageClassification"
    assert not module.training and default_size(module) == SIZE


def test_directory_without_an_architecture_is_the_model(tmp_path: Path) -> None:
    module = build_host(write_config(tmp_path, architectures=None), random_weights=True)
    assert type(module).__name__ == "SwinModel"


def test_directory_with_weights_is_loaded(tmp_path: Path) -> None:
    made: Any = HOSTS["swin_classifier"]()
    made.save_pretrained(tmp_path)
    loaded = build_host(str(tmp_path), random_weights=False)
    weights = made.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.state_dict().items())


def test_class_of_transformers_has_its_default_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    class Tiny(transformers.ResNetConfig):
        def __init__(self, **fields: Any) -> None:
            super().__init__(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], **fields)

    monkeypatch.setattr(transformers.ResNetForImageClassification, "config_class", Tiny)
    module = build_host("ResNetForImageClassification", random_weights=True)
    assert sum(p.numel() for p in module.parameters()) < 100_000
    assert default_size(module) == (224, 224)


def test_timm_and_torchvision_names_are_whole_models() -> None:
    timm = build_host("resnet10t", random_weights=True)
    assert make_inputs(timm, 1, SIZE).call(timm).shape == (1, 1000)
    assert default_size(timm) == (176, 176)
    torchvision = build_host("torchvision/shufflenet_v2_x0_5", random_weights=True)
    assert make_inputs(torchvision, 1, SIZE).call(torchvision).shape == (1, 1000)


def test_function_of_the_working_directory_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_hosts.py").write_text(
        "from torch import nn\ndef mine():\n    return nn.Conv2d(3, 4, 3)\n"
        "def wrong():\n    return 3\ndef none():\n    raise KeyError('lost')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert isinstance(build_host("my_hosts:mine", random_weights=False), nn.Conv2d)
    with pytest.raises(ValueError, match="wanted a torch.nn.Module, got int"):
        build_host("my_hosts:wrong", random_weights=False)
    with pytest.raises(
        ValueError, match=r"my_hosts:none: it raises KeyError: 'lost' \(my_hosts.py:\d+\)"
    ):
        build_host("my_hosts:none", random_weights=False)
    with pytest.raises(ValueError, match="no function 'min'; it has mine"):
        build_host("my_hosts:min", random_weights=False)


def test_random_weights_are_the_same_every_time_and_leave_the_generator() -> None:
    before = torch.get_rng_state()
    first, second = (build_host("resnet10t", random_weights=True).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first["bn1.weight"], torch.ones_like(first["bn1.weight"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "nothing has this name; close names: .*resnet50"),
        ("SwinForImageClasification", "close names: .*SwinForImageClassification"),
        ("torchvision/resnet5O", "close names: .*torchvision/resnet50"),
        ("no_such_module_here:make", "cannot import no_such_module_here"),
        ("./no-such-directory", "wanted a directory or Hub name of transformers"),
        ("timm/no_such_model", "nothing has this name"),
        ("resnet18.nonexistent", "timm raises RuntimeError: .*nonexistent"),
        ("PreTrainedModel", "this class has no configuration of its own"),
        ("AutoModel", "this class has no configuration of its own"),
        ("", "--accelerate: wanted a directory or Hub name of .*, got ''"),
    ],
)
def test_wrong_name_says_what_was_wanted(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_host(name, random_weights=True)


def test_directory_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        build_host(str(tmp_path), random_weights=True)


def test_directory_of_another_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match="wanted a directory or Hub name of transformers"):
        build_host(str(tmp_path), random_weights=True)


def test_class_without_random_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="a class has no weights; add --random-weights"):
        build_host("SwinForImageClassification", random_weights=False)


# --- inputs and outputs


def test_detection_takes_a_list_and_its_tensors_are_named_by_path() -> None:
    class Detector(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            assert isinstance(images, list)
            return [{"boxes": x.mean((1, 2)), "labels": torch.tensor([1])} for x in images]

    Detector.__module__ = "torchvision.models.detection.tiny"
    result = make_inputs(Detector(), 2, SIZE).call(Detector())
    assert named_outputs(result).keys() == {"0.boxes", "1.boxes"}
    assert default_size(Detector()) == (800, 1088)


def test_model_that_reads_text_gets_tokens_within_its_vocabulary() -> None:
    import transformers

    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"image_size": 32, "patch_size": 16, **text}
    heads = {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **heads, "eos_token_id": 98},
        vision_config={**vision, **heads},
        projection_dim=8,
    )
    module = transformers.CLIPModel(config).eval()
    outputs = named_outputs(make_inputs(module, 2, SIZE).call(module))
    assert outputs["logits_per_image"].shape == (2, 2)


def test_model_that_takes_no_images_is_an_error() -> None:
    import transformers

    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="BertModel takes no pixel_values"):
        make_inputs(transformers.BertModel(config), 1, SIZE)


def test_infinities_of_masks_are_no_difference_and_nan_is() -> None:
    masked = torch.tensor([float("-inf"), 1.0, float("nan")])
    assert named_outputs(masked)["output"].nan_to_num(7.0).tolist() == [0.0, 1.0, 7.0]


def test_outermost_modules_hold_no_other() -> None:
    assert outermost(["a", "a.b", "ab", "c.d", "c.d.e"]) == ["a", "ab", "c.d"]
    assert outermost(["", "a"]) == [""]


def test_builders_of_the_repository_are_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    find = host_models._of_function
    assert find("bench.hosts:upernet").__name__ == "upernet"
