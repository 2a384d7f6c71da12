"""A pretended GPU, on which production launch code compiles its kernels exactly as on the device.

Triton asks a driver for the target of the compiler and passes it the binary. Our driver answers
from `architectures.py` and runs no binary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from ._dispatch import Architecture as ArchitectureName
from ._dispatch import launches_directly, pretend
from .architectures import ARCHITECTURES, Architecture, find_architecture
from .recorder import Recording, describe, replaced_run

_MAX_THREADS_PER_CTA = 1024  # on every architecture of the table


class LaunchError(RuntimeError):
    """A kernel does not compile for an architecture, or is called with wrong arguments."""


@contextmanager
def fake_gpu(arch: ArchitectureName) -> Iterator[Recording]:
    """Compiles the kernels that are launched in the block for `arch`, and runs none.

    Specialization, options, grid and binary are the same as on the device, if tensors are aligned
    as on the device; fresh tensors on the CPU and on the meta device are. THE OUTPUT OF A KERNEL IS
    UNINITIALIZED MEMORY: use `interpret()` for values. torch.cuda is not touched. Kernels that were
    compiled before come from Triton's caches.

    Args:
        arch: 80, 86, 89, 90, 100, 120, "gfx90a" or "gfx942".

    Yields:
        the launches with their compiled kernels, filled in as the block runs.

    Raises:
        ValueError: there is no such architecture; from a launch, if CUDA allows no such grid.
        RuntimeError: inside another block of this harness.
        OutOfResources: from a launch, if the kernel does not fit, as on the device.
        LaunchError: from a launch, if the kernel does not compile or has wrong arguments.
        NotImplementedError: from a launch, if the kernel is autotuned.
    """
    architecture = find_architecture(arch)
    recording = Recording(architecture)
    compile_and_launch = JITFunction.run

    def run(fn: JITFunction, *args, grid, warmup: bool, **kwargs):
        where = f"{fn.fn.__name__} on {architecture.label}"
        try:
            kernel = compile_and_launch(fn, *args, grid=grid, warmup=warmup, **kwargs)
        except OutOfResources as error:
            name = f"{error.name} of {where}"
            raise OutOfResources(error.required, error.limit, name) from error
        except Exception as error:
            kind = type(error).__name__
            raise LaunchError(f"{where} ({fn.module}): {kind}: {error}") from error
        if not warmup:
            launch = describe(fn, args, kwargs, grid, architecture)
            recording.launches.append(replace(launch, kernel=kernel))
        return kernel

    with replaced_run(architecture, run), _active(_Driver(architecture)):
        yield recording


@contextmanager
def counting_gpu(arch: ArchitectureName) -> Iterator["CountingDriver"]:
    """Counts the launches of the block, which end at a driver that returns at once.

    `Kernel` does the same as on the device, and so does Triton up to its launcher in C, so that
    both can be timed. Ops do not pass torch's dispatcher. Outputs are uninitialized memory, as in
    `fake_gpu`.

    Args:
        arch: as in `fake_gpu`.
    """
    if launches_directly():
        raise RuntimeError("counting_gpu() inside another block of the harness: leave that first")
    architecture = find_architecture(arch)
    driver = CountingDriver(architecture)
    with pretend(architecture.name), _active(driver):
        yield driver


@contextmanager
def _active(driver: "_Driver") -> Iterator[None]:
    # the property `active` would create the real driver, which fails without a GPU
    before = triton_driver._active
    triton_driver.set_active(driver)  # pyright: ignore[reportArgumentType] - duck-typed
    try:
        yield
    finally:
        triton_driver._active = before


class _Driver:
    """The part of a driver and of its `utils` that Triton's launch path calls."""

    # a JITFunction caches its kernels by the device's index; real devices count from 0
    first_device_index = 1000

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.architecture.target

    def get_current_device(self) -> int:
        return self.first_device_index + list(ARCHITECTURES).index(self.architecture.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.architecture.shared_per_cta}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        # (module, function, registers, spills, most threads); without a module there is nothing
        # to unload when the kernel is collected, perhaps under the real driver
        return None, None, None, None, _MAX_THREADS_PER_CTA

    def launcher_cls(self, source, metadata):
        return lambda *args: None


class CountingDriver(_Driver):
    """A driver whose launchers return at once, and count."""

    first_device_index = 2000

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.n_launches = 0

    def launcher_cls(self, source, metadata):
        def launch(*args) -> None:
            driver = triton_driver._active  # kernels keep the launcher of an earlier block
            assert isinstance(driver, CountingDriver)
            driver.launched(args)

        return launch

    def launched(self, args: tuple) -> None:
        """Counts a launch; `args` are those of Triton's launcher."""
        self.n_launches += 1
