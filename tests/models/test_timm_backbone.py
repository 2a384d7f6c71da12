"""TimmBackbone around any features_only model: timm's values as NCHW."""

from typing import Any

import pytest
import timm
import torch
from reference_models import (
    from_timm,
    gradients,
    images,
    randomize_,
    saved_bytes,
    timm_features,
    timm_maps,
)
from timm.layers.norm_act import FrozenBatchNormAct2d
from tolerance import assert_equal_gradients, assert_equals_upstream
from torch.utils.flop_counter import FlopCounterMode

from fastbb import AutoBackbone, TimmBackbone, TimmBackboneConfig

# random.Random(0).sample(sorted(modules), 20) over timm's model modules, the smallest architecture
# of each; below 15 M parameters
TWENTY = (
    "cait_xxs24_224",
    "csatv2",
    "dla46x_c",
    "efficientformer_l1",
    "efficientvim_m1",
    "fastvit_t8",
    "gcvit_xxtiny",
    "ghostnet_050",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "mobilenetv2_035",
    "poolformerv2_s12",
    "regnetx_002",
    "resnet10t",
    "rexnet_100",
    "starnet_s050",
    "tiny_vit_5m_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "xcit_nano_12_p8_224",
)

# one or two architectures for each class that timm wraps a model in
WRAPPERS = {
    "resnet10t": "FeatureListNet",
    "mambaout_femto": "FeatureListNet",  # NHWC
    "vit_tiny_patch16_224": "FeatureGetterNet",
    "mobilenetv2_035": "EfficientNetFeatures",
    "mobilenetv3_small_050": "MobileNetV3Features",
    "legacy_xception": "FeatureHookNet",
    "pit_ti_224": "FeatureHookNet",
    "hrnet_w18_small": "HighResolutionNetFeatures",
}


def side(name: str) -> int:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return cfg.input_size[-1] if cfg.fixed_input_size else 64


@pytest.mark.parametrize("name", TWENTY)
def test_twenty_families_give_timms_maps_as_nchw(name: str) -> None:
    upstream = timm_features(name)
    selected = list(upstream.feature_info.out_indices)[-3:]
    ours = from_timm(name, upstream, out_indices=selected)
    pixels = images(side(name), side(name))
    with torch.no_grad():
        maps = ours(pixels).feature_maps
        want = timm_maps(upstream, pixels)[-3:]
    assert_equals_upstream(maps, want, rel=1e-4)  # folding rounds elsewhere
    channels = upstream.feature_info.channels()[-3:]
    assert ours.channels == channels == [m.shape[1] for m in maps]
    infos = upstream.feature_info.info
    assert ours.stage_names == [info["module"] for info in infos]
    assert ours.num_features == [info["num_chs"] for info in infos]
    assert ours.out_indices == selected


@pytest.mark.parametrize("name", WRAPPERS)
def test_hidden_states_are_all_features_for_every_wrapper_of_timm(name: str) -> None:
    upstream = timm_features(name)
    assert type(upstream).__name__ == WRAPPERS[name]
    n_stages = len(upstream.feature_info.info)
    everything = timm_features(name, out_indices=list(range(n_stages)))
    ours = from_timm(name, everything, out_indices=[0, n_stages - 1])
    pixels = images(side(name), side(name))
    with torch.no_grad():
        want = timm_maps(everything, pixels)
        out = ours(pixels, output_hidden_states=True)
        assert_equals_upstream(out.hidden_states, want)
        assert_equals_upstream(out.feature_maps, [want[0], want[-1]])
        assert_equals_upstream(ours(pixels).feature_maps, [want[0], want[-1]])
        assert ours(pixels).hidden_states is None


@pytest.mark.parametrize("name", WRAPPERS)
def test_out_indices_set_later_change_what_forward_returns(name: str) -> None:
    upstream = timm_features(name)
    n_stages = len(upstream.feature_info.info)
    upstream = timm_features(name, out_indices=list(range(n_stages)))
    ours = from_timm(name, upstream, out_indices=[1])
    pixels = images(side(name), side(name), batch=1)
    with torch.no_grad():
        want = timm_maps(upstream, pixels)
        for selected in ([0, n_stages - 1], [-2, -1], [], [1]):
            ours.out_indices = selected
            maps = ours(pixels).feature_maps
            assert_equals_upstream(maps, [want[i] for i in selected])
            assert ours.channels == [m.shape[1] for m in maps]
        ours.out_features = ours.stage_names[1:]
        assert_equals_upstream(ours(pixels).feature_maps, want[1:])


