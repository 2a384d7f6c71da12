"""Tensors computed from parameters (fused, padded, folded), remembered while the parameters stay.

They stand beside the modules, not in them: no state dict, copy or pickle of a module has them.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .watch import (
    Statistics,
    follow_layers,
    follow_optimizers,
    is_plain_tensor,
    note_written,
    untraced,
)

Module = TypeVar("Module", bound="RemembersDerived")
Derived = TypeVar("Derived", bound=tuple[Tensor | None, ...])


def derive(
    owner: nn.Module,
    name: str,
    compute: Callable[..., Derived],
    *sources: Tensor,
    constants: Hashable = None,
    statistics: Sequence[int] = (),
) -> Derived:
    """`compute(*sources)`, remembered where no gradient is needed and nothing is traced.

    It is computed again when a source is another object, lies elsewhere, or has another dtype,
    device or version; and after whatever may change parameters without a trace in them: a step of
    any optimizer (fused ones move no version), a layer put back (LoRA merged into it moves none
    either), a call that needs a gradient, `forget_derived`.
    What a parametrization puts in place of a parameter lives for one call, and what is computed
    from it is not remembered.

    Args:
        owner: module that the result belongs to; the result does not outlive it.
        name: of the result; a new one replaces the old one of this name.
        compute: depends on sources and constants only, and is the same at every call with this
            name. Derive together what has the same owner: to look at the sources is what a call
            costs.
        sources: parameters and buffers of any shape.
        constants: what else the result depends on.
        statistics: positions of the sources that batch norm moves without a new version. On a CPU
            their values are compared at every call. On a GPU that would wait for it: there the
            count of batches, which has a version, is a source too, and `F.batch_norm` on a module's
            buffers, which counts none, needs `refresh`.

    Returns:
        What `compute` returns. Calls share the tensors: nothing may write into them.
    """
    if is_tracing():
        return compute(*sources)  # in the graph, which so follows the parameters
    weights = _DERIVED.get(owner)
    if weights is None:
        weights = _start_deriving(owner)
    return weights.get(name, compute, sources, constants, statistics)


@contextmanager
def holding_derived() -> Iterator[list[tuple[Tensor | None, ...]]]:
    """Hands out what was remembered and used inside the block, for a CUDA graph to keep alive.

    Only inside it does a graph that is being captured read remembered tensors, instead of computing
    them anew in every replay. Whoever replays the graph watches the weights (`ModuleStamp`).
    """
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def is_tracing() -> bool:
    """Whether calls are being recorded into a graph, by torch.compile, torch.export or others."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or get_proxy_mode() is not None


def forget_derived(root: nn.Module) -> None:
    """Frees what was computed from the parameters of a module and of all modules inside it."""
    for module in root.modules():
        weights = _DERIVED.get(module)
        if weights is not None:
            weights.clear()


class RemembersDerived(nn.Module):
    """A module that forgets what was derived inside it whenever its parameters may change."""

    def refresh(self) -> None:
        """Forgets and frees what inference computed from the weights and remembers.

        In inference a backbone remembers tensors made of its weights, such as fused projections.
        Optimizer steps, in-place operations, `load_state_dict`, `to`, `train` and new parameters
        are followed. Call this after a change that torch does not record: through `.data`
        (`p.data.mul_(2)`, `p.data = q`), a NumPy view, or another process that shares the memory;
        and on a GPU after running statistics were moved by `F.batch_norm` instead of their module.
        """
        forget_derived(self)
        note_written(self.parameters())

    def train(self: Module, mode: bool = True) -> Module:
        forget_derived(self)
        return super().train(mode)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        forget_derived(self)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # not load_state_dict: a module around this one does not call it
        forget_derived(self)
        super()._load_from_state_dict(*args, **kwargs)


def is_transformed(x: Tensor) -> bool:
    """Whether a call with a tensor is that of a transform: vmap, jvp, forward-mode derivatives."""
    return is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0


