"""Launch configurations, whose values each op's `launch_config` chooses, and their arithmetic.

The functions are Triton's for hosts, which take some microseconds a call, without its wrapper.
"""

from typing import NamedTuple


def cdiv(n: int, block: int) -> int:
    """Number of blocks that cover `n`."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, which is positive."""
    return 1 << (n - 1).bit_length()


class GemmConfig(NamedTuple):
    """Tile of the output (block_m x block_n), depth of a step, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class RowsConfig(NamedTuple):
    """Rows, columns and warps of a tile."""

    block_m: int
    block_n: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps}
