"""What `trace` hands back."""

import math
from dataclasses import dataclass, field

import torch

from .memory import Grid


@dataclass(frozen=True)
class Traffic:
    """What the loads, or the stores, of one tensor argument in one launch move.

    Attributes:
        requested_bytes: of all lanes that no mask switched off, over all programs. Caches see this.
        unique_bytes: of different elements. DRAM moves this at least.
        sector_bytes: of the different 32-byte sectors of each access of a tile, over all accesses.
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
        load: what was read through it. Atomic operations count here and in `store`.
        store: what was written through it.
        n_unwritten: elements that no program stored.
        n_rewritten: elements that were stored more than once.
        first_unwritten: index of the first of them, or None.
        first_rewritten: index of the first of them, or None.
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
        n_programs: how many of them ran.
        tensors: the tensor arguments by name.
        unique_bytes: every different element that is loaded once, plus every one that is stored
            once, however many arguments name it.
        dot_flops: multiplications and additions of `tl.dot`, those on padding included.
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
    """Everything that was launched inside a `trace` block.

    Attributes:
        launches: in order; each appears when it is over.
    """

    launches: list[LaunchTrace] = field(default_factory=list)

    @property
    def unique_bytes(self) -> int:
        """What launches must move at least, over all launches."""
        return sum(launch.unique_bytes for launch in self.launches)

    @property
    def requested_bytes(self) -> int:
        """What programs ask for, over all launches."""
        return sum(launch.requested_bytes for launch in self.launches)

    @property
    def sector_bytes(self) -> int:
        """What accesses touch in whole sectors, over all launches."""
        return sum(launch.sector_bytes for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        """Multiplications and additions of `tl.dot`, over all launches."""
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
