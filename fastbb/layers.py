"""Parts that families share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbb_kernels import ACTIVATIONS, conv_bn_act


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drops whole samples of a residual branch (stochastic depth, Huang et al. 2016).

    Args:
        x: [B, ...].
        rate: probability of dropping a sample; the others are scaled up.
        training: False leaves `x` as it is.
    """
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x.div(keep) * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


def check_untouched(backbone: nn.Module) -> None:
    """Refuses changes that computing from the parameters would silently pass over.

    Raises:
        ValueError: a submodule has forward hooks, or was replaced by one that computes otherwise
            (LoRA, quantized layers).
    """
    for name, module in backbone.named_modules():
        if module is backbone or ".parametrizations." in name:
            continue  # the weight that is read has passed its parametrizations
        if has_hooks(module):
            raise ValueError(
                f"{type(backbone).__name__} computes from its parameters, so the hooks of {name!r} "
                "(or a forward put on it) would never run: remove them, or hook the whole backbone"
            )
        if type(module).forward not in _KNOWN_FORWARDS:
            raise ValueError(
                f"{type(backbone).__name__} computes from its parameters, so the "
                f"{type(module).__name__} put in place of {name!r} would be passed over: "
                "merge adapters into the weights first"
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see or change what passes through a module, or replaced it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


_KNOWN = (nn.Module, nn.Identity, nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d)
_KNOWN_FORWARDS = {cls.forward for cls in (*_KNOWN, nn.SyncBatchNorm)}


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies a convolution, its batch norm, a residual and an activation; one op in inference.

    Args:
        conv: zero-padded convolution.
        norm: batch norm, which in training uses the statistics of the batch, or a frozen one.
        x: [B, C_in, H, W].
        activation: name of the activation, or None.
        residual: [B, C, h, w], added before the activation, or None.

    Returns:
        [B, C, h, w].
    """
    statistics: Any = norm
    if statistics.running_mean is None or (norm.training and isinstance(norm, _BatchNorm)):
        # statistics of the batch: the module updates its own running ones
        x = norm(conv(x))
        x = x if residual is None else x + residual
        return x if activation is None else ACTIVATIONS[activation](x)
    return conv_bn_act(
        x,
        conv.weight,
        conv.bias,
        statistics.running_mean,
        statistics.running_var,
        statistics.weight,
        statistics.bias,
        eps=statistics.eps,
        stride=_pair(conv.stride),
        padding=_pair(conv.padding),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        residual=residual,
        activation=activation,
    )


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Whether a module is a plain or frozen batch norm, without an activation of its own."""
    return type(norm) is nn.BatchNorm2d or type(norm).__name__ == "FrozenBatchNorm2d"


def _pair(value: object) -> tuple[int, int]:
    """A pair that Conv2d holds, typed."""
    assert isinstance(value, tuple)
    return value
