"""Derived tensors: computed from parameters (fused, padded, folded) and cached until these change.

The cache is outside the modules, so state dicts, copies and pickles do not contain it.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
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
    """Returns `compute(*sources)`, cached unless a gradient is needed or the call is traced.

    The result is computed again if a source is another object or has another address, dtype, device
    or version. It is also computed again after events that may change parameters without a new
    version: a step of any optimizer (fused ones do not change versions), a layer put into a module
    (merging LoRA into a layer does not change versions either), a call that needs a gradient, and
    `forget_derived`. A tensor that a parametrization computes lives for one call, so results
    derived from it are not cached.

    Args:
        owner: module that the result belongs to; the result does not outlive it.
        name: key of the result; a new result replaces the old one of this name.
        compute: depends on sources and constants only, and is the same at every call with this
            name. Derive tensors of one owner together, because every call compares the sources.
        sources: parameters and buffers of any shape.
        constants: other values that the result depends on.
        statistics: positions of the sources that batch norm changes without a new version. On a
            CPU, every call compares their values. On a GPU the comparison would synchronize, so
            the count of batches, which has a version, is a source instead; `F.batch_norm` on the
            buffers of a module does not count, and needs `refresh`.

    Returns:
        The result of `compute`. Calls share the tensors, so nothing may write into them.
    """
    if is_tracing():
        return compute(*sources)  # part of the graph, so it follows the parameters
    kept = _weights_of(owner).get(name, compute, sources, constants, statistics)
    return compute(*sources) if kept is None else kept


def derive_if_kept(
    owner: nn.Module, name: str, compute: Callable[..., Derived], *sources: Tensor
) -> Derived | None:
    """Does the same as `derive`, or returns None where it would compute the result in every call.

    For results that only pay if they are computed once: of parameters, and of tensors that are
    derived for the same owner. Others, such as a view that a caller makes, live for one call.
    """
    if is_tracing():
        return None
    return _weights_of(owner).get(name, compute, sources, None, (), only_lasting=True)


@contextmanager
def holding_derived() -> Iterator[list[tuple[Tensor | None, ...]]]:
    """Lists the cached tensors that are used inside the block, so that a CUDA graph keeps them.

    A graph that is captured inside the block reads cached tensors. A graph that is captured
    elsewhere computes them again in every replay. The owner of the graph has to watch the weights
    with a `ModuleStamp`.
    """
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def is_tracing() -> bool:
    """Whether calls are recorded into a graph, by torch.compile, torch.export or another tracer."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or get_proxy_mode() is not None


def forget_derived(root: nn.Module) -> None:
    """Frees the derived tensors of a module and of all modules inside it."""
    for module in root.modules():
        weights = _DERIVED.get(module)
        if weights is not None:
            weights.clear()


def derived_bytes(roots: Iterable[nn.Module]) -> int:
    """Memory of the cached tensors of some modules and of all modules inside them, in bytes.

    Cached tensors that are views of a parameter or a buffer take none.
    """
    modules = {module for root in roots for module in root.modules()}
    own = {
        _storage(tensor)
        for module in modules
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values())
        if tensor is not None
    }
    found: dict[int, int] = {}
    for module in modules:
        weights = _DERIVED.get(module)
        for tensor in [] if weights is None else weights.tensors():
            if _storage(tensor) not in own:
                found[_storage(tensor)] = tensor.nbytes
    return sum(found.values())


def _storage(tensor: Tensor) -> int:
    """A number that tensors share if they share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except Exception:  # there is none, and so no view: oneDNN's layout, sparse, not initialized
        return id(tensor)


class RemembersDerived(nn.Module):
    """A module that frees the derived tensors inside it whenever its parameters may change."""

    def refresh(self) -> None:
        """Frees the tensors that inference computed from the weights and cached.

        In inference a backbone caches tensors computed from its weights, such as fused projections.
        It notices optimizer steps, in-place operations, `load_state_dict`, `to`, `train` and new
        parameters. Call this method after a change that torch does not record: through `.data`
        (`p.data.mul_(2)`, `p.data = q`), a NumPy view, or another process that shares the memory;
        and on a GPU after `F.batch_norm` was called on running statistics without their module.
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
        # not load_state_dict, which a module around this one does not call
        forget_derived(self)
        super()._load_from_state_dict(*args, **kwargs)


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is inside a transform: vmap, jvp or forward-mode differentiation."""
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
        """Whether nothing has changed since; every inference checks this for every layer."""
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
    """The derived tensors of one module, by name. Thread-safe."""

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
        only_lasting: bool = False,
    ) -> Derived | None:
        """The result, cached if it can be; None if it cannot, or its sources do not last."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.clear()  # training: the parameters are about to change
            return None
        capturing = sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and _held is None:
            return None  # a CUDA graph must not read memory that may be freed
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
            return None
        if only_lasting and not all(map(self._lasts, sources)):
            return None
        states = [(s.data_ptr(), s._version, s.dtype, s.device) for s in sources]
        copies = Statistics(sources[position] for position in statistics)
        # a tensor made in inference mode could not be used outside it
        with torch.inference_mode(False), torch.no_grad():
            # detached: a source that is part of the result is no parameter there, and is cached
            value = compute(*(source.detach() for source in sources))
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

    def tensors(self) -> list[Tensor]:
        """The tensors that are cached."""
        with self._lock:
            values = [entry.value for entry in self._entries.values()]
        return [tensor for value in values for tensor in value if tensor is not None]

    def _lasts(self, source: Tensor) -> bool:
        return type(source) is nn.Parameter or any(source is one for one in self.tensors())

    def clear(self) -> None:
        with self._lock:
            # outdates the result that another thread may be computing now too
            self._n_cleared += 1
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


def _weights_of(module: nn.Module) -> _DerivedWeights:
    weights = _DERIVED.get(module)
    if weights is not None:
        return weights
    with _lock:
        follow_optimizers()
        follow_layers(module.modules())
        return _DERIVED.setdefault(module, _DerivedWeights())


def _may_step(source: Tensor) -> bool:
    """Whether an optimizer may have written a tensor; optimizers skip frozen tensors."""
    return source.requires_grad or source.grad is not None


def _can_be_followed(source: Tensor) -> bool:
    """Whether a tensor is a parameter or a buffer whose version shows changes."""
    if source.is_inference():  # has no version
        return False
    # fake, distributed and quantized tensors are of other types
    if type(source) is nn.Parameter:
        return True
    return is_plain_tensor(source) and not source.requires_grad
