"""Options of backbones: defaults of the configuration, checkpointing, dtypes, copies."""

import copy
from typing import Any

import pytest
import torch
from reference_models import gradients, randomize_, saved_bytes, torchvision_resnet
from tolerance import assert_equal_gradients

from fastbb import (
    AutoBackbone,
    ResNetBackbone,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
    list_backbones,
)
from fastbb.models.swin import MaskFormerSwinConfig

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
PIXELS = torch.randn(2, 3, 36, 28)


def swin(**kwargs) -> Any:
    return randomize_(SwinBackbone(SwinConfig(**SWIN, **kwargs)))


@torch.no_grad()
def test_forward_takes_its_defaults_from_the_configuration():
    backbone = swin(output_attentions=True, output_hidden_states=True, return_dict=False)
    output = backbone(PIXELS)
    assert isinstance(output, tuple) and [len(item) for item in output] == [1, 3, 2]
    changed = backbone(
        PIXELS, output_attentions=False, output_hidden_states=False, return_dict=True
    )
    assert list(changed) == ["feature_maps"]


@torch.no_grad()
def test_attentions_cover_every_stage_for_any_out_indices():
    assert len(swin(out_indices=[0])(PIXELS, output_attentions=True).attentions) == 2


def test_images_without_width_are_refused():
    with pytest.raises(ValueError, match=r"must have pixels, got shape \[1, 3, 32, 0\]"):
        swin()(torch.zeros(1, 3, 32, 0))


def test_integer_pixels_are_refused_under_autocast():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"torch\.uint8, the weights torch\.float32"),
    ):
        swin()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_gradient_checkpointing_acts_in_training_and_can_be_disabled():
    backbone = swin()
    pixels = PIXELS.requires_grad_()
    plain = saved_bytes(backbone.train(), pixels)
    in_eval = saved_bytes(backbone.eval(), pixels)
    backbone.gradient_checkpointing_enable()
    assert backbone.is_gradient_checkpointing and saved_bytes(backbone, pixels) == in_eval
    assert saved_bytes(backbone.train(), pixels) < plain
    backbone.gradient_checkpointing_disable()
    assert not backbone.is_gradient_checkpointing and saved_bytes(backbone, pixels) == plain


def test_gradient_checkpointing_takes_torchs_arguments():
    backbone = swin().train()
    want = gradients(backbone, PIXELS)
    # reentrant checkpointing refuses torch.autograd.grad, and saves the inputs only
    backbone.gradient_checkpointing_enable({"use_reentrant": True})
    got = gradients(backbone, PIXELS.detach().requires_grad_())
    assert got.keys() == want.keys()
    with pytest.raises((RuntimeError, ValueError), match="torch.autograd.grad|reentrant"):
        pixels = PIXELS.detach().requires_grad_()
        torch.autograd.grad(backbone(pixels).feature_maps[0].sum(), [pixels])
    backbone.gradient_checkpointing_enable()
    pixels = PIXELS.detach().requires_grad_()
    assert torch.autograd.grad(backbone(pixels).feature_maps[0].sum(), [pixels])[0].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SwinBackbone(SwinConfig(**SWIN, drop_path_rate=0.0)),
        lambda: ResNetBackbone(ResNetConfig(**RESNET)),
    ],
    ids=["swin", "resnet"],
)
def test_gradient_checkpointing_compiles(make):
    torch._dynamo.reset()
    plain = randomize_(make()).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    # a backend that recomputes checkpointed parts in the backward
    compiled = torch.compile(checkpointed, backend="aot_eager_decomp_partition", fullgraph=True)
    pixels = PIXELS.detach().double()
    got = gradients(compiled, pixels)
    want = gradients(plain, pixels)
    assert_equal_gradients({name.removeprefix("_orig_mod."): g for name, g in got.items()}, want)
    for (name, buffer), ours in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.allclose(ours, buffer), name  # a batch is counted once


