"""Loads a model by its name, with its weights or with random ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..auto import AutoBackbone, AutoConfig
from ..backbone.base import Backbone
from ..backbone.configuration import BackboneConfig


def load_backbone(
    name: str,
    out_indices: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    random_weights: bool,
) -> Backbone:
    """Loads a backbone as users do, in eval mode.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        out_indices: of the maps; default: the model's own.
        dtype: of the weights.
        device: of the weights.
        random_weights: draws the weights, the same ones every time, and loads none.

    Raises:
        OSError: there is no such model, or it cannot be had.
        ValueError: an argument is invalid.
    """
    if not random_weights:
        options: dict[str, Any] = {} if out_indices is None else {"out_indices": out_indices}
        return AutoBackbone.from_pretrained(name, dtype=dtype, device=device, **options)
    config = config_without_weights(name, out_indices)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        backbone = AutoBackbone.from_config(config)
        draw_norms(backbone)
    return backbone.to(device, dtype).eval()


@torch.no_grad()
def draw_norms(module: nn.Module) -> None:
    """Draws biases, and weights and statistics of norms: at 0 and 1 a lost one would not show."""
    for name, tensor in module.state_dict().items():
        if tensor.ndim != 1 or not tensor.is_floating_point():
            continue
        if name.endswith((".weight", "running_var")):
            tensor.mul_(0.75 + 0.5 * torch.rand(tensor.shape))
        else:
            tensor.add_(0.1 * torch.randn(tensor.shape))


def config_without_weights(name: str, out_indices: Sequence[int] | None) -> BackboneConfig:
    """Reads the configuration of a model from which `AutoBackbone.from_config` loads no weights.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        out_indices: of the maps; default: the model's own.
    """
    options: dict[str, Any] = {} if out_indices is None else {"out_indices": list(out_indices)}
    config: Any = AutoConfig.from_pretrained(name, **options)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False
    return config
