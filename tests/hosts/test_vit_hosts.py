"""ViTs in hosts: requested outputs, masks, sizes, changed layers, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

import host_models_vit  # noqa: F401 -- registers its hosts
import timm
import torch
from host_matrix import HOSTS, Values, call
from host_models_vit import TIMM
from reference_models import images, randomize_
from tiny_hosts import NO_ACCELERATE_WARNING, assert_bit_equal, assert_ours_ran, tensors
from tolerance import assert_equals_upstream
from torch import nn
from vit_models import hf_vit, hf_vit_model

import fastbb
from fastbb.models import vit_cpu

PIXELS = images(28, 28)
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
NORMED: dict[str, Any] = {"apply_layernorm": False, "out_indices": [1, 2]}
REQUESTS: list[dict[str, Any]] = [
    {},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
]
MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: hf_vit_model("dinov2", **EAGER),
    "dinov2-backbone": lambda: hf_vit("dinov2", **NORMED, **EAGER),
    "registers-backbone": lambda: hf_vit("dinov2_with_registers", **NORMED),
    "dinov3-backbone": lambda: hf_vit("dinov3_vit", apply_layernorm=False, **EAGER),
    "dinov3-tokens": lambda: hf_vit("dinov3_vit", reshape_hidden_states=False),
    "beit": lambda: hf_vit_model("beit", use_shared_relative_position_bias=True, **EAGER),
    "beit-backbone": lambda: hf_vit("beit", reshape_hidden_states=False),
    "clip": lambda: hf_vit_model("clip_vision_model", **EAGER),
    "siglip": lambda: hf_vit_model("siglip_vision_model"),
}


def twins(make: Callable[[], Any]) -> tuple[Any, Any, fastbb.AccelerateReport]:
    """Returns an accelerated model, upstream's with the same weights, and the report."""
    model, twin = make(), make()
    return model, twin, fastbb.accelerate(model, mode="eager")


@torch.no_grad()
@NO_ACCELERATE_WARNING
@pytest.mark.parametrize("name", MODELS)
def test_requested_outputs_equal_upstream(name: str) -> None:
    model, twin, report = twins(MODELS[name])
    for request in REQUESTS * 2:
        got, want = (either(PIXELS, **request) for either in (model, twin))
        Values.of(got).assert_close(Values.of(want), 1e-5)
        if "output_attentions" in request:  # upstream's own
            assert_bit_equal(tensors(got), tensors(want))
    model(PIXELS)
    assert_ours_ran(report)


@torch.no_grad()
@NO_ACCELERATE_WARNING
@pytest.mark.parametrize("name", ["dinov2-backbone", "dinov3-backbone", "beit-backbone"])
def test_stages_and_norms_that_change_equal_upstream(name: str) -> None:
    model, twin, report = twins(MODELS[name])
    states = (
        *(([0, 3], True, True), ([0, 3], False, True), ([0, 3], False, False)),
        *(([1], False, False), ([1, 2], True, False)),
    )
    for indices, is_normed, is_map in states:
        for either in (model, twin):
            either.out_indices = indices
            either.config.apply_layernorm = is_normed
            either.config.reshape_hidden_states = is_map
        for _ in range(2):
            Values.of(model(PIXELS)).assert_close(Values.of(twin(PIXELS)), 1e-5)
    assert_ours_ran(report)
    assert len(report.replaced[0].choices) == len(states)  # artefacts are of one state


@torch.no_grad()
@NO_ACCELERATE_WARNING
@pytest.mark.parametrize("name", ["dinov3-backbone", "beit-backbone"])
def test_layers_are_compared_once_for_all_sizes(name: str) -> None:
    twin, model = MODELS[name](), MODELS[name]()
    report = fastbb.accelerate(model, mode="eager", include="*layer*")
    for size in ((28, 28), (35, 28), (28, 21), (28, 28)):
        pixels = images(*size)
        Values.of(model(pixels)).assert_close(Values.of(twin(pixels)), 1e-5)
    assert_ours_ran(report)
    assert all(len(one.choices) == 1 for one in report.replaced)


@torch.no_grad()
@NO_ACCELERATE_WARNING
@pytest.mark.parametrize("name", ["vit_for_image_classification", "dinov3_model", "siglip"])
def test_whole_models_run_in_another_precision(name: str) -> None:
    host = HOSTS[name]()
    want = call(host)
    report = fastbb.accelerate(host.model, mode="eager", precision="bf16")
    got = call(host)
    assert_equals_upstream(tensors(got), tensors(want), rel=0.03)
    assert not all(map(torch.equal, tensors(got), tensors(want)))
    assert_ours_ran(report)
    assert any("as a whole" in why for *_, why in report.rows())


@torch.no_grad()
@NO_ACCELERATE_WARNING
def test_masks_and_class_tokens_are_upstreams() -> None:
    model, twin, report = twins(MODELS["dinov2"])
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    got, want = (either(PIXELS, attention_mask=mask) for either in (model, twin))
    assert_bit_equal(tensors(got), tensors(want))
    reasons = {why for _, _, _, why in report.rows()}
    assert reasons == {"it is called with an attention mask"}

    model, twin, report = twins(lambda: hf_vit("dinov3_vit", return_class_token=True))
    got, want = (either(PIXELS) for either in (model, twin))
    Values.of(got).assert_close(Values.of(want), 1e-5)
    assert "class tokens are asked for" in str(report)


