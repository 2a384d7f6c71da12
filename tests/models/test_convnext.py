"""ConvNeXt, ConvNeXt V2 and DINOv3's ConvNeXt against transformers, at any image size."""

import warnings
from typing import Any, ClassVar

import pytest
import torch
from contract import BackboneContract
from convnext_models import KINDS, hf_convnext
from feature_models import PICTURES, pixels_of, save_processor
from reference_models import (
    Pair,
    from_hf,
    gradients,
    hf_pair,
    images,
    randomize_,
    saved_bytes,
    timm_pair,
)
from tolerance import assert_equal_gradients, assert_equals_upstream
from torch import nn

import fastbb
from fastbb import AutoBackbone
from fastbb.extraction import FeatureExtractor
from fastbb.models.convnext_timm import timm_upstream
from fastbb_kernels.accuracy import FP32_REL

transformers = pytest.importorskip("transformers")


def builder(kind: str) -> Any:
    return lambda **config: hf_convnext(kind, **config)


class TestContract(BackboneContract):
    UPSTREAM: ClassVar[dict[str, Any]] = {kind: builder(kind) for kind in KINDS}
    PAIRS: ClassVar[dict[str, Any]] = {
        kind: lambda kind=kind: hf_pair(hf_convnext(kind)) for kind in KINDS
    }


def assert_equal_maps(pair: Pair, *size: int, **options: Any) -> None:
    pixels = images(*size, **options)
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_equals_upstream(kind: str) -> None:
    pair = hf_pair(hf_convnext(kind))
    for size in [(64, 96), (53, 70), (32, 33), (64, 96)]:
        assert_equal_maps(pair, *size)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ConvNext", {"patch_size": 2, "num_channels": 1}),
        ("ConvNext", {"hidden_act": "relu", "layer_scale_init_value": 0.0}),
        ("ConvNext", {"num_stages": 2, "depths": [1, 2], "out_indices": [0, 1, 2]}),
        ("ConvNextV2", {"hidden_act": "silu", "layer_norm_eps": 0.1}),  # the last norm only
        ("DINOv3ConvNext", {"layer_norm_eps": 0.1, "num_channels": 1}),
        ("DINOv3ConvNext", {"depths": [2], "hidden_sizes": [8], "out_indices": [0, 1]}),
    ],
    ids=str,
)
def test_config_fields_equal_upstream(kind: str, config: dict[str, Any]) -> None:
    pair = hf_pair(hf_convnext(kind, **config))
    assert_equal_maps(pair, 60, 44, channels=config.get("num_channels", 3))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_have_upstreams_eps(kind: str) -> None:
    # they are too small to show in maps of order one
    for model in ("Backbone", "Model"):
        upstream = hf_convnext(kind, model, layer_norm_eps=0.1)
        ours = AutoBackbone.from_config(upstream.config)
        norms = {n: m for n, m in upstream.named_modules() if isinstance(m, nn.LayerNorm)}
        assert norms
        assert {n: ours.get_submodule(n).eps for n in norms} == {n: m.eps for n, m in norms.items()}


@pytest.mark.parametrize("kind", ["ConvNext", "ConvNextV2"])
def test_the_default_configuration_makes_a_backbone_unlike_upstreams(kind: str) -> None:
    theirs = getattr(transformers, f"{kind}Config")()
    with pytest.raises(TypeError, match="can only concatenate list"):  # its default is a tuple
        transformers.AutoBackbone.from_config(theirs)
    with torch.device("meta"):
        for config in (theirs, getattr(fastbb, f"{kind}Config")()):
            ours = AutoBackbone.from_config(config)
            assert type(ours).__name__ == f"{kind}Backbone" and ours.channels == [768]
    fields = getattr(fastbb, f"{kind}Config")().to_dict().items()
    assert {
        n: list(v) if isinstance(v, tuple) else v for n, v in theirs.to_dict().items()
    }.items() >= fields


