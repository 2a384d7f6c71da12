"""Checks and counts every access of interpreted kernels to global memory.

Each tensor argument has a separate address range, terabytes from the next one, so that an access
past its end cannot reach another tensor, and the addresses of unallocated tensors can be checked.
The tracer records elements while programs run, and evaluates them when the launch ends.

It does not model caches, shared memory, and the order between the threads of a program, except that
a program may load the elements that it stored. It does not relate views of one storage that have
elements of different sizes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from torch import Tensor
from triton.runtime.errors import InterpreterError

from .interpreter import interpret, use_memory
from .memory import Grid, Memory
from .tensor_view import TensorView
from .trace_report import LaunchTrace, TensorTrace, Trace, Traffic

SECTOR_BYTES = 32

# the storage of an argument starts in the middle of its 2**45 bytes
_RANGE_BITS = 45


class OutOfBounds(InterpreterError):
    """A program accesses memory outside the view of its argument."""


class Race(InterpreterError):
    """The result of a launch depends on the order of its programs, or of a program's threads."""


@contextmanager
def trace(
    *, programs: Callable[[Grid], Iterable[Grid]] | None = None, data: bool = True
) -> Iterator[Trace]:
    """Interprets kernels like `interpret`, and checks and counts every access of every launch.

        with torch.no_grad(), use_impl("triton"), trace() as t:
            y = linear_residual(x, weight, bias, residual)
        t.assert_written_once()
        assert t.unique_bytes == find_op("linear_residual").n_bytes(...)

    Args:
        programs: chooses the programs of a launch to run, from its grid; default: all. `corners`
            chooses those with the smallest and largest addresses.
        data: False checks addresses only, on any device: loads return zeros, nothing is stored, and
            an overflow of int32 arithmetic is an error. A meta tensor may then be larger than the
            memory, and its offsets larger than 2**31.

    Yields:
        the trace, which grows with each launch.

    Raises:
        InterpreterError: inside, as from `interpret`; the two errors below are subclasses.
        OutOfBounds: inside, from the launch, at the access.
        Race: inside, from the launch, at the latest after its last program.
        RuntimeError: inside another trace.
    """
    result = Trace()
    with interpret(), use_memory(_TracedMemory(result, programs, data)):
        yield result


def corners(grid: Grid) -> list[Grid]:
    """Returns the programs that are first or last on each axis of a grid."""
    x, y, z = ((0, size - 1) if size > 1 else range(size) for size in grid)
    return list(itertools.product(x, y, z))


@dataclass(eq=False)
class _Accesses:
    """Accesses of one kind of a launch's programs to a storage, through one argument."""

    n_lanes: int = 0
    n_sectors: int = 0
    # since the program began, or since its last barrier
    current: list[np.ndarray] = field(default_factory=list)
    elements: list[np.ndarray] = field(default_factory=list)
    times: list[np.ndarray] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)

    def add(self, elements: np.ndarray, n_sectors: int) -> None:
        self.n_lanes += elements.size
        self.n_sectors += n_sectors
        self.current.append(elements)

    def close(self, program: int) -> None:
        """Summarizes the accesses of `program`."""
        if self.current:
            elements, times = _distinct(np.concatenate(self.current))
            self.elements.append(elements)
            self.times.append(times)
            self.programs.append(program)
            self.current = []


