"""Position embeddings of ViTs: absolute ones that are interpolated."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..weights.derived import derive

Grid = tuple[int, int]  # rows and columns of patches
Rotation = tuple[Tensor, Tensor]  # cosines and sines [h * w, head_dim]


def patch_grid(patch: Grid, size: tuple[int, int]) -> Grid:
    """Rows and columns of the whole patches of an image; pixels beyond them are dropped.

    Args:
        patch: height and width of a patch.
        size: of the image.

    Raises:
        ValueError: the image has no whole patch.
    """
    (h, w), (height, width) = patch, size
    if height < h or width < w:
        raise ValueError(
            f"the image must be at least one patch of {h}x{w} pixels, got {height}x{width}"
        )
    return height // h, width // w


class PositionRules(NamedTuple):
    """How position embeddings are interpolated.

    Attributes:
        grid: of the trained size.
        n_prefix: positions before those of the patches.
        antialias: whether a reduction is smoothed.
        in_fp32: whether the computation is fp32 whatever the dtype.
    """

    grid: Grid
    n_prefix: int
    antialias: bool
    in_fp32: bool


def with_prefix(x: Tensor, prefix: Tensor | None, positions: Tensor | None) -> Tensor:
    """Adds positions [1, N, C] to patches [B, N, C] and puts a prefix [1, P, C] before them."""
    x = x if positions is None else x + positions
    return x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)


def embedding_terms(
    owner: nn.Module,
    rules: PositionRules,
    grid: Grid,
    cls_token: Tensor | None,
    extra_tokens: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The prefix [1, P, C] with its positions, and the positions [1, N, C] of a grid of patches.

    Args:
        owner: module that they are cached for.
        rules: of interpolation.
        grid: rows and columns of patches.
        cls_token: C numbers, or None.
        extra_tokens: [1, E, C], or None.
        positions: [1, P, C] or [P, C], or None.
    """
    given = [tensor for tensor in (cls_token, extra_tokens, positions) if tensor is not None]
    has = (cls_token is not None, extra_tokens is not None, positions is not None)
    if not given:
        return None, None
    compute = partial(_embedding_terms, rules, grid, has)
    return derive(owner, "embedding", compute, *given, constants=(rules, grid, has))


def _embedding_terms(
    rules: PositionRules, grid: Grid, has: tuple[bool, bool, bool], *given: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    tensors = iter(given)
    cls_token, extra_tokens, positions = (next(tensors) if is_there else None for is_there in has)
    tokens = [] if cls_token is None else [cls_token.reshape(1, 1, -1)]
    tokens += [] if extra_tokens is None else [extra_tokens]
    of_patches = None
    if positions is not None:
        positions = positions.view(1, -1, positions.shape[-1])
        n = rules.n_prefix
        of_patches = _interpolated(positions[:, n:], rules, grid)
        if n:
            # registers come after the positions were added
            whole = torch.cat(tokens, dim=1)
            tokens = [whole[:, :n] + positions[:, :n], whole[:, n:]]
    return (torch.cat(tokens, dim=1) if tokens else None), of_patches


def _interpolated(positions: Tensor, rules: PositionRules, grid: Grid) -> Tensor:
    """Positions [1, h * w, C] of the trained grid for another one; copied if it is the same."""
    if grid == rules.grid:
        return positions.contiguous()
    maps = positions.unflatten(1, rules.grid).permute(0, 3, 1, 2)
    maps = F.interpolate(
        maps.float() if rules.in_fp32 else maps,
        size=grid,
        mode="bicubic",
        align_corners=False,
        antialias=rules.antialias,
    )
    return maps.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
