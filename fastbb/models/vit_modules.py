"""The modules of a native ViT, with transformers' names of layers and parameters.

`vit_states` computes from their parameters. The forwards of the modules are plain PyTorch, one call
per layer: they run wherever hooks must see the calls, or adapters (LoRA) and other layers were put
inside, in inference and training. The names come from the row of the type in `vit_names`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import attend, drop_path
from .parts import Activation, NativeModule, untouched
from .vit_forward import layer_bias
from .vit_names import GATE, GATED, ViTNames, part
from .vit_parts import ViTBlockParts, ViTBlockSpec, ViTEmbeddingParts
from .vit_positions import (
    Grid,
    PositionRules,
    Rotation,
    ViTRelativePositionBias,
    embedding_terms,
    patch_grid,
    rotated,
    with_prefix,
)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer, and which parameters it has.

    Attributes:
        channels: of a token.
        hidden: width of the MLP.
        eps: of the norms.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether the output projection has one.
        mlp_bias: whether the layers of the MLP have one.
        is_gated: whether the MLP is gated.
        layer_scale: initial value of the layer scales, or None.
        patch: height and width of a patch.
        bias_grid: patches of the trained size, if the layer has a relative position bias.
    """

    channels: int
    hidden: int
    eps: float
    qkv_bias: tuple[bool, bool, bool] = (True, True, True)
    proj_bias: bool = True
    mlp_bias: bool = True
    is_gated: bool = False
    layer_scale: float | None = None
    patch: Grid = (1, 1)
    bias_grid: Grid | None = None


