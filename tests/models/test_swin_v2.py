"""Swin V2 against transformers and timm, at any image size."""

import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from contract import BackboneContract
from feature_models import PICTURES, pixels_of, save_processor
from reference_models import from_hf, gradients, hf_pair, images
from swin_v2_models import hf_swinv2, layer_beyond_the_mask, timm_swinv2_pair
from tolerance import assert_as_accurate_as_eager, assert_equal_gradients, assert_equals_upstream
from torch import Tensor

import fastbb
from fastbb import AutoBackbone, Swinv2Backbone, Swinv2Config
from fastbb.extraction import FeatureExtractor
from fastbb.models import swin_cpu, swin_v2_forward
from fastbb.models.swin_v2_forward import swinv2_block
from fastbb.models.swin_v2_parts import transformers_block
from fastbb_kernels import ACTIVATIONS

transformers = pytest.importorskip("transformers")


class TestContract(BackboneContract):
    UPSTREAM: ClassVar[dict[str, Any]] = {"swinv2": hf_swinv2}
    PAIRS: ClassVar[dict[str, Any]] = {
        "hf": lambda: hf_pair(hf_swinv2()),
        "timm": timm_swinv2_pair,
    }

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_loses_no_more_than_eager_upstream(
        self, upstream_of: Any, dtype: torch.dtype
    ) -> None:
        """The smallest map of the image is one window: in fp16 upstream's padded maps are NaN."""
        upstream, pixels = upstream_of(), images(64, 128)
        ours = from_hf(upstream, dtype=dtype)
        exact = copy.deepcopy(upstream).double()(pixels.double()).feature_maps
        eager = upstream.to(dtype)(pixels.to(dtype)).feature_maps
        got = ours(pixels.to(dtype)).feature_maps
        for stage, *maps in zip(ours.out_features, got, eager, exact):
            assert_as_accurate_as_eager(stage, *maps)
        padded = images(60, 44).to(dtype)
        assert all(x.isfinite().all() for x in ours(padded).feature_maps)
        assert upstream(padded).feature_maps[1].isfinite().all() == (dtype == torch.bfloat16)


SIZES = [(64, 64), (60, 44), (96, 132), (32, 16)]


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 7, 4, 3])
@pytest.mark.parametrize("source", ["hf", "timm"])
def test_every_size_equals_upstream(source: str, window: int) -> None:
    if source == "hf":
        pair, sizes = hf_pair(hf_swinv2(window_size=window)), [*SIZES, (53, 70), (3, 2)]
    else:  # which refuses parts of patches
        pair, sizes = timm_swinv2_pair(window_size=window), SIZES
    for size in sizes:
        pixels = images(*size)
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    if source == "timm":
        assert pair.ours.native_forward() is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": False},
        {"layer_norm_eps": 0.1},  # of the blocks only: every other norm keeps 1e-5
        {"mlp_ratio": 1.5},
        {"hidden_act": "relu"},
        {"patch_size": 2},
        {"num_channels": 1},
        {"image_size": [128, 32]},  # the windows follow the height
        {"image_size": [32, 128]},
        {"image_size": 256, "window_size": 16},
        {"pretrained_window_sizes": [6, 6, 6, 3]},
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},  # not in eval()
        {"depths": [1, 2], "num_heads": [2, 4], "pretrained_window_sizes": [0, 2]},
        {"depths": [1] * 5, "num_heads": [1, 2, 4, 8, 16], "pretrained_window_sizes": [0] * 5},
    ],
    ids=str,
)
def test_config_fields_equal_upstream(config: dict[str, Any]) -> None:
    pair = hf_pair(hf_swinv2(**config))
    pixels = images(72, 44, channels=config.get("num_channels", 3))
    assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@torch.no_grad()
def test_options_of_timm_equal_upstream() -> None:
    for options in (
        {"window_size": (4, 8)},
        {"always_partition": True},
        {"qkv_bias": False},
        {"pretrained_window_sizes": (6, 6, 6, 3)},
        {"strict_img_size": True, "img_size": (64, 96)},
    ):
        pair, pixels = timm_swinv2_pair(**options), images(64, 96)
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
        assert pair.ours.native_forward() is not None


