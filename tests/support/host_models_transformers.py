"""Tiny random models of transformers: backbones, classifiers, segmentation and depth."""

from typing import Any

import torch
import transformers
from host_matrix import Host, host
from host_models_vision import TIMM_SWIN, TIMM_SWIN_SIZES, timm_swin_parts
from reference_models import hf_maskformer_swin, hf_resnet, hf_swin, images, randomize_
from torch import Tensor

hf: Any = transformers  # its configurations take more than their signatures say

SWIN = {
    "embed_dim": 16,
    "depths": [2, 1, 1, 2],
    "num_heads": [2, 4, 8, 16],
    "window_size": 7,
    "drop_path_rate": 0.0,
}
# on a Swin that is no backbone upstream's windows shrink with the map, which its bias table does
# not follow: maps of 18x16, 9x8 and 5x4
SHRINKING_SWIN = {**SWIN, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [2, 1, 1, 1],
    "layer_type": "bottleneck",
}
CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1]}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 5,
    "num_labels": 3,
}
SWIN_PARTS, RESNET_BLOCKS, TIMM_BLOCKS = 6 + 3, 5, 4  # blocks, and mergings of patches


def pixels(height: int = 70, width: int = 61) -> dict[str, Tensor]:
    return {"pixel_values": images(height, width)}


def tokens(batch: int, length: int, high: int = 30, low: int = 1) -> Tensor:
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(2))


def swin_config(*out: int, **config: Any) -> Any:
    return hf.SwinConfig(**{**SWIN, **config}, out_indices=list(out or (1, 2, 3, 4)))


def resnet_config(*out: int, **config: Any) -> Any:
    return hf.ResNetConfig(**{**RESNET, **config}, out_indices=list(out or (1, 2, 3, 4)))


def timm_resnet_config(*out: int) -> Any:
    # transformers passes no sizes on to timm: the smallest that timm has
    return hf.TimmBackboneConfig(backbone="test_resnet", out_indices=list(out or (1, 2, 3, 4)))


def swin_parts(path: str, depths: list[int]) -> tuple[str, ...]:
    """Names of the blocks and mergings, where no whole backbone is replaced."""
    names = []
    for stage, depth in enumerate(depths):
        names += [f"{path}.{stage}.blocks.{i}" for i in range(depth)]
        names += [f"{path}.{stage}.downsample"] if stage + 1 < len(depths) else []
    return tuple(names)


# --- backbones and classifiers


@host
def swin_backbone() -> Host:
    return Host(hf_swin(), pixels(), ("",), SWIN_PARTS)


@host
def maskformer_swin_backbone() -> Host:
    return Host(hf_maskformer_swin(), pixels(), ("",), SWIN_PARTS)


@host
def resnet_backbone_basic() -> Host:
    return Host(hf_resnet("basic"), pixels(), ("",), RESNET_BLOCKS)


@host
def resnet_backbone_bottleneck() -> Host:
    return Host(hf_resnet("bottleneck"), pixels(), ("",), RESNET_BLOCKS)


@host
def rt_detr_resnet_backbone() -> Host:
    config = hf.RTDetrResNetConfig(**RESNET, out_indices=[1, 2, 3, 4])
    return Host(randomize_(hf.RTDetrResNetBackbone(config)), pixels(), ("",), RESNET_BLOCKS)


@host
def timm_backbone_resnet() -> Host:
    model = hf.TimmBackbone(timm_resnet_config())
    return Host(randomize_(model), pixels(), ("",), TIMM_BLOCKS)


@host
def timm_backbone_swin() -> Host:
    config = hf.TimmBackboneConfig(backbone=TIMM_SWIN, out_indices=[0, 1, 2, 3])
    model = hf.TimmBackbone(config, img_size=(72, 60), **TIMM_SWIN_SIZES)
    return Host(randomize_(model), pixels(72, 60), timm_swin_parts("_backbone.layers_"))


def convnext_backbone(kind: str, **config: Any) -> Host:
    made = getattr(hf, f"{kind}Config")(**CONVNEXT, out_indices=[0, 2, 4], **config)
    return Host(randomize_(getattr(hf, f"{kind}Backbone")(made)), pixels(), ("",), 5)


@host
def convnext_backbone_v1() -> Host:
    return convnext_backbone("ConvNext")


@host
def convnext_backbone_v2() -> Host:
    return convnext_backbone("ConvNextV2")


@host
def convnext_backbone_dinov3() -> Host:
    return convnext_backbone("DINOv3ConvNext", drop_path_rate=0.0)


