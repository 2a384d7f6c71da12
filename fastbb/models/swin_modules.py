"""The modules of a native Swin, with transformers' names of layers and parameters.

`swin_maps` computes from their parameters. The forwards of the modules are plain PyTorch, one call
per layer: they run wherever hooks must see the calls, or adapters (LoRA) and other layers were put
inside, in inference and training.

Tokens are maps [B, h, w, C], which transformers has flattened.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import window_attention, window_attention_weights

from ..backbone.checkpointing import BlockRunner
from .layers import DropPath, cuts_patches
from .parts import Activation, CalledModules, NativeModule, Refused, untouched
from .swin_forward import absolute_positions, call_embeddings, check_patches
from .swin_parts import (
    MergingParts,
    Ragged,
    SwinBlockParts,
    SwinBlockSpec,
    SwinEmbeddingParts,
    SwinParts,
    SwinStageParts,
    relative_position_bias,
)


class SwinRelativePositionBias(NativeModule):
    """The bias of the attention scores of a window."""

    def __init__(self, spec: SwinBlockSpec) -> None:
        super().__init__()
        self.window = spec.geometry.window
        height, width = self.window
        table = torch.zeros((2 * height - 1) * (2 * width - 1), spec.num_heads)
        self.relative_position_bias_table = nn.Parameter(table)

    def forward(self) -> Tensor:
        return relative_position_bias(self.relative_position_bias_table, self.window)


class SwinAttention(NativeModule):
    """Attention within the windows of a map [B, H, W, C]."""

    def __init__(self, channels: int, qkv_bias: bool, spec: SwinBlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.k_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.v_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.o_proj = nn.Linear(channels, channels)
        self.relative_position_bias = SwinRelativePositionBias(spec)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        spec, (height, width) = self.spec, x.shape[1:3]
        geometry = spec.geometry_for(height, width)
        # before the projections, because an adapter may make something else than a bias of zeros
        h, w = geometry.window
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h))
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        options: dict[str, Any] = {
            "num_heads": spec.num_heads,
            "geometry": geometry,
            "dropout_p": spec.attention_dropout if self.training else 0.0,
        }
        bias = self.relative_position_bias()
        if attentions is None:
            y = window_attention(qkv, bias, None, **options)
        else:
            y, weights = window_attention_weights(qkv, bias, None, **options)
            attentions.append(weights)
        return self.o_proj(y[:, :height, :width])


class SwinMlp(NativeModule):
    """Two linear layers with an activation between them."""

    def __init__(self, channels: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation_fn = Activation(activation)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class SwinLayer(NativeModule):
    """A block: window attention and MLP, each with a norm and a residual, of a map [B, H, W, C]."""

    def __init__(
        self, channels: int, hidden: int, eps: float, qkv_bias: bool, spec: SwinBlockSpec
    ) -> None:
        super().__init__()
        self.spec = spec
        self.attention = SwinAttention(channels, qkv_bias, spec)
        self.layernorm_before = nn.LayerNorm(channels, eps=eps)
        self.layernorm_after = nn.LayerNorm(channels, eps=eps)
        self.mlp = SwinMlp(channels, hidden, spec.activation)
        self.dropout = nn.Dropout(spec.dropout)
        self.drop_path = DropPath(spec.drop_path) if spec.drop_path else nn.Identity()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if not any(isinstance(module, SwinAttention) for module in self.attention.modules()):
            raise ValueError(
                f"a {type(self.attention).__name__} was put in place of the attention of a Swin "
                "block, which would get no windows: replace the whole block by a module that takes "
                "and returns a map of tokens [B, H, W, C]"
            )
        y = self.attention(self.layernorm_before(x), **options)
        x = x + self.drop_path(self.dropout(y))
        y = self.dropout(self.mlp(self.layernorm_after(x)))
        return x + (self.drop_path(y) if self.spec.mlp_drop_path else y)

    def parts(self) -> SwinBlockParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        attention, mlp = untouched(self.attention, SwinAttention), untouched(self.mlp, SwinMlp)
        norms = (self.layernorm_before, self.layernorm_after)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm in norms:
            untouched(norm, nn.LayerNorm)
        for linear in (*projections, attention.o_proj, mlp.fc1, mlp.fc2):
            untouched(linear, nn.Linear)
        if len({linear.bias is None for linear in projections}) > 1:
            raise Refused("only some of its queries, keys and values have a bias")
        if mlp.fc1.bias is None or mlp.fc2.bias is None:
            raise Refused("a layer of its MLP has no bias")
        untouched(mlp.activation_fn, Activation)
        untouched(self.dropout, nn.Dropout)
        untouched(self.drop_path, DropPath, nn.Identity)
        return _NativeBlockParts(
            owner=self,
            norms=norms,
            projections=projections,
            proj=attention.o_proj,
            fc1=mlp.fc1,
            fc2=mlp.fc2,
            bias=untouched(attention.relative_position_bias, SwinRelativePositionBias),
            semantics=replace(
                self.spec, drop_path=0.0, mlp_drop_path=0.0, dropout=0.0, attention_dropout=0.0
            ),
            has_index=False,
        )


class _NativeBlockParts(SwinBlockParts):
    """A block that may train: its modules have modes and rates of their own."""

    def spec(self) -> SwinBlockSpec:
        block: Any = self.owner
        attention, dropout, path = block.attention, block.dropout, block.drop_path
        if not (attention.training or dropout.training or path.training):
            return self.semantics
        rate = path.drop_prob if path.training and isinstance(path, DropPath) else 0.0
        return replace(
            self.semantics,
            drop_path=rate,
            mlp_drop_path=rate if block.spec.mlp_drop_path else 0.0,
            dropout=dropout.p if dropout.training else 0.0,
            attention_dropout=block.spec.attention_dropout if attention.training else 0.0,
        )


class SwinPatchMerging(NativeModule):
    """Concatenates, normalizes and reduces 2x2 neighbours, [B, H, W, C] to [B, h, w, 2C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], dim=-1)
        return self.reduction(self.norm(x))

    def parts(self) -> MergingParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        return MergingParts(
            untouched(self.norm, nn.LayerNorm), untouched(self.reduction, nn.Linear)
        )