def test_stages_selected_after_loading_have_maps_unlike_upstreams() -> None:
    upstream, pixels = hf_convnext(), images(32, 32)
    selected = from_hf(upstream, out_indices=[1])
    selected.out_features = ["stage2", "stage4"]
    theirs = hf_convnext(out_indices=[1])
    theirs.out_features = ["stage2"]
    with torch.no_grad():
        maps = upstream(pixels).feature_maps
        assert_equals_upstream(selected(pixels).feature_maps, [maps[2], maps[4]])
        with pytest.raises(KeyError):
            theirs(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_gives_upstreams_maps_and_embedding(kind: str, tmp_path: Any) -> None:
    has_classes = hasattr(transformers, f"{kind}ForImageClassification")
    model = hf_convnext(kind, "ForImageClassification" if has_classes else "Model")
    model.save_pretrained(tmp_path)
    theirs = getattr(transformers, f"{kind}Backbone").from_pretrained(tmp_path).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = AutoBackbone.from_pretrained(tmp_path)
    missing = [str(w.message) for w in caught if "has no norm for stem, stage1" in str(w.message)]
    assert len(missing) == (kind != "DINOv3ConvNext")  # whose maps have no norms
    pixels = images(60, 44)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs(pixels).feature_maps)
        last = ours.forward_stages(pixels, ["stage4"])["stage4"]
        whole = getattr(model, model.base_model_prefix) if has_classes else model
        want = whole(pixels)
        final = ours.final_state(last)
        assert_near(ours.embedding_of(final), want.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_upstreams_model(kind: str, tmp_path: Any) -> None:
    model = hf_convnext(kind, "Model")
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    layer = "model.stages.1" if kind == "DINOv3ConvNext" else "encoder.stages.1"
    names = ["embedding", f"layer:{layer}"]
    names += ["cls", "tokens", "patch_mean"] if kind == "DINOv3ConvNext" else []
    got = FeatureExtractor(tmp_path, names)(PICTURES)
    found: dict[str, Any] = {}
    model.get_submodule(layer).register_forward_hook(lambda *call: found.update(y=call[2]))
    want = model(pixels_of(tmp_path))
    assert_near(got["embedding"], want.pooler_output)
    assert_near(got[f"layer:{layer}"], found["y"])
    if len(names) > 2:
        assert_near(got["cls"], want.pooler_output)
        assert_near(got["tokens"], want.last_hidden_state)
        assert_near(got["patch_mean"], want.last_hidden_state[:, 1:].mean(1))
    hf_convnext(kind).save_pretrained(tmp_path)  # a backbone, which has no final norm
    with pytest.raises(ValueError, match="embedding: .*no trained final norm"):
        FeatureExtractor(tmp_path)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= FP32_REL * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_backbone_loads_in_transformers(kind: str, tmp_path: Any) -> None:
    ours = randomize_(AutoBackbone.from_config(hf_convnext(kind, out_indices=[1, 3]).config))
    ours.save_pretrained(tmp_path)
    pixels = images(60, 44)
    theirs, info = getattr(transformers, f"{kind}Backbone").from_pretrained(
        tmp_path, output_loading_info=True
    )
    final = f"{ours.final_norm_name}."  # its models have one, its backbones have not
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] == {f"{final}weight", f"{final}bias"}
    with torch.no_grad():
        maps = ours(pixels).feature_maps
        assert_equals_upstream(theirs.eval()(pixels).feature_maps, maps)
        again = AutoBackbone.from_pretrained(tmp_path)
        assert all(map(torch.equal, again(pixels).feature_maps, maps))
    model = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path)
    norm = model.get_parameter(f"{final}weight")
    assert torch.equal(norm, ours.get_parameter(f"{final}weight"))
    # a backbone of transformers has no final norm, so that none is written for it
    hf_convnext(kind).save_pretrained(tmp_path)
    without = AutoBackbone.from_pretrained(tmp_path)
    assert without.lacks_final_norm and not any(
        n.startswith(final) for n in without.to_checkpoint_names()
    )


def test_backbones_inside_other_models_and_older_names_are_found() -> None:
    for kind, rename in (
        ("ConvNext", lambda n: f"backbone.{n}"),
        ("DINOv3ConvNext", lambda n: n.replace("model.stages", "stages")),
        ("DINOv3ConvNext", lambda n: f"backbone.{n}"),
        ("DINOv3ConvNext", lambda n: "encoder." + n.replace("model.stages", "stages")),
    ):
        upstream = hf_convnext(kind)
        state = {rename(n): t for n, t in upstream.state_dict().items()}
        outside = ["head"] if not any(n.startswith("stages") for n in state) else []
        state |= {name: torch.ones(1) for name in outside}
        cls = getattr(fastbb, f"{kind}Backbone")
        ours, info = cls.from_state_dict(cls.own_config(upstream.config), state)
        assert info.ignored == outside
        pixels = images(32, 32)
        with torch.no_grad():
            assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)


def test_the_stem_of_dinov3_is_the_image() -> None:
    upstream, pixels = hf_convnext("DINOv3ConvNext"), images(36, 40)
    ours = from_hf(upstream, out_features=["stem", "stage2"])
    with torch.no_grad():
        assert torch.equal(ours(pixels).feature_maps[0], pixels)
        assert torch.equal(upstream(pixels).feature_maps[0], pixels)
    assert ours.channels == [3, 16]


