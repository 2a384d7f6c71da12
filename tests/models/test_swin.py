"""Swin against transformers, timm and torchvision, at any image size."""

import warnings
from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
from contract import BackboneContract
from reference_models import (
    STAGES,
    SWIN,
    Pair,
    family_pair,
    from_hf,
    from_timm,
    gradients,
    hf_maskformer_swin,
    hf_pair,
    hf_swin,
    images,
    randomize_,
    saved_bytes,
    timm_features,
    timm_maps,
    timm_pair,
    torchvision_pair,
    torchvision_swin,
)
from tolerance import (
    assert_equal_gradients,
    assert_equals_upstream,
)

from fastbb import AutoBackbone, SwinBackbone, SwinConfig, TimmBackbone, TimmBackboneConfig

transformers = pytest.importorskip("transformers")

SOURCES = ("hf", "timm", "torchvision")


class TestContract(BackboneContract):
    UPSTREAM: ClassVar[dict[str, Any]] = {"swin": hf_swin}
    PAIRS: ClassVar[dict[str, Any]] = {
        source: partial(family_pair, "swin", "w7", source) for source in SOURCES
    }


@cache
def swin_pair(variant: str, source: str) -> Pair:
    return family_pair("swin", variant, source)


@pytest.mark.parametrize(
    ("source", "size"), [("hf", (53, 70)), ("torchvision", (53, 70)), ("hf", (3, 2))], ids=str
)
def test_sizes_that_are_no_multiple_of_a_patch_equal_upstream(
    source: str, size: tuple[int, int]
) -> None:
    # transformers pads, torchvision floors, timm refuses
    pair, pixels = swin_pair("w7", source), images(*size)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": False},
        {"layer_norm_eps": 0.1},  # of the blocks only: every other norm keeps 1e-5
        {"mlp_ratio": 1.5},
        {"hidden_act": "relu"},
        {"patch_size": 2},
        {"num_channels": 1},
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},  # not in eval()
        {"depths": [1, 2], "num_heads": [2, 4], "out_indices": [0, 1, 2]},
        {"depths": [1] * 5, "num_heads": [1, 2, 4, 8, 16], "out_indices": [0, 3, 5]},
    ],
    ids=lambda config: "-".join(config),
)
def test_config_fields_equal_upstream(config: dict[str, Any]) -> None:
    pair, pixels = (
        hf_pair(hf_swin(**config)),
        images(60, 44, channels=config.get("num_channels", 3)),
    )
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


def test_absolute_embeddings_and_their_interpolation_equal_upstream() -> None:
    pair = hf_pair(hf_swin(use_absolute_embeddings=True, image_size=64))
    pixels, larger = images(64, 64), images(96, 64)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
        theirs = pair.upstream(larger, interpolate_pos_encoding=True).feature_maps
        assert_equals_upstream(
            pair.ours(larger, interpolate_pos_encoding=True).feature_maps, theirs
        )
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            pair.ours(larger)


@pytest.mark.parametrize("side", [56, 60, 4], ids=["even", "odd", "one_token"])
def test_patch_merging_of_even_and_odd_maps_equals_upstream(side: int) -> None:
    pair, pixels = swin_pair("w7", "hf"), images(side, 4 * side)
    with torch.no_grad():
        maps = pair.ours(pixels).feature_maps
        assert_equals_upstream(maps, pair.maps(pixels))
    assert maps[-1].shape[-2:] == (-(-side // 32), -(-side // 8))


def test_saved_backbone_loads_in_transformers(tmp_path: Any) -> None:
    config = SwinConfig(embed_dim=16, depths=[2, 1], num_heads=[2, 4], out_indices=(0, 2))
    ours = randomize_(SwinBackbone(config))
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.SwinBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixels = images(60, 44)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs.eval()(pixels).feature_maps)


@pytest.mark.parametrize("out_indices", [(1,), (0, 4), (-2, -1), (2, 3)], ids=str)
def test_a_classification_checkpoint_gives_upstreams_maps(
    out_indices: tuple[int, ...], tmp_path: Any
) -> None:
    config = transformers.SwinConfig(**SWIN["w7"], depths=[2, 1, 1, 2], num_labels=2)
    randomize_(transformers.SwinForImageClassification(config)).save_pretrained(tmp_path)
    theirs = transformers.SwinBackbone.from_pretrained(tmp_path, out_indices=out_indices).eval()
    with pytest.warns(UserWarning, match=f"no norm for {', '.join(theirs.out_features)}:"):
        ours = AutoBackbone.from_pretrained(tmp_path, out_indices=out_indices)
    pixels = images(60, 44)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs(pixels).feature_maps)
    assert ours.channels == theirs.channels and ours.out_features == theirs.out_features
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each stage
        ours.out_indices = list(out_indices)


