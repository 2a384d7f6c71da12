"""Tiny random models of transformers: detectors around backbones, and one for video."""

from dataclasses import replace
from typing import Any

import torch
from host_matrix import Host, host
from host_models_transformers import (
    DETR,
    RESNET,
    RESNET_BLOCKS,
    SWIN_PARTS,
    TIMM_BLOCKS,
    hf,
    pixels,
    resnet_config,
    swin_config,
    timm_resnet_config,
    tokens,
)
from host_models_vision import TIMM_SWIN_SIZES, timm_swin_parts
from reference_models import images, randomize_

# of deformable attention
FEW_POINTS: dict[str, Any] = {"encoder_n_points": 2, "decoder_n_points": 2}


def detr_like(
    name: str, backbone_config: Any, inner: int, path: str = "model.backbone.model", **config: Any
) -> Host:
    """Model of the DETR family without ranking of queries."""
    settings = getattr(hf, f"{name}Config")(backbone_config=backbone_config, **{**DETR, **config})
    model = getattr(hf, f"{name}ForObjectDetection")(settings)
    return Host(randomize_(model), pixels(), (path,), inner, "smooth")


@host
def detr_timm() -> Host:
    return detr_like("Detr", timm_resnet_config(), TIMM_BLOCKS)


@host
def detr_resnet() -> Host:
    return detr_like("Detr", resnet_config(), RESNET_BLOCKS)


@host
def conditional_detr() -> Host:
    return detr_like("ConditionalDetr", timm_resnet_config(), TIMM_BLOCKS)


@host
def dab_detr() -> Host:
    path = "model.backbone.conv_encoder.model"
    host = detr_like("DabDetr", timm_resnet_config(), TIMM_BLOCKS, path, hidden_size=32)
    return replace(host, dtype=torch.float32)  # upstream does not run in float64


@host
def table_transformer() -> Host:
    path = "model.backbone.conv_encoder.model"
    return detr_like("TableTransformer", timm_resnet_config(), TIMM_BLOCKS, path)


@host
def deformable_detr() -> Host:
    backbone = timm_resnet_config(2, 3, 4)
    return detr_like("DeformableDetr", backbone, TIMM_BLOCKS, **FEW_POINTS)


@host
def deformable_detr_two_stage() -> Host:
    two_stage = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 5}
    backbone = resnet_config(2, 3, 4)
    host = detr_like("DeformableDetr", backbone, RESNET_BLOCKS, **FEW_POINTS, **two_stage)
    return replace(host, head="discrete")


def rt_detr(name: str) -> Host:
    backbone = hf.RTDetrResNetConfig(**RESNET, out_indices=[2, 3, 4])
    config = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [24, 32, 48],
        "decoder_in_channels": [32, 32, 32],
        "decoder_n_points": 2,
    }
    host = detr_like(name, backbone, RESNET_BLOCKS, **config)
    # its maps meet after upsampling by two
    return replace(host, inputs=pixels(64, 96), head="discrete")


@host
def rt_detr_v1() -> Host:
    return rt_detr("RTDetr")


@host
def rt_detr_v2() -> Host:
    return rt_detr("RTDetrV2")


@host
def grounding_dino() -> Host:
    text = {
        "model_type": "bert",
        "vocab_size": 2000,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    path = "model.backbone.conv_encoder.model"
    config = {**FEW_POINTS, "text_config": text, "max_text_len": 16}
    host = detr_like("GroundingDino", swin_config(2, 3, 4), SWIN_PARTS, path, **config)
    # [CLS] words . words . [SEP], by the ids that separate phrases
    phrases = [101, 7, 8, 1012, 9, 1012, 102]
    inputs = {**pixels(), "input_ids": torch.tensor([phrases, phrases])}
    return replace(host, inputs=inputs, head="discrete")


@host
def omdet_turbo() -> Host:
    text = {
        "model_type": "clip_text_model",
        "vocab_size": 40,
        "bos_token_id": 38,
        "eos_token_id": 39,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 8,
    }
    config = hf.OmDetTurboConfig(
        text_config=text,
        image_size=64,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        task_encoder_hidden_dim=32,
        class_embed_dim=16,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[32, 64, 128],
        encoder_hidden_dim=32,
        encoder_dim_feedforward=32,
        encoder_attention_heads=4,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=32,
        decoder_num_points=2,
        num_queries=5,
    )
    config.timm_kwargs = {**TIMM_SWIN_SIZES, "img_size": (64, 96), "always_partition": True}
    model = hf.OmDetTurboForObjectDetection(config)
    parts = timm_swin_parts("vision_backbone.vision_backbone._backbone.layers_")
    classes = tokens(4, 6)
    inputs = {
        **pixels(64, 96),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tokens(2, 6),
        "tasks_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }
    frozen = ("vision_backbone.vision_backbone",)
    return Host(randomize_(model), inputs, parts, head="discrete", frozen=frozen)


@host
def tvp() -> Host:
    config = hf.TvpConfig(
        backbone_config=resnet_config(4),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=40,
        max_position_embeddings=16,
        max_grid_col_position_embeddings=8,
        max_grid_row_position_embeddings=8,
        max_img_size=70,
        visual_prompt_size=16,
        num_frames=4,
    )
    model = hf.TvpForVideoGrounding(config)
    frames = images(70, 70, batch=4).unsqueeze(0)  # upstream takes one video at a time
    ids = tokens(1, 5)
    inputs = {"pixel_values": frames, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    outermost = ("model.vision_model.backbone",)
    frozen = (*outermost, "model.visual_prompter")  # runs before the backbone
    return Host(randomize_(model), inputs, outermost, RESNET_BLOCKS, "smooth", frozen=frozen)
