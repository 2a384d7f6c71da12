"""Calls of a module: their form, the memory layout of results, the difference of two results."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from fastbb_kernels.accuracy import accuracy_problem, allowed_rel


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among some values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def form_of(args: Any, kwargs: Any) -> Iterator[Hashable]:
    """The properties of a call that are the same for all sizes of images.

    Dimensions, dtype, device and layout of tensors; options by value; the types of all else, such
    as the height and width of a map.
    """
    for value in (*args, *itertools.chain.from_iterable(kwargs.items())):
        if isinstance(value, Tensor):
            yield value.ndim, value.dtype, value.device, format_of(value)
        else:
            yield value if isinstance(value, (bool, str, type(None))) else type(value)


def format_of(x: Tensor) -> torch.memory_format | None:
    """Contiguous, channels last, or None for other strides."""
    if x.is_contiguous():
        return torch.contiguous_format
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else None


def in_formats(result: Any, formats: list[torch.memory_format | None]) -> Any:
    """The result with tensors laid out as upstream's, for hosts that take views of them."""
    if isinstance(result, Tensor):  # the usual result of a block
        wanted = formats[0] if formats else None
        return result if wanted is None else result.contiguous(memory_format=wanted)
    left = iter(formats)

    def laid_out(x: Tensor) -> Tensor:
        wanted = next(left, None)
        return x if wanted is None else x.contiguous(memory_format=wanted)

    return tree_map_only(Tensor, laid_out, result)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """The same containers with every floating tensor in a dtype."""

    def converted(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return tree_map_only(Tensor, converted, values)


def is_telling(result: Any) -> bool:
    """Whether a result can be compared: it has finite floating values, and no others."""
    floating = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
    return any(x.numel() for x in floating) and all(bool(x.isfinite().all()) for x in floating)


def difference(
    got: Any, want: Any, truth: Callable[[], tuple[Any, Any]], exactness: float
) -> str | None:
    """The first difference of a result from upstream's, beyond rounding, or None.

    Args:
        got: tensors in any containers.
        want: upstream's.
        truth: returns upstream's result in the precision that `got` was computed in, and in
            float64; both in the containers of `want`.
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
    same_precision, exact = map(tree_leaves, truth())
    for index, (a, eager, true) in enumerate(zip(ours, same_precision, exact)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        rel = allowed_rel(eager, true, exactness)
        problem = accuracy_problem(a.to(eager.dtype), eager, true, rel)
        if problem is not None:
            return f"tensor {index} differs from upstream's: {problem}"
    return None
