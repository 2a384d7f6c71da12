"""Candidates for the launch configuration of a kernel: those near the present one.

A configuration is a named tuple, possibly nested. Its fields are varied by name, except the fields
that a kernel fixes. Configurations that cannot fit, or cannot be faster, are left out.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastbb_kernels.ops.convnext_block import STRIP_ROWS

MOST = 36
# the compiler takes ten seconds for each configuration of these
_MOST_OF = {"swin_attention_block": 20, "mlp_block": 24, "convnext_block": 24}
_SHARED_BYTES = 227 << 10  # of a program, at most; a GPU with less refuses the launch
_MOST_ACCUMULATORS = 128  # of a thread, in fp32
_LEAST_ACCUMULATORS = 8

_VALUES: dict[str, tuple[Any, ...]] = {
    "block_m": (32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (32, 64, 128),
    "block_c": (16, 32, 64, 128),
    "block_h": (16, 32, 64, 128),
    "rows": (1, 2, 4, 8),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "tiles_per_program": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    "resident": (False, True),
    "compiler": ({}, {"maxnreg": 128}, {"maxnreg": 168}),
}
_VALUES_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    # a window has fewer rows
    "window_attention": {"block_m": (16, 32, 64), "num_warps": (1, 2, 4, 8)},
    "convnext_block": {"block_n": (8, 16, 32, 64)},
}
# tiles that are fast on many GPUs: rows, columns, depth, warps, stages
_TILES = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 32, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 64, 64, 8, 3),
    (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (128, 64, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 64, 4, 5),
    (32, 64, 64, 4, 5),
)
_TILE_FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
# fields that follow from the shapes of a kernel, or whose other values have been miscompiled
_FIXED = {
    "bottleneck_tail": {"num_warps"},
    "conv3x3_bn_act": {"num_warps"},
    "layer_norm_nchw": {"block_n"},
    "layer_norm_residual": {"block_n"},
    "patch_embed": {"block_n"},
    "stem_conv_bn_relu_pool": {"block_n", "block_k"},
    "window_attention": {"block_n", "block_tail"},
}
_RESIDENT_FEATURES = 384  # rows with more do not fit on the chip

Leaves = dict[str, Any]


def candidates(table: str, default: Any, sizes: Mapping[str, Any]) -> list[Any]:
    """Returns the default, then the usual tiles, then configurations by distance from the default.

    Args:
        table: name of the choice.
        default: the present configuration.
        sizes: arguments of the choice, by name.
    """
    usual = dict(_leaves(default))
    fixed = _FIXED.get(table, set())
    if usual.get("compiler", {}).keys() - {"maxnreg"}:
        fixed = fixed | {"compiler"}  # options of another vendor's compiler
    known = {**_VALUES, **_VALUES_OF.get(table, {})}
    values = [
        tuple(_with(usual[name], () if name in fixed else known.get(name, ()))) for name in usual
    ]
    found = []
    for chosen in itertools.product(*values):
        leaves = dict(zip(usual, chosen))
        if leaves != usual and _makes_sense(table, leaves, usual, sizes):
            found.append((_distance(leaves, usual), leaves))
    found.sort(key=lambda pair: pair[0])  # a stable sort
    most = _MOST_OF.get(table, MOST)
    return [default, *(_like(default, leaves) for _, leaves in found[: most - 1])]


def _with(usual: Any, values: tuple[Any, ...]) -> Iterator[Any]:
    yield usual
    yield from (value for value in values if value != usual)


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
    """Yields the fields that hold values, of a named tuple and of nested ones."""
    for name, value in zip(config._fields, config):
        if isinstance(value, tuple):
            yield from _leaves(value)
        else:
            yield name, value


def _like(config: Any, leaves: Leaves) -> Any:
    return type(config)(
        *(
            _like(value, leaves) if isinstance(value, tuple) else leaves[name]
            for name, value in zip(config._fields, config)
        )
    )


def _distance(leaves: Leaves, usual: Leaves) -> float:
    """Counts doublings of values, and stages; 0 for usual tiles without resident rows."""
    tile = tuple(leaves.get(name) for name in _TILE_FIELDS)
    if tile in _TILES and not leaves.get("resident"):
        return 0.0
    total = 0.0
    for name, value in leaves.items():
        if isinstance(value, bool | dict):
            total += value != usual[name]
        elif name == "num_stages":
            total += abs(value - usual[name])
        elif value and usual[name]:
            total += abs(math.log2(value / usual[name]))
    return total


def _makes_sense(table: str, leaves: Leaves, usual: Leaves, sizes: Mapping[str, Any]) -> bool:
    channels = sizes.get("channels", 0)
    if table in ("mlp_block", "swin_attention_block", "convnext_block", "linear_norm_residual"):
        # only whole pieces, and registers for the accumulators of all channels
        if channels % leaves["block_c"] or 4 * channels % leaves.get("block_h", 1):
            return False
        is_strips = table == "convnext_block"
        rows = STRIP_ROWS * leaves["block_n"] if is_strips else leaves.get("block_m", 64)
        return _fits_registers(rows * channels, leaves["num_warps"], 1.5 * _MOST_ACCUMULATORS)
    if table == "window_attention":
        return leaves["num_warps"] * 16 <= 2 * leaves["block_m"] <= 2 * leaves["block_n"]
    if table == "depthwise_conv_bn_act":
        strip = leaves["block_n"] * leaves["block_c"] * leaves["rows"]
        return _fits_registers(strip, leaves["num_warps"])
    if "block_k" not in leaves:
        return _fits_registers(leaves["block_m"] * leaves["block_n"], leaves["num_warps"])
    return _gemm_makes_sense(leaves, usual, sizes)


def _gemm_makes_sense(leaves: Leaves, usual: Leaves, sizes: Mapping[str, Any]) -> bool:
    m, n, k, warps = (leaves[name] for name in ("block_m", "block_n", "block_k", "num_warps"))
    features = sizes.get("features", sizes.get("channels", 0))
    columns = sizes.get("out_features", sizes.get("out_channels", n))
    if n >= 2 * columns and n > usual["block_n"]:
        return False
    if features and features % k and not features % usual["block_k"]:
        return False  # needs masks along K, unlike the default
    if 2 * (m + n) * k * leaves["num_stages"] > _SHARED_BYTES:
        return False
    if leaves.get("resident"):
        n_tiles = -(-columns // n)
        return (
            (features <= _RESIDENT_FEATURES or usual["resident"])
            and 1 < leaves["tiles_per_program"] <= n_tiles
            and _fits_registers(m * n, warps)
        )
    return leaves.get("tiles_per_program", 1) == 1 and _fits_registers(m * n, warps)


def _fits_registers(n_elements: int, warps: int, most: float = _MOST_ACCUMULATORS) -> bool:
    return _LEAST_ACCUMULATORS <= n_elements / (32 * warps) <= most
