"""New heads of transformers around pretrained backbones load every weight of the backbone."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from reference_models import images, randomize_
from safetensors.torch import load_file, save_file
from tolerance import assert_equals_upstream

import fastbb
from fastbb import AutoBackbone, ResNetConfig, SwinConfig, TimmBackboneConfig

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SWIN = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TIMM_NAME, TIMM_REPO = "test_resnet", "timm/test_resnet.r160_in1k"
PIXELS = images(64, 72)

DECODER = {
    "model_type": "detr",
    "d_model": 32,
    "num_queries": 5,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
}
MASKFORMER = {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": DECODER}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "dim_feedforward": 16,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 5,
}
DETR = {
    "d_model": 32,
    "num_queries": 5,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
UPERNET = {"hidden_size": 16, "auxiliary_channels": 8, "pool_scales": [1, 2]}

# head, its configuration, the checkpoint, number of maps that it takes by default
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "maskformer-swin": ("MaskFormerForInstanceSegmentation", MASKFORMER, "swin", 4),
    "maskformer-resnet": ("MaskFormerForInstanceSegmentation", MASKFORMER, "resnet", 4),
    "maskformer-timm": ("MaskFormerForInstanceSegmentation", MASKFORMER, "timm", 4),
    "mask2former-swin": ("Mask2FormerForUniversalSegmentation", MASK2FORMER, "swin", 4),
    "mask2former-resnet": ("Mask2FormerForUniversalSegmentation", MASK2FORMER, "resnet", 4),
    "upernet-swin": (
        "UperNetForSemanticSegmentation",
        {**UPERNET, "auxiliary_in_channels": 32},
        "swin",
        4,
    ),
    "upernet-timm": (
        "UperNetForSemanticSegmentation",
        {**UPERNET, "use_auxiliary_head": False},
        "timm",
        4,
    ),
    "detr-timm": ("DetrForObjectDetection", DETR, "timm", 4),
    "detr-resnet": ("DetrForObjectDetection", DETR, "resnet", 4),
    "deformable-detr-timm": (
        "DeformableDetrForObjectDetection",
        {**DETR, "num_feature_levels": 4, "decoder_layers": 2},
        "timm",
        3,
    ),
}


@pytest.fixture
def checkpoints(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Names of classifiers to build heads around: two directories, and a timm repository."""
    swin = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN))
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET))
    for name, model in (("swin", swin), ("resnet", resnet)):
        randomize_(model).save_pretrained(tmp_path / name)
    model = randomize_(timm.create_model(TIMM_NAME))
    timm.models.save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
    hub.add_repo(TIMM_REPO, tmp_path / "timm")
    return {"swin": str(tmp_path / "swin"), "resnet": str(tmp_path / "resnet"), "timm": TIMM_NAME}


def backbone_of(head: Any) -> Any:
    paths = ("backbone", "model.backbone.model", "model.pixel_level_module.encoder")
    for path in paths:
        try:
            return head.get_submodule(path)
        except AttributeError:
            pass
    raise AssertionError(f"none of {paths} in {type(head).__name__}")


def upstreams_maps(kind: str, name: str, indices: list[int]) -> list[torch.Tensor]:
    """Maps of the library that the checkpoint is of."""
    if kind == "timm":
        model = timm.create_model(name, pretrained=True, features_only=True, out_indices=indices)
        return model.eval()(PIXELS)
    cls = {"swin": transformers.SwinBackbone, "resnet": transformers.ResNetBackbone}[kind]
    return list(cls.from_pretrained(name, out_indices=indices).eval()(PIXELS).feature_maps)