def test_wrong_fields_are_errors() -> None:
    upstream = transformers.Swinv2Backbone(
        transformers.Swinv2Config(embed_dim=8, num_heads=[1] * 4, use_absolute_embeddings=True)
    )
    with pytest.raises(RuntimeError, match="must match the size"):
        upstream(images(224, 224))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"use_absolute_embeddings": True}, "makes one position too many"),
        ({"pretrained_window_sizes": [0, 0]}, r"must be a list of 4 integers, got \[0, 0\]"),
        ({"pretrained_window_sizes": [-1] * 4}, "an integer of at least 0, got -1"),
        ({"window_size": 0}, "window_size must be an integer of at least 1"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            Swinv2Config(**fields)


@torch.no_grad()
@pytest.mark.parametrize("on_cpu", [True, False])
def test_scores_beyond_the_mask_equal_upstream(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swin_v2_forward, "runs_on_cpu", lambda *_: on_cpu)
    monkeypatch.setattr(swin_cpu, "pack_linear", lambda weight: weight)
    monkeypatch.setattr(swin_cpu, "packed_linear", plain_linear)
    layer, x = layer_beyond_the_mask((16, 24))
    parts = transformers_block(layer)
    (want,) = layer(x.flatten(1, 2), (16, 24))
    assert_equals_upstream(swinv2_block(x, parts).flatten(1, 2), want, rel=1e-6)
    swin = replace(parts, semantics=replace(parts.semantics, mask_value=-100.0))
    assert (swinv2_block(x, swin).flatten(1, 2) - want).abs().max() > 1e-3


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """`packed_linear` in float64, which oneDNN does not have."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


@torch.no_grad()
@pytest.mark.parametrize("source", ["hf", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_on_a_cpu_is_as_accurate_as_upstream(
    dtype: torch.dtype, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some windows at a time: padded ones, shifted ones, and more parts than one."""
    if not swin_cpu.runs_packed_linears(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype), []):
        pytest.skip("this CPU does not compute the dtype")
    called = []

    def spy(*args: Any) -> Any:
        called.append(args)
        return swin_cpu.swin_block_on_cpu(*args)

    monkeypatch.setattr(swin_v2_forward, "swin_block_on_cpu", spy)
    monkeypatch.setattr(swin_cpu, "PART_BYTES", 2**16)
    pair = hf_pair(hf_swinv2()) if source == "hf" else timm_swinv2_pair()
    pixels = images(60, 100)
    exact = [x.clone() for x in pair.upstream.double() and pair.maps(pixels.double())]
    pair.upstream.to(dtype)
    eager = pair.maps(pixels.to(dtype))
    got = pair.ours.to(dtype)(pixels.to(dtype)).feature_maps
    assert len(called) == 6
    for index, maps in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(str(index), *maps)


@torch.no_grad()
def test_without_it_the_ops_run_and_equal_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin_v2_forward, "runs_on_cpu", lambda *_: False)
    pair, pixels = hf_pair(hf_swinv2()), images(60, 100)
    assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@torch.no_grad()
def test_saved_backbone_loads_in_transformers(tmp_path: Any) -> None:
    upstream, pixels = hf_swinv2(out_indices=[0, 2]), images(60, 44)
    ours = from_hf(upstream)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.Swinv2Backbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    want = upstream(pixels).feature_maps
    assert_equals_upstream(theirs.eval()(pixels).feature_maps, want)
    assert_equals_upstream(AutoBackbone.from_pretrained(tmp_path)(pixels).feature_maps, want)