def test_out_indices_changed_later_uses_the_norms_of_the_checkpoint() -> None:
    upstream, pixels = hf_swin(), images(60, 44)
    ours = from_hf(upstream, out_indices=(1,))
    ours.out_indices = [2, 4]
    with torch.no_grad():
        theirs = upstream(pixels).feature_maps
        assert_equals_upstream(ours(pixels).feature_maps, [theirs[2], theirs[4]])
    assert ours.channels == [32, 128] and ours.out_features == ["stage2", "stage4"]


def test_maskformer_checkpoints_load_in_both_directions(tmp_path: Any) -> None:
    pair, pixels = hf_pair(hf_maskformer_swin()), images(60, 44)
    with torch.no_grad():
        theirs = pair.maps(pixels)
        assert_equals_upstream(pair.ours(pixels).feature_maps, theirs)
        pair.ours.save_pretrained(tmp_path)
        back = type(pair.upstream).from_pretrained(tmp_path).eval()
        assert_equals_upstream(back(pixels).feature_maps, theirs)


def test_attentions_are_one_tensor_for_each_stage() -> None:
    upstream, pixels = hf_swin(), images(60, 44)
    ours = from_hf(upstream)
    upstream.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = upstream(pixels, output_attentions=True)
        out = ours(pixels, output_attentions=True)
    assert len(out.attentions) == 4
    assert_equals_upstream(out.attentions, theirs.attentions)
    assert_equals_upstream(out.feature_maps, theirs.feature_maps)


def test_training_gives_upstreams_gradients() -> None:
    upstream, pixels = hf_swin().double(), images(60, 44).double()
    ours = from_hf(upstream).train()
    assert ours.dtype == torch.float64  # the checkpoint's
    assert_equal_gradients(gradients(ours, pixels), gradients(upstream.train(), pixels))


@pytest.mark.parametrize("source", ["hf", "timm"])
def test_drop_path_drops_the_same_branches_as_upstream(source: str) -> None:
    # at this rate the first block never drops and the second one always does: transformers its
    # attention only, timm its MLP too
    options: dict[str, Any] = {
        **SWIN["w7"],
        "depths": (1, 1),
        "num_heads": (2, 4),
        "drop_path_rate": 1 - 1e-7,
    }
    if source == "hf":
        pair = hf_pair(hf_swin(**options, out_indices=[1, 2]))
    else:
        pair = timm_pair("swin_tiny_patch4_window7_224", **options)
    pixels = images(64, 64)
    with torch.no_grad():
        kept = pair.ours(pixels).feature_maps
        dropped = pair.ours.train()(pixels).feature_maps
        pair.upstream.train()
        assert_equals_upstream(dropped, pair.maps(pixels))
        assert not dropped[1].allclose(kept[1])
        assert torch.equal(pair.ours.eval()(pixels).feature_maps[1], kept[1])


