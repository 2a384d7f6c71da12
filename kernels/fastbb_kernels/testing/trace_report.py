"""The results of `trace`."""

import math
from dataclasses import dataclass, field

import torch

from .memory import Grid


@dataclass(frozen=True)
class Traffic:
    """Traffic of the loads, or of the stores, of a tensor argument in a launch.

    Attributes:
        requested_bytes: of all active lanes of all programs; this is the traffic of the caches.
        unique_bytes: of distinct elements; this is the least traffic of DRAM.
        sector_bytes: of the distinct 32-byte sectors of each access of a tile, over all accesses.
    """

    requested_bytes: int
    unique_bytes: int
    sector_bytes: int


@dataclass(frozen=True)
class TensorTrace:
    """One tensor argument of one launch.

    Attributes:
        name: of the parameter; "x.0" for the first of a tuple.
        shape: of the tensor.
        stride: of the tensor, in elements.
        dtype: of the tensor.
        load: traffic of its loads. Atomic operations count here and in `store`.
        store: traffic of its stores.
        n_unwritten: elements that no program stored.
        n_rewritten: elements that were stored more than once.
        first_unwritten: index of the first unwritten element, or None.
        first_rewritten: index of the first rewritten element, or None.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    load: Traffic
    store: Traffic
    n_unwritten: int
    n_rewritten: int
    first_unwritten: tuple[int, ...] | None
    first_rewritten: tuple[int, ...] | None


@dataclass(frozen=True)
class LaunchTrace:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        grid: number of programs on each axis.
        n_programs: number of programs that ran.
        tensors: the tensor arguments by name.
        unique_bytes: bytes of the distinct loaded elements plus those of the distinct stored
            elements; an element of several arguments counts once.
        dot_flops: multiplications and additions of `tl.dot`, including those on padding.
    """

    kernel: str
    grid: Grid
    n_programs: int
    tensors: dict[str, TensorTrace]
    unique_bytes: int
    dot_flops: int

    @property
    def requested_bytes(self) -> int:
        """Bytes of all active lanes of all loads and stores."""
        return sum(t.load.requested_bytes + t.store.requested_bytes for t in self.tensors.values())

    @property
    def sector_bytes(self) -> int:
        """Bytes of the sectors that loads and stores touch."""
        return sum(t.load.sector_bytes + t.store.sector_bytes for t in self.tensors.values())


@dataclass
class Trace:
    """All launches inside a `trace` block.

    Attributes:
        launches: in order; each is added when it ends.
    """

    launches: list[LaunchTrace] = field(default_factory=list)

    @property
    def unique_bytes(self) -> int:
        """Least traffic, summed over all launches."""
        return sum(launch.unique_bytes for launch in self.launches)

    @property
    def requested_bytes(self) -> int:
        """Bytes that programs request, summed over all launches."""
        return sum(launch.requested_bytes for launch in self.launches)

    @property
    def sector_bytes(self) -> int:
        """Bytes of the sectors that accesses touch, summed over all launches."""
        return sum(launch.sector_bytes for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        """Multiplications and additions of `tl.dot`, summed over all launches."""
        return sum(launch.dot_flops for launch in self.launches)

    def assert_written_once(self, *names: str) -> None:
        """Checks that each launch stored every element of its outputs exactly once.

        Args:
            names: the parameters to check, in the launches that store to them; default: all
                parameters that a launch stores to.

        Raises:
            AssertionError: an element was never written, or more than once; or nothing stores to
                a parameter of `names`, or to anything at all.
            ValueError: only some programs of a launch ran.
        """
        outputs = [
            (launch, tensor)
            for launch in self.launches
            for tensor in launch.tensors.values()
            if tensor.store.requested_bytes and (not names or tensor.name in names)
        ]
        missing = set(names) - {tensor.name for _, tensor in outputs}
        if missing or not outputs:
            what = ", ".join(sorted(missing)) or "anything"
            raise AssertionError(f"none of {len(self.launches)} launches stores to {what}")
        for launch, tensor in outputs:
            if launch.n_programs != math.prod(launch.grid):
                raise ValueError(
                    f"{launch.kernel}: {launch.n_programs} programs of a grid of {launch.grid} "
                    "ran, which says nothing about whole outputs"
                )
            for n, first, what in (
                (tensor.n_unwritten, tensor.first_unwritten, "never"),
                (tensor.n_rewritten, tensor.first_rewritten, "more than once"),
            ):
                if n:
                    raise AssertionError(
                        f"{launch.kernel}: {n} elements of {tensor.name}, of shape "
                        f"{tensor.shape}, are written {what}; the first is {first}"
                    )
