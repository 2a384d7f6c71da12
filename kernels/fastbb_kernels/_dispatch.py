"""Which implementation of an op runs, and why another one does not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

# "eager" is the op's plain PyTorch; torch.compile is applied to whole models, never per op
Impl = Literal["auto", "triton", "eager"]

# compute capability times ten on NVIDIA, the name of the instruction set on AMD
Architecture = int | str

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# plain globals, not ContextVars: dynamo guards on them
_default: Impl = "auto"
_per_op: dict[str, Impl] = {}

_pretending = False
_pretended: Architecture | None = None


@contextmanager
def use_impl(impl: Impl, *, ops: Sequence[str] = ()) -> Iterator[None]:
    """Sets the implementation of ops called without `impl=` inside the block.

    An op that is made of other ops (`swin_attention_block`) runs those where its own kernel does
    not run, so a whole model follows `use_impl("triton")` as long as every part has a kernel.

    Args:
        impl: "auto" takes Triton where it can run the call, "eager" plain PyTorch, and
            "triton" raises the reason where Triton cannot run the call.
        ops: names of the ops this is about, before what is set for all; default: all.
    """
    global _default, _per_op
    before = _default, _per_op
    _check(impl)
    if ops:
        _per_op = {**_per_op, **dict.fromkeys(ops, impl)}
    else:
        _default = impl
    try:
        yield
    finally:
        _default, _per_op = before


def chosen_impl(op: str, impl: Impl | None) -> Impl:
    """What a call of `op` with `impl=` asks for."""
    if impl is not None:
        return _check(impl)
    return _per_op.get(op, _default)


def is_plainly_eager(x: Tensor, impl: Impl | None) -> bool:
    """Whether no op can do other than run PyTorch: the question that costs least, on CPUs."""
    if x.is_cuda or _pretending or impl == "triton":
        return False
    return _default != "triton" and "triton" not in _per_op.values()


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
    impl = chosen_impl(op, impl)
    if impl == "triton" and unsupported:
        raise NotImplementedError(f"{op}: impl='triton' cannot run this call: {unsupported}")
    return impl != "eager" and unsupported is None


def use_block(op: str, impl: Impl | None, unsupported: str | None) -> bool:
    """As `use_triton` for an op made of other ops, which run where its own kernel does not.

    Only a caller who names the op insists on its kernel, by `impl=` or by `use_impl(..., ops=)`.
    "triton" for all ops leaves a call that the kernel cannot run to the other ops, and those raise
    where they cannot run it either.
    """
    if impl is None and op not in _per_op and unsupported:
        return False
    return use_triton(op, impl, unsupported)


def eager_only(op: str, impl: Impl | None) -> None:
    """The seam of an op without a Triton kernel: refuses `impl="triton"` with that reason."""
    use_triton(op, impl, "this op has no Triton kernel yet")


def common_unsupported(x: Tensor, **others: Tensor | None) -> str | None:
    """Why no forward-only kernel can take these tensors, or None.

    Args:
        x: the main input, of any shape.
        others: the other tensors of the call by their names; all are to be like `x`.
    """
    if not (x.is_cuda or _pretending):
        return f"needs a CUDA or ROCm device, got {x.device}"
    if x.dtype not in TRITON_DTYPES:
        return f"needs fp32, fp16 or bf16, got {x.dtype}"
    tensors = {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            return f"needs all tensors on {x.device}, got {name} on {tensor.device}"
        if tensor.dtype != x.dtype:
            return f"needs all tensors in {x.dtype}, got {name} in {tensor.dtype}"
    if x.is_cuda and torch.is_autocast_enabled(x.device.type):
        return "under torch.autocast the dtypes are autocast's choice; cast the model instead"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors.values())):
        return (
            "the kernel has no backward and a gradient is needed; use torch.no_grad(), "
            "or impl='eager' to train"
        )
    return None


def input_precision(dtype: torch.dtype) -> Literal["ieee", "tf32"]:
    """How kernels multiply: fp32 exactly, unless PyTorch was told that TF32 is allowed."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def launches_directly() -> bool:
    """Whether ops call their launcher themselves instead of the dispatcher's kernel of a device."""
    return _pretending


def architecture(device: torch.device) -> Architecture | None:
    """What kernels are compiled for: 90, "gfx942"; None in the interpreter."""
    if _pretending:
        return _pretended
    # dynamo takes the properties for constants, and get_device_capability not
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return 10 * properties.major + properties.minor


@contextmanager
def pretend(architecture: Architecture | None) -> Iterator[None]:
    """Lets CPU and meta tensors count as tensors of a GPU, and ops launch directly.

    For `fastbb_kernels.testing`, which decides what a launch then does.

    Args:
        architecture: what to compile for; None: the interpreter.
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
