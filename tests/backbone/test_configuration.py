"""`out_features` and `out_indices`: transformers' rules and error texts, without its bugs."""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch

from fastbb import AutoConfig, BackboneConfigMixin, ResNetConfig, SwinConfig, TimmBackboneConfig
from fastbb.backbone.configuration import check_choice

transformers = pytest.importorskip("transformers")

PAIRS = {
    "swin": (SwinConfig, transformers.SwinConfig),
    "resnet": (ResNetConfig, transformers.ResNetConfig),
}
families = pytest.mark.parametrize("family", PAIRS)

VALID = [
    {},
    {"out_features": None, "out_indices": None},
    {"out_features": ["stage1", "stage3"]},
    {"out_features": ["stem"]},
    {"out_indices": [0, 2]},
    {"out_indices": (0, 2)},
    {"out_indices": [-2, -1]},
    {"out_indices": [0, -1]},
    {"out_indices": [-5]},
    {"out_indices": []},
    {"out_features": []},
    {"out_features": ["stem", "stage1"], "out_indices": [0, 1]},
    {"out_features": ["stage3", "stage4"], "out_indices": [-2, -1]},
    {"n_stages": 2, "out_indices": [2]},
    {"n_stages": 6, "out_features": ["stage6"]},
]

INVALID = [
    {"out_features": ["stage9"]},
    {"out_features": ["stage1", "stage1"]},
    {"out_features": ["stage2", "stage1"]},
    {"out_indices": [5]},
    {"out_indices": [0, 17]},
    {"out_indices": [1, 1]},
    {"out_indices": [4, -1]},
    {"out_indices": [-1, 2]},
    {"out_indices": [3, 0]},
    {"out_features": ["stage1", "stage2"], "out_indices": [0]},
    {"out_features": ["stage1", "stage2"], "out_indices": [0, 2]},
    {"n_stages": 2, "out_indices": [3]},
]


def stages(family: str, n_stages: int) -> dict[str, list[int]]:
    widths = {"swin": "num_heads", "resnet": "hidden_sizes"}[family]
    return {"depths": list(range(1, n_stages + 1)), widths: [2**i for i in range(n_stages)]}


def build(family: str, n_stages: int | None = None, **arguments: Any) -> tuple[Callable, Callable]:
    """Constructors of our config and of upstream's."""
    shape = {} if n_stages is None else stages(family, n_stages)
    ours, theirs = (partial(config, **shape, **arguments) for config in PAIRS[family])
    return ours, theirs


def selection(config: Any) -> tuple[Any, ...]:
    return config.stage_names, config.out_features, config.out_indices


@families
@pytest.mark.parametrize("arguments", VALID, ids=str)
def test_valid_selections_are_aligned_as_upstream_does(
    family: str, arguments: dict[str, Any]
) -> None:
    ours, theirs = build(family, **arguments)
    assert selection(ours()) == selection(theirs())


@families
@pytest.mark.parametrize("arguments", INVALID, ids=str)
def test_invalid_selections_raise_upstreams_message(family: str, arguments: dict[str, Any]) -> None:
    ours, theirs = build(family, **arguments)
    with pytest.raises(ValueError) as expected:
        theirs()
    with pytest.raises(ValueError) as raised:
        ours()
    assert str(raised.value) == str(expected.value)


SETS = [("out_features", v) for v in (["stage1"], None, [])]
SETS += [("out_indices", v) for v in ([1, 2], (0, 4), [-1], None, [])]
FAILED_SETS = [item for a in INVALID if len(a) == 1 for item in a.items()]


@families
@pytest.mark.parametrize(("name", "value"), SETS, ids=str)
def test_setting_one_selection_realigns_the_other(family: str, name: str, value: Any) -> None:
    ours, theirs = (config(out_indices=[2, 3]) for config in PAIRS[family])
    setattr(ours, name, value)
    setattr(theirs, name, value)
    assert selection(ours) == selection(theirs)


@families
@pytest.mark.parametrize(("name", "value"), FAILED_SETS, ids=str)
def test_a_failed_setter_raises_upstreams_message_and_changes_nothing(
    family: str, name: str, value: Any
) -> None:
    ours, theirs = (config(out_indices=[2, 3]) for config in PAIRS[family])
    before = selection(ours)
    with pytest.raises(ValueError) as expected:
        setattr(theirs, name, value)
    with pytest.raises(ValueError) as raised:
        setattr(ours, name, value)
    assert str(raised.value) == str(expected.value)
    assert selection(theirs) != before  # upstream keeps the invalid value
    assert selection(ours) == before