class SwinStage(NativeModule):
    """A stage; its forward leaves out the merging, which only the next stage needs."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return last(x, **options)


class SwinPatchEmbeddings(NativeModule):
    """Embeds patches, [B, C_in, H, W] to [B, h, w, C]."""

    def __init__(
        self, n_pixel_channels: int, channels: int, patch: tuple[int, int], ragged: Ragged
    ) -> None:
        super().__init__()
        self.patch = patch
        self.ragged: Ragged = ragged
        self.projection = nn.Conv2d(n_pixel_channels, channels, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        check_patches(self.patch, pixel_values, self.ragged)
        height, width = pixel_values.shape[2:]
        h, w = self.patch
        if self.ragged == "pad":
            pixel_values = F.pad(pixel_values, (0, -width % w, 0, -height % h))
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class SwinEmbeddings(NativeModule):
    """Embeds patches with a norm, and absolute positions if there are any.

    Args:
        patches: embeds them.
        channels: of the embedding.
        n_positions: number of absolute positions, or None.
        dropout: after the embedding.
    """

    def __init__(
        self,
        patches: SwinPatchEmbeddings,
        channels: int,
        n_positions: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patch_embeddings = patches
        self.norm = nn.LayerNorm(channels)
        self.position_embeddings = (
            None if n_positions is None else nn.Parameter(torch.zeros(1, n_positions, channels))
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixel_values: Tensor, interpolate_positions: bool = False) -> Tensor:
        x = self.norm(self.patch_embeddings(pixel_values))
        if self.position_embeddings is not None:
            x = x + absolute_positions(self.position_embeddings, x, interpolate_positions)
        return self.dropout(x)

    def parts(self) -> SwinEmbeddingParts:
        """Reads the layers; raises `Refused` if one has to be called."""
        patches = untouched(self.patch_embeddings, SwinPatchEmbeddings)
        projection = untouched(patches.projection, nn.Conv2d)
        if projection.kernel_size != patches.patch or not cuts_patches(projection):
            raise Refused("its convolution does not cut patches")
        return SwinEmbeddingParts(
            projection,
            untouched(self.norm, nn.LayerNorm),
            patches.ragged,
            self,
            untouched(self.dropout, nn.Dropout),
        )


class SwinEncoder(NativeModule):
    """The stages."""

    def __init__(self, stages: Sequence[SwinStage]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(stages)

    def forward(
        self,
        x: Tensor,
        wanted: Sequence[int],
        attentions: list[Tensor] | None = None,
        run_block: BlockRunner | None = None,
    ) -> list[Tensor]:
        states: dict[int, Tensor] = {0: x}
        merging: Any = None
        for index, stage in enumerate(self.layers, start=1):
            if index > max(wanted):
                break
            if merging is not None:
                x = merging(x)
            run = stage if attentions is None else partial(stage, attentions=attentions)
            x = states[index] = run(x) if run_block is None else run_block(run, x)
            merging = merging_of(stage)
        return [states[index] for index in wanted]


class SwinModel(NativeModule):
    """Embeddings and stages: pixels [B, C_in, H, W] to the wanted states, tokens [B, h, w, C]."""

    def __init__(
        self, embeddings: SwinEmbeddings, encoder: SwinEncoder, norm: nn.LayerNorm
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        # no feature map is computed with it, but the image embedding is
        self.layernorm = norm

    def forward(
        self,
        pixel_values: Tensor,
        wanted: Sequence[int],
        interpolate_positions: bool = False,
        **options: Any,
    ) -> list[Tensor]:
        x = call_embeddings(self.embeddings, pixel_values, interpolate_positions)
        return self.encoder(x, wanted, **options)

    def parts(self, called: CalledModules) -> SwinParts:
        """Reads the layers, except those that have to be called.

        Args:
            called: gets these.

        Raises:
            Refused: the whole has to be called.
        """
        return read_swin(self.embeddings, self.encoder, called, SwinLayer, SwinPatchMerging)


def merging_of(stage: Any) -> nn.Module | None:
    """The merging after a stage, which transformers has inside it, or None after the last one.

    Raises:
        ValueError: the stage was replaced by a module that has none.
    """
    try:
        return stage.downsample
    except AttributeError as error:
        raise ValueError(
            f"a {type(stage).__name__} was put in place of a stage of a Swin; it needs the "
            "attribute `downsample` of the stage, which is its patch merging or None"
        ) from error


def read_swin(
    embeddings: Any,
    encoder: Any,
    called: CalledModules,
    block_class: type[nn.Module],
    merging_class: type[nn.Module],
) -> SwinParts:
    """Reads the layers of a native Swin, except those that have to be called.

    Args:
        embeddings: a `SwinEmbeddings`, or what was put in its place.
        encoder: a `SwinEncoder`.
        called: gets the modules that have to be called.
        block_class: class of the blocks, whose `parts` reads one.
        merging_class: class of the mergings, whose `parts` reads one.

    Raises:
        Refused: the whole has to be called.
    """

    def read_embeddings() -> SwinEmbeddingParts:
        return untouched(embeddings, SwinEmbeddings).parts()

    def read_merging() -> MergingParts:
        return untouched(merging, merging_class).parts()

    stages: list[SwinStageParts] = []
    merging: Any = None
    for stage in untouched(encoder, SwinEncoder).layers:
        before = None if merging is None else called.read_or_call(read_merging, merging)
        blocks = called.read_blocks(stage, "blocks", SwinStage, block_class)
        stages.append(SwinStageParts(before, blocks))
        merging = merging_of(stage)
    return SwinParts(called.read_or_call(read_embeddings, embeddings), tuple(stages))
