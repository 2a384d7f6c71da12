"""Calls of a module: form, memory layout of results, difference of two results."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from fastbb_kernels.accuracy import accuracy_problem, allowed_rel

N_COMPARED = 2  # images at each end of a batch


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yields the tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def form_of(args: Any, kwargs: Any) -> Iterator[Hashable]:
    """The properties of a call that are the same for all sizes of images.

    Dimensions, dtype, device and layout of tensors; options by value; the types of positional
    numbers and tuples and of a torch.Size, such as the height and width of a map.
    """
    for name, value in (*((None, value) for value in args), *kwargs.items()):
        if isinstance(value, Tensor):
            yield name, value.ndim, value.dtype, value.device, format_of(value)
        elif isinstance(value, torch.Size):
            yield name, torch.Size
        elif isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
            yield name, type(value), *form_of(value, {})
        elif name is not None or isinstance(value, (bool, str, type(None))):
            yield name, repr(value)
        else:
            yield type(value)


def size_of(args: Any, kwargs: Any) -> int:
    """Number of elements of the tensors of a call."""
    return sum(x.numel() for x in tensors_in((*args, *kwargs.values())))


def rows_to_compare(args: Any, kwargs: Any, result: Any) -> list[int] | None:
    """Returns indices of the first and last two images of a call; None without a common batch."""
    tensors = [*tensors_in((*args, *kwargs.values())), *tensors_in(tree_leaves(result))]
    batches = {len(x) if x.ndim else 0 for x in tensors}
    if len(batches) != 1:
        return None
    (batch,) = batches
    return sorted({*range(batch)[:N_COMPARED], *range(batch)[-N_COMPARED:]})


def picked(values: Any, rows: list[int] | None) -> Any:
    """Returns the same containers with these rows of every tensor; all rows for None."""
    return values if rows is None else tree_map_only(Tensor, lambda x: x[rows], values)


def format_of(x: Tensor) -> torch.memory_format | None:
    """Returns the memory format: contiguous, channels last, or None for other strides."""
    if x.is_contiguous():
        return torch.contiguous_format
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else None


def in_formats(result: Any, formats: list[torch.memory_format | None]) -> Any:
    """Converts a result to upstream's memory formats, for hosts that take views of it."""
    if isinstance(result, Tensor):  # the usual result of a block
        wanted = formats[0] if formats else None
        return result if wanted is None else result.contiguous(memory_format=wanted)
    left = iter(formats)

    def laid_out(x: Tensor) -> Tensor:
        wanted = next(left, None)
        return x if wanted is None else x.contiguous(memory_format=wanted)

    return tree_map_only(Tensor, laid_out, result)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Converts every floating tensor in containers to a dtype."""

    def converted(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return tree_map_only(Tensor, converted, values)


def is_telling(result: Any) -> bool:
    """Whether a result can be compared: each of its floating tensors has a finite value."""
    floating = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
    return bool(floating) and all(bool(x.isfinite().any()) for x in floating)


def difference(
    got: Any,
    want: Any,
    truth: Callable[[], tuple[Any, Any, list[int] | None]],
    exactness: float,
) -> str | None:
    """The first difference of a result from upstream's, beyond rounding, or None.

    Args:
        got: tensors in any containers.
        want: upstream's.
        truth: returns upstream's result in the precision that `got` was computed in, and in
            float64, both in the containers of `want`; and the rows of `got` that they are, or None.
        exactness: allowed in fp32, relative to the largest magnitude of a tensor.
    """
    ours, ours_spec = tree_flatten(got)
    theirs, theirs_spec = tree_flatten(want)
    if ours_spec != theirs_spec:
        return f"it returned {ours_spec}, upstream {theirs_spec}"
    for index, (a, b) in enumerate(zip(ours, theirs)):
        if not isinstance(b, Tensor):
            if a is not b and a != b:
                return f"value {index} is {a!r}, upstream's {b!r}"
        elif a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return (
                f"tensor {index} is {list(a.shape)} {a.dtype} on {a.device}, "
                f"upstream's {list(b.shape)} {b.dtype} on {b.device}"
            )
    same_precision, exact, rows = truth()
    ours = tree_leaves(picked(got, rows))
    for index, (a, eager, true) in enumerate(
        zip(ours, tree_leaves(same_precision), tree_leaves(exact))
    ):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        a, finite = a.to(eager.dtype), eager.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return f"tensor {index} is not finite where upstream's is, or the other way round"
        a, eager, true = (x.where(finite, 0) for x in (a, eager, true))
        rel = allowed_rel(eager, true, exactness)
        problem = accuracy_problem(a, eager, true, rel)
        if problem is not None:
            return f"tensor {index} differs from upstream's: {problem}"
    return None
