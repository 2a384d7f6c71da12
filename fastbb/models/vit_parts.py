"""The parts that the forward of a ViT takes.

Layers are found and checked once. Tensors and eps are read at every call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights.derived import derive
from .vit_positions import Grid, PositionRules, Rotation


@dataclass(frozen=True)
class ViTBlockSpec:
    """Semantics of a layer; rates of dropout are 0 in inference.

    Attributes:
        num_heads: attention heads.
        activation: of the MLP, or of its gate.
        drop_path: stochastic depth of both branches.
        dropout: of both branches.
        attention_dropout: of the attention weights.
    """

    num_heads: int
    activation: str = "gelu"
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0


class ViTBlockWeights(NamedTuple):
    """Tensors of a layer, read for one call. C channels, F hidden channels."""

    norm1_weight: Tensor  # [C]
    norm1_bias: Tensor  # [C]
    qkv_weight: Tensor  # [3C, C]
    qkv_bias: Tensor | None  # [3C]
    proj_weight: Tensor  # [C, C]
    proj_bias: Tensor | None  # [C]
    scale1: Tensor | None  # [C]
    norm2_weight: Tensor  # [C]
    norm2_bias: Tensor  # [C]
    gate_weight: Tensor | None  # [F, C]
    gate_bias: Tensor | None  # [F]
    fc1_weight: Tensor  # [F, C]
    fc1_bias: Tensor | None  # [F]
    fc2_weight: Tensor  # [C, F]
    fc2_bias: Tensor | None  # [C]
    scale2: Tensor | None  # [C]


@dataclass(frozen=True)
class ViTBlockParts:
    """The layers of a block.

    Attributes:
        owner: the block; fused weights are cached for it.
        norms: before the attention and the MLP.
        projections: to queries, keys and values, in three layers or in one.
        proj: after the attention.
        scales: layer scales [C] or None, read at every call.
        fc1: first layer of the MLP.
        fc2: second layer of the MLP.
        gate: layer whose activated result is multiplied with that of `fc1`, or None.
        spec: reads the semantics for a call.
        position_bias: its own relative position bias, or None.
    """

    owner: nn.Module
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    projections: tuple[nn.Linear, ...]
    proj: nn.Linear
    scales: Callable[[], tuple[Tensor | None, Tensor | None]]
    fc1: nn.Linear
    fc2: nn.Linear
    gate: nn.Linear | None
    spec: Callable[[], ViTBlockSpec]
    position_bias: Any = None

    def weights(self) -> ViTBlockWeights:
        """Reads the tensors for a call; fused ones are cached."""
        first, second = self.norms
        qkv_weight, qkv_bias = self.qkv()
        scale1, scale2 = self.scales()
        gate_weight, gate_bias, fc1_weight, fc1_bias = self.hidden()
        return ViTBlockWeights(
            first.weight,
            first.bias,
            qkv_weight,
            qkv_bias,
            self.proj.weight,
            self.proj.bias,
            scale1,
            second.weight,
            second.bias,
            gate_weight,
            gate_bias,
            fc1_weight,
            fc1_bias,
            self.fc2.weight,
            self.fc2.bias,
            scale2,
        )

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """Weight [3C, C] and bias [3C] of queries, keys and values."""
        if len(self.projections) == 1:
            return self.projections[0].weight, self.projections[0].bias
        weights = [linear.weight for linear in self.projections]
        biases = [linear.bias for linear in self.projections]
        return derive(
            self.owner,
            "qkv",
            partial(_fused, [bias is not None for bias in biases]),
            *weights,
            *(bias for bias in biases if bias is not None),
        )

    def hidden(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Weight [F, C] and bias [F] of the gate, and of the first layer."""
        gate = self.gate
        gate_weight, gate_bias = (None, None) if gate is None else (gate.weight, gate.bias)
        return gate_weight, gate_bias, self.fc1.weight, self.fc1.bias


def _fused(has_bias: list[bool], *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Concatenates weights and biases of queries, keys and values; a missing bias is zeros.

    Args:
        has_bias: which of the three have one.
        tensors: three weights [C, C], and the biases [C] that there are.
    """
    weights, biases = tensors[:3], iter(tensors[3:])
    if not any(has_bias):
        return torch.cat(weights), None
    filled = [
        next(biases) if has else weight.new_zeros(weight.shape[0])
        for has, weight in zip(has_bias, weights)
    ]
    return torch.cat(weights), torch.cat(filled)


@dataclass(frozen=True)
class ViTEmbeddingParts:
    """The embedding of patches, class token, registers and positions.

    Attributes:
        owner: the module; interpolated positions are cached for it.
        projection: convolution of patches.
        cls_token: reads the class token, in any shape of C numbers, or None.
        extra_tokens: reads the tokens after it [1, E, C], or None.
        positions: reads the position embeddings [1, P, C] or [P, C], or None.
        rules: how positions are interpolated.
        dropout: of the tokens, or None.
    """

    owner: nn.Module
    projection: nn.Conv2d
    cls_token: Callable[[], Tensor | None]
    extra_tokens: Callable[[], Tensor | None]
    positions: Callable[[], Tensor | None]
    rules: PositionRules
    dropout: nn.Dropout | None = None


@dataclass(frozen=True)
class ViTParts:
    """A ViT; a module is called, and so is another embedding.

    Attributes:
        embedding: of patches.
        pre_norm: norm before the layers, or None.
        blocks: in order of depth.
        root: module around all, if its hooks have to see the call, else None.
        encoder: module around the layers, if its hooks have to see the call, else None.
        rope: computes the rotation of a grid of patches, or None.
        shared_bias: relative position bias of all layers, or None.
        takes_resolution: whether layers have a relative position bias of their own.
    """

    embedding: ViTEmbeddingParts | Callable[[Tensor], Tensor]
    pre_norm: nn.Module | None
    blocks: tuple[ViTBlockParts | nn.Module, ...]
    root: nn.Module | None = None
    encoder: nn.Module | None = None
    rope: Callable[[Grid], Rotation] | None = None
    shared_bias: Callable[[Grid], Tensor] | None = None
    takes_resolution: bool = False