def outputs(head: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = head.eval()(PIXELS)
    return [x for x in out.to_tuple() if isinstance(x, torch.Tensor)]


def assert_same(again: Any, head: Any) -> None:
    """A head that transformers loaded has the tensors and outputs of the one that was saved."""
    state, want = again.state_dict(), head.state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in state.items())
    # the memory address changes the last bit of some convolutions
    assert_equals_upstream(outputs(again), outputs(head))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_head_loads_all_weights_of_the_backbone(
    case: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    class_name, config, kind, count = CASES[case]
    head_class = getattr(transformers, class_name)
    name = checkpoints[kind]
    head = fastbb.heads.build(
        head_class,
        backbone=name,
        use_pretrained_backbone=True,
        use_timm_backbone=kind == "timm",
        **config,
    )
    assert type(head) is head_class and head.training
    head.eval()
    out = backbone_of(head)(PIXELS)
    maps = list(out if isinstance(out, list) else out.feature_maps)
    want = upstreams_maps(kind, name, [1, 2, 3, 4][-count:])
    assert_equals_upstream(maps, want)

    head.save_pretrained(tmp_path / "head")
    again = head_class.from_pretrained(tmp_path / "head")
    assert_same(again, head)


def test_heads_differ_in_nothing_but_the_backbone(checkpoints: dict[str, str]) -> None:
    head_class = transformers.UperNetForSemanticSegmentation
    config = {**UPERNET, "auxiliary_in_channels": 24}
    torch.manual_seed(1)
    head = fastbb.heads.build(
        head_class, backbone=checkpoints["resnet"], use_pretrained_backbone=True, **config
    )
    torch.manual_seed(1)
    backbone_config = transformers.ResNetConfig(**RESNET, out_indices=[1, 2, 3, 4])
    theirs = head_class(transformers.UperNetConfig(backbone_config=backbone_config, **config))
    state, drawn = head.state_dict(), theirs.state_dict()
    assert state.keys() == drawn.keys()
    differ = {name for name in state if not torch.equal(state[name], drawn[name])}
    assert differ and all(name.startswith("backbone.") for name in differ)


@pytest.mark.parametrize("pretrained", [True, False])
def test_maskformer_config_behaves_as_in_transformers_4(
    pretrained: bool, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    config: Any = fastbb.MaskFormerConfig(
        backbone=checkpoints["resnet"], use_pretrained_backbone=pretrained, **MASKFORMER
    )
    assert isinstance(config, transformers.MaskFormerConfig)
    assert config.backbone == checkpoints["resnet"]
    # transformers 4 took the last stage, on which its MaskFormer cannot run
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(same) is type(config) and same.use_pretrained_backbone is pretrained
    head = fastbb.MaskFormerForInstanceSegmentation(config)
    bias = "embedder.embedder.normalization.bias"
    loaded = load_file(Path(checkpoints["resnet"]) / "model.safetensors")[f"resnet.{bias}"]
    assert torch.equal(backbone_of(head).state_dict()[bias], loaded) is pretrained

    # the saved configuration is transformers' own, without pretrained weights
    config.save_pretrained(tmp_path / "config")
    written = json.loads((tmp_path / "config" / "config.json").read_text())
    theirs = transformers.MaskFormerConfig.from_pretrained(tmp_path / "config")
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == written
    again = fastbb.MaskFormerConfig.from_pretrained(tmp_path / "config")
    assert not again.use_pretrained_backbone
    assert again.to_dict() == config.to_dict() == theirs.to_dict()

    head.save_pretrained(tmp_path / "head")
    for cls in (transformers, fastbb):
        same = cls.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "head")
        assert type(same) is transformers.MaskFormerForInstanceSegmentation
        assert_same(same, head)


def test_backbone_options_reach_the_backbone_of_the_head(
    checkpoints: dict[str, str], hub: HubServer
) -> None:
    config: Any = fastbb.MaskFormerConfig(
        backbone=checkpoints["resnet"], backbone_kwargs={"out_indices": (2, 3)}, **MASKFORMER
    )
    assert config.backbone_config.out_features == ["stage2", "stage3"]

    hub.add_repo("acme/swin", checkpoints["swin"], revision="v2")
    build: Callable[..., Any] = fastbb.heads.build
    kwargs = {"revision": "v2", "out_features": ["stage2", "stage4"], "drop_path_rate": 0.0}
    head_class = transformers.UperNetForSemanticSegmentation
    head = build(
        head_class,
        backbone="acme/swin",
        use_pretrained_backbone=True,
        backbone_kwargs=kwargs,
        **{**UPERNET, "use_auxiliary_head": False},
    )
    assert head.backbone.channels == [16, 64] and head.config.backbone_config.drop_path_rate == 0
    with hub.offline(), pytest.raises(TypeError, match="SwinConfig has no field depth"):
        build(head_class, backbone="acme/swin", backbone_kwargs={"revision": "v2", "depth": 1})

    # a DETR with `dilation` asks for another stride, `num_channels` for another stem
    detr = transformers.DetrForObjectDetection
    head = build(
        detr, backbone=TIMM_NAME, use_timm_backbone=True, dilation=True, num_channels=1, **DETR
    )
    maps = backbone_of(head)(torch.randn(1, 1, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 4]

    # an OmDet-Turbo builds timm's Swin for its own size of images
    name = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        head = build(transformers.OmDetTurboForObjectDetection, backbone=name)
    assert head.config.timm_kwargs == {"img_size": 640, "always_partition": True}


def test_half_precision_checkpoint_is_loaded_in_fp32(tmp_path: Path) -> None:
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET))
    randomize_(resnet).half().save_pretrained(tmp_path)
    head = fastbb.heads.build(
        transformers.UperNetForSemanticSegmentation,
        backbone=str(tmp_path),
        use_pretrained_backbone=True,
        **{**UPERNET, "auxiliary_in_channels": 24},
    )
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    state = resnet.resnet.float().state_dict()
    assert all(torch.equal(t, state[name]) for name, t in head.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["nano-swin-digits", "nano-resnet-digits"])
def test_bundled_models_load_into_heads(name: str) -> None:
    ours = AutoBackbone.from_pretrained(name)
    head = fastbb.heads.build(
        transformers.UperNetForSemanticSegmentation,
        backbone=name,
        use_pretrained_backbone=True,
        **{**UPERNET, "use_auxiliary_head": False},
    )
    state, want = head.backbone.state_dict(), ours.state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in state.items())


