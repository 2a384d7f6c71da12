"""When a GEMM has enough work for large tiles: one rule for kernels with two sizes of tiles."""

import triton

from .._dispatch import Architecture

# multiprocessors of a GPU, about; gfx942 has 304, but counting all of them would give the 1x1
# convolutions of ResNets a second binary
_MULTIPROCESSORS = 128
_MORE_MULTIPROCESSORS: dict[Architecture | None, int] = {120: 170, "gfx942": 190}


def has_work_for_large_tiles(n_rows: int, out_features: int, arch: Architecture | None) -> bool:
    """Whether an output of [n_rows, out_features] is computed in large tiles, not in small ones.

    It is where it has at least a tile of 64x64 for each multiprocessor. From there on small tiles
    of 64x32 are three or more to a multiprocessor, and ask L2 for at least as many bytes as one
    tile of 128x128, or 64x128, on a part of them. A third size between the two would save little
    at some batches, and be one more binary to compile when batches change.
    """
    enough = _MORE_MULTIPROCESSORS.get(arch, _MULTIPROCESSORS)
    return triton.cdiv(n_rows, 64) * triton.cdiv(out_features, 64) >= enough
