"""Native ViTs against transformers, at any image size."""

from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
from contract import BackboneContract
from reference_models import Pair, from_hf, gradients, hf_pair, images, saved_bytes
from tolerance import assert_equal_gradients, assert_equals_upstream
from vit_models import (
    PLAIN,
    TYPES,
    hf_vit,
    hf_vit_model,
    patches,
    upstream_class,
    vit_config,
)

from fastbb import AutoBackbone, AutoConfig
from fastbb.extraction.models import BackboneModel
from fastbb.inspect.verify import verify
from fastbb.models.vit_timm import timm_upstream

transformers = pytest.importorskip("transformers")

# the trained size; another one with as many patches; larger and ragged; smaller; wide
SIZES = [(28, 28), (14, 56), (60, 44), (20, 15), (7, 84)]


class TestContract(BackboneContract):
    UPSTREAM: ClassVar[dict[str, Any]] = {kind: partial(hf_vit, kind) for kind in TYPES}
    PAIRS: ClassVar[dict[str, Any]] = {kind: lambda kind=kind: vit_pair(kind) for kind in TYPES}


@cache
def vit_pair(kind: str) -> Pair:
    return hf_pair(hf_vit(kind))


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_any_size_equals_upstream(kind: str) -> None:
    pair = vit_pair(kind)
    for size in SIZES:
        pixels = images(*size)
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


DINO = [
    {"apply_layernorm": False},
    {"reshape_hidden_states": False},
    {"apply_layernorm": False, "reshape_hidden_states": False},
    {"use_swiglu_ffn": True},
    {"qkv_bias": False},
    {"layer_norm_eps": 0.1},
    {"mlp_ratio": 2, "hidden_act": "gelu_new", "num_channels": 1},
    {"patch_size": 4, "image_size": (28, 28), "hidden_dropout_prob": 0.5},  # not in eval()
]
FLAGS = [{"apply_layernorm": False}, {"reshape_hidden_states": False}]
FIELDS = {
    "dinov2": DINO,
    "dinov2_with_registers": [*DINO[:4], {"num_register_tokens": 5}],
    "vit": [*FLAGS, {"qkv_bias": False, "hidden_act": "relu"}, {"hidden_act": "gelu_python"}],
    "deit": FLAGS,
    "clip_vision_model": [{"apply_layernorm": True}, {"reshape_hidden_states": False}],
    "siglip_vision_model": FLAGS,
    "beit": [
        {"reshape_hidden_states": False},
        {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
        {"use_relative_position_bias": False, "layer_scale_init_value": 0.0},
        {"use_mean_pooling": False, "use_mask_token": True, "apply_layernorm": True},  # of no map
        {"add_fpn": True},
    ],
    "dinov3_vit": [
        {"reshape_hidden_states": False},
        {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 0},
        {"use_gated_mlp": True, "mlp_bias": False},  # gated by GELU
        {"query_bias": False, "value_bias": False, "proj_bias": False},
        {"key_bias": True, "rope_theta": 10.0},
    ],
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [(kind, config) for kind, configs in FIELDS.items() for config in configs],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_config_fields_equal_upstream(kind: str, config: dict[str, Any]) -> None:
    pair = hf_pair(hf_vit(kind, **config))
    pixels = images(33, 44, channels=config.get("num_channels", 3))
    with torch.no_grad():
        assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "deit", "beit"])
@torch.no_grad()
def test_trained_sizes_that_are_not_square_equal_upstream(kind: str) -> None:
    beit = {"use_absolute_position_embeddings": True, "use_relative_position_bias": False}
    fields = {"image_size": (14, 56), **(beit if kind == "beit" else {})}
    pair = hf_pair(hf_vit(kind, **fields))
    for size in ((14, 56), (28, 28), (35, 21)):
        pixels = images(*size)
        if kind not in PLAIN or size != (14, 56):
            assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
            continue
        # without interpolate_pos_encoding transformers keeps the true grid
        forward = upstream_class(kind, "Model").forward
        states = forward(pair.upstream, pixels, output_hidden_states=True).hidden_states
        ours = pair.ours(pixels, output_hidden_states=True)
        assert_equals_upstream(ours.hidden_states, states)
    assert verify(pair.ours, batch=1).passed
    ours = from_hf(hf_vit(kind, **{**fields, "image_size": (14, 28)}))
    with pytest.raises(ValueError, match="8 position embeddings cannot be interpolated for 4x4"):
        ours(images(28, 28))


