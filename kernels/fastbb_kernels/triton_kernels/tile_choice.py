"""Rules for large or small tiles of a GEMM, shared by kernels with several sizes of tiles."""

import torch

from .._dispatch import Architecture
from .config import GemmConfig, cdiv

# a multiprocessor holds one or two of these; others have too little shared memory or registers
_LARGEST: dict[Architecture | None, GemmConfig] = {
    80: GemmConfig(256, 128, 32, num_warps=8, num_stages=3),
    90: GemmConfig(256, 128, 64, num_warps=8, num_stages=3),
    100: GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
}
# with fewer features memory bounds a GEMM, and several tiles on a multiprocessor hide its latency
_ENOUGH_FEATURES = 128

# approximate number of multiprocessors of a GPU; gfx942 has 304, but with that number the 1x1
# convolutions of ResNets would need a second binary
_MULTIPROCESSORS = 128
_MORE_MULTIPROCESSORS: dict[Architecture | None, int] = {120: 170, "gfx942": 190}


def has_work_for_large_tiles(n_rows: int, out_features: int, arch: Architecture | None) -> bool:
    """Whether an output of [n_rows, out_features] is computed in large tiles, not in small ones.

    It is if it has at least one tile of 64x64 per multiprocessor. From this size on, a
    multiprocessor has three or more small tiles of 64x32, which read at least as many bytes from L2
    as one tile of 128x128, or 64x128, on some of the multiprocessors. A third size between the two
    would save little at some batch sizes, and would be another binary to compile.
    """
    enough = _MORE_MULTIPROCESSORS.get(arch, _MULTIPROCESSORS)
    return cdiv(n_rows, 64) * cdiv(out_features, 64) >= enough


def largest_tiles(
    n_rows: int, features: int, out_features: int, dtype: torch.dtype, arch: Architecture | None
) -> GemmConfig | None:
    """Returns the tiles that read the fewest bytes from L2, if they divide the columns and steps.

    None if there are too few of them to fill a GPU, or registers or shared memory do not hold them.
    """
    largest = _LARGEST.get(arch)
    if largest is None or dtype == torch.float32 or features < _ENOUGH_FEATURES:
        return None
    if out_features % largest.block_n or features % largest.block_k:
        return None  # masks of steps take registers
    n_tiles = cdiv(n_rows, largest.block_m) * (out_features // largest.block_n)
    return largest if n_tiles >= _MULTIPROCESSORS else None
