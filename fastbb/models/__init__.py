"""The families: one file each."""

from .resnet import ResNetBackbone
from .swin import MaskFormerSwinConfig, SwinBackbone, SwinConfig, TorchvisionSwinConfig
from .timm import TimmBackbone, TimmBackboneConfig

__all__ = []