class _Entry(NamedTuple):
    sources: list[tuple[weakref.ref[Tensor], int, int, torch.dtype, torch.device]]
    constants: Hashable
    statistics: Statistics
    n_cleared: int
    last_step: object
    last_layer: object
    value: tuple[Tensor | None, ...]

    def is_of(self, sources: tuple[Tensor, ...], constants: Hashable) -> bool:
        """Whether nothing has changed since; every inference asks this for every layer."""
        if constants != self.constants or len(sources) != len(self.sources):
            return False
        for source, (ref, address, version, dtype, device) in zip(sources, self.sources):
            if (
                ref() is not source
                or source._version != version
                or source.data_ptr() != address
                or source.dtype != dtype
                or source.device != device
            ):
                return False
        return self.statistics.are_current()


class _DerivedWeights:
    """What was computed from the parameters of one module, by name, for any number of threads."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._n_cleared = 0
        self._lock = threading.Lock()

    def get(
        self,
        name: str,
        compute: Callable[..., Derived],
        sources: tuple[Tensor, ...],
        constants: Hashable,
        statistics: Sequence[int],
    ) -> Derived:
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.clear()  # training: the parameters are about to change
            return compute(*sources)
        capturing = sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and _held is None:
            return compute(*sources)  # a CUDA graph must not read memory that may be freed
        n_cleared, last_step, last_layer = self._n_cleared, untraced.last_step, untraced.last_layer
        entry = self._entries.get(name)
        if (
            entry is not None
            and entry.n_cleared == n_cleared
            and entry.last_layer is last_layer
            and (entry.last_step is last_step or not any(map(_may_step, sources)))
            and entry.is_of(sources, constants)
        ):
            if _held is not None:
                _held.append(entry.value)
            return entry.value  # type: ignore[return-value]  # of the same `compute`
        if capturing or not all(_can_be_followed(source) for source in sources):
            return compute(*sources)
        states = [(s.data_ptr(), s._version, s.dtype, s.device) for s in sources]
        copies = Statistics(sources[position] for position in statistics)
        # a tensor made in inference mode could not be used outside it
        with torch.inference_mode(False), torch.no_grad():
            value = compute(*sources)
        if all(is_plain_tensor(tensor) for tensor in value if tensor is not None):
            if sources[0].is_cuda:  # another stream may be the next to read the value
                torch.cuda.current_stream(sources[0].device).synchronize()
            refs = self._refs(name, sources)
            seen = [(ref, *state) for ref, state in zip(refs, states)]
            with self._lock:
                self._entries[name] = _Entry(
                    seen, constants, copies, n_cleared, last_step, last_layer, value
                )
        return value

    def clear(self) -> None:
        with self._lock:
            self._n_cleared += 1  # also what another thread is computing now will be out of date
            self._entries.clear()

    def _refs(self, name: str, sources: tuple[Tensor, ...]) -> list[weakref.ref[Tensor]]:
        this = weakref.ref(self)

        def forget(_: weakref.ref[Tensor]) -> None:
            weights = this()
            if weights is not None:
                weights._entries.pop(name, None)

        return [weakref.ref(source, forget) for source in sources]


_DERIVED: weakref.WeakKeyDictionary[nn.Module, _DerivedWeights] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_held: list[tuple[Tensor | None, ...]] | None = None


def _start_deriving(module: nn.Module) -> _DerivedWeights:
    with _lock:
        follow_optimizers()
        follow_layers(module.modules())
        return _DERIVED.setdefault(module, _DerivedWeights())


def _may_step(source: Tensor) -> bool:
    """Whether an optimizer may have written a tensor since; a frozen one it passes over."""
    return source.requires_grad or source.grad is not None


def _can_be_followed(source: Tensor) -> bool:
    """Whether it is a parameter or a buffer whose changes show in its version."""
    if source.is_inference():  # without a version
        return False
    # fake, distributed and quantized tensors are of other types
    if type(source) is nn.Parameter:
        return True
    return is_plain_tensor(source) and not source.requires_grad
