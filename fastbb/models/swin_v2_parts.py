"""The parts that the forward of Swin V2 takes, and builders of them for the models of libraries.

Windows and shifts are those of the modules, which libraries make for one size of image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import log, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import WindowGeometry

from ..weights.derived import derive
from .layers import cuts_patches
from .parts import Refused
from .swin_parts import (
    SwinBlockParts,
    SwinBlockWeights,
    SwinEmbeddingParts,
    SwinParts,
    SwinStageParts,
    checked_block,
    merging_parts,
    read_timm,
    relative_position_bias,
)

MOST_LOGIT_SCALE = log(1.0 / 0.01)  # of the parameter, which is a logarithm
# transformers adds the mask of -100 twice
TRANSFORMERS_MASK_VALUE = -200.0


class Biases(NamedTuple):
    """Biases [C] of queries, keys and values; a block without them has None for all."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


@dataclass(frozen=True)
class Swinv2BlockParts(SwinBlockParts):
    """The layers of a block, whose norms come after attention and MLP.

    `bias` is the module that has `logit_scale` [num_heads, 1, 1]; with `has_index` it has
    `relative_coords_table` and `relative_position_index` too, which are made from the windows
    otherwise.

    Attributes:
        positions: MLP from coordinates [2] to the position bias of each head: two linear layers,
            and a ReLU between them.
        pretrained_window: tokens per window, (height, width), that the coordinates are relative to;
            0: those of the window.
    """

    positions: Sequence[Any] = ()
    pretrained_window: tuple[int, int] = (0, 0)

    def biases(self) -> Biases:
        """Reads the biases of the projections."""
        if len(self.projections) == 1:
            owner = self.bias
            return Biases(owner.q_bias, owner.k_bias, owner.v_bias)
        return Biases(*(linear.bias for linear in self.projections))

    def trains(self) -> bool:
        """Whether the block may drop something at random, and so has to be called."""
        return False

    def weights(self) -> SwinBlockWeights:
        window = self.spec().geometry.window
        hidden, _, out = self.positions
        owner, buffers = self.bias, {}
        if self.has_index:
            buffers = {
                "coords": owner.relative_coords_table,
                "index": owner.relative_position_index,
            }
        tensors: dict[str, Tensor | None] = {
            "logit_scale": owner.logit_scale,
            "hidden_weight": hidden.weight,
            "hidden_bias": hidden.bias,
            "out_weight": out.weight,
            **buffers,
            **{f"weight{i}": linear.weight for i, linear in enumerate(self.projections)},
            **{f"{name}_bias": bias for name, bias in self.biases()._asdict().items()},
        }
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        constants = tuple(given), window, self.pretrained_window
        qkv_weight, qkv_bias, bias, logit_scale = derive(
            self.owner,
            "attention",
            partial(_attention_tensors, *constants),
            *given.values(),
            constants=constants,
        )
        return self.weights_with(qkv_weight, qkv_bias, bias, logit_scale)

    def misfit(self) -> str | None:
        height, width = self.spec().geometry.window
        if self.bias.relative_coords_table.numel() != 2 * (2 * height - 1) * (2 * width - 1):
            return f"its table of coordinates is not for windows of {height}x{width}"
        if self.bias.relative_position_index.numel() != (height * width) ** 2:
            return f"its index of coordinates is not for windows of {height}x{width}"
        return None


