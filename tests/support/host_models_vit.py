"""Tiny random ViTs of transformers and timm: backbones, classifiers, towers, depth."""

from typing import Any

import timm
import transformers
from host_matrix import Host, host
from host_models_transformers import pixels, tokens
from reference_models import images, randomize_
from vit_models import TYPES, hf_vit, vit_config

hf: Any = transformers
N_LAYERS = 3
SIDE = {"height": 28, "width": 28}


def layers(path: str, n: int = N_LAYERS) -> tuple[str, ...]:
    """Names of the layers, where no whole backbone is replaced."""
    return tuple(f"{path}.{i}" for i in range(n))


# --- backbones, whose last layers no map depends on


def backbone(kind: str, **config: Any) -> Host:
    model = hf_vit(kind, out_indices=[0, 2], **config)
    return Host(model, pixels(36, 29), ("",), N_LAYERS)


@host
def dinov2_backbone() -> Host:
    return backbone("dinov2")


@host
def dinov2_with_registers_backbone() -> Host:
    return backbone("dinov2_with_registers", use_swiglu_ffn=True, reshape_hidden_states=False)


@host
def dinov3_backbone() -> Host:
    return Host(hf_vit("dinov3_vit"), pixels(36, 29), ("",), N_LAYERS)


@host
def beit_backbone() -> Host:
    model = hf_vit("beit", add_fpn=True, use_shared_relative_position_bias=True)
    return Host(model, pixels(36, 29), ("",), N_LAYERS)


# --- classifiers and towers


def classifier(kind: str, path: str, **config: Any) -> Host:
    name = f"{TYPES[kind][1]}ForImageClassification"
    model = randomize_(getattr(hf, name)(vit_config(kind, num_labels=5, **config)))
    return Host(model, pixels(**SIDE), layers(path), head="smooth", frozen=(path.split(".")[0],))


@host
def dinov2_for_image_classification() -> Host:
    return classifier("dinov2", "dinov2.encoder.layer", attn_implementation="eager")


@host
def vit_for_image_classification() -> Host:
    return classifier("vit", "vit.layers")


@host
def deit_for_image_classification() -> Host:
    return classifier("deit", "deit.layers")


@host
def beit_for_image_classification() -> Host:
    return classifier("beit", "beit.layers")


@host
def dinov3_model() -> Host:
    model = hf.DINOv3ViTModel(vit_config("dinov3_vit", use_gated_mlp=True, hidden_act="silu"))
    return Host(randomize_(model), pixels(36, 29), layers("model.layer"), head="smooth")


def towers(kind: str, model: Any, n_text: int, **text: Any) -> Host:
    """A model of images and texts, called with both; `n_text` layers of texts run ours."""
    vision = vit_config(kind).to_dict()
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **text}
    text |= {"num_attention_heads": 2, "vocab_size": 30, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 29}
    config = model.config_class(vision_config=vision, text_config=text, projection_dim=16)
    inputs = {**pixels(**SIDE), "input_ids": tokens(2, 6)}
    of_text = layers("text_model.encoder.layers", n_text)
    outermost = (*of_text, *layers("vision_model.encoder.layers"))
    return Host(randomize_(model(config)), inputs, outermost, head="smooth")


@host
def clip() -> Host:
    return towers("clip_vision_model", hf.CLIPModel, 0)


@host
def siglip() -> Host:
    return towers("siglip_vision_model", hf.SiglipModel, 1, projection_size=32)


# --- depth


@host
def depth_anything_dinov2() -> Host:
    config = hf.DepthAnythingConfig(
        backbone_config=vit_config("dinov2", out_indices=[0, 1, 2, 3], reshape_hidden_states=False),
        reassemble_hidden_size=32,
        patch_size=7,
        reassemble_factors=[2, 1, 1, 0.5],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_in_channels=8,
        head_hidden_size=4,
    )
    model = randomize_(hf.DepthAnythingForDepthEstimation(config))
    return Host(model, pixels(35, 28), ("backbone",), N_LAYERS, "smooth")


@host
def dpt_dinov2() -> Host:
    config = hf.DPTConfig(
        backbone_config=vit_config("dinov2", out_indices=[0, 1, 2, 3], reshape_hidden_states=False),
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[2, 1, 1, 0.5],
    )
    # this head always asks for hidden states
    model = randomize_(hf.DPTForDepthEstimation(config))
    return Host(model, pixels(35, 28), ("backbone",), N_LAYERS, "smooth")


# --- timm

TIMM = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_vit(name: str, **options: Any) -> Host:
    model = randomize_(timm.create_model(name, num_classes=5, **TIMM, **options))
    return Host(model, (images(28, 28),), layers("blocks", 2), head="smooth")


@host
def timm_dinov2_swiglu() -> Host:
    return timm_vit("vit_giant_patch14_reg4_dinov2", mlp_ratio=3.0)


@host
def timm_clip() -> Host:
    return timm_vit("vit_base_patch16_clip_quickgelu_224")


@host
def timm_dinov3() -> Host:
    return timm_vit("vit_small_plus_patch16_dinov3")


@host
def timm_eva_biases() -> Host:
    return timm_vit("eva_giant_patch14_224", mlp_ratio=2.0)
