"""Launches the kernels of ops: chooses their configurations, and notes them and the binaries.

A launch notes its configurations and binaries, so that the self-check can launch the same binary
again on other tensors.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ._dispatch import architecture, current_check
from .measured import is_measured, unforced_config

_Config = TypeVar("_Config", bound=tuple[Any, ...])

# arguments of ops whose first dimension counts images or rows
_BATCHED = ("x", "qkv", "pixel_values", "residual", "shortcut")
FEW_IMAGES = 2
# as many as two tiles of the most rows, and a part of one
_FEW_ROWS = 2 * 256 + 37


@dataclass
class Launched:
    """Launches in a block of `noting`.

    Attributes:
        binaries: digests of the compiled kernels; none where nothing was compiled.
        configs: the configurations that were chosen, by table.
        sizes: the arguments of each choice, by table.
    """

    binaries: list[str] = field(default_factory=list)
    configs: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def digests(self) -> set[str]:
        """Digests of the binaries; empty if nothing had to be launched, or a launch failed."""
        return set(self.binaries)


class _Thread(threading.local):
    """State of the launches of one thread."""

    def __init__(self) -> None:
        self.noted: Launched | None = None
        self.forced: dict[str, Any] = {}
        self.measured_on: torch.device | None = None


_thread = _Thread()


class noting:  # in lower case as the functions below; a generator would cost each launch more
    """Notes the launches of this thread in the block; an outer block notes them too."""

    def __enter__(self) -> Launched:
        self._before = _thread.noted
        self._noted = _thread.noted = Launched()
        return self._noted

    def __exit__(self, *error: object) -> None:
        _thread.noted = self._before
        if self._before is not None:
            self._before.binaries += self._noted.binaries
            self._before.configs |= self._noted.configs
            self._before.sizes |= self._noted.sizes


def note_binary(digest: str) -> None:
    """Adds a binary to the notes of this thread."""
    if _thread.noted is not None:
        _thread.noted.binaries.append(digest)


@contextmanager
def forced(configs: dict[str, Any]) -> Iterator[None]:
    """Makes this thread launch with these configurations, by table, for all sizes."""
    before, _thread.forced = _thread.forced, {**_thread.forced, **configs}
    try:
        yield
    finally:
        _thread.forced = before


@contextmanager
def configured_as_on(device: torch.device) -> Iterator[None]:
    """Makes this thread's launches on pretended GPUs take configurations measured on a real one."""
    before, _thread.measured_on = _thread.measured_on, device
    try:
        yield
    finally:
        _thread.measured_on = before


def chosen_config(
    table: str, launch_config: Callable[..., _Config], device: torch.device, *sizes: Any
) -> _Config:
    """Returns the configuration of a launch: forced, measured on this GPU, or the usual one.

    Args:
        table: name of the choice, by which configurations are forced and measured.
        launch_config: makes the usual one from `sizes` and the architecture.
        device: of the launch.
        sizes: arguments of the choice.
    """
    config = _thread.forced.get(table)
    if config is None:
        arch, device = architecture(device), _thread.measured_on or device
        config = unforced_config(table, launch_config, device, arch, sizes)
    if _thread.noted is not None:
        _thread.noted.configs[table], _thread.noted.sizes[table] = config, sizes
    return config


def may_be_unusual(table: str, device: torch.device) -> bool:
    """Whether `chosen_config` may return another configuration than the usual one."""
    return table in _thread.forced or is_measured(table, _thread.measured_on or device)


def typed_argument(names: Sequence[str]) -> int:
    """Returns the position of the argument whose dtype is the dtype of the call."""
    # the first argument of a stem, its pixels, may be integers
    return names.index("weight") if "weight" in names else 0


class Launch:
    """Launcher of an op on GPUs; new binaries are checked at their first launch.

    Attributes:
        op: its name.
        run: launches, without a check.
        eager: computes the same with PyTorch's own ops; runs if a binary is wrong.
    """

    def __init__(self, op: str, run: Callable[..., Tensor], eager: Callable[..., Tensor]) -> None:
        """
        Args:
            op: its name.
            run: takes the arguments of the custom op.
            eager: takes the same.
        """
        self.op = op
        self.run = run
        self.eager = eager
        self.names = tuple(inspect.signature(run).parameters)
        self._typed = typed_argument(self.names)

    def __call__(self, *args: Any) -> Tensor:
        check = current_check()
        x = args[0]
        if check is None or x.device.type == "meta" or isinstance(x, FakeTensor):
            return self.run(*args)
        return check.launch(self, args)

    def dtype(self, args: Sequence[Any]) -> torch.dtype:
        """Returns the dtype of a launch."""
        return args[self._typed].dtype

    def alike(self, args: Sequence[Any], n_images: int | None, seed: int) -> tuple[Any, ...]:
        """Makes random arguments that run the same binaries as `args`.

        Args:
            args: of a launch.
            n_images: largest number of images; rows without images: a few hundred; None: all.
            seed: of the values.
        """
        device = args[0].device
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        return tuple(
            _alike(name, value, n_images, generator) if isinstance(value, Tensor) else value
            for name, value in zip(self.names, args)
        )

    def ends(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Returns arguments with the first and the last image only."""
        last = len(args[0]) - 1
        return tuple(
            value[[0, last]] if isinstance(value, Tensor) and name in _BATCHED else value
            for name, value in zip(self.names, args)
        )


def _alike(
    name: str, tensor: Tensor, n_images: int | None, generator: torch.Generator | None
) -> Tensor:
    """Makes random values with the strides and the alignment of a tensor."""
    size = list(tensor.shape)
    if n_images is not None and name in _BATCHED and tensor.ndim > 1:
        size[0] = min(size[0], _FEW_ROWS if tensor.ndim == 2 else n_images)
    # Triton specializes on whether an address is a multiple of 16
    offset = 0 if tensor.is_meta else tensor.data_ptr() % 16 // tensor.element_size()
    span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, tensor.stride()))
    values = _random(name, offset + span, tensor, generator)
    return values.as_strided(size, tensor.stride(), offset)


def _random(name: str, n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Makes [n] values of the usual magnitude of an argument of that name."""
    if not like.is_floating_point():
        return torch.randint(
            0, 256, (n,), dtype=like.dtype, device=like.device, generator=generator
        )
    values = torch.randn(n, dtype=torch.float32, device=like.device, generator=generator)
    if name.endswith("weight") and like.ndim > 1:
        values *= max(like[0].numel(), 1) ** -0.5
    elif like.numel() == 1:  # a factor of all values; a random one may hide all others
        values.fill_(2.0)
    elif like.ndim == 1 and name != "sums":  # of these, larger ones show a mean that is lost
        values = 0.2 * values + name.endswith("weight")
    return values.to(like.dtype)
