"""The weights of a convolution with its batch norm folded in, and the rule when calls may use them.

In inference a batch norm is an affine map of each channel, so it can be merged into the weights of
the convolution that feeds it. Parameters and state dict do not change: folded weights are derived
tensors, computed in float64, cast once, and computed again when a source changes.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.modules.batchnorm import _BatchNorm

from fastbb_kernels._dispatch import is_plainly_eager
from fastbb_kernels.onednn import pack_conv, packs

from .derived import derive, forget_derived, is_tracing, is_transformed
from .watch import STATISTICS

FROZEN_EPS = 1e-5  # of transformers' frozen norms, which have no `eps`


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Computes weight and bias of the convolution that equals `batch_norm(conv2d(x))`, in float64.

    Args:
        weight: [C, C_in / groups, kh, kw].
        bias: [C] or None, of the convolution.
        running_mean: [C].
        running_var: [C].
        norm_weight: [C] or None.
        norm_bias: [C] or None.
        eps: added to the variance; may be 0.

    Returns:
        weight like `weight` and bias [C], float64.
    """
    scale = (running_var.double() + eps).rsqrt()
    if norm_weight is not None:
        scale = scale * norm_weight.double()
    shift = -running_mean.double() if bias is None else bias.double() - running_mean.double()
    shift = shift * scale
    if norm_bias is not None:
        shift = shift + norm_bias.double()
    return weight.double() * scale.view(-1, 1, 1, 1), shift


