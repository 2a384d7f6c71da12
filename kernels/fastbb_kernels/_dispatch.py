"""Choice of the implementation that an op runs, and reasons why another one cannot run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, local
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from .fp32_precision import Fp32Precision, matmul_precision
from .supported_gpus import LAUNCH_TABLES, Architecture, gpu_problem

if TYPE_CHECKING:
    from .self_check import SelfCheck

# "eager" is the op's plain PyTorch; torch.compile is applied to whole models, never per op
Impl = Literal["auto", "triton", "eager"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# plain globals, not ContextVars: dynamo guards on them
_default: Impl = "auto"
_per_op: dict[str, Impl] = {}
# the blocks of `use_impl` that are open, in the order they were entered
_blocks: list["_Block"] = []
_blocks_lock = Lock()

_pretending = False
_pretended: Architecture | None = None

# launch table and problem of each GPU that was asked for
_gpus: dict[torch.device, tuple[Architecture, str | None]] = {}

_installed_check: "SelfCheck | None" = None
_own_check: "SelfCheck | None" = None
_own_check_lock = Lock()


class Arguments(Protocol):
    """A named tuple."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class KernelWarning(RuntimeWarning):
    """A kernel does not work on this device, and something else runs in its place."""


class _Block(NamedTuple):
    """An open block of `use_impl`."""

    impl: Impl
    ops: tuple[str, ...]


@contextmanager
def use_impl(impl: Impl, *, ops: Sequence[str] = ()) -> Iterator[None]:
    """Sets the implementation of ops called without `impl=` inside the block, in all threads.

    An op that is made of other ops (`swin_attention_block`) runs those if its own kernel cannot
    run, so a whole model follows `use_impl("triton")` as long as every part has a kernel.

    Args:
        impl: "auto" takes Triton if it can run the call, "eager" plain PyTorch, and "triton" raises
            the reason if Triton cannot run the call.
        ops: names of the ops to set; they take precedence over a setting for all; default: all.
    """
    block = _Block(_check(impl), (ops,) if isinstance(ops, str) else tuple(ops))
    with _blocks_lock:
        _blocks.append(block)
        _apply_blocks()
    try:
        yield
    finally:
        # do not restore a saved list: other threads may have changed it since
        with _blocks_lock:
            _blocks[:] = [other for other in _blocks if other is not block]
            _apply_blocks()


def _apply_blocks() -> None:
    global _default, _per_op
    impls: list[Impl] = ["auto", *(block.impl for block in _blocks if not block.ops)]
    _default = impls[-1]
    _per_op = {op: block.impl for block in _blocks for op in block.ops}


def chosen_impl(op: str, impl: Impl | None) -> Impl:
    """Returns the implementation that a call of `op` with `impl=` requests."""
    if impl is not None:
        return _check(impl)
    return _per_op.get(op, _default)


def is_plainly_eager(x: Tensor, impl: Impl | None) -> bool:
    """Whether every op has to run plain PyTorch; the cheapest check, made first on CPUs."""
    if x.is_cuda or _pretending or impl == "triton":
        return False
    return _default != "triton" and "triton" not in _per_op.values()


def use_triton(op: str, impl: Impl | None, unsupported: str | None, x: Tensor) -> bool:
    """Resolves `impl` for one call.

    Args:
        op: name of the op, for the error and the self-check.
        impl: implementation that the caller asked for; None: that of `use_impl`.
        unsupported: why Triton cannot run this call, or None.
        x: a tensor of the call that has its device and dtype.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: "triton" was asked for and cannot run, or is known to fail on the
            device; the message says why.
    """
    impl = chosen_impl(op, impl)
    if impl == "triton":
        reason = unsupported or _checked(op, x.device, x.dtype, False)
        if reason:
            raise NotImplementedError(f"{op}: impl='triton' cannot run this call: {reason}")
        return True
    return impl == "auto" and unsupported is None and _checked(op, x.device, x.dtype, True) is None


def use_block(op: str, impl: Impl | None, unsupported: str | None, x: Tensor) -> bool:
    """Does the same as `use_triton`, for an op made of other ops that run if its kernel cannot.

    The kernel is required only if the caller names the op, by `impl=` or by `use_impl(..., ops=)`.
    With "triton" set for all ops, a call that the kernel cannot run goes to the other ops, and
    these raise if they cannot run it either.
    """
    if impl is None and op not in _per_op and _default == "triton":
        return unsupported is None and _checked(op, x.device, x.dtype, False) is None
    return use_triton(op, impl, unsupported, x)


def eager_only(op: str, impl: Impl | None) -> None:
    """Refuses `impl="triton"` for an op that has no Triton kernel."""
    if chosen_impl(op, impl) == "triton":
        raise NotImplementedError(
            f"{op}: impl='triton' cannot run this call: this op has no Triton kernel yet"
        )


class _Thread(local):
    """State of the calls of one thread."""

    is_unchecked = False


_thread = _Thread()


@contextmanager
def unchecked() -> Iterator[None]:
    """Lets this thread launch kernels that are not trusted, to check or to time them."""
    before, _thread.is_unchecked = _thread.is_unchecked, True
    try:
        yield
    finally:
        _thread.is_unchecked = before


def current_check() -> "SelfCheck | None":
    """Returns the check that decides whether kernels are trusted; None: no check, or no GPU."""
    if _thread.is_unchecked:
        return None
    return _installed_check if _installed_check is not None or _pretending else machine_check()


