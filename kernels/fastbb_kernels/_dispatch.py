"""Which implementation of an op runs, and why another one does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

# "eager" is the op's plain PyTorch; torch.compile is applied to whole models, never per op
Impl = Literal["auto", "triton", "eager"]

# a plain global, not a ContextVar: dynamo guards on it
_default: Impl = "auto"


@contextmanager
def use_impl(impl: Impl) -> Iterator[None]:
    """Sets the implementation of every op called without `impl=` inside the block.

    Args:
        impl: "auto" takes Triton where it can run the call, "eager" plain PyTorch, and
            "triton" raises the reason where Triton cannot run the call.
    """
    global _default
    previous, _default = _default, _check(impl)
    try:
        yield
    finally:
        _default = previous


def use_triton(op: str, impl: Impl | None, unsupported: str | None) -> bool:
    """Resolves `impl` for one call.

    Args:
        op: name of the op, for the error.
        impl: what the caller asked for; None: what `use_impl` set.
        unsupported: why Triton cannot run this call, or None.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: "triton" was asked for and cannot run; the message says why.
    """
    impl = _default if impl is None else _check(impl)
    if impl == "triton" and unsupported:
        raise NotImplementedError(f"{op}: impl='triton' cannot run this call: {unsupported}")
    return impl != "eager" and unsupported is None


def _check(impl: Impl) -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    return impl


def eager_only(op: str, impl: Impl | None) -> None:
    """The seam of an op without a Triton kernel: refuses `impl="triton"` with that reason."""
    use_triton(op, impl, "this op has no Triton kernel yet")
