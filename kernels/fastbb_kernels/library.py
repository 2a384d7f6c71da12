"""Calls of an op by a library (cuBLASLt, cuDNN), at shapes where that was measured as faster."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ._activation import Activation
from ._dispatch import Architecture, architecture, current_check
from .launching import Launch, chosen_config, may_be_unusual, note_binary

KERNEL, LIBRARY = "kernel", "library"


class Way(NamedTuple):
    """What computes the calls of an op with these sizes.

    Attributes:
        name: `KERNEL` or `LIBRARY`.
    """

    name: str


def usual_way(
    n_rows: int,
    features: int,
    out_features: int,
    stride: int,
    residual: bool,
    activation: Activation,
    dtype: torch.dtype,
    arch: Architecture | None,
) -> Way:
    """Returns the choice on GPUs without a measurement, for [n_rows, features] by [out_features].

    Kernels compute the ends of a product in its epilogue, for which libraries pass over the map
    again. Nobody has measured where their faster products make up for it.
    """
    return Way(KERNEL)


class LibraryCall(Protocol):
    """A call of an op that a library can compute."""

    def __getitem__(self, index: Any, /) -> Any: ...

    def library(self) -> Tensor:
        """Computes the call by a library, with the strides of `empty_result`."""
        ...

    def library_sizes(self) -> tuple[Any, ...]:
        """Returns the arguments of `usual_way`, without the architecture."""
        ...


class Library:
    """A library's way to compute the calls of an op.

    Attributes:
        table: name of the choice, by which it is forced and measured.
        run: computes a call, from the arguments of the custom op.
    """

    def __init__(self, op: str, call_of: Callable[..., Any], eager: Callable[..., Tensor]) -> None:
        """
        Args:
            op: its name.
            call_of: makes a call from the arguments of the custom op.
            eager: computes the result with PyTorch's own ops, from the same arguments.
        """
        self.table = f"{op}_way"

        def run(*args: Any) -> Tensor:
            note_binary(LIBRARY)
            return call_of(*args).library()

        run.__signature__ = inspect.signature(eager)  # pyright: ignore[reportFunctionMemberAccess]
        self._op, self.run = op, run
        self._launch = Launch(f"{op} by a library", run, eager)

    def is_faster(self, call: LibraryCall) -> bool:
        """Whether the library is the choice for a call, and was right the first time."""
        x: Tensor = call[0]
        # a tracer, or the interpreter, cannot follow a library
        if torch.compiler.is_compiling() or architecture(x.device) is None:
            return False
        if not may_be_unusual(self.table, x.device):  # usually kernels run: no sizes are needed
            return False
        way = chosen_config(self.table, usual_way, x.device, *call.library_sizes())
        # its calls are not to be recorded in place of the op
        if way.name != LIBRARY or torch._C._is_tracing() or get_proxy_mode() is not None:
            return False
        check = current_check()
        if check is None or x.is_meta or isinstance(x, FakeTensor):
            return True
        arguments: Any = call
        values = (
            (tuple(one.shape), one.stride(), one.dtype) if isinstance(one, Tensor) else one
            for one in arguments
        )
        return check.trusts((self._op, *values), self._launch, tuple(arguments))
