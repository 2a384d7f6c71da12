"""The one place where kernels are launched. It decides nothing of their binaries."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from ..launching import note_binary

# versions of Triton whose compiled kernels `Kernel` calls as Triton's own launch does
_TESTED = ("3.6.", "3.8.")
_IS_TESTED = triton.__version__.startswith(_TESTED) and torch.version.hip is None
_MOST_BINARIES = 4096


class _Binary(NamedTuple):
    """A loaded binary, for one form of the arguments.

    Attributes:
        compiled: Triton's kernel, which unloads the binary when it is freed.
        run: Triton's launcher.
        function: handle of the driver.
        metadata: of the launch.
        names: of the keyword arguments that the kernel has, in its order.
    """

    compiled: Any
    run: Callable[..., None]
    function: Any
    metadata: Any
    names: tuple[str, ...]


class Kernel:
    """A Triton kernel, launched as `kernel[grid](x, ...)` on the device of `x`.

    Triton launches on the current device, whatever device its tensors are on. At every launch it
    binds, specializes and formats all arguments, which takes some 60 us of Python. So only the
    first launch of each form of the arguments goes through it, and later ones go to the binary.
    """

    def __init__(self, function: JITFunction) -> None:
        self.function = function
        self._binaries: dict[tuple[Any, ...], _Binary] = {}
        # positions of integers of whose values Triton takes no notice
        parameters = getattr(function, "params", ())  # the interpreter's function has none
        self._unspecialized = {i for i, p in enumerate(parameters) if p.do_not_specialize}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                self._launch_here(grid, (x, *args), options)
        else:
            self._launch_here(grid, (x, *args), options)

    def _launch_here(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Launches on the current device."""
        if not (_IS_TESTED and self._is_plain()):
            compiled = self.function[grid](*arguments, **options)
            note_binary(getattr(compiled, "hash", "interpreted"))
            return
        driver: Any = triton_driver.active
        device = driver.get_current_device()
        form = device, *self._forms(arguments), *options.items()
        binary = self._binaries.get(form)
        if binary is None:
            compiled = self.function[grid](*arguments, **options)
            self._remember(form, compiled, len(arguments), options)
            note_binary(compiled.hash)
            return
        binary.run(
            *(*grid, 1, 1)[:3],
            driver.get_current_stream(device),
            binary.function,
            binary.metadata,
            None,  # these three are for hooks
            None,
            None,
            *arguments,
            *[options[name] for name in binary.names],
        )
        note_binary(binary.compiled.hash)

    def _is_plain(self) -> bool:
        """Whether nobody observes launches: no hook, no profiler of Triton, no harness."""
        runtime: Any = knobs.runtime
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        return (
            JITFunction.run.__module__ == JITFunction.__module__
            and isinstance(self.function, JITFunction)
            and not self.function.pre_run_hooks
            and not any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
        )

    def _forms(self, arguments: Iterable[Any]) -> Iterable[Any]:
        """What Triton may specialize a binary on, or more: of equal forms it is the same one."""
        for index, value in enumerate(arguments):
            if isinstance(value, Tensor):
                yield value.dtype
                yield value.data_ptr() % 16 == 0
            elif index in self._unspecialized:
                yield value.bit_length() < 32
            else:
                yield value if type(value) is int else (type(value), value)

    def _remember(
        self, form: tuple[Any, ...], compiled: Any, n_positional: int, options: dict[str, Any]
    ) -> None:
        names = tuple(parameter.name for parameter in self.function.params[n_positional:])
        if not all(name in options for name in names):
            return  # a default is used
        while len(self._binaries) >= _MOST_BINARIES:
            self._binaries.pop(next(iter(self._binaries)), None)
        self._binaries[form] = _Binary(
            compiled, compiled.run, compiled.function, compiled.packed_metadata, names
        )
