"""Launch configurations, whose values each op's `launch_config` chooses."""

from typing import NamedTuple


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