def machine_check() -> "SelfCheck | None":
    """Returns the check of this machine's GPUs, also inside `pretend`; None: there is no GPU."""
    global _own_check
    if _own_check is not None:
        return _own_check
    with _own_check_lock:
        if _own_check is None and torch.cuda.is_available():
            from .self_check import SelfCheck

            _own_check = SelfCheck()
    return _own_check


@contextmanager
def use_check(check: "SelfCheck") -> Iterator[None]:
    """Lets `check` decide which ops are trusted inside the block, on pretended devices too."""
    global _installed_check
    before, _installed_check = _installed_check, check
    try:
        yield
    finally:
        _installed_check = before


def _checked(op: str, device: torch.device, dtype: torch.dtype, warn: bool) -> str | None:
    """Returns the reason why the kernels of an op are off for a device and dtype, or None.

    Args:
        op: its name.
        device: of the tensors.
        dtype: of the tensors.
        warn: warns once of each op that is off.
    """
    check = current_check()
    if check is None:
        return None
    return check.problem(op, device, dtype) if warn else check.known_problem(op, device, dtype)


# as torch.compiler.assume_constant_result does, which imports the compiler
_checked._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def common_unsupported(
    call: Arguments, first: int = 0, or_fp32: tuple[str, ...] = ()
) -> str | None:
    """Returns the reason why no forward-only kernel can take the tensors of a call, or None.

    Args:
        call: of an op.
        first: position of the argument whose device and dtype all later tensors must have; earlier
            arguments are not checked.
        or_fp32: names of arguments that may also be fp32.
    """
    arguments = call[first:] if first else call
    x = arguments[0]
    if not (x.is_cuda or _pretending):
        return f"needs a CUDA or ROCm device, got {x.device}"
    device, dtype = x.device, x.dtype
    if (problem := gpu_unsupported(device)) is not None:
        return problem
    if dtype not in TRITON_DTYPES:
        return f"needs fp32, fp16 or bf16, got {dtype}"
    needs_grad = False
    for index, tensor in enumerate(arguments):
        if tensor is None or not isinstance(tensor, Tensor):
            continue
        if tensor.device != device:
            name = call._fields[first + index]
            return f"needs all tensors on {device}, got {name} on {tensor.device}"
        if tensor.dtype != dtype:
            name = call._fields[first + index]
            if name not in or_fp32 or tensor.dtype != torch.float32:
                return f"needs all tensors in {dtype}, got {name} in {tensor.dtype}"
        needs_grad = needs_grad or tensor.requires_grad
    if x.is_cuda and torch.is_autocast_enabled(device.type):
        return "under torch.autocast the dtypes are autocast's choice; cast the model instead"
    if needs_grad and torch.is_grad_enabled():
        return (
            "the kernel has no backward and a gradient is needed; use torch.no_grad(), "
            "or impl='eager' to train"
        )
    return None


def input_precision(dtype: torch.dtype) -> Fp32Precision:
    """Returns the precision of products: exact fp32, unless PyTorch's settings allow TF32."""
    return matmul_precision() if dtype == torch.float32 else "ieee"


def launches_directly() -> bool:
    """Whether a GPU is pretended: torch's dispatcher would not launch kernels for its tensors.

    `CustomOp` and the harness call this; other code calls `launches_on`.
    """
    return _pretending


def launches_on(device: torch.device) -> bool:
    """Whether our kernels launch for tensors on this device: a GPU, or a pretended one."""
    return device.type == "cuda" or _pretending


def computes_nothing() -> bool:
    """Whether launches are recorded for a pretended GPU and, unlike in the interpreter, not run."""
    return _pretended is not None


def architecture(device: torch.device) -> Architecture | None:
    """Returns the name of the launch table: 90, "gfx942"; None in the interpreter."""
    return _pretended if _pretending else _launch_table(device)


def gpu_unsupported(device: torch.device) -> str | None:
    """Returns the reason why no kernel runs on this GPU, or None."""
    return None if _pretending else _gpu_problem(device)


def _launch_table(device: torch.device) -> Architecture:
    return _gpu(device)[0]


def _gpu_problem(device: torch.device) -> str | None:
    return _gpu(device)[1]


# as torch.compiler.assume_constant_result does, which imports the compiler
_launch_table._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_gpu_problem._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _gpu(device: torch.device) -> tuple[Architecture, str | None]:
    """Returns a GPU's launch table and its problem or None; cached because each call needs it."""
    if device not in _gpus:
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            name: Architecture = properties.gcnArchName.split(":")[0]
        else:
            name = 10 * properties.major + properties.minor
        found = LAUNCH_TABLES.get(name, name), gpu_problem(name)
        if device.index is None:  # the current device, which may be another one the next time
            return found
        _gpus[device] = found
    return _gpus[device]


@contextmanager
def pretend(architecture: Architecture | None) -> Iterator[None]:
    """Treats CPU and meta tensors as tensors of a GPU, for which ops launch directly.

    `interpret`, `fake_gpu` and similar tools use this; they decide the effect of a launch.

    Args:
        architecture: target of the compiler; None: the interpreter.
    """
    global _pretending, _pretended
    before = _pretending, _pretended
    _pretending, _pretended = True, architecture
    try:
        yield
    finally:
        _pretending, _pretended = before


def _check(impl: Impl) -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    return impl
