"""Table of the libraries whose models `accelerate` knows."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Library:
    """A library of models.

    Attributes:
        name: beginning of the import paths of its model classes.
        is_backbone: whether a class takes pixels [B, C, H, W] and is a whole backbone, from pixels
            to maps, hidden states or logits. The outermost such module is replaced as a whole.
    """

    name: str
    is_backbone: Callable[[type], bool]


def full_name(cls: type) -> str:
    """Import path and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


_TRANSFORMERS_MODELS = {
    "transformers.models.beit.modeling_beit.BeitModel",
    "transformers.models.clip.modeling_clip.CLIPVisionModel",
    "transformers.models.deit.modeling_deit.DeiTModel",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers."
    "Dinov2WithRegistersModel",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
    "transformers.models.resnet.modeling_resnet.ResNetModel",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
    "transformers.models.swin.modeling_swin.SwinModel",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model",
    "transformers.models.vit.modeling_vit.ViTModel",
}
_TRANSFORMERS_MIXIN = "transformers.backbone_utils.BackboneMixin"
_TIMM_FEATURES = {
    "FeatureListNet",
    "FeatureDictNet",
    "FeatureGetterNet",
    "EfficientNetFeatures",
    "MobileNetV3Features",
}
_TORCHVISION_HEADS = ("torchvision.models.detection.", "torchvision.models.segmentation.")


def _of_transformers(cls: type) -> bool:
    names = {full_name(base) for base in cls.__mro__}
    return full_name(cls) in _TRANSFORMERS_MODELS or _TRANSFORMERS_MIXIN in names


def _of_timm(cls: type) -> bool:
    return cls.__name__ in _TIMM_FEATURES or hasattr(cls, "forward_features")


def _of_torchvision(cls: type) -> bool:
    return not cls.__module__.startswith(_TORCHVISION_HEADS)


LIBRARIES = (
    Library("transformers.", _of_transformers),
    Library("timm.models.", _of_timm),
    Library("torchvision.models.", _of_torchvision),
    Library("segmentation_models_pytorch.encoders.", lambda cls: True),
)


def is_backbone(module: nn.Module) -> bool:
    """Whether a module is a whole backbone of one of the libraries."""
    cls = type(module)
    return any(
        cls.__module__.startswith(library.name) and library.is_backbone(cls)
        for library in LIBRARIES
    )


def is_known_part(module: nn.Module) -> bool:
    """Whether a part of a block is PyTorch's or a library's own, not an adapter put into it."""
    name = type(module).__module__
    roots = {library.name.partition(".")[0] for library in LIBRARIES}
    return name.startswith("torch.nn.modules.") or name.partition(".")[0] in roots