@pytest.mark.parametrize("native", [True, False], ids=["native", "timms_own"])
@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "vit_tiny_patch16_224", *TWENTY[-3:-1]])
def test_stages_after_the_last_requested_one_do_not_run(name: str, native: bool) -> None:
    ours = from_timm(name, timm_features(name), native=native)
    pixels = images(side(name), side(name), batch=1)
    flops = []
    for selected in ([0], [-1]):
        ours.out_indices = selected
        # the counter does not know the products of oneDNN
        with (
            torch.backends.mkldnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            ours(pixels)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.6 * flops[1]


@pytest.mark.parametrize("size", [(64, 96), (104, 72)], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_zepto_rms"])
def test_any_image_size_that_timm_takes_equals_timm(name: str, size: tuple[int, int]) -> None:
    dynamic = {"dynamic_img_size": True, "dynamic_img_pad": True} if "vit" in name else {}
    upstream = timm_features(name, **dynamic)
    ours = from_timm(name, upstream, out_indices=upstream.feature_info.out_indices)
    size = (64, 96) if "vit" in name else size
    with torch.no_grad():
        pixels = images(*size)
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"output_stride": 8}),
        ("regnetx_002", {"output_stride": 16}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ],
    ids=str,
)
def test_timm_options_are_passed_on(name: str, options: dict[str, Any]) -> None:
    upstream, pixels = timm_features(name, **options), images(64, 64)
    selected = upstream.feature_info.out_indices
    ours = from_timm(name, upstream, out_indices=selected, **options)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


def test_num_channels_is_timms_in_chans() -> None:
    upstream, pixels = timm_features("resnet10t", in_chans=5), images(64, 64, channels=5)
    ours = from_timm("resnet10t", upstream, num_channels=5)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_frozen_batch_norm_ignores_train(name: str) -> None:
    config = TimmBackboneConfig(backbone=name, freeze_batch_norm_2d=True, out_indices=[1, 4])
    ours, pixels = randomize_(TimmBackbone(config)), images(64, 64)
    assert any(isinstance(m, FrozenBatchNormAct2d) for m in ours.modules()) or name == "resnet18"
    assert not any(type(m) is torch.nn.BatchNorm2d for m in ours.modules())
    with torch.no_grad():
        in_eval, in_train = ours(pixels).feature_maps, ours.train()(pixels).feature_maps
    assert_equals_upstream(in_train, in_eval)


@pytest.mark.parametrize("native", [True, False], ids=["native", "timms_own"])
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_hooks_on_timms_modules_run_or_are_refused(name: str, native: bool) -> None:
    ours = from_timm(name, timm_features(name), native=native)
    calls: list[str] = []
    stage = "layers_1" if name.startswith("swin") else "layer1"
    ours._backbone.get_submodule(stage).register_forward_hook(lambda *_: calls.append(stage))
    try:
        with torch.no_grad():
            ours(images(64, 64))
    except ValueError as error:
        assert "hook" in str(error)
    else:
        assert calls


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_every_norm_has_the_eps_of_its_module(name: str) -> None:
    upstream = timm_features(name, **({"strict_img_size": False} if "swin" in name else {}))
    ours = from_timm(name, upstream)
    for model in (upstream, ours):
        norms = [m for m in model.modules() if hasattr(m, "eps")]
        for i, norm in enumerate(norms):
            norm.eps = 1e-3 * (i + 1)
    pixels = images(64, 64)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, timm_maps(upstream, pixels))


def test_unknown_stages_raise_value_error() -> None:
    with pytest.raises(ValueError, match=r"layer9.*|.*act1.*layer1") as error:
        TimmBackbone(TimmBackboneConfig(backbone="resnet10t", out_features=["layer1", "layer9"]))
    assert "layer9" in str(error.value) and "layer4" in str(error.value)
    with pytest.raises(ValueError, match="out_indices must be valid indices for stage_names"):
        TimmBackbone(TimmBackboneConfig(backbone="resnet10t", out_indices=[5]))
    ours = TimmBackbone(TimmBackboneConfig(backbone="resnet10t", out_features=["layer1", "layer3"]))
    assert ours.out_indices == [1, 3] and ours.config.out_features == ["layer1", "layer3"]


