"""Memory of the copies of weights that inference keeps beside the parameters."""

import itertools
from collections.abc import Iterable, Sequence

from torch import nn

from ..weights.derived import derived_bytes
from .computation import dtype_of
from .measuring import memory
from .settings import dtype_name


def copies_note(
    modules: Iterable[nn.Module], converted: Sequence[nn.Module] = (), compiled: bool = False
) -> str | None:
    """A sentence with the bytes of copies, or None if there are none.

    Args:
        modules: that run; tensors derived from their weights are counted.
        converted: copies of modules in another dtype; their weights are counted too.
        compiled: whether a compiler keeps weights of its own, which cannot be counted.
    """
    parts = []
    derived = derived_bytes([*modules, *converted])
    if derived:
        parts.append(f"{memory(derived)} fused, folded or packed")
    by_dtype: dict[str, int] = {}
    for module in converted:
        name = dtype_name(dtype_of(module))
        by_dtype[name] = by_dtype.get(name, 0) + _n_bytes(module)
    parts += [f"{memory(n_bytes)} converted to {name}" for name, n_bytes in by_dtype.items()]
    if compiled:
        parts.append("those inside what was compiled, not counted")
    return f"copies of weights: {'; '.join(parts)}" if parts else None


def _n_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in itertools.chain(module.parameters(), module.buffers()))
