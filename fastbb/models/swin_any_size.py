"""A second form of Swin's forward, into which the sizes of the images enter as index tensors only.

Algorithm: maps are rows of tokens [T, C], those of all images one below the other. Padding, rolling
and cutting into windows are one gather, putting back is another, merging a third; the windows of
all images are one dimension. What depends on sizes is so computed once, outside the graph, and a
compiler that takes the lengths of the index tensors for variables needs no second look.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import (
    WindowGeometry,
    linear_residual,
)
from fastbb_kernels.ops.window_attention import _regions, _windows

from .layers import check_untouched
from .swin import SwinBackbone, TorchvisionSwinConfig
from .swin_compute import cuts_patches, merge_patches, mlp_half, project_qkv
from .swin_weights import PatchMergingWeights, SwinBlockSpec, SwinBlockWeights

MAX_REMEMBERED_SIZES = 16
PADDING = -1  # in an index: a token that the map does not have
MIN_ROWS = 2  # compilers take a length of 1 for a constant


class WindowIndices(NamedTuple):
    """How T tokens are cut into W windows of N tokens.

    Attributes:
        gather: [W, N] int64, row of each token of a window, or `PADDING`.
        scatter: [T] int64, which of the W * N tokens of windows a row is.
        regions: [W, N] fp32 numbers of the regions, between which no token attends.
    """

    gather: Tensor
    scatter: Tensor
    regions: Tensor


class SwinAnySize:
    """The inference of one backbone, for the stages that are selected on it at construction.

    `maps(forward(*inputs(x)), x)` are the feature maps. `forward` is what to compile, with the
    first dimension of every input dynamic: it is never 1, nor are others that depend on it.
    """

    def __init__(self, backbone: SwinBackbone) -> None:
        reason = swin_any_size_unsupported(backbone)
        if reason is not None:
            raise NotImplementedError(f"SwinAnySize cannot run this backbone: {reason}")
        check_untouched(backbone)
        self.backbone = backbone
        self.names = tuple(backbone.out_features)
        self.n_stages = backbone.stage_names.index(self.names[-1])
        patch = backbone.config.patch_size
        self.patch = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
        self.drops_pixels = isinstance(backbone.config, TorchvisionSwinConfig)
        self.kinds = [
            list(dict.fromkeys(_kind(spec) for spec in specs))
            for specs in backbone._specs[: self.n_stages]
        ]
        self.indices = lru_cache(MAX_REMEMBERED_SIZES)(self._make_indices)

    def inputs(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Rows of pixels and the index tensors of these sizes.

        Args:
            pixel_values: [B, C, H, W] as the backbone takes them, B at least 1.

        Returns:
            [T, C * p * q] patches of p x q pixels, then int64 and fp32 tensors [n, m] or [n] with
            an n that depends on B, H and W. Their number is always the same.
        """
        (p, q), (B, C, H, W) = self.patch, pixel_values.shape
        height, width = self._grid(H, W)
        if self.drops_pixels:
            pixel_values = pixel_values[:, :, : height * p, : width * q]
        elif H % p or W % q:
            pixel_values = F.pad(pixel_values, (0, -W % q, 0, -H % p))
        n_patches = B * height * width
        patches = pixel_values.new_empty(max(n_patches, MIN_ROWS), C * p * q)
        patches[n_patches:] = 0
        x = pixel_values.unflatten(3, (width, q)).unflatten(2, (height, p))
        patches[:n_patches].view(B, height, width, C, p, q).copy_(x.permute(0, 2, 4, 1, 3, 5))
        return patches, *self.indices(B, height, width, pixel_values.device)

    def forward(self, patches: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        """Rows [T, C] of each selected stage, from what `inputs` returns."""
        backbone, index = self.backbone, iter(indices)
        embeddings = backbone.swin.embeddings
        projection, norm = embeddings.patch_embeddings.projection, embeddings.norm
        assert isinstance(projection, nn.Conv2d)
        x = F.linear(patches, projection.weight.flatten(1), projection.bias)
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        outputs = []
        for number, name in enumerate(backbone.stage_names[: self.n_stages + 1]):
            if number > 0:
                stage = backbone._stage(number - 1)
                if stage.downsample is not None:
                    x = _merge(x, next(index), stage.downsample)
                kinds = self.kinds[number - 1]
                windows = {
                    kind: (next(index), next(index), next(index) if any(kind[0].shift) else None)
                    for kind in kinds
                }
                for spec, weights in stage.blocks:
                    x = _block(x, spec, weights(), *windows[_kind(spec)])
            if name in self.names:
                # [T, C] as a map of one row
                hidden = x[None, None].permute(0, 3, 1, 2)
                outputs.append(backbone.feature_map(name, hidden)[0, :, 0].T)
        return tuple(outputs)

    def maps(self, outputs: Sequence[Tensor], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[B, C, h, w] of each selected stage in channels-last strides, views of `outputs`."""
        batch, _, H, W = pixel_values.shape
        grids = _grids(*self._grid(H, W), self.n_stages)
        maps = []
        for name, rows in zip(self.names, outputs):
            height, width = grids[self.backbone.stage_names.index(name)]
            rows = rows[: batch * height * width]
            maps.append(rows.view(batch, height, width, -1).permute(0, 3, 1, 2))
        return tuple(maps)

    def _grid(self, H: int, W: int) -> tuple[int, int]:
        p, q = self.patch
        if not self.drops_pixels:
            return -(-H // p), -(-W // q)
        if p > H or q > W:
            raise ValueError(f"the image must be at least one patch of {p}x{q} pixels, got {H}x{W}")
        return H // p, W // q

    def _make_indices(
        self, batch: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        grids = _grids(height, width, self.n_stages)
        for number, grid in enumerate(grids[1:]):
            if number > 0:
                tensors.append(merge_index(batch, *grids[number]))
            for geometry, clamp_shift in self.kinds[number]:
                spec = SwinBlockSpec(1, geometry, clamp_shift)
                windows = window_indices(batch, *grid, spec.geometry_for(*grid))
                tensors += [windows.gather, windows.scatter]
                if any(geometry.shift):
                    tensors.append(windows.regions)
        return tuple(tensor.to(device) for tensor in tensors)


def swin_any_size_unsupported(backbone: SwinBackbone) -> str | None:
    """Why `SwinAnySize` cannot run a backbone, or None."""
    if backbone.training:
        return "it is for inference; call eval()"
    if backbone.config.use_absolute_embeddings:
        return "its absolute embeddings are for one size"
    if not cuts_patches(backbone.swin.embeddings.patch_embeddings.projection):  # type: ignore[arg-type]
        return "its patch embedding does more than cut patches"
    return None


def window_indices(batch: int, height: int, width: int, geometry: WindowGeometry) -> WindowIndices:
    """The windows of `batch` maps of height x width tokens."""
    n_tokens = height * width
    position = torch.arange(n_tokens).view(1, height, width, 1).expand(-1, -1, -1, 3)
    # the op's own padding, rolling and cutting, of positions in place of queries
    windows, _, _ = _windows(position, torch.full((3,), PADDING), 1, geometry)
    gather = windows.flatten(1)  # [W, N]
    (slots,) = (gather.flatten() != PADDING).nonzero(as_tuple=True)
    scatter = torch.empty(n_tokens, dtype=torch.int64)
    scatter[gather.flatten()[slots]] = slots
    scatter = (scatter + gather.numel() * torch.arange(batch).view(-1, 1)).flatten()
    (h, w), (shift_h, shift_w), _ = geometry
    rows = _regions(height, h, shift_h, position.device)
    columns = _regions(width, w, shift_w, position.device)
    regions = 3 * rows.view(-1, 1, h, 1) + columns.view(1, -1, 1, w)
    regions = regions.reshape(1, -1, h * w).expand(batch, -1, -1).flatten(0, 1).float()
    return WindowIndices(
        _at_least_two(_of_images(gather, batch, n_tokens), PADDING),
        _at_least_two(scatter, 0),
        _at_least_two(regions, 0),
    )


def merge_index(batch: int, height: int, width: int) -> Tensor:
    """[T', 4] rows of the 2x2 tokens of height x width maps that become one, or `PADDING`."""
    position = torch.arange(height * width).view(height, width)
    position = F.pad(position, (0, width % 2, 0, height % 2), value=PADDING)
    index = position.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(0, 2, 1, 3)
    return _at_least_two(_of_images(index.reshape(-1, 4), batch, height * width), PADDING)


def _of_images(index: Tensor, batch: int, n_tokens: int) -> Tensor:
    """[n, m] rows of one image -> [batch * n, m] rows of a batch."""
    first = n_tokens * torch.arange(batch).view(-1, 1, 1)
    return torch.where(index == PADDING, PADDING, index + first).flatten(0, 1)


def _at_least_two(x: Tensor, value: float) -> Tensor:
    """Appends rows that nothing reads, for compilers take a length of 1 for a constant."""
    missing = max(MIN_ROWS - len(x), 0)
    return torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])


def _grids(height: int, width: int, n_stages: int) -> list[tuple[int, int]]:
    """Tokens (height, width) of the stem and of each stage."""
    grids = [(height, width)] * 2
    while len(grids) <= n_stages:
        grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    return grids[: n_stages + 1]


def _kind(spec: SwinBlockSpec) -> tuple[WindowGeometry, bool]:
    """What the windows of a block depend on, beside the size of the map."""
    return spec.geometry, spec.clamp_shift


def _rows(x: Tensor, index: Tensor, padding: Tensor | float) -> Tensor:
    """[T, C] -> [n, m, C], with `padding` where the index says so."""
    rows = x[index.clamp(min=0)]
    return torch.where((index == PADDING).unsqueeze(-1), padding, rows)


def _merge(x: Tensor, index: Tensor, downsample: PatchMergingWeights) -> Tensor:
    """[T, C] -> [T', 2C]: every token of the result is a map of 2x2 to the op."""
    neighbours = _rows(x, index, 0.0).unflatten(1, (2, 2))
    return merge_patches(neighbours, downsample).flatten(0, 2)


def _block(
    x: Tensor,
    spec: SwinBlockSpec,
    weights: SwinBlockWeights,
    gather: Tensor,
    scatter: Tensor,
    regions: Tensor | None,
) -> Tensor:
    """`swin_block` in inference, on rows [T, C]; the indices are those of `WindowIndices`."""
    qkv = project_qkv(x, weights)
    padding = 0.0 if weights.qkv_bias is None else weights.qkv_bias
    qkv = _rows(qkv, gather, padding).unflatten(2, (3, spec.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [W, heads, N, head_dim]
    y = _attend(q, k, v, weights.relative_position_bias, regions)
    y = y.transpose(1, 2).flatten(2).flatten(0, 1)[scatter]
    x = linear_residual(y, weights.proj_weight, weights.proj_bias, x)
    return mlp_half(x, spec, weights)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
    """Attention within windows [W, heads, N, head_dim] with a bias [heads, N, P].

    Written out, for a compiler makes one pass of everything between the two products; a mask for
    `scaled_dot_product_attention` would have to be made of bias and regions for every image.
    """
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores + bias[..., : bias.shape[1]].to(scores.dtype)
    if regions is not None:
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        scores = torch.where(apart, scores - 100.0, scores)
    statistics = torch.promote_types(scores.dtype, torch.float32)
    attention = F.softmax(scores, dim=-1, dtype=statistics)
    if regions is not None:
        # exp(-100) is a subnormal number, and CPUs multiply by those slowly
        tiny = torch.finfo(statistics).tiny
        attention = torch.where(attention < tiny, 0.0, attention)
    return attention.to(v.dtype) @ v
