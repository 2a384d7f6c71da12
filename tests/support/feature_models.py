"""Tiny models in directories of their libraries' formats, and pictures, for feature extraction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from reference_models import randomize_
from safetensors.torch import save_file
from torch import Tensor

from fastbb import AutoImageProcessor

PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 56, 3), dtype=np.uint8))
    for i in range(3)
]

SMALL_VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
# one of each kind: class token, average, registers, pooling by attention, windows, convolutions
TIMM_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (64, SMALL_VIT),
    "vit_small_patch14_dinov2": (56, {**SMALL_VIT, "img_size": 56}),
    "vit_small_patch14_reg4_dinov2": (56, {**SMALL_VIT, "img_size": 56}),
    "vit_base_patch16_clip_224": (64, SMALL_VIT),
    "vit_base_patch16_siglip_224": (64, SMALL_VIT),
    "deit_tiny_distilled_patch16_224": (64, SMALL_VIT),
    "beit_base_patch16_224": (64, SMALL_VIT),
    "eva02_tiny_patch14_224": (56, {**SMALL_VIT, "img_size": 56, "embed_dim": 48}),
    "swin_tiny_patch4_window7_224": (
        56,
        {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4), "img_size": 56},
    ),
    "test_vit3": (160, {}),
    "test_resnet": (64, {}),
    "test_convnext": (64, {}),
    "test_efficientnet": (64, {}),
    "test_mambaout": (64, {}),
    "test_nfnet": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "regnetx_002": (64, {}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "repvgg_a0": (64, {}),
    "levit_128s": (64, {"img_size": 64}),
    "inception_v3": (128, {}),  # whose forward is not made of two halves
}


def gap(got: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected magnitude."""
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()


def save_processor(directory: Path, size: int = 128) -> None:
    """Writes the preprocessor_config.json of a ViT for images of `size` x `size`."""
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (directory / "preprocessor_config.json").write_text(json.dumps(config))


def pixels_of(directory: Path | str) -> Tensor:
    """The pixels [3, 3, H, W] of `PICTURES` for a model."""
    return AutoImageProcessor.from_pretrained(directory)(PICTURES).pixel_values


def save_timm(
    directory: Path,
    name: str,
    size: int = 0,
    tag: str | None = None,
    state: dict[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Saves a timm model with random weights in timm's format, and returns it.

    Args:
        directory: made here.
        name: of the architecture.
        size: of the images, where it is not the model's own.
        tag: of the weights, in place of timm's default.
        state: weights in place of random ones.
        options: of `timm.create_model`; `head_bias=False` sets the bias of the head to zero.
    """
    has_bias = options.pop("head_bias", True)
    model = randomize_(timm.create_model(name, **options))
    if state is not None:
        model.load_state_dict(state)
    if not has_bias:
        torch.nn.init.zeros_(model.head.bias)
    found = timm.get_pretrained_cfg(name)
    cfg = {} if found is None else found.to_dict()
    cfg |= {"tag": tag} if tag else {}
    cfg |= {"input_size": [3, size, size]} if size else {}
    cfg["num_classes"] = model.num_classes
    config = {"architecture": name, "num_classes": model.num_classes, "pretrained_cfg": cfg}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "model_args": options}))
    state = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")
    return model


@torch.no_grad()
def without_classifier(model: Any, name: str, **options: Any) -> Any:
    """timm's own model for `num_classes=0`, with the weights of another."""
    bare = timm.create_model(name, **{**options, "num_classes": 0}).eval()
    state = model.state_dict()
    bare.load_state_dict({key: state[key] for key in bare.state_dict()})
    return bare