@families
@pytest.mark.parametrize("value", [("stage1", "stage2"), "stage1"], ids=str)
def test_setting_out_features_needs_a_list(family: str, value: Any) -> None:
    # transformers' SwinConfig says the same in huggingface_hub's words
    theirs = transformers.ResNetConfig()
    with pytest.raises(ValueError) as expected:
        theirs.out_features = value
    config = PAIRS[family][0]()
    with pytest.raises(ValueError) as raised:
        config.out_features = value
    assert str(raised.value) == str(expected.value)
    assert config.out_features == ["stage4"]


@families
@pytest.mark.parametrize(("features", "indices"), [(["stage1"], [2]), (["stage9"], None)])
def test_set_output_features_output_indices_is_public(
    family: str, features: Any, indices: Any
) -> None:
    ours, theirs = (config() for config in PAIRS[family])
    with pytest.raises(ValueError) as expected:
        theirs.set_output_features_output_indices(features, indices)
    with pytest.raises(ValueError) as raised:
        ours.set_output_features_output_indices(features, indices)
    assert str(raised.value) == str(expected.value)
    ours.set_output_features_output_indices(["stage1"], [1])
    assert ours.out_indices == [1]


@families
@pytest.mark.parametrize("indices", [[-6], [-6, -1], [0, -17]], ids=str)
def test_too_negative_indices_are_a_value_error(family: str, indices: list[int]) -> None:
    ours, theirs = PAIRS[family]
    with pytest.raises((IndexError, ValueError)):
        theirs(out_indices=indices)
    with pytest.raises(ValueError, match="out_indices must be valid indices for stage_names"):
        ours(out_indices=indices)
    config = ours()
    with pytest.raises(ValueError, match="out_indices must be valid indices for stage_names"):
        config.out_indices = indices
    assert config.out_indices == [4]


