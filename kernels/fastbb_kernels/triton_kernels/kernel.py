"""The one place where kernels are launched."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..launching import note_binary


class Kernel:
    """A Triton kernel, launched as `kernel[grid](x, ...)` on the device of `x`.

    Triton launches on the current device, whatever device its tensors are on.
    """

    def __init__(self, function: JITFunction) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
        if x.is_cuda:
            with torch.cuda.device(x.device):
                compiled = self.function[grid](x, *args, **options)
        else:  # a pretended device
            compiled = self.function[grid](x, *args, **options)
        note_binary(getattr(compiled, "hash", "interpreted"))
