"""The computation of ResNets over convolutions and norms, whoever owns them; timm's modules."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone.registry import StagesForward
from .layers import ConvNorm, is_foldable


def residual_block(
    x: Tensor,
    pairs: Sequence[ConvNorm],
    shortcut: ConvNorm | None,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Basic or bottleneck block: the convolutions with ReLU between them, then the residual.

    Args:
        x: [B, C, H, W].
        pairs: two (basic) or three (bottleneck) convolutions.
        shortcut: the convolution of the residual, or None.
        activation: name of the last activation.
        residual: [B, C_s, H_s, W_s] if it is not `x`.

    Returns:
        [B, C', h, w].
    """
    residual = x if residual is None else residual
    if len(pairs) == 3 and shortcut is None:
        first, second, last = pairs
        return second.tail(first(x, "relu", hidden=True), last, residual, activation)
    *inner, last = pairs
    for pair in inner:
        x = pair(x, "relu", hidden=True)
    return last.end(x, residual, shortcut, activation)


def timm_forward(features: nn.Module) -> StagesForward | None:
    """A forward over the parameters of timm's features-only ResNet; None if it is not one.

    A block or stem with parts that have no op of ours runs as timm's module.
    Stage 0 is the stem before the pool (stride 2), as timm counts.
    """
    parts = dict(features.named_children())
    stem = [parts.pop(name, None) for name in ("conv1", "bn1", "act1", "maxpool")]
    if None in stem or not all(type(stage) is nn.Sequential for stage in parts.values()):
        return None
    conv, norm, act, pool = (part for part in stem if part is not None)
    pair = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked here
    fused = is_plain(pair) and type(act) is nn.ReLU and pools_by_2(pool)
    stages = [[timm_block(block) for block in stage.children()] for stage in parts.values()]

    def forward(pixel_values: Tensor, indices: Sequence[int]) -> list[Tensor]:
        maps = {}
        pooled = fused and 0 not in indices
        if fused:
            x = pair.stem(pixel_values, "relu", pool=pooled)
        else:
            x = act(norm(conv(pixel_values)))
        if not pooled:
            maps[0] = x
            x = pool(x) if max(indices) else x
        for index, stage in enumerate(stages[: max(indices)], start=1):
            for block in stage:
                x = block(x)
            maps[index] = x
        return [maps[index] for index in indices]

    return forward


def timm_block(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """timm's residual block as calls of our ops; the block itself if they do not cover it.

    Channel attention, blur pools and the average pool before a shortcut run as timm's modules. In
    inference, where this is for, stochastic depth and drop block do nothing.
    """
    from timm.models.resnet import BasicBlock, Bottleneck

    if type(block) not in (BasicBlock, Bottleneck):
        return block
    parts: Any = block
    numbers = (1, 2) if type(block) is BasicBlock else (1, 2, 3)
    pairs = [ConvNorm(getattr(parts, f"conv{i}"), getattr(parts, f"bn{i}")) for i in numbers]
    acts = [getattr(parts, f"act{i}") for i in numbers]
    before, shortcut = _timm_shortcut(parts.downsample)
    covered = (
        all(type(act) is nn.ReLU for act in acts)
        and all(is_plain(pair) for pair in pairs)
        and (parts.downsample is None or shortcut is not None)
    )
    if not covered:
        return block
    blur = None if isinstance(parts.aa, nn.Identity) else parts.aa

    def forward(x: Tensor) -> Tensor:
        residual = x
        for module in before:
            residual = module(residual)
        if blur is None and parts.se is None:
            return residual_block(x, pairs, shortcut, "relu", residual)
        *inner, last = pairs
        for pair in inner:
            x = pair(x, "relu", hidden=True)
        x = x if blur is None else blur(x)
        if parts.se is None:
            return last.end(x, residual, shortcut, "relu")
        x = parts.se(last(x))
        x += residual if shortcut is None else shortcut(residual)
        return F.relu_(x)

    return forward


def _timm_shortcut(downsample: nn.Module | None) -> tuple[list[nn.Module], ConvNorm | None]:
    """What runs before the convolution of a shortcut, and it with its norm, if it has these."""
    if type(downsample) is not nn.Sequential or len(downsample) < 2:
        return [], None
    *before, conv, norm = downsample
    pair = ConvNorm(conv, norm)  # type: ignore[arg-type]  # checked here
    return before, pair if is_plain(pair) else None


def pools_by_2(pool: nn.Module) -> bool:
    """Whether a pool is the one of `stem_conv_bn_relu_pool`."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
        return False
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)


def is_plain(pair: ConvNorm) -> bool:
    """Whether it is torch's convolution and a batch norm, frozen or not, and nothing else."""
    return type(pair.conv) is nn.Conv2d and is_foldable(pair.norm)
