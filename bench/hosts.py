"""Hosts around another backbone than their default one, for `fastbb bench --accelerate`.

    fastbb bench --accelerate bench.hosts:upernet --size 512

From the root of the checkout. The models have their full size and random weights; those that need
no builder, such as `DetrForObjectDetection` or `torchvision/deeplabv3_resnet50`, are not here.
"""

from typing import Any

from torch import nn

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swin_backbone() -> nn.Module:
    import transformers

    return transformers.SwinBackbone(_config("SwinConfig", out_features=STAGES))


def maskformer() -> nn.Module:
    return _head("MaskFormerForInstanceSegmentation", "MaskFormerConfig", "SwinConfig")


def mask2former() -> nn.Module:
    return _head("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", "SwinConfig")


def upernet() -> nn.Module:
    return _head("UperNetForSemanticSegmentation", "UperNetConfig", "SwinConfig")


def detr() -> nn.Module:
    """DETR around transformers' ResNet-50, not timm's."""
    return _head("DetrForObjectDetection", "DetrConfig", "ResNetConfig", use_timm_backbone=False)


def smp_unet() -> nn.Module:
    return _smp_unet("resnet50")


def smp_swin() -> nn.Module:
    return _smp_unet("tu-swin_tiny_patch4_window7_224")


def _head(name: str, config: str, backbone: str, **fields: Any) -> nn.Module:
    """A head of transformers around a backbone of the usual size."""
    import transformers

    inner = _config(backbone, out_features=STAGES)
    return getattr(transformers, name)(_config(config, backbone_config=inner, **fields))


def _config(name: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**fields)


def _smp_unet(encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder, encoder_weights=None)