def test_gradient_checkpointing_saves_memory_and_keeps_gradients() -> None:
    ours, pixels = from_hf(hf_swin().double()).train(), images(60, 44).double()
    plain_bytes, plain = saved_bytes(ours, pixels), gradients(ours, pixels)
    ours.gradient_checkpointing_enable()
    assert saved_bytes(ours, pixels) < plain_bytes / 2
    assert_equal_gradients(gradients(ours, pixels), plain)
    ours.gradient_checkpointing_disable()
    assert saved_bytes(ours, pixels) == plain_bytes


def test_timm_keeps_timms_names_and_layout_of_the_state_dict() -> None:
    pair = swin_pair("w7", "timm")
    assert isinstance(pair.ours, TimmBackbone)
    assert pair.ours.stage_names == [f"layers.{i}" for i in range(4)]
    assert pair.ours.channels == pair.upstream.feature_info.channels()
    assert set(pair.ours.state_dict()) == {f"_backbone.{k}" for k in pair.upstream.state_dict()}


@pytest.mark.parametrize("native", [True, False], ids=["native", "timms_own"])
@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 192},  # stage 4 is 6x6: timm's constructor shrinks its window and its shift
        {"img_size": (64, 96), "window_size": 4},
        {"always_partition": True},
        {"qkv_bias": False, "mlp_ratio": 2.0},
        {"window_size": (7, 7, 14, 7)},  # as swin_s3
        {"head_dim": 4},
    ],
    ids=lambda options: "-".join(options),
)
def test_timm_options_equal_upstream(options: dict[str, Any], native: bool) -> None:
    arguments = {**SWIN["w7"], "depths": (2, 1, 2, 2), **options}
    pair = timm_pair("swin_tiny_patch4_window7_224", native=native, **arguments)
    for size in [(64, 96), (104, 72)]:
        pixels = images(*size)
        with torch.no_grad():
            assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


def test_timm_refuses_sizes_without_whole_patches() -> None:
    with pytest.raises(ValueError, match="divisible by"):
        swin_pair("w7", "timm").ours(images(54, 72))


def test_timm_native_changes_only_the_forward() -> None:
    name, options = "swin_tiny_patch4_window7_224", {**SWIN["w7"], "depths": (2, 1, 1, 2)}
    upstream = timm_features(name, strict_img_size=False, **options)
    native = from_timm(name, upstream, **options)
    plain = from_timm(name, upstream, native=False, **options)
    pixels = images(64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, plain(pixels).feature_maps, timm_maps(upstream, pixels)))
    assert native.state_dict().keys() == plain.state_dict().keys()
    assert native.stage_names == plain.stage_names and native.channels == plain.channels


def test_untrained_timm_backbone_has_finite_gradients() -> None:
    config = TimmBackboneConfig(
        "swin_tiny_patch4_window7_224", backbone_kwargs={**SWIN["w7"], "depths": (1, 1, 1, 1)}
    )
    assert all(g.isfinite().all() for g in gradients(TimmBackbone(config), images(64, 64)).values())


def test_torchvision_backbone_has_no_stage_norms() -> None:
    ours = swin_pair("w7", "torchvision").ours
    assert isinstance(ours, SwinBackbone)
    assert ours.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert not [name for name in ours.state_dict() if "hidden_states_norms" in name]


def test_torchvision_swin_t_by_name_equals_upstream() -> None:
    torchvision = pytest.importorskip("torchvision")
    upstream = randomize_(torchvision.models.swin_t())
    pair, pixels = torchvision_pair(upstream, "swin_t"), images(64, 96, batch=1)
    assert pair.ours.channels == [96, 96, 192, 384, 768]
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


def test_torchvision_defaults_to_the_last_stage_and_lists_missing_tensors() -> None:
    weights = torchvision_swin().state_dict()
    assert AutoBackbone.from_torchvision(None, weights).out_features == ["stage4"]
    lost = "features.1.0.attn.qkv.weight"
    del weights[lost]
    with pytest.raises(ValueError, match=r"(?s)by transformers' names.*missing: .*q_proj\.weight"):
        AutoBackbone.from_torchvision(None, weights, out_indices=STAGES)
