"""The elements of a storage that belong to a tensor."""

import functools
from collections.abc import Sequence

import numpy as np


class TensorView:
    """The elements of a strided tensor, by their offset from its first one. Allocates nothing.

    Attributes:
        shape: of the tensor.
        stride: of the tensor, in elements.
        n_elements: number of distinct elements; an expanded axis adds none.
    """

    def __init__(self, shape: Sequence[int], stride: Sequence[int]) -> None:
        self.shape, self.stride = tuple(shape), tuple(stride)
        self.n_elements = 0 if 0 in self.shape else 1
        # (size, stride) from the largest stride down; contiguous axes are merged
        self._runs: list[tuple[int, int]] = []
        # all offsets in order, if several indices may refer to one element (sliding windows)
        self._offsets: np.ndarray | None = None
        if not self.n_elements:
            return
        for step, size in sorted(zip(self.stride, self.shape), reverse=True):
            if size == 1 or step == 0:
                continue
            self.n_elements *= size
            if self._runs and self._runs[-1][1] == step * size:
                self._runs[-1] = (self._runs[-1][0] * size, step)
            else:
                self._runs.append((size, step))
        reach = 0
        for size, step in reversed(self._runs):
            if step <= reach:
                self._enumerate()
                return
            reach += (size - 1) * step

    def _enumerate(self) -> None:
        offsets = np.zeros(1, np.int64)
        for size, step in self._runs:
            offsets = np.unique(offsets[:, None] + step * np.arange(size))
        self._offsets, self.n_elements = offsets, offsets.size

    def ranks(self, offsets: np.ndarray) -> np.ndarray:
        """Returns the positions of elements among those of the tensor, sorted by offset.

        Args:
            offsets: int64.

        Returns:
            int64, of the same shape; -1 for an offset that is not in the tensor.
        """
        if not self.n_elements:
            return np.full(offsets.shape, -1)
        if self._offsets is not None:
            rank = np.searchsorted(self._offsets, offsets).clip(max=self.n_elements - 1)
            return np.where(self._offsets[rank] == offsets, rank, -1)
        outside = offsets < 0
        rank, rest = np.zeros_like(offsets), offsets
        for size, step in self._runs:
            digit = rest // step
            outside |= digit >= size
            rank, rest = rank * size + digit, rest - digit * step
        return np.where(outside | (rest != 0), -1, rank)

    def holds_all(self, offsets: np.ndarray) -> bool:
        """Whether all elements are in the tensor; `offsets` are int64, at least one."""
        if len(self._runs) == 1 and self._runs[0][1] == 1:
            return bool(offsets.min() >= 0 and offsets.max() < self.n_elements)
        return bool((self.ranks(offsets) >= 0).all())

    def index(self, rank: int) -> tuple[int, ...]:
        """Returns an index of the element of this rank in the tensor."""
        if self._offsets is not None:
            axes = [s * np.arange(n if s else 1) for n, s in zip(self.shape, self.stride)]
            every = functools.reduce(np.add.outer, axes)
            return tuple(np.argwhere(every == self._offsets[rank])[0].tolist())
        offset = 0
        for size, step in reversed(self._runs):
            rank, digit = divmod(rank, size)
            offset += digit * step
        index = [0] * len(self.shape)
        for axis in sorted(range(len(index)), key=lambda axis: self.stride[axis], reverse=True):
            if self.shape[axis] > 1 and self.stride[axis]:
                index[axis], offset = divmod(offset, self.stride[axis])
        return tuple(index)