def test_configurations_given_to_backbones_are_copied(tmp_path):
    config = SwinConfig(**SWIN)
    backbone = AutoBackbone.from_config(config)
    backbone.out_indices = [0, 1]
    assert config.out_indices == [2]
    before = backbone.config.to_dict()
    backbone.save_pretrained(tmp_path)
    assert backbone.config.to_dict() == before
    given = AutoBackbone.from_pretrained(tmp_path, config=config, out_indices=[1])
    assert given.out_indices == [1] and config.out_indices == [2]


def test_our_own_configuration_of_another_type_is_refused():
    class Relative(SwinConfig):
        model_type = "resnet"

    with pytest.raises(ValueError, match="ResNetBackbone needs a ResNetConfig, got Relative"):
        ResNetBackbone(Relative(**SWIN))  # type: ignore[arg-type]  # the point


def test_dtype_given_to_from_config_and_from_pretrained_applies(tmp_path):
    backbone = AutoBackbone.from_config(
        SwinConfig(**SWIN), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    assert backbone.dtype == torch.bfloat16
    backbone.save_pretrained(tmp_path)
    loaded = AutoBackbone.from_pretrained(tmp_path, dtype="auto", attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16


def test_options_given_to_from_torchvision_apply():
    state = torchvision_resnet().state_dict()
    backbone = AutoBackbone.from_torchvision(
        None, state, out_features=["stem", "stage2"], dtype="bfloat16", device="meta"
    )
    assert backbone.out_indices == [0, 2]
    assert backbone.dtype == torch.bfloat16 and backbone.device.type == "meta"


def test_forward_with_filtered_kwargs_drops_unsupported_arguments():
    resnet = ResNetBackbone(ResNetConfig(**RESNET)).eval()
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    assert list(resnet.forward_with_filtered_kwargs(PIXELS, **kwargs)) == [
        "feature_maps",
        "hidden_states",
    ]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_pre_hook"])
def test_every_kind_of_hook_runs(kind):
    backbone, seen = swin(), []
    norm = backbone.swin.embeddings.norm
    getattr(norm, f"register_{kind}")(lambda *_: seen.append(1))
    backbone(PIXELS).feature_maps[-1].sum().backward()
    assert seen == [1]


def test_names_with_pretrained_weights_have_timm_tags():
    named = list_backbones("*resnet18*", pretrained=True)
    assert "resnet18.a1_in1k" in named and "resnet18" not in named
    assert list_backbones("nano-*", pretrained=True) == ["nano-resnet-digits", "nano-swin-digits"]


def test_use_timm_backbone_loads_only_saved_timm_backbones(tmp_path):
    TimmBackbone(TimmBackboneConfig("test_resnet")).save_pretrained(tmp_path)
    assert type(AutoBackbone.from_pretrained(tmp_path, use_timm_backbone=True)) is TimmBackbone
    swin().save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="TimmBackbone loads model_type timm_backbone"):
        AutoBackbone.from_pretrained(tmp_path / "swin", use_timm_backbone=True)


def test_maskformer_refuses_the_stem_and_stays_unchanged():
    config = MaskFormerSwinConfig(**SWIN, out_indices=[1])
    with pytest.raises(ValueError, match="does not support 'stem'"):
        config.out_indices = [0, 1]
    assert config.out_indices == [1] and config.out_features == ["stage1"]


def test_a_single_block_has_no_stochastic_depth():
    one = {"depths": [1], "num_heads": [1], "drop_path_rate": 0.5}
    backbone = SwinBackbone(SwinConfig(**{**SWIN, **one})).train()
    assert torch.equal(backbone(PIXELS).feature_maps[0], backbone(PIXELS).feature_maps[0])


def test_fresh_weights_have_the_spread_of_the_configuration():
    backbone = SwinBackbone(SwinConfig(**{**SWIN, "embed_dim": 32}, initializer_range=0.5))
    fc1: Any = backbone.swin.encoder.layers[0]
    assert 0.4 < fc1.blocks[0].mlp.fc1.weight.std() < 0.6


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="3 heads for 16 channels in stage2"):
        SwinConfig(**{**SWIN, "num_heads": [1, 3]})