def test_fastbb_configurations_are_accepted_as_backbone_config(
    hub: HubServer, checkpoints: dict[str, str]
) -> None:
    head_class = transformers.MaskFormerForInstanceSegmentation
    for own in (SwinConfig(**SWIN), ResNetConfig(**RESNET), TimmBackboneConfig(TIMM_NAME)):
        head = fastbb.heads.build(head_class, backbone_config=own, **MASKFORMER)
        assert backbone_of(head).config.model_type.endswith(own.model_type)
    assert not hub.requests
    # timm's weights are asked for in the backbone's own configuration
    own = TimmBackboneConfig(TIMM_NAME, use_pretrained_backbone=True, out_indices=[1, 2])
    theirs = transformers.TimmBackboneConfig(
        backbone=TIMM_NAME, use_pretrained_backbone=True, out_indices=[1, 2]
    )
    for config in (own, theirs):
        head = fastbb.heads.build(head_class, backbone_config=config, **MASKFORMER).eval()
        maps = backbone_of(head)(PIXELS).feature_maps
        assert_equals_upstream(maps, upstreams_maps("timm", TIMM_NAME, [1, 2]))


def test_checkpoint_with_missing_weights_raises_value_error(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    file = Path(checkpoints["resnet"]) / "model.safetensors"
    state = load_file(file)
    gone = "encoder.stages.1.layers.0.layer.0.convolution.weight"
    del state[f"resnet.{gone}"]
    save_file(state, file, metadata={"format": "pt"})
    config = fastbb.MaskFormerConfig(
        backbone=checkpoints["resnet"], use_pretrained_backbone=True, **MASKFORMER
    )
    with pytest.raises(ValueError, match=rf"do not fit .*\nmissing: {gone}$|missing: {gone}"):
        fastbb.MaskFormerForInstanceSegmentation(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "x", "backbone_config": {}}, "both `backbone` and `backbone_config`"),
        (
            {"use_timm_backbone": True, "backbone_config": {}},
            "both `use_timm_backbone` and `backbone_config`",
        ),
        (
            {"backbone_kwargs": {"depths": [1]}, "backbone_config": ResNetConfig()},
            "both `backbone_kwargs` and `backbone_config`",
        ),
        ({"use_pretrained_backbone": True}, "`backbone` must name a model"),
        ({"use_timm_backbone": True}, "`backbone` must name a model"),
        (
            {"use_pretrained_backbone": True, "backbone_config": ResNetConfig()},
            "`backbone` must name a model if `use_pretrained_backbone` is set",
        ),
        (
            {"backbone": "nano-resnet-digits", "use_timm_backbone": True},
            "is a resnet of transformers, not a timm model",
        ),
        (
            {"backbone_config": TimmBackboneConfig("test_resnet", out_features=["layer1"])},
            "cannot keep out_features of 'test_resnet'",
        ),
        (
            {"backbone_config": TimmBackboneConfig("test_vit", backbone_kwargs={"depth": 2})},
            "cannot keep depth of 'test_vit'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    build: Callable[..., Any] = fastbb.heads.build
    with pytest.raises(ValueError, match=message):
        fastbb.MaskFormerConfig(**arguments)
    with pytest.raises(ValueError, match=message):
        build(transformers.UperNetForSemanticSegmentation, **arguments)


@torch.no_grad()
def test_families_that_only_transformers_has_are_loaded(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    randomize_(transformers.Dinov2Model(config)).save_pretrained(tmp_path / "dinov2")
    kwargs = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    head = fastbb.heads.build(
        transformers.DPTForDepthEstimation,
        backbone=str(tmp_path / "dinov2"),
        use_pretrained_backbone=True,
        backbone_kwargs=kwargs,
        hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    ).eval()
    theirs = transformers.Dinov2Backbone.from_pretrained(tmp_path / "dinov2", **kwargs).eval()
    pixels = images(28, 28)
    assert all(map(torch.equal, head.backbone(pixels).feature_maps, theirs(pixels).feature_maps))
    assert head(pixels).predicted_depth.isfinite().all()

    state = load_file(tmp_path / "dinov2" / "model.safetensors")
    del state["encoder.layer.2.norm1.weight"]
    save_file(state, tmp_path / "dinov2" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit ViTBackbone .*missing: .*2\.norm1\.weight"):
        fastbb.heads.build(
            transformers.DPTForDepthEstimation,
            backbone=str(tmp_path / "dinov2"),
            use_pretrained_backbone=True,
        )


def test_models_without_a_backbone_are_refused() -> None:
    build: Callable[..., Any] = fastbb.heads.build
    with pytest.raises(ValueError, match="SwinModel has no backbone"):
        build(transformers.SwinModel, backbone="nano-swin-digits")
    with pytest.raises(TypeError, match="must be a model class of transformers, got <class"):
        build(transformers.MaskFormerConfig, backbone="nano-swin-digits")
    torchvision = fastbb.AutoConfig.for_model("fastbb-torchvision-swin")
    with pytest.raises(ValueError, match="transformers has no backbone 'fastbb-torchvision-swin'"):
        build(transformers.UperNetForSemanticSegmentation, backbone_config=torchvision)
    with pytest.raises(OSError, match="neither a local directory"):
        build(transformers.UperNetForSemanticSegmentation, backbone="not a/model")
