"""The forward of a ViT, computed from its parts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastbb_kernels import layer_norm_nchw, linear_residual
from fastbb_kernels.ops.layer_norm_swiglu import layer_norm_swiglu
from fastbb_kernels.ops.rope_qkv import rope_qkv

from ..backbone.checkpointing import BlockRunner
from .layers import attend, drop_path, norm_linear
from .vit_cpu import runs_on_cpu, vit_block_on_cpu
from .vit_parts import (
    ViTBlockParts,
    ViTBlockSpec,
    ViTBlockWeights,
    ViTEmbeddingParts,
    ViTParts,
)
from .vit_positions import Grid, Rotation, embedding_terms, patch_grid, with_prefix


def vit_states(
    parts: ViTParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    *,
    patch: Grid,
    attentions: list[Tensor] | None = None,
    run_block: BlockRunner | None = None,
) -> list[Tensor]:
    """Runs the layers up to the last wanted state.

    Args:
        parts: of the ViT.
        pixel_values: [B, C_in, H, W].
        wanted: indices of states, at least one; 0 is the embedding.
        patch: height and width of a patch.
        attentions: list to append the attention weights of each layer to, or None.
        run_block: runs a layer with gradient checkpointing, or None.

    Returns:
        Tokens [B, N, C] of each wanted state.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    run = partial(
        _run, parts, wanted=wanted, patch=patch, attentions=attentions, run_block=run_block
    )
    return run(pixel_values) if parts.root is None else parts.root(pixel_values, run)


def _run(
    parts: ViTParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    patch: Grid,
    attentions: list[Tensor] | None,
    run_block: BlockRunner | None,
) -> list[Tensor]:
    height, width = pixel_values.shape[2:]
    grid = patch_grid(patch, (height, width))
    if isinstance(parts.embedding, ViTEmbeddingParts):
        x = _embed(parts.embedding, pixel_values, grid)
    else:
        x = parts.embedding(pixel_values)
    if parts.pre_norm is not None:
        x = parts.pre_norm(x)
    options: dict[str, Any] = {}
    if parts.rope is not None:
        options["position_embeddings"] = parts.rope(grid)
    if parts.shared_bias is not None:
        options["attention_mask"] = parts.shared_bias(grid)
    if parts.takes_resolution:
        options["resolution"] = (height, width)
    if attentions is not None:
        options["attentions"] = attentions
    blocks = [
        partial(vit_block, parts=block, patch=patch) if isinstance(block, ViTBlockParts) else block
        for block in parts.blocks[: max(wanted)]
    ]
    run = partial(_run_blocks, blocks, wanted=wanted, run_block=run_block, options=options)
    return run(x) if parts.encoder is None else parts.encoder(x, run)


def _run_blocks(
    blocks: Sequence[Any],
    x: Tensor,
    wanted: Sequence[int],
    run_block: BlockRunner | None,
    options: dict[str, Any],
) -> list[Tensor]:
    """Runs layers; returns the wanted states, of which 0 is `x`."""
    states = {0: x}
    for index, block in enumerate(blocks, start=1):
        run = partial(block, **options)
        x = run(x) if run_block is None else run_block(run, x)
        if index in wanted:
            states[index] = x
    return [states[index] for index in wanted]


def _embed(parts: ViTEmbeddingParts, pixel_values: Tensor, grid: Grid) -> Tensor:
    """Embeds pixels [B, C_in, H, W] as tokens [B, N, C]."""
    x = parts.projection(pixel_values).flatten(2).transpose(1, 2)
    tokens = parts.cls_token(), parts.extra_tokens(), parts.positions()
    x = with_prefix(x, *embedding_terms(parts.owner, parts.rules, grid, *tokens))
    dropout = parts.dropout
    return x if dropout is None or not dropout.training else dropout(x)


