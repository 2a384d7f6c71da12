"""Fast vision backbones that compute exactly what their own libraries compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import AutoBackbone, AutoConfig, list_backbones
    from .backbone.base import BackboneMixin
    from .backbone.configuration import BackboneConfigMixin
    from .backbone.output import BackboneOutput
    from .extraction import (
        FeatureExtractor,
        export_features,
        extract,
        open_features,
        verify_features,
    )
    from .hosts import heads as heads
    from .hosts.accelerate import AccelerateReport, AccelerateWarning, accelerate, restore
    from .hosts.heads import MaskFormerConfig as MaskFormerConfig
    from .hosts.heads import MaskFormerForInstanceSegmentation as MaskFormerForInstanceSegmentation
    from .hosts.heads import register as register
    from .hosts.heads import unregister as unregister
    from .hosts.transformers_backbone import TransformersBackbone
    from .hosts.transformers_config import TransformersBackboneConfig
    from .images.processor import AutoImageProcessor, ImageProcessor
    from .models.resnet import ResNetBackbone, ResNetConfig
    from .models.swin import SwinBackbone, SwinConfig
    from .models.swin_config import Swinv2Config as Swinv2Config
    from .models.swin_v2 import Swinv2Backbone as Swinv2Backbone
    from .models.timm import TimmBackbone, TimmBackboneConfig
    from .models.vit import ViTBackbone as ViTBackbone
    from .models.vit_config import BeitConfig as BeitConfig
    from .models.vit_config import CLIPVisionConfig as CLIPVisionConfig
    from .models.vit_config import DeiTConfig as DeiTConfig
    from .models.vit_config import Dinov2Config as Dinov2Config
    from .models.vit_config import Dinov2WithRegistersConfig as Dinov2WithRegistersConfig
    from .models.vit_config import DINOv3ViTConfig as DINOv3ViTConfig
    from .models.vit_config import SiglipVisionConfig as SiglipVisionConfig
    from .models.vit_config import ViTConfig as ViTConfig

__version__ = "0.2.0"

# without what is in `heads`, which needs an extra: `from fastbb import *` works without it
__all__ = [
    "AccelerateReport",
    "AccelerateWarning",
    "AutoBackbone",
    "AutoConfig",
    "AutoImageProcessor",
    "BackboneConfigMixin",
    "BackboneMixin",
    "BackboneOutput",
    "FeatureExtractor",
    "ImageProcessor",
    "ResNetBackbone",
    "ResNetConfig",
    "SwinBackbone",
    "SwinConfig",
    "TimmBackbone",
    "TimmBackboneConfig",
    "TransformersBackbone",
    "TransformersBackboneConfig",
    "accelerate",
    "export_features",
    "extract",
    "list_backbones",
    "open_features",
    "restore",
    "verify_features",
]

_MODULES = {
    "hosts.accelerate": ("AccelerateReport", "AccelerateWarning", "accelerate", "restore"),
    "auto": ("AutoBackbone", "AutoConfig", "list_backbones"),
    "backbone.base": ("BackboneMixin",),
    "backbone.output": ("BackboneOutput",),
    "backbone.configuration": ("BackboneConfigMixin",),
    "extraction": (
        "FeatureExtractor",
        "export_features",
        "extract",
        "open_features",
        "verify_features",
    ),
    "hosts.heads": (
        "MaskFormerConfig",
        "MaskFormerForInstanceSegmentation",
        "register",
        "unregister",
    ),
    "hosts.transformers_backbone": ("TransformersBackbone",),
    "hosts.transformers_config": ("TransformersBackboneConfig",),
    "images.processor": ("AutoImageProcessor", "ImageProcessor"),
    "models.resnet": ("ResNetBackbone", "ResNetConfig"),
    "models.swin": ("SwinBackbone", "SwinConfig"),
    "models.timm": ("TimmBackbone", "TimmBackboneConfig"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # lazy (PEP 562), so that importing fastbb costs nothing
    if name == "heads":
        return import_module(".hosts.heads", __name__)
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name.endswith(("Backbone", "Config")):
        value = _of_a_family(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _of_a_family(name: str) -> Any:
    """Finds a class of a family that has no line above."""
    import_module(".models", __name__)
    for family in import_module(".backbone.registry", __name__).FAMILIES:
        for cls in (family.backbone, *family.configs):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "heads"})