class ViTAttention(NativeModule):
    """Attention of all tokens to all tokens [B, N, C]."""

    def __init__(self, shape: LayerShape, spec: ViTBlockSpec, names: ViTNames) -> None:
        super().__init__()
        self.spec = spec
        self.names = names
        channels = shape.channels
        for name, has_bias in zip(("q_proj", "k_proj", "v_proj"), shape.qkv_bias):
            setattr(self, name, nn.Linear(channels, channels, bias=has_bias))
        setattr(self, names.proj, nn.Linear(channels, channels, bias=shape.proj_bias))

    @property
    def projections(self) -> tuple[Any, Any, Any]:
        """The layers that make queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def proj(self) -> Any:
        """The output projection."""
        return getattr(self, self.names.proj)

    def forward(
        self,
        x: Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: Tensor | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        heads = (self.spec.num_heads, -1)
        q, k, v = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer in self.projections)
        if position_embeddings is not None:
            q, k = rotated(q, position_embeddings), rotated(k, position_embeddings)
        dropout = self.spec.attention_dropout if self.training else 0.0
        return self.proj(attend(q, k, v, attention_mask, dropout, attentions))


class ViTMlp(NativeModule):
    """Two linear layers with an activation between them, which may gate a third."""

    def __init__(self, shape: LayerShape, activation: str, names: ViTNames) -> None:
        super().__init__()
        self.is_gated = shape.is_gated
        sizes, bias = (shape.channels, shape.hidden), shape.mlp_bias
        self.layer_names = (*names.fc, names.activation)
        if self.is_gated:
            self.layer_names = GATED
            setattr(self, GATE, nn.Linear(*sizes, bias=bias))
        first, second, third = self.layer_names
        setattr(self, first, nn.Linear(*sizes, bias=bias))
        setattr(self, second, nn.Linear(*sizes[::-1], bias=bias))
        setattr(self, third, Activation(activation))

    @property
    def layers(self) -> tuple[Any, Any, Any, Any]:
        """Gate or None, first layer, second layer, activation."""
        gate = getattr(self, GATE) if self.is_gated else None
        fc1, fc2, activation = (getattr(self, name) for name in self.layer_names)
        return gate, fc1, fc2, activation

    def forward(self, x: Tensor) -> Tensor:
        gate, fc1, fc2, activation = self.layers
        return fc2(activation(fc1(x)) if gate is None else activation(gate(x)) * fc1(x))


class ViTLayerScale(NativeModule):
    """Multiplies each channel by a learned number."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((channels,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class ViTDropPath(NativeModule):
    """Stochastic depth: drops whole samples of a residual branch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class ViTLayer(NativeModule):
    """A layer: attention and MLP of tokens [B, N, C], each with a norm and a residual."""

    def __init__(self, shape: LayerShape, spec: ViTBlockSpec, names: ViTNames) -> None:
        super().__init__()
        self.spec = spec
        self._inference_spec = ViTBlockSpec(spec.num_heads, spec.activation)
        self.names = names
        self.patch = shape.patch
        setattr(self, names.attention, ViTAttention(shape, spec, names))
        for name in names.norms:
            setattr(self, name, nn.LayerNorm(shape.channels, eps=shape.eps))
        self.mlp = ViTMlp(shape, spec.activation, names)
        self.dropout = nn.Dropout(spec.dropout) if names.drops_branches else None
        self.drop_path = None
        if names.has_drop_path:
            self.drop_path = ViTDropPath(spec.drop_path) if spec.drop_path else nn.Identity()
        self.scale_names = () if shape.layer_scale is None or not names.scales else names.scales
        for path in self.scale_names:
            name, _, inner = path.partition(".")
            scale = ViTLayerScale(shape.channels, shape.layer_scale or 0.0)
            setattr(self, name, scale if inner else scale.lambda1)
        self.relative_position_bias = (
            None
            if shape.bias_grid is None
            else ViTRelativePositionBias(shape.bias_grid, spec.num_heads)
        )

    def forward(
        self,
        x: Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: Tensor | None = None,
        resolution: tuple[int, int] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        names = self.names
        bias = layer_bias(self.relative_position_bias, self.patch, resolution, attention_mask)
        given = {
            "position_embeddings": position_embeddings,
            "attention_mask": bias,
            "attentions": attentions,
        }
        options = {name: value for name, value in given.items() if value is not None}
        first, second = (getattr(self, name) for name in names.norms)
        x = x + self._branch(getattr(self, names.attention)(first(x), **options), 0)
        return x + self._branch(self.mlp(second(x)), 1)

    def _branch(self, x: Tensor, index: int) -> Tensor:
        """Dropout, layer scale and stochastic depth of the first or second branch."""
        x = x if self.dropout is None else self.dropout(x)
        if self.scale_names:
            scale = getattr(self, self.scale_names[index].partition(".")[0])
            x = x * scale if isinstance(scale, Tensor) else scale(x)
        return x if self.drop_path is None else self.drop_path(x)

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.scale_names:
            return None, None
        first, second = (part(self, path) for path in self.scale_names)
        return first, second

    def _spec(self) -> ViTBlockSpec:
        """The semantics for a call; the modules have modes and rates of their own."""
        attention: Any = getattr(self, self.names.attention)
        dropout, path = self.dropout, self.drop_path
        layers = (attention, dropout, path)
        if not any(layer is not None and layer.training for layer in layers):
            return self._inference_spec
        return replace(
            self.spec,
            drop_path=path.drop_prob if isinstance(path, ViTDropPath) and path.training else 0.0,
            dropout=0.0 if dropout is None or not dropout.training else dropout.p,
            attention_dropout=self.spec.attention_dropout if attention.training else 0.0,
        )

    def parts(self) -> ViTBlockParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        names = self.names
        attention = untouched(getattr(self, names.attention), ViTAttention)
        gate, fc1, fc2, activation = untouched(self.mlp, ViTMlp).layers
        first, second = (untouched(getattr(self, name), nn.LayerNorm) for name in names.norms)
        linears = (*attention.projections, attention.proj, fc1, fc2, *([gate] if gate else []))
        for linear in linears:
            untouched(linear, nn.Linear)
        untouched(activation, Activation)
        if self.dropout is not None:
            untouched(self.dropout, nn.Dropout)
        if self.drop_path is not None:
            untouched(self.drop_path, ViTDropPath, nn.Identity)
        for path in self.scale_names:
            name, _, inner = path.partition(".")
            if inner:
                untouched(getattr(self, name), ViTLayerScale)
        return ViTBlockParts(
            owner=self,
            norms=(first, second),
            projections=attention.projections,
            proj=attention.proj,
            scales=self._scales,
            fc1=fc1,
            fc2=fc2,
            gate=gate,
            spec=self._spec,
            position_bias=self.relative_position_bias,
        )


class ViTContainer(NativeModule):
    """A module around others; its hooks see what goes in and comes out."""

    def forward(self, x: Tensor, run: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        return run(x)


class ViTPatchEmbeddings(NativeModule):
    """Embeds patches, [B, C_in, H, W] to [B, N, C]."""

    def __init__(self, projection: nn.Conv2d) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTPositions(NativeModule):
    """Position embeddings that transformers has in an embedding layer."""

    def __init__(self, n_positions: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_positions, channels))

    def forward(self) -> Tensor:
        return self.weight


class ViTEmbeddings(NativeModule):
    """Embeds patches, and puts class token and registers before them.

    Args:
        projection: convolution of patches.
        names: of the type.
        rules: of positions.
        n_extra: tokens between the class token and the patches.
        n_patches: number of patches with absolute position embeddings; None if there are none.
        mask_token: shape of the token of masked patches, which no map depends on, or None.
        dropout: of the tokens, or None where upstream has no such module.
    """

    def __init__(
        self,
        projection: nn.Conv2d,
        names: ViTNames,
        rules: PositionRules,
        n_extra: int,
        n_patches: int | None,
        mask_token: tuple[int, ...] | None,
        dropout: float | None,
    ) -> None:
        super().__init__()
        self.names, self.rules = names, rules
        self.patch: Grid = (projection.kernel_size[0], projection.kernel_size[1])
        channels = projection.out_channels
        name, _, inner = names.patches.partition(".")
        setattr(self, name, ViTPatchEmbeddings(projection) if inner else projection)
        if names.cls_token is not None:
            of_vector = names.cls_token == "class_embedding"
            shape = (channels,) if of_vector else (1, 1, channels)
            setattr(self, names.cls_token, nn.Parameter(torch.zeros(shape)))
        if mask_token is not None:
            self.mask_token = nn.Parameter(torch.zeros(mask_token))
        if names.extra_tokens is not None:
            setattr(self, names.extra_tokens, nn.Parameter(torch.zeros(1, n_extra, channels)))
        self.has_positions = n_patches is not None
        if n_patches is not None:
            n_positions = n_patches + rules.n_prefix
            name, _, inner = str(names.positions).partition(".")
            positions = torch.zeros(1, n_positions, channels)
            value = ViTPositions(n_positions, channels) if inner else nn.Parameter(positions)
            setattr(self, name, value)
        self.dropout = None if dropout is None else nn.Dropout(dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        grid = patch_grid(self.patch, (pixel_values.shape[2], pixel_values.shape[3]))
        x = getattr(self, self.names.patches.partition(".")[0])(pixel_values)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        positions = None
        if self.has_positions:
            positions = getattr(self, str(self.names.positions).partition(".")[0])
            positions = positions if isinstance(positions, Tensor) else positions()
        tokens = self._cls_token(), self._extra_tokens(), positions
        x = with_prefix(x, *embedding_terms(self, self.rules, grid, *tokens))
        return x if self.dropout is None else self.dropout(x)

    def _cls_token(self) -> Tensor | None:
        return None if self.names.cls_token is None else getattr(self, self.names.cls_token)

    def _extra_tokens(self) -> Tensor | None:
        return None if self.names.extra_tokens is None else getattr(self, self.names.extra_tokens)

    def _positions(self) -> Tensor | None:
        return part(self, str(self.names.positions)) if self.has_positions else None

    def parts(self) -> ViTEmbeddingParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        name, _, inner = self.names.patches.partition(".")
        if inner:
            untouched(getattr(self, name), ViTPatchEmbeddings)
        name, _, inner = str(self.names.positions).partition(".")
        if self.has_positions and inner:
            untouched(getattr(self, name), ViTPositions)
        if self.dropout is not None:
            untouched(self.dropout, nn.Dropout)
        return ViTEmbeddingParts(
            owner=self,
            projection=untouched(part(self, self.names.patches), nn.Conv2d),
            cls_token=self._cls_token,
            extra_tokens=self._extra_tokens,
            positions=self._positions,
            rules=self.rules,
            dropout=self.dropout,
        )