@pytest.mark.parametrize("kind", TYPES)
def test_saved_backbone_loads_in_transformers(kind: str, tmp_path: Any) -> None:
    pair, pixels = vit_pair(kind), images(28, 28)
    pair.ours.save_pretrained(tmp_path)
    theirs, info = type(pair.upstream).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert_equals_upstream(pair.maps(pixels), theirs.eval()(pixels).feature_maps)


def test_a_swiglu_is_saved_as_transformers_loads_it(tmp_path: Any) -> None:
    pair, pixels = hf_pair(hf_vit("dinov2", use_swiglu_ffn=True)), images(28, 28)
    pair.ours.save_pretrained(tmp_path)
    theirs = type(pair.upstream).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_equals_upstream(pair.maps(pixels), theirs(pixels).feature_maps)


@pytest.mark.parametrize("kind", TYPES)
def test_state_dict_has_upstreams_names(kind: str) -> None:
    pair = vit_pair(kind)
    assert pair.ours.state_dict().keys() == pair.upstream.state_dict().keys()
    report = verify(pair.ours, batch=1)
    assert report.passed and "transformers" in report.reference


@pytest.mark.parametrize("kind", TYPES)
def test_embedding_equals_upstreams_pooler_output(kind: str) -> None:
    upstream, pixels = hf_vit_model(kind), images(30, 44)
    ours = from_hf(upstream)
    with torch.no_grad():
        last = ours.stage_names[-1]
        state = ours.forward_stages(pixels, [last])[last]
        final = ours.final_state(state)
        theirs = upstream(pixels, **({"interpolate_pos_encoding": True} if kind in PLAIN else {}))
        assert_equals_upstream(ours.embedding_of(final), theirs.pooler_output)
        # CLIP's last hidden state has no norm
        state = state if kind == "clip_vision_model" else final
        assert_equals_upstream(ours.tokens_of(state), theirs.last_hidden_state)
        of_patches = patches(theirs.last_hidden_state, ours.n_prefix_tokens, (4, 6))
        assert_equals_upstream(ours(pixels).feature_maps[-1], of_patches)


@pytest.mark.parametrize("kind", TYPES)
def test_attentions_are_those_of_each_layer(kind: str) -> None:
    upstream, pixels = hf_vit(kind), images(28, 35)
    ours = from_hf(upstream)
    upstream.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = upstream(pixels, output_attentions=True)
        out = ours(pixels, output_attentions=True)
    assert_equals_upstream(out.attentions, theirs.attentions)
    assert_equals_upstream(out.feature_maps, theirs.feature_maps)


@pytest.mark.parametrize("kind", TYPES)
def test_training_gives_upstreams_gradients(kind: str) -> None:
    upstream, pixels = hf_vit(kind).double(), images(20, 28).double()
    ours = from_hf(upstream).train()
    torch.manual_seed(0)  # DINOv3 moves the coordinates of patches
    want = gradients(upstream.train(), pixels)
    torch.manual_seed(0)
    assert_equal_gradients(gradients(ours, pixels), want)
    plain = saved_bytes(ours, pixels)
    ours.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_equal_gradients(gradients(ours, pixels), want)
    assert saved_bytes(ours, pixels) < plain / 2