@dataclass(frozen=True)
class _Touched:
    """Elements of a storage, unsorted, with the program that accessed each, and the count."""

    elements: np.ndarray
    times: np.ndarray
    programs: np.ndarray

    @classmethod
    def by(cls, *accesses: _Accesses) -> "_Touched":
        parts = [(e, t, p) for a in accesses for e, t, p in zip(a.elements, a.times, a.programs)]
        none = np.zeros(0, np.int64)
        return cls(
            elements=np.concatenate([none, *(elements for elements, _, _ in parts)]),
            times=np.concatenate([none, *(times for _, times, _ in parts)]),
            programs=np.concatenate([none, *(np.full(e.size, p) for e, _, p in parts)]),
        )


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns distinct values, sorted, and the count of each."""
    if (values[1:] > values[:-1]).all():
        return values, np.ones_like(values)
    ordered = np.sort(values)
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return ordered[starts], np.diff(starts, append=ordered.size)


class _Argument:
    """A tensor argument of the running launch."""

    def __init__(self, name: str, tensor: Tensor, number: int, allocated: bool) -> None:
        self.name, self.dtype = name, tensor.dtype
        self.view = TensorView(tensor.shape, tensor.stride())
        self.n_bytes = tensor.element_size()
        storage = tensor.untyped_storage()
        self.storage = (storage._cdata, self.n_bytes)
        self.first = int(tensor.storage_offset())
        base = (number << _RANGE_BITS) + (1 << _RANGE_BITS - 1)
        self.pointer = base + self.first * self.n_bytes
        # difference between the address in the real storage and ours, modulo 2**64
        shift = tensor.data_ptr() - self.pointer if allocated else 0
        self.shift = np.array(shift, np.int64).astype(np.uint64)
        self.accesses = {kind: _Accesses() for kind in ("load", "store", "atomic")}

    def element(self, element: Any) -> str:
        """Formats an element of the storage for errors."""
        rank = self.view.ranks(np.array([element - self.first]))[0]
        return f"element {self.view.index(int(rank))} of {self.name}"

    def result(self) -> TensorTrace:
        stored = _Touched.by(self.accesses["store"], self.accesses["atomic"])
        ranks = self.view.ranks(stored.elements - self.first)
        written, times = _count(ranks, stored.times)
        n_unwritten = self.view.n_elements - written.size
        gaps = np.flatnonzero(written != np.arange(written.size))
        unwritten = int(gaps[0]) if gaps.size else written.size
        rewritten = written[times > 1]
        return TensorTrace(
            name=self.name,
            shape=self.view.shape,
            stride=self.view.stride,
            dtype=self.dtype,
            load=self._traffic("load"),
            store=self._traffic("store"),
            n_unwritten=n_unwritten,
            n_rewritten=rewritten.size,
            first_unwritten=self.view.index(unwritten) if n_unwritten else None,
            first_rewritten=self.view.index(int(rewritten[0])) if rewritten.size else None,
        )

    def _traffic(self, kind: str) -> Traffic:
        parts = [self.accesses[kind], self.accesses["atomic"]]
        return Traffic(
            requested_bytes=sum(part.n_lanes for part in parts) * self.n_bytes,
            unique_bytes=_n_distinct(parts) * self.n_bytes,
            sector_bytes=sum(part.n_sectors for part in parts) * SECTOR_BYTES,
        )


def _count(values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns distinct values, sorted, and the sum of `times` of each."""
    order = np.argsort(values)
    distinct, n = _distinct(values[order])
    return distinct, np.add.reduceat(times[order], np.cumsum(n) - n) if n.size else n


def _n_distinct(accesses: Iterable[_Accesses]) -> int:
    return _distinct(_Touched.by(*accesses).elements)[0].size