@families
@pytest.mark.parametrize(
    "arguments",
    [
        {"out_features": ("stage1", "stage2")},
        {"out_features": "stage1"},
        {"out_indices": 3},
        {"out_indices": "3"},
        {"out_indices": range(2)},
        {"out_indices": ["stage1"]},
        {"out_indices": [1.0]},
        {"out_features": [1]},
        {"num_channels": "3"},
        {"depths": 2},
        {"hidden_act": 3},
    ],
    ids=str,
)
def test_wrong_types_in_the_constructor_raise_value_error(
    family: str, arguments: dict[str, Any]
) -> None:
    # upstream raises huggingface_hub's StrictDataclassFieldValidationError, which is none
    ours, theirs = PAIRS[family]
    with pytest.raises(Exception):  # noqa: B017 - several unrelated classes upstream
        theirs(**arguments)
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        ours(**arguments)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (SwinConfig, {"window_size": [7, 7]}),
        (ResNetConfig, {"layer_type": "foo"}),
        (TimmBackboneConfig, {"backbone": 3}),
        (TimmBackboneConfig, {"output_stride": "8"}),
    ],
    ids=str,
)
def test_wrong_field_error_names_the_field(config: Any, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        config(**arguments)


@pytest.mark.parametrize("value", [1, 0, None, "Auto", ["auto"], torch.ones(2)], ids=str)
def test_a_choice_is_compared_with_its_type(value: Any) -> None:
    choices = ("auto", True, False)
    assert [check_choice("graph", choice, choices) for choice in choices] == list(choices)
    with pytest.raises(ValueError, match="graph must be one of 'auto', True, False, got"):
        check_choice("graph", value, choices)


def test_unknown_layer_type_raises_upstreams_message() -> None:
    with pytest.raises(ValueError, match="layer_type=foo is not one of basic,bottleneck"):
        ResNetConfig(layer_type="foo")


def test_stage_names_must_be_set() -> None:
    class Bare(BackboneConfigMixin):
        stage_names = None

    with pytest.raises(ValueError, match="Stage_names must be set for transformers backbones"):
        Bare().set_output_features_output_indices(out_features=None, out_indices=[0])


def own_fields(theirs: Any) -> dict[str, Any]:
    generic = {f.name for f in fields(transformers.PreTrainedConfig)}
    names = [f.name for f in fields(theirs) if not f.name.startswith("_") and f.init]
    return {name: json_value(getattr(theirs(), name)) for name in names if name not in generic}


def json_value(value: Any) -> Any:
    return json.loads(json.dumps(value))


@families
def test_fields_and_defaults_equal_upstream(family: str) -> None:
    ours, theirs = PAIRS[family]
    for name, default in own_fields(theirs).items():
        assert json_value(getattr(ours(), name)) == default, name
    assert ours.model_type == theirs.model_type
    derived = {"hidden_size", "num_layers"} & set(theirs().to_dict())
    assert all(getattr(ours(), name) == getattr(theirs(), name) for name in derived)


@families
def test_a_config_goes_to_transformers_and_back(family: str, tmp_path: Any) -> None:
    ours, theirs = PAIRS[family]
    config = ours(**stages(family, 2), out_indices=(0, -1))
    config.save_pretrained(tmp_path / "ours")
    read = theirs.from_pretrained(tmp_path / "ours")
    assert selection(read) == selection(config)
    assert read.depths == [1, 2]

    upstream = theirs(**stages(family, 2), out_features=["stage1"], hidden_act="silu")
    upstream.save_pretrained(tmp_path / "theirs")
    got = ours.from_pretrained(tmp_path / "theirs")
    assert selection(got) == selection(upstream)
    assert got.hidden_act == "silu"
    assert type(AutoConfig.from_pretrained(tmp_path / "theirs")) is ours
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == theirs.model_type
    assert written["out_features"] == ["stem", "stage2"] and written["out_indices"] == [0, -1]
    assert not [key for key in written if key.startswith("_out")]


@families
def test_unknown_fields_are_kept(family: str, tmp_path: Any) -> None:
    ours, _ = PAIRS[family]
    extra = {"finetuned_on": ["a", 1], "id2label": {"0": "cat"}, "nested": {"x": None}}
    config = ours.from_dict({**ours(out_indices=[1]).to_dict(), **extra})
    assert config.finetuned_on == ["a", 1]
    config.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert {name: again.to_dict()[name] for name in extra} == extra


@families
def test_to_dict_is_a_copy_that_from_dict_reads(family: str) -> None:
    ours, _ = PAIRS[family]
    config = ours(**stages(family, 3), out_features=["stage2"])
    data = config.to_dict()
    assert json_value(data) == data
    assert ours.from_dict(data).to_dict() == data
    data["depths"].append(4)
    data["out_indices"].append(3)
    assert config.depths == [1, 2, 3] and config.out_indices == [2]


@families
def test_from_pretrained_overrides_fields(family: str, tmp_path: Any) -> None:
    ours, _ = PAIRS[family]
    ours(out_features=["stage1"]).save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path, out_indices=(2, 3)).out_features == ["stage2", "stage3"]
    assert ours.from_pretrained(tmp_path, out_features=["stem"]).out_indices == [0]


@families
def test_configs_of_one_class_do_not_share_lists(family: str) -> None:
    ours, _ = PAIRS[family]
    one, two = ours(), ours()
    one.depths = [9]
    one.out_indices = [0]
    assert two.depths != [9] and two.out_indices == [4]


def test_timm_backbone_config_takes_the_name_first() -> None:
    # this call of the reference page is refused by transformers 5
    with pytest.raises(ValueError):
        transformers.TimmBackboneConfig("resnet50", use_pretrained_backbone=True)
    config = TimmBackboneConfig("resnet50", use_pretrained_backbone=True)
    assert config.backbone == "resnet50" and config.use_pretrained_backbone
    assert TimmBackboneConfig(backbone="resnet50").use_pretrained_backbone is False
    assert TimmBackboneConfig("resnet50").out_indices == [-1]
    for name, default in own_fields(transformers.TimmBackboneConfig).items():
        assert json_value(getattr(TimmBackboneConfig(), name)) == default, name


def test_timm_backbone_config_survives_saving_and_loading(tmp_path: Any) -> None:
    config = TimmBackboneConfig("resnet50", out_indices=(1, 2), output_stride=8, img_size=128)
    config.save_pretrained(tmp_path)
    again = TimmBackboneConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    theirs = transformers.TimmBackboneConfig.from_pretrained(tmp_path)
    assert (theirs.backbone, theirs.out_indices, theirs.output_stride) == ("resnet50", [1, 2], 8)


def test_a_config_of_an_unsupported_type_lists_the_supported_ones(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"bert(?s:.*)resnet(?s:.*)swin"):
        AutoConfig.from_pretrained(tmp_path)
