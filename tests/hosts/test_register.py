"""`register` makes transformers build fast backbones into its heads; `unregister` undoes it."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from reference_models import images, randomize_
from tolerance import assert_equals_upstream
from torch.utils._pytree import tree_leaves

import fastbb
from fastbb.hosts.accelerate import replacement_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
from convnext_models import KINDS, SHAPE  # noqa: E402
from transformers.models import maskformer  # noqa: E402
from vit_models import vit_config  # noqa: E402

SWIN = transformers.SwinConfig(
    embed_dim=8,
    depths=[1, 2, 1, 1],
    num_heads=[1, 2, 4, 8],
    window_size=4,
    out_indices=[1, 2, 3, 4],
)
RESNET = transformers.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_indices=[1, 2, 3, 4]
)
TIMM = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4])
MASKFORMER_SWIN = maskformer.MaskFormerSwinConfig.from_dict(SWIN.to_dict())
BACKBONES: dict[str, tuple[Any, Any]] = {
    "swin": (SWIN, transformers.SwinBackbone),
    "maskformer-swin": (MASKFORMER_SWIN, maskformer.MaskFormerSwinBackbone),
    "resnet": (RESNET, transformers.ResNetBackbone),
    "timm": (TIMM, transformers.TimmBackbone),
    **{
        kind.lower(): (
            getattr(transformers, f"{kind}Config")(**SHAPE, out_indices=[1, 2, 3, 4]),
            getattr(transformers, f"{kind}Backbone"),
        )
        for kind in KINDS
    },
    "dinov2": (vit_config("dinov2"), transformers.Dinov2Backbone),
    "registers": (
        vit_config("dinov2_with_registers"),
        transformers.Dinov2WithRegistersBackbone,
    ),
    "dinov3": (vit_config("dinov3_vit"), transformers.DINOv3ViTBackbone),
    "beit": (vit_config("beit"), transformers.BeitBackbone),
}
PIXELS = images(64, 72)
HEAD_REL = 1e-4  # tolerance of a head whose maps differ by rounding
NECK = {
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "reassemble_factors": [2, 1, 1, 0.5],
}
DEPTH_ANYTHING = {"patch_size": 7, "reassemble_hidden_size": 32, "head_in_channels": 8}
ZOEDEPTH = {"bottleneck_features": 8, "num_relative_features": 8}
# head, its configuration, and the type of its backbone, which returns tokens [B, N, C]
DEPTH: dict[str, tuple[str, dict[str, Any], str]] = {
    "dpt-dinov2": ("DPT", {}, "dinov2"),
    "dpt-beit": ("DPT", {}, "beit"),
    "depth-anything-dinov2": ("DepthAnything", DEPTH_ANYTHING, "dinov2"),
    "zoedepth-beit": ("ZoeDepth", ZOEDEPTH, "beit"),
    "zoedepth-dinov2": ("ZoeDepth", ZOEDEPTH, "dinov2"),
}


def registered() -> dict[type, Any]:
    return dict(transformers.AutoBackbone._model_mapping._extra_content)


@pytest.fixture
def register() -> Iterator[None]:
    before = registered()
    fastbb.register()
    yield
    fastbb.unregister()
    assert registered() == before


def head(config: Any) -> Any:
    """A tiny UperNet."""
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=copy.deepcopy(config),
            hidden_size=16,
            pool_scales=[1, 2],
            use_auxiliary_head=False,
        )
    )


def depth_model(name: str) -> Any:
    """A tiny model of depth with random weights."""
    kind, fields, backbone = DEPTH[name]
    config = vit_config(backbone, reshape_hidden_states=False)
    made = getattr(transformers, f"{kind}Config")(backbone_config=config, **NECK, **fields)
    # no seed makes the last activation zero
    return randomize_(getattr(transformers, f"{kind}ForDepthEstimation")(made), seed=3)


def runs_ours(module: Any) -> bool:
    """Whether the module has a forward of fastbb, and that forward has run."""
    replacement = replacement_of(module)
    return replacement is not None and replacement.off is None and bool(replacement.choices)


@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
def test_heads_get_fast_backbones(kind: str, register: None, tmp_path: Path) -> None:
    config, upstream = BACKBONES[kind]
    fastbb.unregister()
    theirs = randomize_(head(config))
    want = theirs(PIXELS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    assert type(theirs.backbone) is upstream

    fastbb.register()
    ours = type(theirs).from_pretrained(tmp_path / "theirs")
    assert isinstance(ours.backbone, upstream) and isinstance(
        ours.backbone, transformers.PreTrainedModel
    )
    assert ours.backbone.config_class is upstream.config_class
    before_any_call = copy.deepcopy(ours)
    for model in (ours, before_any_call, copy.deepcopy(ours)):
        assert_equals_upstream(model(PIXELS).logits, want, rel=HEAD_REL)
        assert type(model.backbone) is upstream and runs_ours(model.backbone)
    state, kept = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(kept) and all(torch.equal(state[n], kept[n]) for n in state)

    # the saved model is one of transformers
    ours.save_pretrained(tmp_path / "ours")
    fastbb.unregister()
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert type(again.backbone) is upstream and replacement_of(again.backbone) is None
    fastbb.restore(ours)
    assert replacement_of(ours.backbone) is None
    for model in (again, ours):
        assert_equals_upstream(model(PIXELS).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("name", DEPTH)
def test_depth_models_on_tokens_equal_upstream(name: str, register: None, tmp_path: Path) -> None:
    pixels = images(70, 56)
    requests: list[dict[str, Any]] = [
        {},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ]
    fastbb.unregister()
    theirs = depth_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.set_attn_implementation("eager")  # for attention weights

    fastbb.register()
    ours = type(theirs).from_pretrained(tmp_path / "theirs")
    ours.set_attn_implementation("eager")
    assert type(ours.backbone) is not type(theirs.backbone)
    for request in requests * 2:
        got, want = (tree_leaves(model(pixels, **request)) for model in (ours, theirs))
        assert_equals_upstream(got, want)
        assert want[0].std() > 0.01 * want[0].abs().max()
    assert runs_ours(ours.backbone)  # also for DPT, which always asks for hidden states

    ours.save_pretrained(tmp_path / "ours")
    fastbb.unregister()
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert type(again.backbone) is type(theirs.backbone)
    assert_equals_upstream(again(pixels).predicted_depth, theirs(pixels).predicted_depth)


def test_training_equals_upstream(register: None) -> None:
    torch.manual_seed(0)
    ours = head(RESNET).train()
    fastbb.unregister()
    torch.manual_seed(0)
    theirs = head(RESNET).train()
    for model in (ours, theirs):
        model(PIXELS).logits.square().mean().backward()
    assert replacement_of(ours.backbone) is None
    for (name, ours_p), (_, theirs_p) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.equal(ours_p.grad, theirs_p.grad), name
    with torch.no_grad():
        assert_equals_upstream(
            ours.eval()(PIXELS).logits, theirs.eval()(PIXELS).logits, rel=HEAD_REL
        )
    assert replacement_of(ours.backbone) is not None


@torch.no_grad()
def test_models_are_pickled_before_their_first_call(register: None) -> None:
    ours = randomize_(head(RESNET))  # transformers' hooks in the other families are not pickled
    again = pickle.loads(pickle.dumps(ours))
    assert_equals_upstream(again(PIXELS).logits, ours(PIXELS).logits)
    assert runs_ours(again.backbone)


@torch.no_grad()
def test_a_compiled_graph_holds_upstreams_forward(register: None) -> None:
    ours = randomize_(head(RESNET))
    compiled = torch.compile(ours, backend="eager")
    maps = compiled(PIXELS).logits
    assert replacement_of(ours.backbone) is None
    assert_equals_upstream(ours(PIXELS).logits, maps, rel=HEAD_REL)
    assert runs_ours(ours.backbone)


@torch.no_grad()
def test_detr_with_frozen_norms_equals_upstream_and_runs_ours(register: None) -> None:
    config = transformers.DetrConfig(
        backbone_config=copy.deepcopy(RESNET),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
    ours = randomize_(transformers.DetrForObjectDetection(config))
    fastbb.unregister()
    theirs = transformers.DetrForObjectDetection(config).eval()
    theirs.load_state_dict(ours.state_dict())
    assert_equals_upstream(ours(PIXELS).logits, theirs(PIXELS).logits, rel=HEAD_REL)
    assert runs_ours(ours.model.backbone.model)


@torch.no_grad()
def test_auto_backbone_of_transformers_runs_ours(
    register: None, hub: HubServer, tmp_path: Path
) -> None:
    theirs = randomize_(transformers.SwinBackbone(SWIN))
    theirs.save_pretrained(tmp_path)
    hub.add_repo("acme/swin", tmp_path)
    ours = transformers.AutoBackbone.from_pretrained("acme/swin", out_indices=[1, 2])
    assert_equals_upstream(ours(PIXELS).feature_maps, theirs(PIXELS).feature_maps[:2])
    assert runs_ours(ours)


def test_register_and_unregister_are_idempotent_and_keep_other_classes() -> None:
    before = registered()
    fastbb.unregister()
    assert registered() == before

    class Theirs(transformers.ResNetBackbone):
        pass

    auto = transformers.AutoBackbone
    auto.register(transformers.ResNetConfig, Theirs, exist_ok=True)
    with_theirs = registered()
    try:
        for _ in range(2):
            fastbb.register()
        assert len(registered()) == len(before) + len(BACKBONES)
        assert type(auto.from_config(RESNET)) is not Theirs
        for _ in range(2):
            fastbb.unregister()
        assert registered() == with_theirs and type(auto.from_config(RESNET)) is Theirs

        fastbb.register()
        auto.register(transformers.ResNetConfig, Theirs, exist_ok=True)  # stays registered
        fastbb.unregister()
        assert registered() == with_theirs
    finally:
        auto._model_mapping._extra_content.pop(transformers.ResNetConfig, None)
    assert registered() == before


@torch.no_grad()
def test_arguments_of_accelerate_win_over_register(register: None) -> None:
    model = head(SWIN).eval()
    report = fastbb.accelerate(model, mode="eager", precision="fp32")
    assert "backbone" in report.accelerated
    model(PIXELS)
    replacement = replacement_of(model.backbone)
    assert replacement is not None
    assert (replacement.settings.mode, replacement.settings.precision) == ("eager", "fp32")
    assert type(model.backbone) is transformers.SwinBackbone
