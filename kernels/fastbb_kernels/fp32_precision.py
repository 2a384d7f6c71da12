"""Reads and sets PyTorch's old and new settings of TF32 in fp32 products.

PyTorch's own products follow the new settings (`torch.backends.fp32_precision` and those of
backends and operators below it); the old getters raise after both kinds were used. A setting that
is "none" follows the one above it, and "none" everywhere means exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Fp32Precision = Literal["ieee", "tf32"]

# backends and operators; settings that others follow come first, as a getter resolves "none"
_FOLLOWED = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_OPERATORS = (
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)
_MULTIPLYING_ON_CPU = (("mkldnn", "matmul"), ("mkldnn", "conv"))


def matmul_precision() -> Fp32Precision:
    """Precision of PyTorch's fp32 matrix products on a GPU; dynamo takes it as a constant."""
    return "tf32" if _get("cuda", "matmul") == "tf32" else "ieee"


def convolution_precision() -> Fp32Precision:
    """Precision of PyTorch's fp32 cuDNN convolutions; dynamo takes it as a constant."""
    return "tf32" if _get("cuda", "conv") == "tf32" else "ieee"


# as torch.compiler.assume_constant_result does, which imports the compiler
for _function in (matmul_precision, convolution_precision):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_in_force(precision: Fp32Precision) -> bool:
    """Whether matrix products and convolutions have this precision; "ieee": on CPUs too."""
    if not matmul_precision() == convolution_precision() == precision:
        return False
    return precision == "tf32" or all(_get(*on) in ("ieee", "none") for on in _MULTIPLYING_ON_CPU)


@contextmanager
def fp32_products(precision: Fp32Precision) -> Iterator[None]:
    """Sets the precision of fp32 products inside the block, in all threads, and restores it after.

    Inside the block the old getters agree. For "ieee", the getter of cuDNN raises there if its
    setting was never set, because PyTorch cannot restore that state.
    """
    if is_in_force(precision):
        yield
        return
    settings = _Settings()
    try:
        settings.read()
        settings.set(precision)
        yield
    finally:
        settings.restore()


class _Settings:
    """The stored settings; a getter returns the setting that is followed instead."""

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], str] = {}
        self._matmul: str | None = None  # of the old API
        self._cudnn: bool | None = None  # of the old API; None: cannot be set and restored

    def read(self) -> None:
        """Reads all settings, which requires setting them; afterwards all products are exact."""
        for setting in _FOLLOWED:
            self._stored[setting] = _get(*setting)
            _set(*setting, "none")
        stored = {setting: _get(*setting) for setting in _OPERATORS}
        for setting in _FOLLOWED:
            _set(*setting, "ieee")
        # TF32 that was never set, such as cuDNN's default: it follows other settings until then
        unset = [s for s, value in stored.items() if value == "tf32" and _get(*s) == "ieee"]
        self._stored.update({s: value for s, value in stored.items() if s not in unset})
        for setting in self._stored:
            _set(*setting, "ieee")
        self._matmul = torch.get_float32_matmul_precision()  # never raises if all are exact
        if not unset:
            self._cudnn = _legacy_cudnn_of_exact()

    def set(self, precision: Fp32Precision) -> None:
        allowed = precision == "tf32"
        if allowed:  # on GPUs only; other settings keep their values
            for (backend, operator), value in self._stored.items():
                _set(backend, operator, "tf32" if backend == "cuda" else value)
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        if self._cudnn is not None:
            torch.backends.cudnn.allow_tf32 = allowed

    def restore(self) -> None:
        # the old setters set the new settings too
        if self._matmul is not None:
            torch.set_float32_matmul_precision(self._matmul)
        if self._cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self._cudnn
        for setting, value in self._stored.items():
            _set(*setting, value)


def _legacy_cudnn_of_exact() -> bool:
    """Reads `torch.backends.cudnn.allow_tf32`, whose getter raises if the new settings differ."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True


def _get(backend: str, operator: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, operator)


def _set(backend: str, operator: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operator, precision)
