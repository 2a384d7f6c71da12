"""A layer of a ViT on a CPU: some images at a time, so that hidden rows stay in the cache.

The matrix products take packed weights; oneDNN computes the activation and the residual with them,
and the layer scales are folded into the weights before them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels.onednn import pack_linear, packed_linear
from fastbb_kernels.ops.rope_qkv import rotate_

from ..weights.derived import derive
from .layers import attend, runs_packed_linears, scaled_linear
from .vit_parts import ViTBlockParts, ViTBlockSpec, ViTBlockWeights
from .vit_positions import Rotation

# size of the hidden rows of a part; about the size of a cache
PART_BYTES = 8 * 2**20


def runs_on_cpu(x: Tensor, spec: ViTBlockSpec, weights: ViTBlockWeights) -> bool:
    """Whether `vit_block_on_cpu` may compute a layer in this call; in inference only."""
    if spec.drop_path or spec.dropout or spec.attention_dropout:
        return False
    # small products of a scale and a weight would be zeros in fp16
    is_scaled = weights.scale1 is not None or weights.scale2 is not None
    if is_scaled and x.dtype == torch.float16:
        return False
    tensors = [tensor for tensor in weights if tensor is not None]
    return runs_packed_linears(x, weights.fc1_weight, tensors)


def vit_block_on_cpu(
    x: Tensor,
    parts: ViTBlockParts,
    spec: ViTBlockSpec,
    weights: ViTBlockWeights,
    rotation: Rotation | None,
    bias: Tensor | None,
) -> Tensor:
    """Computes `vit_block` in inference; see `runs_on_cpu`.

    Args:
        x: [B, N, C].
        parts: of the layer.
        spec: its semantics.
        weights: its tensors.
        rotation: of the patches' queries and keys, or None.
        bias: [1, num_heads, N, N], added to the scores, or None.

    Returns:
        [B, N, C].
    """
    packed = _packed(parts.owner, weights)
    n_hidden = weights.fc1_weight.shape[0] * (1 if weights.gate_weight is None else 2)
    n_images = max(1, PART_BYTES // (n_hidden * x.shape[1] * x.element_size()))
    results = [
        _layer(part, parts, spec, weights, packed, rotation, bias) for part in x.split(n_images)
    ]
    result = results[0] if len(results) == 1 else torch.cat(results)
    # strides of the residual, as the ops give
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


class _Packed(NamedTuple):
    """Packed weights; those before a layer scale, and their biases, are multiplied by it."""

    qkv: Tensor
    proj: Tensor
    proj_bias: Tensor | None
    gate: Tensor | None
    fc1: Tensor
    fc2: Tensor
    fc2_bias: Tensor | None


def _packed(owner: nn.Module, weights: ViTBlockWeights) -> _Packed:
    w = weights
    matrices = w.qkv_weight, w.proj_weight, w.fc1_weight, w.fc2_weight
    others = w.gate_weight, w.proj_bias, w.scale1, w.fc2_bias, w.scale2
    is_there = tuple(tensor is not None for tensor in others)

    def pack(qkv: Tensor, proj: Tensor, fc1: Tensor, fc2: Tensor, *found: Tensor) -> _Packed:
        left = iter(found)
        gate, proj_bias, scale1, fc2_bias, scale2 = (
            next(left) if there else None for there in is_there
        )
        proj, proj_bias = scaled_linear(proj, proj_bias, scale1)
        fc2, fc2_bias = scaled_linear(fc2, fc2_bias, scale2)
        return _Packed(
            pack_linear(qkv),
            pack_linear(proj),
            proj_bias,
            None if gate is None else pack_linear(gate),
            pack_linear(fc1),
            pack_linear(fc2),
            fc2_bias,
        )

    sources = *matrices, *(tensor for tensor in others if tensor is not None)
    return derive(owner, "packed", pack, *sources, constants=is_there)


def _layer(
    x: Tensor,
    parts: ViTBlockParts,
    spec: ViTBlockSpec,
    weights: ViTBlockWeights,
    packed: _Packed,
    rotation: Rotation | None,
    bias: Tensor | None,
) -> Tensor:
    """Computes the layer for some images [B, N, C]."""
    (B, N, C), (norm1, norm2) = x.shape, parts.norms
    rows = x.reshape(B * N, C)
    y = F.layer_norm(rows, (C,), weights.norm1_weight, weights.norm1_bias, norm1.eps)
    qkv = packed_linear(y, packed.qkv, weights.qkv_bias).view(B, N, 3, spec.num_heads, -1)
    if rotation is not None:
        rotate_(qkv, *rotation)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    y = attend(q, k, v, bias, 0.0, None).view(B * N, -1)
    rows = packed_linear(y, packed.proj, packed.proj_bias, residual=rows)
    y = F.layer_norm(rows, (C,), weights.norm2_weight, weights.norm2_bias, norm2.eps)
    if packed.gate is None:
        y = packed_linear(y, packed.fc1, weights.fc1_bias, activation=spec.activation)
    else:
        gate = packed_linear(y, packed.gate, weights.gate_bias, activation=spec.activation)
        y = gate.mul_(packed_linear(y, packed.fc1, weights.fc1_bias))
    return packed_linear(y, packed.fc2, packed.fc2_bias, residual=rows).view(B, N, C)
