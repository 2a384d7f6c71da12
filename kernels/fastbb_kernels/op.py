"""An op: its call, declared once, from which its custom op and its launch are derived.

`ops/<op>.py` declares the call as a named tuple of its arguments with the methods of `Call`. From
it, `Op` makes the custom op of torch with its fake, and the launch that is checked.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._ops import OpOverload

from . import ops
from ._dispatch import (
    Arguments,
    Impl,
    chosen_impl,
    is_plainly_eager,
    launches_directly,
    use_block,
    use_triton,
)
from .launching import Launch, typed_argument
from .library import Library

_library = torch.library.Library("fastbb", "FRAGMENT")

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Call(Arguments, Protocol):
    """One call of an op: a named tuple of its arguments.

    The fields are the arguments of the public function. The custom op has the same arguments, but
    no defaults, and the fields of a nested named tuple instead of the tuple.
    """

    def check(self) -> None:
        """Raises a ValueError if the arguments do not fit together."""
        ...

    def eager(self) -> Tensor:
        """Computes the call with PyTorch's own ops, in any dtype: the fallback and reference."""
        ...

    def unsupported(self) -> str | None:
        """Returns why the kernel cannot run this call, or None."""
        ...

    def n_bytes(self) -> int:
        """Returns the least traffic: each input read once, the output written once."""
        ...

    def empty_result(self) -> Tensor:
        """Allocates the result, with the strides that the kernel gives it."""
        ...

    def launch(self) -> Tensor:
        """Launches the kernel."""
        ...


_Call = TypeVar("_Call", bound=Call)


class CustomOp(Generic[_Call]):
    """A custom op of torch that takes the fields of a call.

    Attributes:
        overload: of torch's dispatcher, seen by torch.compile and torch.export.
        eager: computes the result with PyTorch's own ops, from the arguments of the custom op.
        gpu: computes it on GPUs, from the same arguments.
    """

    def __init__(
        self, name: str, call_type: type[_Call], gpu: Callable[..., Tensor] | None = None
    ) -> None:
        """Registers the custom op.

        Args:
            name: of the op, without a namespace.
            call_type: declares the arguments.
            gpu: runs on GPUs; default: a `Launch` of `call_type.launch`.
        """
        hints = get_type_hints(call_type)
        named_tuple: Any = call_type
        self._make: Callable[[Sequence[Any]], _Call] = named_tuple._make
        nested = [(i, kind) for i, kind in enumerate(hints.values()) if _is_named_tuple(kind)]
        self._nested: tuple[int, Any] | None = nested[0] if nested else None
        assert len(nested) <= 1, "more nested named tuples would take a loop in every call"
        call_of = self._call_of_flat if self._nested else self._make

        def eager(*args: Any) -> Tensor:
            call = call_of(args)
            y, empty = call.eager(), call.empty_result()
            # the result has the strides of the fake and of the kernel
            return y if y.stride() == empty.stride() else empty.copy_(y)

        def launch(*args: Any) -> Tensor:
            return call_of(args).launch()

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=hint) for name, hint in _flat_hints(hints)],
            return_annotation=Tensor,
        )
        eager.__signature__ = launch.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        self.eager = eager
        self.gpu = Launch(name, launch, eager) if gpu is None else gpu
        # not by `torch.library.custom_op`, whose wrapper looks at every result for aliases
        schema = torch.library.infer_schema(eager, mutates_args=())
        _library.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, eager, "CompositeExplicitAutograd")
        # a frame that Dynamo left alone may call it, and Dynamo would try to trace the launch
        _library.impl(name, _disable_dynamo(lambda *args: self.gpu(*args)), "CUDA")
        torch.library.register_fake(
            f"fastbb::{name}", lambda *args: call_of(args).empty_result(), lib=_library
        )
        self.overload: OpOverload[..., Any] = getattr(torch.ops.fastbb, name).default

    def __call__(self, call: _Call) -> Tensor:
        """Runs a call on its device: a CPU, a GPU or a pretended GPU."""
        args: Any = call
        if self._nested:
            i, _ = self._nested
            args = *args[:i], *args[i], *args[i + 1 :]
        return self.gpu(*args) if launches_directly() else self.overload(*args)

    def _call_of_flat(self, args: Sequence[Any]) -> _Call:
        """Makes a call from the arguments of the custom op, which has no nested named tuple."""
        assert self._nested
        i, kind = self._nested
        end = i + len(kind._fields)
        # the dispatcher of torch turns tuples into lists
        nested = kind._make(tuple(v) if type(v) is list else v for v in args[i:end])
        return self._make((*args[:i], nested, *args[end:]))


