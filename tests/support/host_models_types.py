"""Tiny random models of transformers around conv-bn backbones and ViTs that have no family here."""

from dataclasses import replace
from typing import Any

import torch
from host_matrix import Host, host
from host_models_detection import detr_like
from host_models_transformers import hf, pixels
from reference_models import images, randomize_
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import ResNetV2
from tiny_types import HGNET, upstream
from vit_models import vit_config


def backbone(model_type: str, **fields: Any) -> Host:
    """A backbone whose norms are folded, where its dataflow allows it."""
    inputs = {"pixel_values": images(70, 61)}
    return Host(upstream(model_type, **fields), inputs, ("",), rel=1e-4)


@host
def hgnet_v2_backbone() -> Host:
    return backbone("hgnet_v2")


@host
def hgnet_v2_backbone_with_affine_blocks() -> Host:
    return backbone("hgnet_v2", use_learnable_affine_block=True)


@host
def textnet_backbone() -> Host:
    return backbone("textnet")


@host
def pp_lcnet_backbone() -> Host:
    return backbone("pp_lcnet")


@host
def pp_lcnet_v3_backbone() -> Host:
    return backbone("pp_lcnet_v3")


@host
def pp_lcnet_v4_backbone() -> Host:
    return backbone("pp_lcnet_v4")


@host
def uvdoc_backbone() -> Host:
    return backbone("uvdoc_backbone")


def standardized(model: Any) -> tuple[str, ...]:
    """Names of the convolutions that standardize their weight."""
    names = ("WeightStandardizedConv2d", "StdConv2d")
    return tuple(n for n, m in model.named_modules() if type(m).__name__ in names)


@host
def bit_backbone() -> Host:
    model = upstream("bit", global_padding="same")
    return Host(model, pixels(), standardized(model))


@host
def timm_bit_classifier() -> Host:
    model = randomize_(
        ResNetV2(
            layers=[1, 1, 1, 1],
            channels=(128, 128, 128, 256),
            num_classes=5,
            stem_type="fixed",
            conv_layer=StdConv2d,
        )
    )
    return Host(model, (images(70, 61),), standardized(model), head="smooth")


@host
def d_fine() -> Host:
    config = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 32],
        "decoder_in_channels": [32, 32],
        "feat_strides": [4, 8],
        "num_feature_levels": 2,
        "encode_proj_layers": [1],
        "decoder_n_points": [2, 2],
    }
    made = hf.HGNetV2Config(**{**HGNET, "hidden_sizes": [16, 32]}, out_indices=[1, 2])
    found = detr_like("DFine", made, 0, **config)
    return replace(found, inputs=pixels(64, 96), head="discrete", rel=1e-4, dtype=torch.float32)


@host
def zoe_depth() -> Host:
    config = hf.ZoeDepthConfig(
        backbone_config=vit_config("beit", out_indices=[0, 1, 2, 3], reshape_hidden_states=False),
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_attractors=[2, 2, 2, 1],
        bin_embedding_dim=8,
        reassemble_factors=[2, 1, 1, 0.5],
    )
    model = randomize_(hf.ZoeDepthForDepthEstimation(config))
    return Host(model, pixels(35, 28), ("backbone",), 3, "smooth")