def folded(conv: nn.Conv2d, norm: nn.Module, channels_last: bool = True) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm(conv(x))`, cached.

    Args:
        conv: convolution.
        norm: batch norm with running statistics.
        channels_last: layout of the weight, which PyTorch also gives the output; kernels read wide
            rows in it. False keeps the layout of `conv`.
    """
    eps, sources, present = _sources(conv, norm)

    def compute(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = _fold(tensors, present, eps)
        return _as_weight(weight, conv, channels_last), bias.to(conv.weight.dtype)

    name = "folded, channels last" if channels_last else "folded"
    return derive(conv, name, compute, *sources, constants=(eps, present), statistics=_STATISTICS)


def folded_packed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm(conv(x))` for `packed_conv`, cached for two shapes of x.

    The layout depends on the shape. Packing again costs as much as in PyTorch's own convolution,
    which packs in every call.
    """
    weight, bias = folded(conv, norm)
    shape = tuple(x.shape)

    def compute(weight: Tensor) -> tuple[Tensor]:
        return (pack_conv(weight, shape, **geometry(conv)),)

    constants = shape, *geometry(conv).values()
    name = f"packed {_slot(conv, shape)}"
    (packed,) = derive(conv, name, compute, weight, constants=constants)
    return packed, bias


_N_PACKED = 2
_Slots = OrderedDict[tuple[int, ...], int]
_slots: weakref.WeakKeyDictionary[nn.Conv2d, _Slots] = weakref.WeakKeyDictionary()
_slots_lock = threading.Lock()


def _slot(conv: nn.Conv2d, shape: tuple[int, ...]) -> int:
    """The slot of the weights packed for a shape; replaces the least recently used shape."""
    with _slots_lock:
        slots = _slots.setdefault(conv, OrderedDict())
        if shape not in slots:
            slots[shape] = len(slots) if len(slots) < _N_PACKED else slots.popitem(last=False)[1]
        slots.move_to_end(shape)
        return slots[shape]


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups, as keyword arguments of the convolution ops."""
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def runs_packed(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a call that may use folded weights may use packed ones: it is eager, on a CPU."""
    if is_tracing() or not is_plainly_eager(x, None) or x.device.type != "cpu":
        return False
    if type(x) is not Tensor or is_transformed(x) or not x.numel():
        return False
    return isinstance(conv.padding, tuple) and packs(x.dtype)


def folded_with_shortcut(
    conv: nn.Conv2d, norm: nn.Module, shortcut: nn.Conv2d, shortcut_norm: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Both weights and the common bias of `norm(conv(x)) + shortcut_norm(shortcut(y))`, cached."""
    eps, sources, present = _sources(conv, norm)
    other_eps, others, other_present = _sources(shortcut, shortcut_norm)

    def compute(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = _fold(tensors[: len(sources)], present, eps)
        shortcut_weight, shortcut_bias = _fold(tensors[len(sources) :], other_present, other_eps)
        bias = (bias + shortcut_bias).to(conv.weight.dtype)
        return _as_weight(weight, conv), _as_weight(shortcut_weight, shortcut), bias

    constants = (eps, other_eps, present, other_present)
    name = "folded with shortcut"
    statistics = [*_STATISTICS, *(len(sources) + position for position in _STATISTICS)]
    return derive(
        conv, name, compute, *sources, *others, constants=constants, statistics=statistics
    )


def _sources(conv: nn.Conv2d, norm: Any) -> tuple[float, list[Tensor], tuple[bool, ...]]:
    """eps, the tensors that a folded weight is computed from, and which of seven are present."""
    # the count is a source because its version changes with the statistics, see `derive`
    found = [_tensor(norm, name) for name in _NORM_TENSORS]
    found += [_tensor(conv, "weight"), _tensor(conv, "bias")]
    present = tuple([tensor is not None for tensor in found])
    tensors = [tensor for tensor in found if tensor is not None]
    return getattr(norm, "eps", FROZEN_EPS), tensors, present


_NORM_TENSORS = (*STATISTICS, "weight", "bias", "num_batches_tracked")
_STATISTICS = range(len(STATISTICS))  # positions in the tensors of `_sources`


def _tensor(module: Any, name: str) -> Tensor | None:
    """`getattr(module, name, None)`, without nn.Module's look-up, most of a call's overhead."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name, None)


def _fold(
    tensors: Iterable[Tensor], present: tuple[bool, ...], eps: float
) -> tuple[Tensor, Tensor]:
    given = iter(tensors)
    values = (next(given) if there else None for there in present)
    mean, var, norm_weight, norm_bias, _count, weight, bias = values
    assert mean is not None and var is not None and weight is not None
    return fold_batch_norm(weight, bias, mean, var, norm_weight, norm_bias, eps=eps)


def _as_weight(weight: Tensor, conv: nn.Conv2d, channels_last: bool = True) -> Tensor:
    weight = weight.to(conv.weight.dtype)
    if not channels_last:
        return weight.to(memory_format=suggest_memory_format(conv.weight))
    if weight.shape[1] == 1:  # depthwise: the output's channels come last
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return weight.contiguous(memory_format=torch.channels_last)


def runs_folded(conv: nn.Conv2d, norm: Any, x: Tensor | None = None) -> bool:
    """Whether a call may use folded weights: it needs no gradient and no statistics of the batch.

    The mode of the norm decides and not that of the model, because frozen norms stay in eval mode.
    A call that needs a gradient frees folded weights, because the parameters are about to change.

    Args:
        conv: convolution.
        norm: batch norm.
        x: input of the call; None: whether calls with some input may use folded weights.
    """
    if _tensor(norm, "running_mean") is None or conv.padding_mode != "zeros":
        return False
    if isinstance(norm, _BatchNorm) and (
        norm.training or _tensor(norm, "num_batches_tracked") is None
    ):
        return False
    weight = conv.weight
    tracing = is_tracing()
    if tracing and not weight.is_cuda:
        return False  # a compiler fuses the norm itself, and would fold again in every call
    if torch.is_grad_enabled():
        tensors = (x, weight, conv.bias, norm.weight, norm.bias)
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            if not tracing:
                forget_derived(conv)
            return False
    if not tracing and (type(weight) is not nn.Parameter or weight.is_inference()):
        return False  # folded weights could not be cached, and folding costs more than it saves
    if autocasts(weight.device.type):
        return False
    return x is None or x.dtype == weight.dtype


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast chooses the dtypes on a type of device."""
    # is_autocast_enabled raises for some devices without autocast
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