@pytest.mark.parametrize("out_indices", [[3, 0], [0, 0, 1]], ids=str)
def test_unsorted_or_repeated_indices_are_refused(out_indices: list[int]) -> None:
    # timm returns them in the order of the network, once each, beside channels in the order asked
    with pytest.raises(ValueError, match="out_indices must"):
        TimmBackbone(TimmBackboneConfig(backbone="resnet10t", out_indices=out_indices))


def test_unknown_name_error_suggests_close_names() -> None:
    with pytest.raises(ValueError, match="resnet50"):
        TimmBackbone(TimmBackboneConfig(backbone="resnet5O"))
    with pytest.raises(ValueError, match="backbone is not set in the config"):
        TimmBackbone(TimmBackboneConfig())


def test_the_default_is_the_last_feature() -> None:
    ours = TimmBackbone(TimmBackboneConfig("resnet10t"))
    assert ours.out_features == ["layer4"] and ours.channels == [512]
    assert ours.stage_names[ours.out_indices[0]] == "layer4"


def test_attentions_are_refused_as_upstream_does() -> None:
    ours = TimmBackbone(TimmBackboneConfig("resnet10t"))
    with pytest.raises(ValueError, match="Cannot output attentions for timm backbones"):
        ours(images(64, 64), output_attentions=True)


def test_forward_with_filtered_kwargs_drops_unknown_arguments() -> None:
    ours = TimmBackbone(TimmBackboneConfig("resnet10t")).eval()
    with torch.no_grad():
        out = ours.forward_with_filtered_kwargs(images(64, 64), interpolate_pos_encoding=True)
    assert len(out.feature_maps) == 1


@pytest.mark.parametrize("name", ["resnet18", "mambaout_femto", "mobilenetv2_035"])
def test_saved_backbone_loads_with_equal_maps(name: str, tmp_path: Any) -> None:
    upstream, pixels = timm_features(name), images(64, 64)
    ours = from_timm(name, upstream, out_indices=[1, 3])
    ours.save_pretrained(tmp_path)
    again = AutoBackbone.from_pretrained(tmp_path)
    assert isinstance(again, TimmBackbone) and not again.training
    with torch.no_grad():
        want = ours(pixels).feature_maps
        assert all(map(torch.equal, again(pixels).feature_maps, want))
        last = AutoBackbone.from_pretrained(tmp_path, out_indices=(3,))(pixels).feature_maps
        assert_equals_upstream(last, want[1:])


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_zepto_rms"])
def test_gradient_checkpointing_saves_memory_and_keeps_gradients(name: str) -> None:
    if name == "resnet10t" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 does not recompute timm's ReLU in place, in timm's model either")
    # without drop path, which is random
    config = TimmBackboneConfig(name, backbone_kwargs={"drop_path_rate": 0.0})
    ours = TimmBackbone(config).double().train()
    pixels = images(side(name), side(name), batch=1).double()
    want, kept = gradients(ours, pixels), saved_bytes(ours, pixels)
    ours.gradient_checkpointing_enable()
    assert saved_bytes(ours, pixels) < 0.8 * kept
    assert_equal_gradients(gradients(ours, pixels), want)


def test_low_precision_and_empty_batches_equal_timm() -> None:
    upstream = timm_features("mambaout_femto")
    ours = from_timm("mambaout_femto", upstream).to(torch.bfloat16)
    pixels = images(64, 64).bfloat16()
    with torch.no_grad():
        want = timm_maps(upstream.to(torch.bfloat16), pixels)
        assert all(map(torch.equal, ours(pixels).feature_maps, want))
        empty = ours(pixels[:0]).feature_maps
    assert [m.shape for m in empty] == [(0, *m.shape[1:]) for m in want]


def test_pixels_of_the_wrong_shape_are_refused() -> None:
    ours = TimmBackbone(TimmBackboneConfig("resnet10t"))
    with pytest.raises(ValueError, match="channel"):
        ours(images(64, 64, channels=4))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]|4"):
        ours(images(64, 64)[0])
