"""Tiny random models of transformers and timm around Swin V2."""

from typing import Any

import timm
import transformers
from host_matrix import Host, host
from reference_models import images
from swin_v2_models import SHAPE, TIMM, WINDOW, hf_swinv2, randomize_swinv2_

hf: Any = transformers  # its configurations take more than their signatures say
BLOCKS = 6


def block_names(path: str) -> tuple[str, ...]:
    return tuple(
        f"{path}{stage}.blocks.{i}" for stage, n in enumerate(SHAPE["depths"]) for i in range(n)
    )


def config(**fields: Any) -> Any:
    return hf.Swinv2Config(**SHAPE, **WINDOW, drop_path_rate=0.0, **fields)


def pixels() -> dict[str, Any]:
    return {"pixel_values": images(70, 61)}


@host
def swinv2_backbone() -> Host:
    return Host(hf_swinv2(), pixels(), ("",), BLOCKS)


@host
def swinv2_model() -> Host:
    return Host(hf_swinv2("Model"), pixels(), block_names("encoder.layers."), head="smooth")


@host
def swinv2_for_image_classification() -> Host:
    model = hf_swinv2("ForImageClassification", num_labels=5)
    parts = block_names("swinv2.encoder.layers.")
    return Host(model, pixels(), parts, head="smooth", frozen=("swinv2",))


@host
def uper_net_swinv2() -> Host:
    made = hf.UperNetConfig(
        backbone_config=config(out_indices=[1, 2, 3, 4]),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=64,
        auxiliary_channels=16,
        num_labels=3,
    )
    model = randomize_swinv2_(hf.UperNetForSemanticSegmentation(made))
    return Host(model, pixels(), ("backbone",), BLOCKS, "smooth")


@host
def mask2_former_swinv2() -> Host:
    made = hf.Mask2FormerConfig(
        backbone_config=config(out_indices=[1, 2, 3, 4]),
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
    model = randomize_swinv2_(hf.Mask2FormerForUniversalSegmentation(made))
    outermost = ("model.pixel_level_module.encoder",)
    return Host(model, pixels(), outermost, BLOCKS, "discrete")


def timm_swinv2(**settings: Any) -> Any:
    sizes = {**SHAPE, "window_size": 8, "img_size": (72, 60)}
    return randomize_swinv2_(timm.create_model(TIMM, pretrained=False, **sizes, **settings))


@host
def timm_swinv2_classifier() -> Host:
    model = timm_swinv2(num_classes=5)
    return Host(model, (images(72, 60),), block_names("layers."), head="smooth")


@host
def timm_swinv2_features() -> Host:
    model = timm_swinv2(features_only=True)
    return Host(model, (images(72, 60),), block_names("layers_"), head="smooth")
