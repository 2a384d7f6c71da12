"""Partition of a map into Swin's windows, shared by the attention ops."""

from typing import NamedTuple

import torch
from torch import Tensor

# added to the score of two tokens that were not neighbours before the map was rolled
MASK_VALUE = -100.0


class WindowGeometry(NamedTuple):
    """Partition of a map into windows.

    Attributes:
        window: tokens per window, (height, width).
        shift: tokens by which the map is rolled up and left before cutting, (height, width).
        roll_first: roll before padding, as timm does (timm issue 2438), instead of after it. The
            two are equal where no padding is needed.
    """

    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    roll_first: bool = False


def check_geometry(op: str, geometry: WindowGeometry, bias: Tensor, num_heads: int) -> None:
    """Raises a ValueError unless windows, their position bias and their shift fit together."""
    (h, w), shift = geometry.window, geometry.shift
    if h < 1 or w < 1:
        raise ValueError(f"{op}: windows must be at least 1x1, got {h}x{w}")
    if bias.ndim != 3 or bias.shape[:2] != (num_heads, h * w) or bias.shape[2] < h * w:
        raise ValueError(
            f"{op}: bias must be [{num_heads}, {h * w}, at least {h * w}] for "
            f"{num_heads} heads and a {h}x{w} window, got {list(bias.shape)}"
        )
    if not (0 <= shift[0] < h and 0 <= shift[1] < w):
        raise ValueError(
            f"{op}: shift must be at least 0 and below the window {h}x{w}, got {shift}"
        )


def relative_position_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """Row of the bias table for every pair of tokens of a window.

    Args:
        window: tokens per window, (height, width).
        device: of the index.

    Returns:
        [N * N] int64 for a table of [(2h - 1) * (2w - 1), num_heads].
    """
    h, w = window
    rows = torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    dh = rows[:, None] - rows[None, :] + h - 1
    dw = columns[:, None] - columns[None, :] + w - 1
    index = dh[:, None, :, None] * (2 * w - 1) + dw[None, :, None, :]  # [h, w, h, w]
    return index.flatten()
