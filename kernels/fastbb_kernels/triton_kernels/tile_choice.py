"""A rule for large or small tiles of a GEMM, shared by kernels with two sizes of tiles."""

from .._dispatch import Architecture
from .config import cdiv

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