class Op(Generic[_Call]):
    """An op with a Triton kernel, as `ops/<op>.py` defines it.

    Attributes:
        name: in `fastbb_kernels`.
        kernel: the custom op, which launches the kernel.
        is_block: if its own kernel cannot run, the ops that it is made of run.
        library: computes calls by a library, or None.
    """

    def __init__(self, name: str, call_type: type[_Call], *, is_block: bool = False) -> None:
        """Registers the custom op.

        Args:
            name: of the public function, and of the module in `ops/`.
            call_type: declares the call.
            is_block: if its own kernel cannot run, the ops that it is made of run.
        """
        self.name = name
        self.kernel = CustomOp(name, call_type)
        self.is_block = is_block
        self._call_type: Any = call_type
        self._typed = typed_argument(self._call_type._fields)
        has_library = hasattr(call_type, "library")
        self.library = Library(name, call_type, self.kernel.eager) if has_library else None
        _ops[name] = self

    def __call__(self, call: _Call, impl: Impl | None) -> Tensor:
        """Checks a call, and runs it by the kernel, a library or PyTorch's own ops.

        Args:
            call: of the op.
            impl: implementation that the caller asked for; None: that of `use_impl`.

        Raises:
            ValueError: arguments do not fit together, or there is no such implementation.
            NotImplementedError: "triton" was asked for and cannot run; the message says why.
        """
        call.check()
        if not self.takes(call, impl):
            return call.eager()
        if self.library is not None and chosen_impl(self.name, impl) == "auto":
            arguments: Any = call
            if self.library.is_faster(arguments):
                return self.library.run(*arguments)
        return self.kernel(call)

    def takes(self, call: _Call, impl: Impl | None) -> bool:
        """Whether the kernel runs a call; raises the same errors as `__call__`."""
        x = call[self._typed]
        if impl is None and is_plainly_eager(x, None):
            return False
        choose = use_block if self.is_block else use_triton
        if not choose(self.name, impl, call.unsupported(), x):
            return False
        # of a block; its parts run where they are expected to be faster
        pays = getattr(call, "pays", None)
        if pays is None or chosen_impl(self.name, impl) != "auto":
            return True
        return torch.compiler.is_exporting() or pays()  # an export may be for any batch

    @property
    def call(self) -> Callable[..., Tensor]:
        """The public function."""
        return getattr(import_module(f".ops.{self.name}", __package__), self.name)

    # the methods below take the arguments of the public function without `impl`

    def bind(self, *args: Any, **options: Any) -> Call:
        """Makes the call that the public function makes from its arguments."""
        bound = inspect.signature(self.call).bind(*args, **options)
        bound.apply_defaults()
        return self._call_type(*(bound.arguments[name] for name in self._call_type._fields))

    def eager(self, *args: Any, **options: Any) -> Tensor:
        """Computes the reference."""
        return self.bind(*args, **options).eager()

    def unsupported(self, *args: Any, **options: Any) -> str | None:
        """Returns why the kernel cannot run a call, or None."""
        return self.bind(*args, **options).unsupported()

    def n_bytes(self, *args: Any, **options: Any) -> int:
        """Returns the least traffic of a call in bytes."""
        return self.bind(*args, **options).n_bytes()

    @property
    def launch(self) -> Launch:
        """The launch of the kernel, whose binaries are checked."""
        assert isinstance(self.kernel.gpu, Launch)
        return self.kernel.gpu

    @property
    def custom_op(self) -> OpOverload[..., Any]:
        """The overload in torch's dispatcher."""
        return self.kernel.overload


_ops: dict[str, Op[Any]] = {}


def find_op(name: str) -> Op[Any]:
    """Returns the op of that name."""
    import_module(f".ops.{name}", __package__)
    return _ops[name]


def op_names() -> list[str]:
    """Returns the names of all ops with a Triton kernel, imported or not."""
    for module in pkgutil.iter_modules(ops.__path__):
        import_module(f".ops.{module.name}", __package__)
    return sorted(_ops)


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with every tensor in float64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _flat_hints(hints: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields names and types of the arguments of a custom op."""
    for name, hint in hints.items():
        if _is_named_tuple(hint):
            yield from _flat_hints(get_type_hints(hint))
        else:
            yield name, Sequence[int] if hint == tuple[int, int] else hint


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "_fields")
