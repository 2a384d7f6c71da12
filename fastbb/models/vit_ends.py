"""Modules after the layers of a ViT: image embeddings from tokens [B, N, C], a pyramid of maps."""

from functools import partial

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


class ViTMeanPooler(NativeModule):
    """The normalized mean of the patches after a class token, [B, N, C] to [B, C] (BEiT)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.layernorm(x[:, 1:].mean(1))


class ViTPyramid(NativeModule):
    """Four maps [B, C, h, w] at 4, 2, 1 and 1/2 of their size (BEiT)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        up = partial(nn.ConvTranspose2d, channels, channels, kernel_size=2, stride=2)
        self.fpn1 = ViTUpsampling(up(), nn.BatchNorm2d(channels), up())
        self.fpn2 = up()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, second, third, fourth = maps
        return self.fpn1(first), self.fpn2(second), third, self.fpn4(fourth)


class ViTUpsampling(NativeModule):
    """Two transposed convolutions with a batch norm and GELU between them."""

    def __init__(self, first: nn.Module, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv_transpose1, self.normalization, self.conv_transpose2 = first, norm, second
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.normalization(self.conv_transpose1(x)))
        return self.conv_transpose2(x)


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
