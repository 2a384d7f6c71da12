"""Records kernel launches with their grid, constants and tensors; compiles nothing."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from ._dispatch import Architecture as ArchitectureName
from ._dispatch import launches_directly, pretend
from .architectures import Architecture, find_architecture


@dataclass(frozen=True)
class TensorArgument:
    """A tensor argument of a kernel.

    Attributes:
        storage: equal for arguments of one launch that share memory.
        storage_offset: in elements.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    storage_offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorArgument":
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.untyped_storage()._cdata,
            int(tensor.storage_offset()),
        )

    @property
    def n_elements(self) -> int:
        """Number of distinct elements; those of an expanded dimension count once.

        Overlapping windows (`unfold`) count every element that they span.
        """
        if 0 in self.shape:
            return 0
        moving = [(size, step) for size, step in zip(self.shape, self.stride) if step]
        span = 1 + sum((size - 1) * step for size, step in moving)
        return min(span, math.prod(size for size, _ in moving))

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: of the kernel.
        grid: programs along the three axes.
        constexprs: compile-time arguments by parameter name, and those that are None.
        scalars: other arguments that are not tensors, by parameter name.
        tensors: by parameter name; of a descriptor its base; of a tuple by `name[i]`.
        specialization: key of the binary; on one architecture, launches of equal specialization run
            the same binary.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline of its loops.
        kernel: the compiled kernel in `fake_gpu()`; None in `record_launches()`.
    """

    name: str
    grid: tuple[int, int, int]
    constexprs: Mapping[str, Any]
    scalars: Mapping[str, Any]
    tensors: Mapping[str, TensorArgument]
    specialization: str
    num_warps: int
    num_stages: int
    kernel: CompiledKernel | None = field(default=None, repr=False)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program.

        Raises:
            ValueError: the kernel was recorded, not compiled.
        """
        if self.kernel is None:
            raise ValueError(f"{self.name} was recorded, not compiled: use fake_gpu()")
        return self.kernel.metadata.shared

    @property
    def n_bytes(self) -> int:
        """Least traffic: the distinct elements of each tensor argument, read or written once.

        A tensor that is updated in place counts twice only where it is passed twice.
        """
        return sum(tensor.n_bytes for tensor in self.tensors.values())


@dataclass
class Recording:
    """Launches of a block.

    Attributes:
        architecture: of the pretended GPU.
        launches: in order.
    """

    architecture: Architecture
    launches: list[Launch] = field(default_factory=list)

    @property
    def kernels(self) -> list[CompiledKernel]:
        """The distinct binaries of the launches, in order of first use."""
        compiled = [launch.kernel for launch in self.launches if launch.kernel is not None]
        return list({kernel.hash: kernel for kernel in compiled}.values())

    @property
    def n_bytes(self) -> int:
        """Least traffic of all launches, see `Launch.n_bytes`."""
        return sum(launch.n_bytes for launch in self.launches)


@contextmanager
def record_launches(arch: ArchitectureName = 90) -> Iterator[Recording]:
    """Records the kernel launches of the block; compiles and runs nothing.

    On the meta device, a whole model takes only the time of its Python code. Outputs of kernels
    hold no values.

    Args:
        arch: 80, 86, 89, 90, 100, 120, "gfx90a" or "gfx942"; launch configurations depend on it.

    Yields:
        the recording, filled in as the block runs.

    Raises:
        ValueError: there is no such architecture; from a launch, if CUDA allows no such grid.
        RuntimeError: inside another block of this harness.
        NotImplementedError: from a launch, if the kernel is autotuned.
    """
    recording = Recording(find_architecture(arch))

    def run(fn: JITFunction, *args, grid, warmup: bool, **kwargs) -> None:
        if not warmup:
            recording.launches.append(describe(fn, args, kwargs, grid, recording.architecture))

    with replaced_run(recording.architecture, run):
        yield recording


@contextmanager
def replaced_run(architecture: Architecture, run: Callable) -> Iterator[None]:
    """Replaces `JITFunction.run` by `run`, and makes ops launch on pretended devices.

    Raises:
        RuntimeError: inside another block of this harness.
    """
    if launches_directly():
        raise RuntimeError(
            "fake_gpu(), record_launches(), interpret() and trace() do not nest: "
            "leave the outer block first"
        )
    with (
        pretend(architecture.name),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", _refuse_autotuner),
    ):
        yield


def _refuse_autotuner(tuner: Autotuner, *args, **kwargs) -> None:
    raise NotImplementedError(
        f"{tuner.base_fn.__name__}: an autotuner chooses by timing, which takes a GPU; "
        f"launch the kernel with a fixed configuration"
    )


def describe(
    fn: JITFunction,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]],
    architecture: Architecture,
) -> Launch:
    """Describes the launch `fn[grid](*args, **kwargs)` on `architecture`.

    Raises:
        ValueError: the grid is larger than CUDA allows.
    """
    arguments, specialization, options = _binder(fn, architecture)(*args, **kwargs)
    parsed: Any = make_backend(architecture.target).parse_options(options)

    constexprs, scalars, tensors = {}, {}, {}

    def sort(name: str, value: Any) -> None:
        if isinstance(value, TensorDescriptor):
            value = value.base
        if isinstance(value, Tensor):
            tensors[name] = TensorArgument.of(value)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                sort(f"{name}[{i}]", item)
        else:
            scalars[name] = value

    for parameter in fn.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constexprs[parameter.name] = value
        else:
            sort(parameter.name, value)

    sizes = grid(arguments) if callable(grid) else grid
    x, y, z = (*sizes, 1, 1)[:3]
    if architecture.is_nvidia and (x >= 1 << 31 or max(y, z) >= 1 << 16):
        raise ValueError(
            f"{fn.fn.__name__}: CUDA launches at most (2147483647, 65535, 65535) programs, "
            f"got {(x, y, z)}; put the long axis first"
        )
    return Launch(
        name=fn.fn.__name__,
        grid=(x, y, z),
        constexprs=constexprs,
        scalars=scalars,
        tensors=tensors,
        specialization=fn.fn.__name__ + compute_cache_key({}, specialization, options),
        num_warps=parsed.num_warps,
        num_stages=parsed.num_stages,
    )


@cache
def _binder(fn: JITFunction, architecture: Architecture) -> Callable:
    """Returns Triton's own function that binds a kernel's arguments and specializes on them."""
    backend = make_backend(architecture.target)
    return create_function_from_signature(fn.signature, fn.params, backend)