def _attention_tensors(
    names: Sequence[str],
    window: tuple[int, int],
    pretrained_window: tuple[int, int],
    *tensors: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Computes weight and bias of q, k and v, the position bias, and the scale of each head.

    Args:
        names: of the tensors, see `Swinv2BlockParts.weights`.
        window: (h, w).
        pretrained_window: see `Swinv2BlockParts`.
        tensors: in the order of the names.
    """
    given = dict(zip(names, tensors))
    weights = [given[name] for name in names if name.startswith("weight")]
    q_bias = given.get("q_bias")
    qkv_bias = None
    if q_bias is not None:
        k_bias = given.get("k_bias", torch.zeros_like(q_bias))
        qkv_bias = torch.cat([q_bias, k_bias.to(q_bias.dtype), given["v_bias"]])
    layers = given["hidden_weight"], given["hidden_bias"], given["out_weight"]
    coords = given.get("coords")
    if coords is None:
        coords = relative_coords_table(window, pretrained_window, layers[0].device)
    bias = continuous_position_bias(coords, *layers)
    return (
        torch.cat(weights) if len(weights) > 1 else weights[0],
        qkv_bias,
        relative_position_bias(bias, window, given.get("index")),
        scale_of_cosines(given["logit_scale"]),
    )


def relative_coords_table(
    window: tuple[int, int], pretrained_window: tuple[int, int], device: torch.device
) -> Tensor:
    """Coordinates of all relative positions in a window, spaced by their logarithms.

    Args:
        window: tokens per window, (h, w).
        pretrained_window: those that the coordinates are relative to; 0: those of the window.
        device: of the table.

    Returns:
        [(2h - 1) * (2w - 1), 2] fp32, (y, x) from -log8(9) to log8(9) in the pretrained window.
    """
    axes = []
    for size, pretrained in zip(window, pretrained_window):
        positions = torch.arange(1 - size, size, dtype=torch.float32, device=device)
        axes.append(positions / max((pretrained or size) - 1, 1) * 8)
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return table.sign() * torch.log2(table.abs() + 1.0) / log2(8)


def continuous_position_bias(
    coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, out_weight: Tensor
) -> Tensor:
    """Computes the table of position biases from coordinates, in fp32 at least.

    Args:
        coords: coordinates of each relative position, in the last of any dimensions [..., 2].
        hidden_weight: [F, 2].
        hidden_bias: [F].
        out_weight: [num_heads, F].

    Returns:
        [(2h - 1) * (2w - 1), num_heads] between 0 and 16, dtype of the weights.
    """
    exact = torch.promote_types(out_weight.dtype, torch.float32)
    coords, hidden_weight, hidden_bias, weight = (
        tensor.to(exact) for tensor in (coords.view(-1, 2), hidden_weight, hidden_bias, out_weight)
    )
    table = F.linear(F.relu(F.linear(coords, hidden_weight, hidden_bias)), weight)
    return (16 * torch.sigmoid(table)).to(out_weight.dtype)


def scale_of_cosines(logit_scale: Tensor) -> Tensor:
    """Factors [num_heads] of the cosines, at most 100, from their logarithms [num_heads, 1, 1]."""
    exact = torch.promote_types(logit_scale.dtype, torch.float32)
    scale = logit_scale.to(exact).clamp(max=MOST_LOGIT_SCALE).exp()
    return scale.flatten().to(logit_scale.dtype)


# --- the layers of other libraries


def transformers_block(block: Any) -> Swinv2BlockParts:
    """Reads a Swinv2Layer.

    Raises:
        Refused: the ops do not cover the module. The other builders raise it too.
    """
    own = getattr(block.attention, "self")  # noqa: B009 -- a name that reads as a variable
    window, shift = int(block.window_size), int(block.shift_size)
    if tuple(own.window_size) != (window, window):
        raise Refused("its attention has windows of another size")
    return _block(
        block,
        own,
        own.continuous_position_bias_mlp,
        norms=(block.layernorm_before, block.layernorm_after),
        projections=(own.query, own.key, own.value),
        linears=(block.attention.output.dense, block.intermediate.dense, block.output.dense),
        activation=block.intermediate.intermediate_act_fn,
        num_heads=own.num_attention_heads,
        geometry=WindowGeometry((window, window), (shift, shift)),
        mask_value=TRANSFORMERS_MASK_VALUE,
    )


def timm_block(block: Any) -> Swinv2BlockParts:
    """Reads timm's SwinTransformerV2Block, which rolls before it pads."""
    attention, mlp = block.attn, block.mlp
    return _block(
        block,
        attention,
        attention.cpb_mlp,
        norms=(block.norm1, block.norm2),
        projections=(attention.qkv,),
        linears=(attention.proj, mlp.fc1, mlp.fc2),
        activation=mlp.act,
        num_heads=attention.num_heads,
        geometry=WindowGeometry(tuple(block.window_size), tuple(block.shift_size), True),
    )


def _block(block: Any, owner: Any, positions: Any, **options: Any) -> Swinv2BlockParts:
    """Builds the parts of a block; `options` as of `checked_block`.

    Args:
        block: their owner.
        owner: of the scale and of the buffers.
        positions: MLP of the position bias.
    """
    kinds = [type(layer) for layer in positions]
    if kinds != [nn.Linear, nn.ReLU, nn.Linear]:
        raise Refused("the MLP of its positions has other layers")
    if positions[0].bias is None or positions[2].bias is not None:
        raise Refused("the MLP of its positions has other biases")
    if owner.logit_scale.numel() != options["num_heads"]:
        raise Refused("its scale is not one number for each head")
    make = partial(Swinv2BlockParts, positions=positions)
    found: Any = checked_block(block, bias=owner, make=make, post_norm=True, **options)
    biases = found.biases()
    if (biases.q is None) != (biases.v is None):
        raise Refused("only some of its queries and values have a bias")
    return found


def transformers_parts(backbone: Any) -> SwinParts:
    """Reads transformers' Swinv2Backbone."""
    embeddings, stages = backbone.embeddings, list(backbone.encoder.layers)
    projection = embeddings.patch_embeddings.projection
    if type(projection) is not nn.Conv2d or not cuts_patches(projection):
        raise Refused("its patch embedding is no convolution that cuts patches")
    if type(embeddings.norm) is not nn.LayerNorm:
        raise Refused("its norms are not layer norms")
    mergings = [merging_parts(stage.downsample) for stage in stages[:-1]]
    return SwinParts(
        SwinEmbeddingParts(projection, embeddings.norm, "pad", embeddings),
        tuple(
            SwinStageParts(merging, tuple(map(transformers_block, stage.blocks)))
            for merging, stage in zip([None, *mergings], stages)
        ),
    )


def timm_parts(features: nn.Module) -> SwinParts:
    """Reads timm's features-only Swin V2."""
    from timm.layers.mlp import Mlp
    from timm.models.swin_transformer_v2 import (
        PatchMerging,
        SwinTransformerV2Block,
        SwinTransformerV2Stage,
        WindowAttention,
    )

    layers = SwinTransformerV2Block, WindowAttention, Mlp
    return read_timm(features, SwinTransformerV2Stage, PatchMerging, layers, timm_block)
