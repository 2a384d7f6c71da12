"""ResNet against transformers, timm and torchvision, at any image size."""

import copy
from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
from contract import BackboneContract
from reference_models import (
    RESNET,
    Pair,
    family_pair,
    from_hf,
    from_timm,
    gradients,
    hf_pair,
    hf_resnet,
    images,
    randomize_,
    saved_bytes,
    timm_features,
    timm_maps,
    timm_options,
    timm_pair,
    torchvision_pair,
    torchvision_resnet,
)
from tolerance import (
    assert_equal_gradients,
    assert_equals_upstream,
)

from fastbb import AutoBackbone, ResNetBackbone, ResNetConfig, TimmBackbone

transformers = pytest.importorskip("transformers")

SOURCES = ("hf", "timm", "torchvision")


class TestContract(BackboneContract):
    UPSTREAM: ClassVar[dict[str, Any]] = {
        "basic": hf_resnet,
        "bottleneck": partial(hf_resnet, "bottleneck"),
    }
    PAIRS: ClassVar[dict[str, Any]] = {
        source: partial(family_pair, "resnet", "bottleneck", source) for source in SOURCES
    }


@cache
def resnet_pair(variant: str, source: str) -> Pair:
    try:
        return family_pair("resnet", variant, source)
    except KeyError:
        pytest.skip(f"{source} cannot express {variant}")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [(53, 70), (1, 1)], ids=["53x70", "1x1"])
def test_sizes_that_are_no_multiple_of_a_stride_equal_upstream(
    source: str, size: tuple[int, int]
) -> None:
    pair, pixels = resnet_pair("bottleneck", source), images(*size)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize(
    "config",
    [
        {"downsample_in_first_stage": True},
        {"hidden_act": "gelu"},  # of the stem and after the residual; inside it is always ReLU
        {"hidden_act": "gelu", "layer_type": "bottleneck"},
        {"num_channels": 1},
        {"embedding_size": 8},
        {"depths": [1, 2], "hidden_sizes": [24, 16], "out_indices": [0, 1, 2]},
        {"depths": [1] * 5, "hidden_sizes": [16, 8, 16, 8, 16], "out_indices": [0, 3, 5]},
    ],
    ids=lambda config: "-".join(config),
)
def test_config_fields_equal_upstream(config: dict[str, Any]) -> None:
    pair = hf_pair(hf_resnet(**config))
    pixels = images(60, 44, channels=pair.ours.config.num_channels)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("variant", RESNET)
def test_saved_backbone_loads_in_transformers(variant: str, tmp_path: Any) -> None:
    config = ResNetConfig(
        **RESNET[variant],
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 1],
        out_indices=(0, 2),
    )
    ours = randomize_(ResNetBackbone(config))
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.ResNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixels = images(60, 44)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs.eval()(pixels).feature_maps)


@pytest.mark.parametrize("out_indices", [(1,), (0, 4), (-2, -1)], ids=str)
def test_a_classification_checkpoint_gives_upstreams_maps(
    out_indices: tuple[int, ...], tmp_path: Any
) -> None:
    config = copy.deepcopy(hf_resnet("bottleneck").config)
    config.num_labels = 2
    randomize_(transformers.ResNetForImageClassification(config)).save_pretrained(tmp_path)
    theirs = transformers.ResNetBackbone.from_pretrained(tmp_path, out_indices=out_indices).eval()
    ours = AutoBackbone.from_pretrained(tmp_path, out_indices=out_indices)
    pixels = images(60, 44)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs(pixels).feature_maps)
    assert ours.channels == theirs.channels and ours.out_features == theirs.out_features


