"""Calls of a module: of what kind one is, how its result lies in memory, how two results differ."""

import itertools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

# largest difference to upstream's result, over its largest value: rounding, not other maths
ALLOWED = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
_OF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float16}


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among some values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def kind_of(args: Any, kwargs: Any) -> Iterator[Hashable]:
    """What decides how long a call takes, and whether ours covers it."""
    for value in (*args, *itertools.chain.from_iterable(kwargs.items())):
        if isinstance(value, Tensor):
            yield tuple(value.shape), value.dtype, value.device, format_of(value)
        else:
            yield value if isinstance(value, (int, str, float, type(None))) else repr(value)


def form_of(args: Any, kwargs: Any) -> Iterator[Hashable]:
    """What decides, of a call, what is computed and returned, whatever the sizes."""
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


def difference(got: Any, want: Any, precision: str | None = None) -> str | None:
    """What a result has otherwise than upstream's, beyond rounding, or None.

    Args:
        got: tensors in any containers.
        want: upstream's.
        precision: that `got` was computed in, if not in its dtype.
    """
    ours, ours_spec = tree_flatten(got)
    theirs, theirs_spec = tree_flatten(want)
    if ours_spec != theirs_spec:
        return f"it returned {ours_spec}, upstream {theirs_spec}"
    for index, (a, b) in enumerate(zip(ours, theirs)):
        if not isinstance(b, Tensor):
            if a is not b and a != b:
                return f"value {index} is {a!r}, upstream's {b!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return (
                f"tensor {index} is {list(a.shape)} {a.dtype} on {a.device}, "
                f"upstream's {list(b.shape)} {b.dtype} on {b.device}"
            )
        if not b.numel() or not b.is_floating_point():
            continue
        allowed = ALLOWED[_OF_PRECISION.get(precision or "", b.dtype)]
        wide = torch.promote_types(b.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return f"tensor {index} is not finite where upstream's is, or the other way round"
        a, b = a.where(finite, 0), b.where(finite, 0)
        largest = float(b.abs().max())
        error = float((a - b).abs().max())
        if error > allowed * largest:
            return f"tensor {index} differs by {error / (largest or 1):.2g} of its largest value"
    return None
