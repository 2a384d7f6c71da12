"""The MLP of a ConvNeXt block on a CPU: some rows at a time, so that hidden rows stay in the cache.

The matrix products take packed weights; oneDNN computes the activation and the residual with them,
and the layer scale is folded into the second weight. Eager PyTorch reads and writes the hidden map
twice more, and the result four times.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbb_kernels.onednn import pack_linear, packed_linear

from ..weights.derived import derive
from .convnext_parts import ConvNextBlockParts
from .layers import runs_packed_linears, scaled_linear

# size of the hidden rows of a part; about the size of a cache
PART_BYTES = 8 * 2**20


def runs_on_cpu(x: Tensor, parts: ConvNextBlockParts) -> bool:
    """Whether `mlp_on_cpu` may compute the MLP of a block in this call; in inference only."""
    if x.device.type != "cpu":
        return False
    layers: tuple[Any, ...] = (parts.conv, parts.norm, parts.fc1, parts.fc2, parts.grn)
    found = [(layer.weight, layer.bias) for layer in layers if layer is not None]
    tensors = [tensor for pair in found for tensor in pair if tensor is not None]
    scale = parts.scale()
    tensors += [] if scale is None else [scale]
    return runs_packed_linears(x, parts.fc1.weight, tensors)


def mlp_on_cpu(x: Tensor, residual: Tensor, parts: ConvNextBlockParts) -> Tensor:
    """Computes `residual + scale * mlp(norm(x))` in inference; see `runs_on_cpu`.

    Args:
        x: [B, H, W, C], result of the depthwise convolution.
        residual: [B, H, W, C].
        parts: of the block.

    Returns:
        [B, H, W, C].
    """
    batch, height, width, channels = x.shape
    packed = _packed(parts)
    rows, residual = x.reshape(-1, channels), residual.reshape(-1, channels)
    # the response of a channel is normalized over its whole image
    unit = 1 if parts.grn is None else height * width
    hidden_bytes = parts.fc1.weight.shape[0] * x.element_size()
    n_rows = max(1, PART_BYTES // (hidden_bytes * unit)) * unit
    results = [
        _mlp(some, others, unit, parts, packed)
        for some, others in zip(rows.split(n_rows), residual.split(n_rows))
    ]
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result.view(x.shape)


class _Packed(NamedTuple):
    """Packed weights; bias and scale of the second layer, of which the scale may be folded in."""

    fc1: Tensor
    fc2: Tensor
    bias: Tensor
    scale: Tensor | None


def _packed(parts: ConvNextBlockParts) -> _Packed:
    scale = parts.scale()
    sources = [parts.fc1.weight, parts.fc2.weight, parts.fc2.bias]
    sources += [] if scale is None else [scale]
    return derive(parts.owner, "packed", _pack, *sources)  # type: ignore[arg-type]  # has a bias


def _pack(fc1: Tensor, fc2: Tensor, bias: Tensor, scale: Tensor | None = None) -> _Packed:
    fc1, fc2 = fc1.flatten(1), fc2.flatten(1)
    if scale is not None and fc2.dtype != torch.float16:  # whose small products would be zeros
        fc2, scaled_bias = scaled_linear(fc2, bias, scale)
        assert scaled_bias is not None
        bias, scale = scaled_bias, None
    return _Packed(pack_linear(fc1), pack_linear(fc2), bias, scale)


def _mlp(
    x: Tensor, residual: Tensor, unit: int, parts: ConvNextBlockParts, packed: _Packed
) -> Tensor:
    """Computes the MLP of rows [n, C], a multiple of `unit`, the pixels of an image."""
    norm = parts.norm
    x = F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps)
    x = packed_linear(x, packed.fc1, parts.fc1.bias, activation=parts.activation)
    if parts.grn is not None:
        x = _response_normalized(x.view(-1, unit, x.shape[1]), parts).view(x.shape)
    if packed.scale is None:
        return packed_linear(x, packed.fc2, packed.bias, residual=residual)
    return torch.addcmul(residual, packed.scale, packed_linear(x, packed.fc2, packed.bias))


def _response_normalized(x: Tensor, parts: ConvNextBlockParts) -> Tensor:
    """Normalizes images [n, P, F] in one pass after that of the norms."""
    # a third of the time of `vector_norm`, which is slow over other dimensions than the last
    norms = x.float().square().sum(dim=1, keepdim=True).sqrt()
    relative = norms / (norms.mean(dim=-1, keepdim=True) + parts.grn_eps)
    factors = (1.0 + parts.grn.weight.flatten() * relative).to(x.dtype)
    return torch.addcmul(parts.grn.bias.flatten(), x, factors)
