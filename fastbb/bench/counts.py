"""Parameters, multiply-adds and activations of a model, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
# attention is two batched products on the meta device
_COUNTED = frozenset((_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution))


class Counts(NamedTuple):
    """Of one image.

    Attributes:
        params: number of parameters; a shared one counts once.
        macs: multiply-adds of matrix products, convolutions and attention; None where the model
            does not run on the meta device.
        activations: elements that these write, as fvcore's `ActivationCountAnalysis` counts them;
            None as above.
    """

    params: int
    macs: int | None
    activations: int | None


def count(
    run: Callable[[nn.Module, Tensor], object],
    module: nn.Module,
    size: tuple[int, int],
    channels: int = 3,
) -> Counts:
    """Counts what a model computes for one image.

    timm's tables have a little more: they include the head (2 million multiply-adds of ResNet-50's
    4.11 billion), and fvcore counts norms (22 million).

    Args:
        run: calls the module with pixels.
        module: on any device; it is not changed.
        size: (height, width) of the image.
        channels: of the image.
    """
    params = sum(parameter.numel() for parameter in module.parameters())
    activations = _Activations()
    try:
        on_meta = meta_copy(module)
        pixels = torch.empty(1, channels, *size, device="meta", dtype=_dtype(module))
        # the mode entered last takes ops apart first
        with torch.no_grad(), activations, FlopCounterMode(display=False) as flops:
            run(on_meta, pixels)
    except Exception:  # of any model: values that decide, ops without a meta kernel
        return Counts(params, None, None)
    return Counts(params, flops.get_total_flops() // 2, activations.n_elements)


def _dtype(module: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())


def meta_copy(module: nn.Module) -> nn.Module:
    """Copies a module without the memory of its weights."""
    weights: dict[int, Any] = {}
    for parameter in module.parameters():
        weights[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    for buffer in module.buffers():
        weights[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, weights).eval()


class _Activations(TorchDispatchMode):
    """Adds up the elements of the results of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COUNTED:
            self.n_elements += result.numel()
        return result
