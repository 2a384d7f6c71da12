"""Memory of the tensors that a forward pass makes on a CPU or a GPU, and what a GPU has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(NamedTuple):
    """Bytes of the tensors of a forward pass, without its input and what it keeps.

    Attributes:
        largest: of the largest tensor.
        peak: of all tensors that live at the same time.
    """

    largest: int
    peak: int


def tensor_memory(run: Callable[[Tensor], Any], pixel_values: Tensor) -> TensorMemory:
    """Counts the memory of a forward pass; runs it twice."""
    run(pixel_values)  # makes tensors derived from the weights, some of them larger than maps
    with _Counter() as counter:
        run(pixel_values)
    return TensorMemory(counter.largest, counter.peak)


def free_bytes(device: torch.device) -> int:
    """Memory that a program may still take on a GPU, blocks that PyTorch caches included.

    Blocks of recorded graphs are not free, even where no tensor is in them.
    """
    free, _ = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return free + sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
    )


class _Counter(TorchDispatchMode):
    """Counts every result that has its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)}
        self._alive = {k: (ref, n) for k, (ref, n) in self._alive.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if _has_memory(leaf) and _address(leaf) not in given:  # not a view
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
                storage = leaf.untyped_storage()
                self._alive[_address(leaf)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self._alive.values()))
        return result


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_mkldnn  # not weights packed by oneDNN


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
