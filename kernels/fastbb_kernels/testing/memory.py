"""Memory that interpreted kernels access through their pointers."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from triton._C.libtriton import interpreter as native

# programs on the axes 0, 1 and 2 of a grid, or the ids of one program on them
Grid = tuple[int, int, int]


class Memory:
    """CPU tensors at their real addresses.

    One object serves all launches of an `interpret` block, one after the other. The arrays of
    pointers and masks have the shape of the access.

    Attributes:
        checks_overflow: whether an overflow of int32 arithmetic is an error. The check doubles the
            time of a program's index arithmetic.
        kernel: name of the kernel that runs.
    """

    checks_overflow = False
    kernel: str

    def begin_launch(self, kernel: str, grid: Grid) -> None:
        """Called before the arguments of a launch are converted."""
        self.kernel = kernel

    def address(self, name: str, tensor: Tensor) -> int:
        """Returns the pointer that the kernel gets for a tensor argument.

        Raises:
            ValueError: the tensor is not on the CPU.
        """
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{self.kernel}: interpret() computes with CPU tensors, but {name} is on "
                f"{tensor.device}; move it to the CPU (trace(data=False) checks addresses alone)"
            )
        return tensor.data_ptr()

    def programs(self, grid: Grid) -> Iterable[Grid]:
        """Returns the programs of the launch to run, in order."""
        x, y, z = map(range, grid)
        return itertools.product(x, y, z)

    def begin_program(self, program: Grid) -> None:
        """Called before each program."""

    def end_launch(self) -> None:
        """Called after the last program."""

    def barrier(self) -> None:
        """Called when the threads of the program wait for each other."""

    def dot(self, n_flops: int) -> None:
        """Called when the program multiplies two tiles."""

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Reads one element per pointer, and takes `other` where the mask is off."""
        return native.load(pointers, mask, other, other.dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        """Writes one element per pointer where the mask is on."""
        native.store(pointers, value, mask)

    def atomic_rmw(
        self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any
    ) -> np.ndarray:
        """Updates one element per pointer and returns the old values."""
        return native.atomic_rmw(op, pointers, value, mask, order)

    def atomic_cas(
        self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any
    ) -> np.ndarray:
        """Replaces the elements that are as expected and returns the old values."""
        return native.atomic_cas(pointers, expected, value, order)