@host
def convnext_for_image_classification() -> Host:
    model = hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT, num_labels=5))
    blocks = [
        f"{stage}.layers.{i}"
        for stage, depth in enumerate(CONVNEXT["depths"])
        for i in range(depth)
    ]
    parts = tuple(f"convnext.encoder.stages.{block}" for block in blocks)
    return Host(randomize_(model), pixels(), parts, head="smooth", frozen=("convnext",))


@host
def swin_model() -> Host:
    model = hf.SwinModel(hf.SwinConfig(**SHRINKING_SWIN))
    parts = swin_parts("encoder.layers", SHRINKING_SWIN["depths"])
    return Host(randomize_(model), pixels(), parts, head="smooth")


@host
def swin_for_image_classification() -> Host:
    config = hf.SwinConfig(**SHRINKING_SWIN, num_labels=5)
    parts = swin_parts("swin.encoder.layers", SHRINKING_SWIN["depths"])
    model = hf.SwinForImageClassification(config)
    return Host(randomize_(model), pixels(), parts, head="smooth", frozen=("swin",))


@host
def resnet_model() -> Host:
    model = hf.ResNetModel(resnet_config())
    return Host(randomize_(model), pixels(), ("",), RESNET_BLOCKS)


@host
def resnet_for_image_classification() -> Host:
    model = hf.ResNetForImageClassification(resnet_config(num_labels=5))
    return Host(randomize_(model), pixels(), ("resnet",), RESNET_BLOCKS, "smooth")


# --- segmentation and depth


def mask_former(backbone_config: Any, inner: int) -> Host:
    # its decoder takes no num_labels
    decoder = {name: value for name, value in DETR.items() if name != "num_labels"}
    config = hf.MaskFormerConfig(
        backbone_config=backbone_config,
        decoder_config={"model_type": "detr", **decoder},
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    model = hf.MaskFormerForInstanceSegmentation(config)
    outermost = ("model.pixel_level_module.encoder",)
    return Host(randomize_(model), pixels(), outermost, inner, "smooth")


@host
def mask_former_swin() -> Host:
    return mask_former(swin_config(), SWIN_PARTS)


@host
def mask_former_resnet() -> Host:
    return mask_former(resnet_config(), RESNET_BLOCKS)


@host
def mask2_former() -> Host:
    config = hf.Mask2FormerConfig(
        backbone_config=swin_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=5,
        num_labels=3,
    )
    model = hf.Mask2FormerForUniversalSegmentation(config)
    outermost = ("model.pixel_level_module.encoder",)
    return Host(randomize_(model), pixels(), outermost, SWIN_PARTS, "discrete")


@host
def one_former() -> Host:
    config = hf.OneFormerConfig(
        backbone_config=swin_config(),
        task_seq_len=6,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        query_dec_layers=1,
        num_attention_heads=4,
        num_queries=5,
        num_labels=3,
    )
    model = hf.OneFormerForUniversalSegmentation(config)
    inputs = {**pixels(), "task_inputs": tokens(2, 6)}
    outermost = ("model.pixel_level_module.encoder",)
    return Host(randomize_(model), inputs, outermost, SWIN_PARTS, "discrete")


def uper_net(backbone_config: Any, inner: int, channels: int) -> Host:
    config = hf.UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=channels,
        auxiliary_channels=16,
        num_labels=3,
    )
    model = hf.UperNetForSemanticSegmentation(config)
    return Host(randomize_(model), pixels(), ("backbone",), inner, "smooth")


@host
def uper_net_swin() -> Host:
    return uper_net(swin_config(), SWIN_PARTS, channels=64)


@host
def uper_net_resnet() -> Host:
    return uper_net(resnet_config(), RESNET_BLOCKS, channels=32)


@host
def dpt() -> Host:
    config = hf.DPTConfig(
        backbone_config=swin_config(), neck_hidden_sizes=[16, 32, 64, 128], fusion_hidden_size=16
    )
    config.neck_ignore_stages = [0, 1, 2, 3]  # maps in the layout of images
    model = hf.DPTForDepthEstimation(config)
    # this head always asks for hidden states, so only the blocks are ours
    why = {"backbone": "output_hidden_states is asked for"}
    return Host(randomize_(model), pixels(), ("backbone",), SWIN_PARTS, "smooth", upstream=why)


@host
def dpt_hybrid() -> Host:
    config = hf.DPTConfig(
        is_hybrid=True,
        backbone_config=resnet_config(1, 2, 3).to_dict(),
        backbone_featmap_shape=[1, 32, 4, 4],
        image_size=64,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 0, 1],
        neck_hidden_sizes=[16, 24, 32, 48],
        fusion_hidden_size=16,
    )
    model = hf.DPTForDepthEstimation(config)
    outermost = ("dpt.embeddings.backbone",)
    return Host(randomize_(model), pixels(64, 64), outermost, RESNET_BLOCKS, "smooth")
