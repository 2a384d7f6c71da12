"""The families, each in files that begin with its name. Importing them registers them."""

from . import resnet, swin, timm

__all__ = ["resnet", "swin", "timm"]