def test_dinov3_moves_coordinates_in_training_as_upstream() -> None:
    changes = {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    pair, pixels = hf_pair(hf_vit("dinov3_vit", **changes)), images(28, 28)
    with torch.no_grad():
        still = pair.ours(pixels).feature_maps
        pair.ours.train()
        pair.upstream.train()
        torch.manual_seed(0)
        want = pair.maps(pixels)
        torch.manual_seed(0)
        assert_equals_upstream(pair.ours(pixels).feature_maps, want)
    assert not still[-1].allclose(want[-1])


def test_dinov3_returns_class_tokens() -> None:
    upstream = hf_vit("dinov3_vit", return_class_token=True, out_indices=[1, 3])
    ours, pixels = from_hf(upstream), images(28, 35)
    with torch.no_grad():
        theirs, out = upstream(pixels), ours(pixels)
        assert_equals_upstream(out.cls_tokens, theirs.cls_tokens)
        assert_equals_upstream(out.feature_maps, theirs.feature_maps)
        assert list(out) == ["feature_maps", "cls_tokens"]
        assert_equals_upstream(
            ours(pixels, output_hidden_states=[1]).hidden_states[1],
            upstream(pixels, output_hidden_states=True).hidden_states[1],
        )


def test_class_tokens_run_no_later_layers_and_are_prepared() -> None:
    upstream = hf_vit("dinov3_vit", return_class_token=True, out_indices=[0, 2])
    ours, pixels = from_hf(upstream), images(28, 28)
    last = ours.model.layer[2].register_forward_hook(lambda *_: pytest.fail("it ran"))
    plain = ours(pixels)
    last.remove()
    with torch.no_grad():
        theirs = upstream(pixels)
        assert_equals_upstream(plain.cls_tokens, theirs.cls_tokens)
        prepared = ours.prepare("eager")
        out = prepared(pixels)
        assert prepared._engine is not None and prepared._engine._plans
        assert_equals_upstream(out.cls_tokens, theirs.cls_tokens)
        assert_equals_upstream(out.feature_maps, theirs.feature_maps)
        assert verify(prepared, batch=1).passed
        assert len(prepared(pixels, return_dict=False)[1]) == 2
        ours.out_indices = [2]
        features = BackboneModel(ours, ["cls"], "final", pooled="stage2").features(pixels)
        state = upstream(pixels, output_hidden_states=True).hidden_states[-1]
        assert_equals_upstream(features["cls"], upstream.norm(state)[:, 0])


def test_dinov3_without_a_norm_has_none_on_the_last_map() -> None:
    pair, pixels = hf_pair(hf_vit("dinov3_vit", apply_layernorm=False)), images(28, 28)
    with torch.no_grad():
        *theirs, normed = pair.maps(pixels)
        *ours, last = pair.ours(pixels).feature_maps
        state = pair.upstream(pixels, output_hidden_states=True).hidden_states[-1]
    assert_equals_upstream(ours, theirs)
    assert_equals_upstream(last, patches(state, 3, (4, 4)))
    assert not last.allclose(normed)  # upstream's last map is normalized in any case
    assert verify(pair.ours, batch=1).passed


@pytest.mark.parametrize("rate", [0.0, 1 - 1e-7], ids=["dropout", "drop_path"])
def test_dropout_drops_what_upstream_drops(rate: float) -> None:
    fields: dict[str, Any] = {"drop_path_rate": rate}
    if not rate:
        fields = {"hidden_dropout_prob": 0.5, "num_hidden_layers": 1, "out_indices": [0, 1]}
    pair, pixels = hf_pair(hf_vit("dinov2", **fields)), images(28, 28)
    with torch.no_grad():
        pair.ours.train()
        pair.upstream.train()
        torch.manual_seed(0)
        want = pair.maps(pixels)
        torch.manual_seed(0)
        assert_equals_upstream(pair.ours(pixels).feature_maps, want)
        assert not want[1].allclose(pair.ours.eval()(pixels).feature_maps[1])


def test_layers_beyond_the_last_wanted_stage_do_not_run() -> None:
    ours = from_hf(hf_vit("dinov2"), out_indices=[0, 1])
    ours.encoder.layer[1].register_forward_hook(lambda *_: pytest.fail("it ran"))
    assert len(ours(images(28, 28)).feature_maps) == 2


@torch.no_grad()
def test_a_hooked_encoder_and_a_replaced_layer_are_called() -> None:
    pair, pixels = hf_pair(hf_vit("dinov2")), images(28, 28)
    seen = []
    pair.ours.encoder.register_forward_hook(lambda *_: seen.append(1))
    assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    assert seen and "encoder" in pair.ours.called_modules()
    pair.ours.encoder.layer[1] = Doubled()
    states = pair.ours(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(states[2], 2 * states[1])


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return 2 * x


def test_images_and_configurations_that_do_not_fit_are_errors() -> None:
    ours = vit_pair("dinov2").ours
    with pytest.raises(ValueError, match="at least one patch of 7x7 pixels, got 6x28"):
        ours(images(6, 28))
    for fields, problem in (
        ({"num_attention_heads": 3}, "must divide hidden_size, got 3 heads for 32"),
        ({"num_experts": 6}, "mixture of experts"),
        ({"head_dim": 8}, "head_dim must be"),
        ({"hidden_act": "sine"}, "hidden_act must be one of 'gelu', .*'gelu_python'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must be in 0 ... 1, got 1.5"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob must be in"),
        ({"mlp_ratio": -4}, "mlp_ratio must be positive"),
    ):
        with pytest.raises(ValueError, match=problem):
            AutoConfig.for_model("dinov2", hidden_size=32, **{"num_attention_heads": 2, **fields})
    with pytest.raises(ValueError, match="rope_theta must be positive, got -1"):
        AutoConfig.for_model("dinov3_vit", rope_theta=-1)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_saved_in_the_type_that_transformers_reads(kind: str, tmp_path: Any) -> None:
    default = AutoConfig.for_model(kind)
    fields = {
        name: int(value) if isinstance(value, float) else float(value)
        for name, value in default.to_dict().items()
        if name == "mlp_ratio" or (isinstance(value, float) and value.is_integer())
    }
    whole = {"layer_norm_eps": 1, "initializer_range": 1, **fields}
    ours = AutoConfig.for_model(kind, **whole)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in whole} == whole


@pytest.mark.parametrize(
    ("kind", "config", "problem"),
    [
        ("dinov2", {"patch_size": 14}, r"of the wrong shape: .*patch_embeddings"),
        ("dinov2_with_registers", {}, r"missing: embeddings\.register_tokens"),
    ],
    ids=["patch", "registers"],
)
def test_weights_that_do_not_fit_are_named(
    kind: str, config: dict[str, Any], problem: str, tmp_path: Any
) -> None:
    hf_vit("dinov2").save_pretrained(tmp_path)
    vit_config(kind, **config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=problem):
        AutoBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("dinov2", {"use_swiglu_ffn": True}),
        ("dinov2_with_registers", {}),
        ("deit", {}),
        ("clip_vision_model", {}),
        ("siglip_vision_model", {}),
        ("dinov3_vit", {"num_register_tokens": 0, "rope_theta": 50.0}),
        ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "silu"}),
        # transformers normalizes the last map in any case
        ("dinov3_vit", {"apply_layernorm": False, "out_indices": [1, 2]}),
        ("dinov3_vit", {"query_bias": False, "proj_bias": False, "mlp_bias": False}),
        ("dinov3_vit", {"query_bias": False, "value_bias": False, "hidden_size": 48}),
        ("beit", {}),
        ("beit", {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}),
        ("beit", {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}),
        ("beit", {"use_mean_pooling": False, "use_absolute_position_embeddings": True}),
    ],
    ids=str,
)
def test_timms_vit_with_the_weights_computes_the_same(kind: str, config: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    theirs = hf_vit(kind, **{"out_indices": [1, 3], **config})
    ours = from_hf(theirs)
    for size in ((28, 28), (28, 42)):
        pixels = images(*size)
        with torch.no_grad():
            upstream = timm_upstream(ours, size)
            maps = upstream.maps(upstream.module, pixels)
            assert_equals_upstream(maps, theirs(pixels).feature_maps)
    with pytest.raises(ValueError, match="no map of the stem"):
        timm_upstream(from_hf(hf_vit(kind)), (28, 28))


@pytest.mark.parametrize(
    ("kind", "config", "problem"),
    [
        ("dinov3_vit", {"key_bias": True}, "keys of timm's dinov3_vit have no bias"),
        ("dinov3_vit", {"hidden_act": "relu"}, "no MLP with the activation relu"),
        ("dinov3_vit", {"use_gated_mlp": True}, "no MLP that this activation gates"),
        ("beit", {"hidden_act": "gelu_new"}, "no MLP with the activation gelu_new"),
        ("beit", {"add_fpn": True, "num_hidden_layers": 4}, "no feature pyramid"),
        ("vit", {"patch_size": (7, 14)}, "has square patches"),
        ("beit", {"reshape_hidden_states": False}, "returns maps"),
    ],
    ids=str,
)
def test_timm_that_has_no_such_vit_says_so(kind: str, config: dict[str, Any], problem: str) -> None:
    pytest.importorskip("timm")
    indices = range(1, config.get("num_hidden_layers", 3) + 1)
    ours = from_hf(hf_vit(kind, **config, out_indices=list(indices)))
    with pytest.raises(ValueError, match=problem):
        timm_upstream(ours, (28, 28))
