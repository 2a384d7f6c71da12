"""The forward of ResNets over their parts, whoever owns them."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS

from ..backbone.checkpointing import BlockRunner
from .resnet_parts import ResNetBlockParts, ResNetParts, StemLayer


def resnet_maps(
    parts: ResNetParts,
    pixel_values: Tensor,
    wanted: Sequence[int],
    *,
    run_block: BlockRunner | None = None,
) -> list[Tensor]:
    """Runs the stages up to the last wanted map.

    Args:
        parts: of the ResNet.
        pixel_values: [B, C, H, W].
        wanted: indices of maps, at least one; 0 is the stem.
        run_block: runs a block with gradient checkpointing, or None.

    Returns:
        [B, C', h, w] of each wanted map.
    """
    last = max(wanted)
    pools_at_once = parts.pools_stem_map or 0 not in wanted
    x = _stem(parts, pixel_values, pools_at_once)
    maps = {0: x}
    if last and not pools_at_once:
        x = _pool(parts, x)
    for index, stage in enumerate(parts.stages[:last], start=1):
        for block in stage:
            if not isinstance(block, ResNetBlockParts):
                x = block(x)
            elif run_block is None:
                x = residual_block(x, block)
            else:
                x = run_block(residual_block, x, block)
        maps[index] = x
    return [maps[index] for index in wanted]


def _stem(parts: ResNetParts, x: Tensor, pools: bool) -> Tensor:
    *layers, last = parts.stem
    for layer in layers:
        x = layer(x)
    if parts.pool is None and isinstance(last, StemLayer):
        return last.pair.stem(x, last.activation, pool=pools)
    x = last(x)
    return _pool(parts, x) if pools else x


def _pool(parts: ResNetParts, x: Tensor) -> Tensor:
    if parts.pool is not None:
        return parts.pool(x)
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def residual_block(x: Tensor, parts: ResNetBlockParts) -> Tensor:
    """Basic or bottleneck block: the convolutions with ReLU between them, then the residual.

    Args:
        x: [B, C, H, W].
        parts: of the block.

    Returns:
        [B, C', h, w].
    """
    pairs, shortcut, activation = parts.pairs, parts.shortcut, parts.activation
    residual = x
    for module in parts.before:
        residual = module(residual)
    is_usual = parts.blur is None and parts.attention is None
    if is_usual and shortcut is None and len(pairs) == 3:
        first, second, last = pairs
        return second.tail(first(x, "relu", hidden=True), last, residual, activation)
    *inner, last = pairs
    for pair in inner:
        x = pair(x, "relu", hidden=True)
    if parts.blur is not None:
        x = parts.blur(x)
    if parts.attention is None:
        return last.end(x, residual, shortcut, activation)
    x = parts.attention(last(x))
    x += residual if shortcut is None else shortcut(residual)
    return F.relu_(x) if activation == "relu" else ACTIVATIONS[activation](x)