def test_no_stage_after_the_last_one_runs() -> None:
    ours = from_hf(hf_convnext(), out_indices=[0, 2])
    for stage in ours.encoder.stages[2:]:
        stage.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
        stage.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with torch.no_grad():
        assert len(ours(images(32, 32)).feature_maps) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_upstreams_gradients_with_and_without_checkpointing(kind: str) -> None:
    upstream, pixels = hf_convnext(kind).double(), images(44, 36).double()
    ours = from_hf(upstream).train()
    theirs = gradients(upstream.train(), pixels)
    plain_bytes = saved_bytes(ours, pixels)
    assert_equal_gradients(gradients(ours, pixels), theirs)
    ours.gradient_checkpointing_enable()
    assert saved_bytes(ours, pixels) < plain_bytes / 2
    assert_equal_gradients(gradients(ours, pixels), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_drop_path_drops_the_same_branches_as_upstream(kind: str) -> None:
    pair = hf_pair(hf_convnext(kind, drop_path_rate=0.5))
    pixels = images(36, 36, batch=8)
    with torch.no_grad():
        kept = pair.ours(pixels).feature_maps
        for model in (pair.ours, pair.upstream):
            model.train()
        torch.manual_seed(0)
        dropped = pair.ours(pixels).feature_maps
        torch.manual_seed(0)
        assert_equals_upstream(dropped, pair.maps(pixels))
        assert not dropped[4].allclose(kept[4])
        for linear in [m for m in pair.ours.modules() if isinstance(m, nn.Linear)]:
            linear.register_forward_hook(lambda *_: None)  # so that blocks call their layers
        torch.manual_seed(0)
        assert_equals_upstream(pair.ours(pixels).feature_maps, dropped)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_compares_with_transformers(kind: str) -> None:
    report = from_hf(hf_convnext(kind)).verify(inputs=images(32, 40))
    assert report.passed and f"{kind}Backbone" in str(report)


TIMM = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_tiny", {}),
        ("convnext_atto", {}),  # 1x1 convolutions
        ("convnextv2_atto", {"kernel_sizes": 5}),
        ("convnext_nano_ols", {}),  # a stem of two convolutions
        ("convnext_tiny", {"output_stride": 8, "norm_eps": 0.1}),  # dilated convolutions
        ("convnext_zepto_rms", {}),  # norms of another kind are timm's own
    ],
    ids=str,
)
def test_timm_models_equal_upstream(name: str, options: dict[str, Any]) -> None:
    pair = timm_pair(name, **{**TIMM, **options})
    for size in [(64, 96), (71, 50)]:
        assert_equal_maps(pair, *size)
    assert pair.ours.native_forward() is not None


@pytest.mark.parametrize("kind", KINDS)
def test_timm_with_the_weights_of_a_backbone_equals_it(kind: str) -> None:
    ours, pixels = from_hf(hf_convnext(kind)), images(64, 48)
    ours.out_indices = [1, 2, 4]
    theirs = timm_upstream(ours, (64, 48))
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, theirs.maps(theirs.module, pixels))
    ours.out_indices = [0, 1]
    with pytest.raises(ValueError, match="no map of the stem"):
        timm_upstream(ours, (64, 48))


def test_called_stages_and_downsamplings_equal_upstream() -> None:
    upstream, pixels = hf_convnext(), images(40, 40)
    ours = from_hf(upstream)
    names = ["encoder.stages.1", "encoder.stages.2.downsampling_layer.0", "embeddings"]
    for model in (upstream, ours):
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda module, args, y: 1.5 * y)
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)
    called = ["embeddings", "encoder.stages.1", "encoder.stages.2.downsampling_layer"]
    assert sorted(ours.called_modules()) == called


def test_layers_put_into_a_block_are_called() -> None:
    class Doubled(nn.Linear):
        """As an adapter, it computes something else than its parameters say."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    upstream, pixels = hf_convnext("ConvNextV2"), images(40, 40)
    ours = from_hf(upstream)
    for model in (upstream, ours):
        layer = model.encoder.stages[1].layers[1]
        other = Doubled(16, 64)
        other.load_state_dict(layer.pwconv1.state_dict())
        layer.pwconv1 = other
    with torch.no_grad():
        assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)
    assert list(ours.called_modules()) == ["encoder.stages.1.layers.1"]
    assert_equal_gradients(
        gradients(ours.double(), pixels.double()), gradients(upstream.double(), pixels.double())
    )
    with pytest.raises(ValueError, match="what was put into 'encoder.stages.1.layers.1'"):
        ours.save_pretrained("never_written")


def test_other_settings_of_convolutions_count() -> None:
    upstream, pixels = hf_convnext(), images(64, 64)
    ours = from_hf(upstream)
    with torch.no_grad():
        before = ours(pixels).feature_maps
        for model in (upstream, ours):
            conv = model.encoder.stages[1].layers[0].dwconv
            conv.dilation, conv.padding = (2, 2), (6, 6)
            model.encoder.stages[2].layers[0].dwconv.padding_mode = "circular"
            model.encoder.stages[2].layers[0].dwconv._reversed_padding_repeated_twice = [3] * 4
            model.encoder.stages[3].downsampling_layer[1].dilation = (1, 2)
        maps = ours(pixels).feature_maps
        assert_equals_upstream(maps, upstream(pixels).feature_maps)
    assert not maps[2].allclose(before[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stages": 3}, "num_stages must be the number of depths"),
        ({"hidden_sizes": [8]}, "hidden_sizes must be a list of 4 integers"),
        ({"hidden_act": "softmax"}, "hidden_act must be one of"),
        ({"layer_scale_init_value": None}, "layer_scale_init_value must be a number"),
    ],
    ids=str,
)
def test_wrong_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastbb.ConvNextConfig(**change)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_a_patch_is_an_error(kind: str) -> None:
    ours = from_hf(hf_convnext(kind))
    for size, patch in (((3, 40), "4x4"), ((40, 31), "2x2")):
        with pytest.raises(ValueError, match=f"the image is too small: .* patches of {patch}"):
            ours(images(*size))
