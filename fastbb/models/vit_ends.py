"""Modules after the final norm of a ViT, which compute an image embedding from tokens [B, N, C]."""

import torch
from torch import Tensor, nn

from .parts import Activation, NativeModule
from .vit_modules import LayerShape, ViTMlp
from .vit_names import ViTNames
from .vit_parts import ViTBlockSpec


class ViTPooler(NativeModule):
    """A linear layer and an activation of the first token, [B, N, C] to [B, D]."""

    def __init__(self, channels: int, size: int, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, size)
        self.activation = nn.Tanh() if activation == "tanh" else Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x[:, 0]))


class ViTAttentionPool(NativeModule):
    """Attention of a learned probe to all tokens, and an MLP, [B, N, C] to [B, C] (SigLIP)."""

    def __init__(self, shape: LayerShape, spec: ViTBlockSpec, names: ViTNames) -> None:
        super().__init__()
        channels = shape.channels
        self.probe = nn.Parameter(torch.zeros(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, spec.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(channels, eps=shape.eps)
        self.mlp = ViTMlp(shape, spec.activation, names)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.repeat(x.shape[0], 1, 1)
        x = self.attention(probe, x, x)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]