def vit_block(
    x: Tensor,
    parts: ViTBlockParts,
    patch: Grid,
    position_embeddings: Rotation | None = None,
    attention_mask: Tensor | None = None,
    resolution: tuple[int, int] | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Runs a layer: attention and MLP, each with a norm, a layer scale and a residual.

    Args:
        x: [B, N, C].
        parts: of the layer.
        patch: height and width of a patch.
        position_embeddings: rotation of the patches' queries and keys, or None.
        attention_mask: [1, num_heads, N, N], added to the scores, or None.
        resolution: height and width of the image, if the layer has a position bias of its own.
        attentions: list to append the attention weights to, or None.

    Returns:
        [B, N, C].
    """
    spec, weights = parts.spec(), parts.weights()
    bias = layer_bias(parts.position_bias, patch, resolution, attention_mask)
    if attentions is None and runs_on_cpu(x, spec, weights):
        return vit_block_on_cpu(x, parts, spec, weights, position_embeddings, bias)
    q, k, v = _qkv(x, parts, spec, weights, position_embeddings)
    y = attend(q, k, v, bias, spec.attention_dropout, attentions)
    x = _add_branch(x, y, weights.proj_weight, weights.proj_bias, weights.scale1, spec)
    y = _hidden(x, parts, spec, weights)
    return _add_branch(x, y, weights.fc2_weight, weights.fc2_bias, weights.scale2, spec)


def layer_bias(
    own: Any, patch: Grid, resolution: tuple[int, int] | None, shared: Tensor | None
) -> Tensor | None:
    """The bias [1, num_heads, N, N] of the scores of a layer, its own plus the shared one."""
    if own is None:
        return shared
    assert resolution is not None
    bias = own(patch_grid(patch, resolution))
    return bias if shared is None else bias + shared


def _qkv(
    x: Tensor,
    parts: ViTBlockParts,
    spec: ViTBlockSpec,
    weights: ViTBlockWeights,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, num_heads, N, head_dim] of tokens [B, N, C]."""
    tensors = weights.norm1_weight, weights.norm1_bias, weights.qkv_weight, weights.qkv_bias
    eps, heads = parts.norms[0].eps, spec.num_heads
    if rotation is None:
        qkv = norm_linear(parts.owner, "qkv")(x, *tensors, eps=eps).unflatten(-1, (3, heads, -1))
    else:
        n_prefix = x.shape[1] - rotation[0].shape[0]
        qkv = rope_qkv(x, *tensors, *rotation, num_heads=heads, n_prefix=n_prefix, eps=eps)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _hidden(
    x: Tensor, parts: ViTBlockParts, spec: ViTBlockSpec, weights: ViTBlockWeights
) -> Tensor:
    """The hidden layer of the MLP, [B, N, C] to [B, N, F]."""
    norm, eps = (weights.norm2_weight, weights.norm2_bias), parts.norms[1].eps
    fc1 = weights.fc1_weight, weights.fc1_bias
    first = norm_linear(parts.owner, "fc1")
    if weights.gate_weight is None:
        return first(x, *norm, *fc1, eps=eps, activation=spec.activation)
    gate = weights.gate_weight, weights.gate_bias
    if spec.activation == "silu":
        return layer_norm_swiglu(x, *norm, *gate, *fc1, eps=eps)
    gated = norm_linear(parts.owner, "gate")(x, *norm, *gate, eps=eps, activation=spec.activation)
    return gated * first(x, *norm, *fc1, eps=eps)


def _add_branch(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    spec: ViTBlockSpec,
) -> Tensor:
    """Adds a branch, which ends with a linear layer and a layer scale, to the residual."""
    if spec.dropout == 0.0 and spec.drop_path == 0.0:
        return linear_residual(x, weight, bias, residual, scale)
    branch = F.dropout(F.linear(x, weight, bias), spec.dropout)
    branch = branch if scale is None else branch * scale
    return residual + drop_path(branch, spec.drop_path)


def normed_tokens(x: Tensor, norm: Any) -> Tensor:
    """Normalizes tokens [B, N, C]."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def normed_map(x: Tensor, norm: Any) -> Tensor:
    """Normalizes patches [B, h, w, C] and returns them as a map [B, C, h, w]."""
    return layer_norm_nchw(x, norm.weight, norm.bias, eps=norm.eps)
