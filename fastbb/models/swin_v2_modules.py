"""The modules of a native Swin V2, with transformers' names of layers and parameters.

The forward of the family computes from their parameters. The forwards of the modules are plain
PyTorch, one call per layer: they run in training, and wherever hooks must see the calls, or
adapters (LoRA) and other layers were put inside.

Tokens are maps [B, h, w, C], which transformers has flattened.
"""

from dataclasses import replace
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import window_attention, window_attention_weights

from .layers import DropPath
from .parts import Activation, NativeModule, Refused, untouched
from .swin_modules import SwinPatchMerging
from .swin_parts import SwinBlockSpec, relative_position_bias
from .swin_v2_forward import merge_patches
from .swin_v2_parts import (
    Swinv2BlockParts,
    relative_coords_table,
    scale_of_cosines,
)

POSITION_FEATURES = 512  # hidden width of the MLP of positions


class Swinv2SelfAttention(NativeModule):
    """Attention within the windows of a map [B, H, W, C], by cosines."""

    def __init__(
        self,
        channels: int,
        qkv_bias: bool,
        spec: SwinBlockSpec,
        pretrained_window: tuple[int, int],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((spec.num_heads, 1, 1), log(10)))
        self.continuous_position_bias_mlp = nn.Sequential(
            nn.Linear(2, POSITION_FEATURES),
            Activation("relu"),
            nn.Linear(POSITION_FEATURES, spec.num_heads, bias=False),
        )
        self.query = nn.Linear(channels, channels, bias=qkv_bias)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=qkv_bias)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        spec, (height, width) = self.spec, x.shape[1:3]
        # before the projections, because an adapter may make something else than a bias of zeros
        h, w = spec.geometry.window
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h))
        qkv = torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        coords = relative_coords_table((h, w), self.pretrained_window, x.device).to(x.dtype)
        table = 16 * torch.sigmoid(self.continuous_position_bias_mlp(coords))
        bias = relative_position_bias(table, (h, w))
        options: dict[str, Any] = {
            "num_heads": spec.num_heads,
            "geometry": spec.geometry,
            "dropout_p": spec.attention_dropout if self.training else 0.0,
            "logit_scale": scale_of_cosines(self.logit_scale),
            "mask_value": spec.mask_value,
        }
        if attentions is None:
            y = window_attention(qkv, bias, None, **options)
        else:
            y, weights = window_attention_weights(qkv, bias, None, **options)
            attentions.append(weights)
        return y[:, :height, :width]


class Swinv2Output(NativeModule):
    """A linear layer and dropout."""

    def __init__(self, features: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(features, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x))


class Swinv2Attention(NativeModule):
    """Window attention and its projection."""

    def __init__(
        self,
        channels: int,
        qkv_bias: bool,
        spec: SwinBlockSpec,
        pretrained_window: tuple[int, int],
    ) -> None:
        super().__init__()
        own = Swinv2SelfAttention(channels, qkv_bias, spec, pretrained_window)
        self.add_module("self", own)
        self.output = Swinv2Output(channels, channels, spec.attention_dropout)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        return self.output(self.get_submodule("self")(x, attentions))


class Swinv2Intermediate(NativeModule):
    """The first layer of the MLP, and its activation."""

    def __init__(self, channels: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, hidden)
        self.intermediate_act_fn = Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class Swinv2Layer(NativeModule):
    """A block: window attention and MLP, each followed by a norm and added to a residual."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        eps: float,
        qkv_bias: bool,
        spec: SwinBlockSpec,
        pretrained_window: tuple[int, int],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.attention = Swinv2Attention(channels, qkv_bias, spec, pretrained_window)
        self.layernorm_before = nn.LayerNorm(channels, eps=eps)
        self.drop_path = DropPath(spec.drop_path) if spec.drop_path else nn.Identity()
        self.intermediate = Swinv2Intermediate(channels, hidden, spec.activation)
        self.output = Swinv2Output(hidden, channels, spec.dropout)
        self.layernorm_after = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if not any(isinstance(module, Swinv2SelfAttention) for module in self.attention.modules()):
            raise ValueError(
                f"a {type(self.attention).__name__} was put in place of the attention of a Swin V2 "
                "block, which would get no windows: replace the whole block by a module that takes "
                "and returns a map of tokens [B, H, W, C]"
            )
        y = self.layernorm_before(self.attention(x, **options))
        x = x + self.drop_path(y)
        y = self.layernorm_after(self.output(self.intermediate(x)))
        return x + self.drop_path(y)

    def parts(self) -> Swinv2BlockParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        attention = untouched(self.attention, Swinv2Attention)
        own: Any = untouched(attention.get_submodule("self"), Swinv2SelfAttention)
        outputs = [untouched(part, Swinv2Output) for part in (attention.output, self.output)]
        proj, fc2 = (output.dense for output in outputs)
        intermediate = untouched(self.intermediate, Swinv2Intermediate)
        norms = (self.layernorm_before, self.layernorm_after)
        projections = (own.query, own.key, own.value)
        positions = untouched(own.continuous_position_bias_mlp, nn.Sequential)
        if len(positions) != 3:
            raise Refused("the MLP of its positions has other layers")
        for norm in norms:
            untouched(norm, nn.LayerNorm)
        linears = (*projections, proj, intermediate.dense, fc2, positions[0], positions[2])
        for linear in linears:
            untouched(linear, nn.Linear)
        if (own.query.bias is None) != (own.value.bias is None):
            raise Refused("only some of its queries and values have a bias")
        if intermediate.dense.bias is None or positions[0].bias is None:
            raise Refused("a layer of an MLP has no bias")
        for activation in (intermediate.intermediate_act_fn, positions[1]):
            untouched(activation, Activation)
        for output in outputs:
            untouched(output.dropout, nn.Dropout)
        untouched(self.drop_path, DropPath, nn.Identity)
        return _NativeBlockParts(
            owner=self,
            norms=norms,
            projections=projections,
            proj=proj,
            fc1=intermediate.dense,
            fc2=fc2,
            bias=own,
            semantics=replace(self.spec, drop_path=0.0, dropout=0.0, attention_dropout=0.0),
            has_index=False,
            positions=positions,
            pretrained_window=own.pretrained_window,
        )


class _NativeBlockParts(Swinv2BlockParts):
    """A block that may train: its modules have modes of their own."""

    def trains(self) -> bool:
        block: Any = self.owner
        attention = block.attention
        parts = (*attention.children(), attention.output.dropout, block.output.dropout)
        return any(part.training for part in (*parts, block.drop_path))


class Swinv2PatchMerging(SwinPatchMerging):
    """Concatenates, reduces and normalizes 2x2 neighbours, [B, H, W, C] to [B, h, w, 2C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm = nn.LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, self)