class _TracedMemory(Memory):
    """Checks and records accesses, and makes them at the real addresses."""

    grid: Grid
    program: Grid
    arguments: list[_Argument]
    n_programs: int
    dot_flops: int

    def __init__(
        self, result: Trace, chosen: Callable[[Grid], Iterable[Grid]] | None, data: bool
    ) -> None:
        self.result, self.chosen, self.data = result, chosen, data
        # an offset that wraps around may be in bounds again
        self.checks_overflow = not data

    def begin_launch(self, kernel: str, grid: Grid) -> None:
        super().begin_launch(kernel, grid)
        self.grid, self.arguments = grid, []
        self.n_programs = self.dot_flops = 0

    def address(self, name: str, tensor: Tensor) -> int:
        if self.data:
            super().address(name, tensor)
        # no range has number 0, that of null pointers
        argument = _Argument(name, tensor, len(self.arguments) + 1, allocated=self.data)
        self.arguments.append(argument)
        return argument.pointer

    def programs(self, grid: Grid) -> Iterable[Grid]:
        return super().programs(grid) if self.chosen is None else self.chosen(grid)

    def begin_program(self, program: Grid) -> None:
        self.barrier()
        self.program = program
        self.n_programs += 1

    def barrier(self) -> None:
        if not self.n_programs:
            return
        x, y, z = self.program
        number = (z * self.grid[1] + y) * self.grid[0] + x
        for argument in self.arguments:
            for accesses in argument.accesses.values():
                accesses.close(number)

    def end_launch(self) -> None:
        self.barrier()
        storages: dict[Any, list[_Argument]] = {}
        for argument in self.arguments:
            storages.setdefault(argument.storage, []).append(argument)
        unique_bytes = 0
        for group in storages.values():
            self._check_races(group)
            for kind in ("load", "store"):
                parts = [a.accesses[k] for a in group for k in (kind, "atomic")]
                unique_bytes += _n_distinct(parts) * group[0].n_bytes
        tensors = {argument.name: argument.result() for argument in self.arguments}
        self.result.launches.append(
            LaunchTrace(
                self.kernel, self.grid, self.n_programs, tensors, unique_bytes, self.dot_flops
            )
        )

    def dot(self, n_flops: int) -> None:
        self.dot_flops += n_flops

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray) -> np.ndarray:
        real = self._access("load", pointers, mask)
        if not self.data:
            return np.where(mask, np.zeros((), other.dtype), other)
        return super().load(real, mask, other)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        real = self._access("store", pointers, mask)
        if self.data:
            super().store(real, value, mask)

    def atomic_rmw(
        self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any
    ) -> np.ndarray:
        real = self._access("atomic", pointers, mask)
        if not self.data:
            return np.zeros_like(value)
        return super().atomic_rmw(op, real, value, mask, order)

    def atomic_cas(
        self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any
    ) -> np.ndarray:
        real = self._access("atomic", pointers, np.ones(pointers.shape, bool))
        if not self.data:
            return np.zeros_like(value)
        return super().atomic_cas(real, expected, value, order)

    def _access(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Checks and records the active lanes, and returns the real addresses."""
        signed = pointers.astype(np.int64)
        active = signed.reshape(-1) if mask.all() else signed[mask]
        if not active.size:
            return pointers
        lowest, highest = (int(end) >> _RANGE_BITS for end in (active.min(), active.max()))
        if lowest == highest:
            return pointers + self._record(kind, lowest, active).shift
        # pointers to several tensors, chosen by a `tl.where`
        real, numbers = pointers.copy(), signed >> _RANGE_BITS
        for number in _distinct(active >> _RANGE_BITS)[0].tolist():
            here = numbers == number
            real[here] += self._record(kind, number, signed[mask & here]).shift
        return real

    def _record(self, kind: str, number: int, active: np.ndarray) -> _Argument:
        """Checks and records lanes in the range of one argument, and returns the argument."""
        if not 0 < number <= len(self.arguments):
            address = f"{int(active[0]) & 2**64 - 1:#x}"
            self._fail(OutOfBounds, f"{kind} at address {address}, which is in no argument")
        argument = self.arguments[number - 1]
        offsets = (active - argument.pointer) // argument.n_bytes
        view = argument.view
        if not view.holds_all(offsets):
            bad = offsets[view.ranks(offsets) < 0]
            self._fail(
                OutOfBounds,
                f"{kind} of {argument.name} outside its view, in {bad.size} of {active.size} "
                f"active lanes, the first at element {bad[0]} counted from the view's first "
                f"(shape {view.shape}, stride {view.stride})",
            )
        elements = offsets + argument.first
        if kind == "load":
            self._check_own_stores(argument, elements)
        elif kind == "store":
            distinct, times = _distinct(elements)
            if distinct.size != elements.size:
                twice = argument.element(distinct[times > 1][0])
                self._fail(Race, f"one tl.store writes {twice} more than once")
        sectors = active // SECTOR_BYTES
        before, after = sectors[:-1], sectors[1:]
        if (after < before).any():
            n_sectors = _distinct(sectors)[0].size
        else:
            n_sectors = 1 + np.count_nonzero(after != before)
        argument.accesses[kind].add(elements, int(n_sectors))
        return argument

    def _check_own_stores(self, argument: _Argument, elements: np.ndarray) -> None:
        for other in self.arguments:
            stored = other.accesses["store"].current
            if other.storage == argument.storage and stored:
                back = np.isin(elements, np.concatenate(stored))
                if back.any():
                    element = argument.element(elements[back][0])
                    message = f"loads {element} after storing it, without tl.debug_barrier()"
                    self._fail(Race, message)

    def _fail(self, error: type[InterpreterError], what: str) -> NoReturn:
        raise error(f"{self.kernel}, program {self.program}: {what}")

    def _check_races(self, group: list[_Argument]) -> None:
        """Raises if one program stores an element that another one stores or loads.

        Args:
            group: all arguments of one storage.
        """
        stored = _Touched.by(*(argument.accesses["store"] for argument in group))
        updated = _Touched.by(*(argument.accesses["atomic"] for argument in group))
        elements = np.concatenate([stored.elements, updated.elements])
        if not elements.size:
            return
        programs = np.concatenate([stored.programs, updated.programs])
        order = np.lexsort((programs, elements))
        elements, programs, plain = elements[order], programs[order], order < stored.elements.size
        written, times = _distinct(elements)
        starts = np.cumsum(times) - times
        first, last = programs[starts], programs[starts + times - 1]
        clash = np.flatnonzero((first != last) & np.logical_or.reduceat(plain, starts))
        if clash.size:
            i = clash[0]
            writers = [_Touched.by(a.accesses["store"], a.accesses["atomic"]) for a in group]
            name = next(
                a.element(written[i]) for a, w in zip(group, writers) if written[i] in w.elements
            )
            raise Race(
                f"{self.kernel}: programs {self._program(first[i])} and {self._program(last[i])} "
                f"both store {name} ({clash.size} such elements)"
            )
        for argument in group:
            loaded = _Touched.by(argument.accesses["load"])
            at = np.searchsorted(written, loaded.elements).clip(max=written.size - 1)
            foreign = (first[at] != loaded.programs) | (last[at] != loaded.programs)
            clash = np.flatnonzero(foreign & (written[at] == loaded.elements))
            if clash.size:
                i = clash[0]
                reader, name = loaded.programs[i], argument.element(loaded.elements[i])
                writer = last[at[i]] if first[at[i]] == reader else first[at[i]]
                raise Race(
                    f"{self.kernel}: program {self._program(reader)} loads {name}, which program "
                    f"{self._program(writer)} stores ({clash.size} such loads)"
                )

    def _program(self, number: Any) -> Grid:
        rest, x = divmod(int(number), self.grid[0])
        z, y = divmod(rest, self.grid[1])
        return (x, y, z)
