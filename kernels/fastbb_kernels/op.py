"""The parts of an op, by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .cases import small_cases
from .launching import Launch

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Op:
    """The parts of an op, which all take the same arguments.

    Attributes:
        name: in `fastbb_kernels`.
        call: the public function.
        eager: the reference.
        unsupported: why Triton cannot run a call, or None.
        n_bytes: least bytes of a call.
        custom_op: what the dispatcher of torch knows.
        launch: what it runs on GPUs.
        is_block: where its own kernel does not run, the ops that it is made of do.
    """

    name: str
    call: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    unsupported: Callable[..., str | None]
    n_bytes: Callable[..., int]
    custom_op: Any
    launch: Launch
    is_block: bool


def find_op(name: str) -> Op:
    """The parts of the op `name`."""
    module = import_module(f".ops.{name}", __package__)
    return Op(
        name,
        call=getattr(module, name),
        eager=getattr(module, f"{name}_eager"),
        unsupported=getattr(module, f"{name}_unsupported"),
        n_bytes=getattr(module, f"{name}_n_bytes"),
        custom_op=getattr(torch.ops.fastbb, name).default,
        launch=module._launch,
        is_block=hasattr(module, "use_block"),
    )


def op_names() -> list[str]:
    """Every op with a Triton kernel."""
    return list(dict.fromkeys(case.op for case in small_cases()))


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with every tensor in float64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
