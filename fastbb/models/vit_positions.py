"""Position embeddings of ViTs: absolute ones, which are interpolated, rotary and relative ones."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import relative_position_index

from ..weights.derived import derive
from .parts import NativeModule

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
        grid: for which they are as they are, or None; rows and columns.
        n_prefix: positions before those of the patches.
        antialias: whether a reduction is smoothed.
        in_fp32: whether the computation is fp32 whatever the dtype.
    """

    grid: Grid | None
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
    """Positions [1, N, C] for a grid of patches; copied if it is the trained one.

    Raises:
        ValueError: N is no square, and the grid is another one.
    """
    if grid == rules.grid:
        return positions.contiguous()
    n_positions = positions.shape[1]
    side = math.isqrt(n_positions)
    if side * side != n_positions:
        raise ValueError(
            f"the {n_positions} position embeddings cannot be interpolated for {grid[0]}x{grid[1]} "
            "patches, as transformers takes them as a square: wanted a square number of them"
            + ("" if rules.grid is None else ", or images of {}x{} patches".format(*rules.grid))
        )
    # upstream takes positions of a grid that is no square as one too
    maps = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    maps = F.interpolate(
        maps.float() if rules.in_fp32 else maps,
        size=grid,
        mode="bicubic",
        align_corners=False,
        antialias=rules.antialias,
    )
    return maps.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


class RopeAugmentation(NamedTuple):
    """Random changes of the coordinates of patches in training; None is no change.

    Attributes:
        shift: both axes shift by up to this.
        jitter: each axis is scaled by up to this factor.
        rescale: both axes are scaled by up to this factor.
    """

    shift: float | None
    jitter: float | None
    rescale: float | None


class ViTRope(NativeModule):
    """Rotary position embeddings of the centers of patches (DINOv3).

    Args:
        head_dim: channels of a head.
        theta: base of the frequencies.
        augmentation: in training.
    """

    def __init__(self, head_dim: int, theta: float, augmentation: RopeAugmentation) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.augmentation = augmentation

    def forward(self, like: Tensor, grid: Grid) -> Rotation:
        """Computes the rotation, in fp32 for any dtype but float64.

        Args:
            like: a parameter, of whose dtype and device the rotation is.
            grid: rows and columns of patches.

        Returns:
            Cosines and sines [h * w, head_dim].
        """
        if self.training and any(value is not None for value in self.augmentation):
            coordinates = _augmented(_centers(grid, like.device), self.augmentation)
            return _rotation(coordinates, self.head_dim, self.theta, like.dtype)
        return derive(
            self,
            "rotation",
            lambda like: _rotation(
                _centers(grid, like.device), self.head_dim, self.theta, like.dtype
            ),
            like,
            constants=(grid, self.theta),
        )


def _centers(grid: Grid, device: torch.device) -> Tensor:
    """Centers (y, x) of the patches of a grid, in -1 ... 1, [h * w, 2]."""
    axes = [torch.arange(0.5, n, dtype=torch.float32, device=device) / n for n in grid]
    return 2.0 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) - 1.0


def _augmented(coordinates: Tensor, augmentation: RopeAugmentation) -> Tensor:
    """Shifts and scales coordinates [h * w, 2] at random."""
    shift, jitter, rescale = augmentation
    if shift is not None:
        coordinates = coordinates + coordinates.new_empty(1, 2).uniform_(-shift, shift)
    if jitter is not None:
        limit = math.log(jitter)
        coordinates = coordinates * coordinates.new_empty(1, 2).uniform_(-limit, limit).exp()
    if rescale is not None:
        limit = math.log(rescale)
        coordinates = coordinates * coordinates.new_empty(1).uniform_(-limit, limit).exp()
    return coordinates


def _rotation(coordinates: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines [h * w, head_dim] of coordinates [h * w, 2]."""
    steps = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=coordinates.device)
    frequencies = 1 / theta**steps
    if dtype == torch.float64:  # a buffer of upstream's, which it converts
        frequencies = frequencies.double()
    angles = 2 * math.pi * coordinates[:, :, None] * frequencies
    angles = angles.flatten(1, 2).tile(2)
    return torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the patches of queries or keys [B, num_heads, N, head_dim], which are last."""
    cos, sin = rotation
    prefix, of_patches = x.split([x.shape[-2] - cos.shape[0], cos.shape[0]], dim=-2)
    first, second = of_patches.chunk(2, dim=-1)
    turned = of_patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, turned], dim=-2)


class ViTRelativePositionBias(NativeModule):
    """The bias of the attention scores by relative positions of patches (BEiT).

    Args:
        grid: rows and columns of patches of the trained size.
        num_heads: attention heads.
    """

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        # the last three are for class token to patch, patch to class token, and itself
        n_rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(n_rows, num_heads))

    def forward(self, grid: Grid) -> Tensor:
        """Computes the bias [1, num_heads, N, N] for a grid of patches after a class token."""
        return relative_position_bias(self, self.grid, grid)


def relative_position_bias(owner: Any, trained: Grid, grid: Grid) -> Tensor:
    """The bias [1, num_heads, N, N] for a grid of patches after a class token.

    Args:
        owner: module with the `relative_position_bias_table`; the bias is cached for it.
        trained: rows and columns of patches that the table was made for.
        grid: rows and columns of patches.
    """
    table = owner.relative_position_bias_table
    compute = partial(_relative_bias, trained, grid)
    return derive(owner, "bias", compute, table, constants=(trained, grid))[0]


def relative_position_rows(table: Tensor, trained: Grid, grid: Grid) -> Tensor:
    """Interpolates a table of biases for another grid of patches.

    Args:
        table: [(2h - 1) * (2w - 1) + 3, num_heads] of the trained grid; the last three rows, of the
            class token, stay.
        trained: rows and columns of patches that the table was made for.
        grid: rows and columns of patches.
    """
    (old_h, old_w), (new_h, new_w) = [(2 * h - 1, 2 * w - 1) for h, w in (trained, grid)]
    # upstream takes a table of a trained grid that is no square as width x height
    maps = table[:-3].view(1, old_w, old_h, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(new_h, new_w), mode="bilinear")
    return torch.cat([maps.permute(0, 2, 3, 1).flatten(0, 2), table[-3:]])


def _relative_bias(trained: Grid, grid: Grid, table: Tensor) -> tuple[Tensor]:
    rows = relative_position_rows(table, trained, grid)
    n_patches, n_relative = grid[0] * grid[1], len(rows) - 3
    index = torch.empty(n_patches + 1, n_patches + 1, dtype=torch.int64, device=table.device)
    index[1:, 1:] = relative_position_index(grid, table.device).view(n_patches, n_patches)
    index[0, :] = n_relative
    index[:, 0] = n_relative + 1
    index[0, 0] = n_relative + 2
    bias = rows[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)
    # rows whose starts are aligned, as the kernels of attention ask for
    bias = F.pad(bias, (0, -len(index) % 16)).contiguous()
    return (bias[None, ..., : len(index)],)