def test_out_indices_changed_later_changes_the_maps() -> None:
    upstream, pixels = hf_resnet(), images(60, 44)
    ours = from_hf(upstream, out_indices=(1,))
    ours.out_indices = [2, 4]
    with torch.no_grad():
        theirs = upstream(pixels).feature_maps
        assert_equals_upstream(ours(pixels).feature_maps, [theirs[2], theirs[4]])
        ours.out_features = ["stem"]
        assert_equals_upstream(ours(pixels).feature_maps, theirs[:1])
    assert ours.channels == [16] and ours.out_indices == [0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_hidden_states": True},
        {"output_hidden_states": True, "output_attentions": True},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_output_is_object_dict_and_tuple_as_upstream(options: dict[str, bool]) -> None:
    pair, pixels = resnet_pair("basic", "hf"), images(32, 32)
    with torch.no_grad():
        out, theirs = (m.forward_with_filtered_kwargs(pixels, **options) for m in pair_models(pair))
        maps = pair.ours(pixels).feature_maps
    assert isinstance(out, tuple) == isinstance(theirs, tuple)
    assert isinstance(out, dict) == isinstance(theirs, dict)
    assert len(out) == len(theirs)
    if options.get("return_dict", True):
        assert list(out) == list(theirs) and list(out.keys()) == list(theirs.keys())
        assert out["feature_maps"] is out.feature_maps is out[0] is out.to_tuple()[0]
        assert out.attentions is None and len(out.to_tuple()) == len(theirs.to_tuple())
    assert all(map(torch.equal, out[0], maps))


def pair_models(pair: Pair) -> tuple[Any, Any]:
    return pair.ours, pair.upstream


def test_wrong_number_of_channels_raises_value_error() -> None:
    message = "channel dimension of the pixel values match"
    for model in pair_models(resnet_pair("basic", "hf")):
        with pytest.raises(ValueError, match=message):
            model(images(32, 32, channels=4))


@pytest.mark.parametrize("variant", RESNET)
def test_training_gives_upstreams_gradients_and_statistics(variant: str) -> None:
    upstream, pixels = hf_resnet(variant).double(), images(60, 44).double()
    ours = from_hf(upstream).train()
    assert_equal_gradients(gradients(ours, pixels), gradients(upstream.train(), pixels))
    buffers = dict(ours.named_buffers())
    assert buffers.keys() == dict(upstream.named_buffers()).keys()
    for name, buffer in upstream.named_buffers():
        assert_equals_upstream(buffers[name], buffer)


def test_after_training_the_new_statistics_are_used() -> None:
    # values folded for inference before must not be used
    upstream, pixels = hf_resnet(), images(60, 44)
    ours = from_hf(upstream)
    with torch.no_grad():
        ours(pixels)
        for model in (ours, upstream):
            model.train()(pixels)
        assert_equals_upstream(ours.eval()(pixels).feature_maps, upstream.eval()(pixels)[0])


def checkpointed_pair() -> tuple[Any, Any, torch.Tensor]:
    # upstream's ResNetBackbone has no gradient checkpointing
    upstream = hf_resnet(depths=(3, 3, 3, 3)).double()
    plain, checkpointed = from_hf(upstream).train(), from_hf(upstream).train()
    checkpointed.gradient_checkpointing_enable()
    return plain, checkpointed, images(64, 64).double()


def test_gradient_checkpointing_saves_memory_and_keeps_gradients() -> None:
    plain, checkpointed, pixels = checkpointed_pair()
    assert_equal_gradients(gradients(checkpointed, pixels), gradients(plain, pixels))
    assert saved_bytes(checkpointed, pixels) < saved_bytes(plain, pixels) / 2


def test_gradient_checkpointing_updates_statistics_once() -> None:
    # the second forward, in the backward, must leave the running statistics alone
    plain, checkpointed, pixels = checkpointed_pair()
    for model in (plain, checkpointed):
        gradients(model, pixels)
    for (name, buffer), ours in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(ours, buffer), name


def test_timm_keeps_timms_names_and_layout_of_the_state_dict() -> None:
    pair = resnet_pair("basic", "timm")
    assert isinstance(pair.ours, TimmBackbone)
    assert pair.ours.stage_names == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert pair.ours.channels == pair.upstream.feature_info.channels()
    assert set(pair.ours.state_dict()) == {f"_backbone.{k}" for k in pair.upstream.state_dict()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {"output_stride": 8}),
        ("resnet18", {"output_stride": 16}),
        ("resnet50d", {}),
        ("resnext50_32x4d", {}),
        ("seresnet50", {}),
        ("resnetblur50", {}),
        ("resnetaa50", {}),
        ("wide_resnet50_2", {}),
        ("resnet18", {"act_layer": "gelu"}),
    ],
    ids=str,
)
def test_timm_relatives_of_resnet_equal_upstream(name: str, options: dict[str, Any]) -> None:
    options = {**options, "layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}
    pair = timm_pair(name, **options)
    pixels = images(64, 64)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


def test_timm_native_changes_only_the_forward() -> None:
    name, options = timm_options("resnet", "bottleneck")
    upstream = timm_features(name, **options)
    native = from_timm(name, upstream, **options)
    plain = from_timm(name, upstream, native=False, **options)
    pixels = images(64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, plain(pixels).feature_maps, timm_maps(upstream, pixels)))
    assert native.state_dict().keys() == plain.state_dict().keys()
    assert native.stage_names == plain.stage_names and native.channels == plain.channels


def test_torchvision_resnet_is_a_native_backbone() -> None:
    ours = resnet_pair("basic", "torchvision").ours
    assert isinstance(ours, ResNetBackbone)
    assert ours.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]


def test_torchvision_resnet50_by_name_equals_upstream() -> None:
    torchvision = pytest.importorskip("torchvision")
    upstream = randomize_(torchvision.models.resnet50())
    pair, pixels = torchvision_pair(upstream, "resnet50"), images(64, 64, batch=1)
    assert pair.ours.channels == [64, 256, 512, 1024, 2048]
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext50_32x4d"])
def test_torchvisions_relatives_of_resnet_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*resnet50"):
        AutoBackbone.from_torchvision(name, torchvision_resnet("bottleneck").state_dict())


def test_torchvision_weights_error_lists_missing_tensors() -> None:
    weights = torchvision_resnet().state_dict()
    lost = "layer2.0.bn1.running_mean"
    del weights[lost]
    named = r"layers\.0\.layer\.0\.normalization\.running_mean"
    with pytest.raises(ValueError, match=f"(?s)by transformers' names.*missing: .*{named}"):
        AutoBackbone.from_torchvision(None, weights)