@torch.no_grad()
@NO_ACCELERATE_WARNING
def test_images_and_texts_of_clip_alone() -> None:
    host = HOSTS["clip"]()
    model: Any = host.model
    pixels, ids = host.inputs["pixel_values"], host.inputs["input_ids"]
    want = model.get_image_features(pixels), model.get_text_features(ids)
    report = fastbb.accelerate(model, mode="eager")
    for _ in range(2):
        got = model.get_image_features(pixels), model.get_text_features(ids)
        Values.of(got[0]).assert_close(Values.of(want[0]), 1e-5)
        assert_bit_equal(tensors(got[1]), tensors(want[1]))
    assert_ours_ran(report)
    assert all(name.startswith("vision_model.") for name in report.accelerated)

    layer = model.vision_model.encoder.layers[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    fastbb.restore(model)
    want = layer(x, None, is_causal=True)
    report = fastbb.accelerate(layer, mode="eager")
    assert torch.equal(layer(x, None, is_causal=True), want)
    assert "it is called with is_causal" in str(report)


@torch.no_grad()
@NO_ACCELERATE_WARNING
def test_changed_layers_are_left_alone_or_followed() -> None:
    model, twin = MODELS["dinov2"](), MODELS["dinov2"]()
    adapter = nn.Sequential(model.encoder.layer[0].mlp.fc1, nn.Linear(128, 128))
    for either in (model, twin):
        either.encoder.layer[0].mlp.fc1 = adapter
        either.encoder.layer[1].attention.is_causal = True
    report = fastbb.accelerate(model, mode="eager")
    why = {one.name: one.why for one in report.left_alone}
    assert why == {
        "encoder.layer.0": "a Sequential is where a linear layer was expected",
        "encoder.layer.1": "its attention is causal",
    }
    for change in (
        lambda block: block.layer_scale1.lambda1.mul_(-2.0),
        lambda block: setattr(block.norm2, "eps", 0.1),
        lambda block: setattr(block.attention, "scaling", 0.5),
    ):
        Values.of(model(PIXELS)).assert_close(Values.of(twin(PIXELS)), 1e-5)
        for either in (model, twin):
            change(either.encoder.layer[2])
        Values.of(model(PIXELS)).assert_close(Values.of(twin(PIXELS)), 1e-5)
    assert "its attention scale is 0.5" in str(report)


def timm_block(name: str, **options: Any) -> Any:
    return randomize_(timm.create_model(name, num_classes=0, **TIMM, **options)).blocks[0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: timm_block("vit_tiny_patch16_224", qk_norm=True), "a LayerNorm is inside it"),
        (lambda: timm_block("eva02_tiny_patch14_224", scale_attn_inner=True), "a LayerNorm is"),
        (lambda: timm_block("vit_small_patch16_rope_224"), "its attention is a AttentionRope"),
        (lambda: timm_block("vit_tiny_patch16_224", norm_layer="rmsnorm"), "its norm is a RmsNorm"),
    ],
    ids=["qk_norm", "scale_norm", "rope", "rms_norm"],
)
def test_other_blocks_of_timm_are_refused(make: Callable[[], Any], why: str) -> None:
    with pytest.warns(fastbb.AccelerateWarning, match=why):
        fastbb.accelerate(make(), mode="eager")


@torch.no_grad()
@NO_ACCELERATE_WARNING
def test_masks_and_other_rotations_of_timm_are_upstreams() -> None:
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    plain, eva = timm_block("vit_tiny_patch16_224"), timm_block("eva02_tiny_patch14_224")
    rope = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for block, options, why in (
        (plain, {"is_causal": True}, "mask"),
        (plain, {"attn_mask": torch.zeros(17, 17)}, "mask"),
        (eva, {"rope": rope}, "otherwise than DINOv3"),
    ):
        want = block(x, **options)
        report = fastbb.accelerate(block, mode="eager")
        assert torch.equal(block(x, **options), want)
        assert why in str(report)
        block(x)
        assert_ours_ran(report)
        fastbb.restore(block)


@torch.no_grad()
def test_timms_dinov3_in_bf16_rotates_in_bf16() -> None:
    host = HOSTS["timm_dinov3"]()
    model, pixels = host.model.bfloat16(), host.inputs[0].bfloat16()
    report = fastbb.accelerate(model, mode="eager")
    model(pixels)
    assert_ours_ran(report)


@torch.no_grad()
def test_a_lost_layer_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, report = twins(MODELS["dinov2"])
    original = vit_cpu.scaled_linear
    monkeypatch.setattr(vit_cpu, "scaled_linear", lambda w, b, scale: original(w, b, None))
    with pytest.warns(fastbb.AccelerateWarning, match="differs from upstream's"):
        got = model(PIXELS)
    assert_equals_upstream(tensors(got), tensors(twin(PIXELS)))
    assert {runs for _, _, runs, _ in report.rows()} == {"upstream"}