@torch.no_grad()
@pytest.mark.parametrize("model", ["Model", "ForImageClassification", "ForMaskedImageModeling"])
def test_a_whole_model_gives_upstreams_maps_and_embedding(model: str, tmp_path: Any) -> None:
    made = hf_swinv2(model, num_labels=2)
    made.save_pretrained(tmp_path)
    save_processor(tmp_path)
    pixels = pixels_of(tmp_path)
    theirs = transformers.Swinv2Backbone.from_pretrained(tmp_path, out_indices=[0, 2, 4]).eval()
    ours = AutoBackbone.from_pretrained(tmp_path, out_indices=[0, 2, 4])
    assert isinstance(ours, Swinv2Backbone)
    assert_equals_upstream(ours(pixels).feature_maps, theirs(pixels).feature_maps)
    base = made if model == "Model" else made.swinv2
    got = FeatureExtractor(tmp_path, "embedding")(PICTURES)["embedding"]
    want = base(pixels)
    pooled = want.last_hidden_state.mean(1) if want.pooler_output is None else want.pooler_output
    assert_equals_upstream(got, pooled)


@torch.no_grad()
def test_a_backbone_has_no_embedding(tmp_path: Any) -> None:
    hf_swinv2().save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match="embedding: .*no trained final norm"):
        FeatureExtractor(tmp_path)


@torch.no_grad()
def test_attentions_are_one_tensor_for_each_stage() -> None:
    upstream, pixels = hf_swinv2(), images(96, 64)
    ours = from_hf(upstream)
    theirs = upstream(pixels, output_attentions=True)
    out = ours(pixels, output_attentions=True)
    assert len(out.attentions) == 4
    assert_equals_upstream(out.attentions, theirs.attentions)
    assert_equals_upstream(out.feature_maps, theirs.feature_maps)


def test_training_gives_upstreams_gradients() -> None:
    upstream, pixels = hf_swinv2().double(), images(60, 44).double()
    ours = from_hf(upstream)
    assert ours.dtype == torch.float64
    for mode in (True, False):  # its modules, and the ops
        got = gradients(ours.train(mode), pixels)
        assert_equal_gradients(got, gradients(upstream.train(mode), pixels))


def test_drop_path_drops_the_same_branches_as_upstream() -> None:
    # at this rate the first block never drops and the second one always does
    options: dict[str, Any] = {"depths": [1, 1], "num_heads": [2, 4], "drop_path_rate": 1 - 1e-7}
    pair = hf_pair(hf_swinv2(**options, pretrained_window_sizes=[0, 0], out_indices=[1, 2]))
    pixels = images(64, 64)
    with torch.no_grad():
        kept = pair.ours(pixels).feature_maps
        dropped = pair.ours.train()(pixels).feature_maps
        assert_equals_upstream(dropped, pair.upstream.train()(pixels).feature_maps)
        assert not dropped[1].allclose(kept[1])


@torch.no_grad()
def test_changed_weights_change_the_maps() -> None:
    """Position bias and scale are derived: the caches follow their sources."""
    upstream, pixels = hf_swinv2(), images(64, 64)
    ours = from_hf(upstream)
    ours(pixels)
    own = dict(ours.named_parameters())
    for name, parameter in upstream.named_parameters():
        if "logit_scale" in name or "position_bias_mlp" in name or name.endswith("query.bias"):
            parameter.add_(0.5)
            own[name].add_(0.5)
    assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)


@torch.no_grad()
def test_a_replaced_layer_is_called() -> None:
    upstream, pixels = hf_swinv2(), images(60, 44)
    ours = from_hf(upstream)
    for model in (upstream, ours):
        own = model.encoder.layers[0].blocks[1].attention.get_submodule("self")
        own.query = torch.nn.Sequential(own.query, torch.nn.Tanh())
    assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)
    assert list(ours.called_modules()) == ["encoder.layers.0.blocks.1"]
    ours.encoder.layers[0].blocks[1].attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="which would get no windows"):
        ours(pixels)


def test_verify_compares_it_with_transformers() -> None:
    ours = from_hf(hf_swinv2())
    assert ours.verify(inputs=images(64, 64)).passed


def test_it_is_found_by_name() -> None:
    assert AutoBackbone.from_config(Swinv2Config(embed_dim=8, num_heads=[1] * 4)).channels == [64]
    assert fastbb.Swinv2Config is Swinv2Config
