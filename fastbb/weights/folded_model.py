"""Runs a model of any library with batch norms folded into its convolutions.

`find_norms` says which norm belongs to which convolution. `Folding` runs the model with folded
weights, and with activations fused into the convolutions.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastbb_kernels import conv_bn_act, conv_op

from .find_norms import FoldedNorm, FoldReport, owns_norm, pads_as_tensorflow
from .folded_weights import autocasts, folded, geometry, runs_folded
from .recognize import activation_name, norm_problem, own_activation
from .watch import ModuleSettings, OwnForward, Places, is_observed, own_forward

Result = TypeVar("Result")


class Folding:
    """Sets folded forwards on the modules of a model, which compute folded only inside `run`.

    Parameters, buffers, hooks and types of modules are unchanged. Outside of `run`, every module
    computes its own forward. So does the whole model after one of its folded modules was replaced.

    Args:
        model: gets the forwards on the instances of its modules.
        norms: result of `find_norms` for the model.
    """

    def __init__(self, model: nn.Module, norms: Iterable[FoldedNorm]) -> None:
        self._places = Places()
        self._pairs: dict[str, _FoldedConv] = {}  # by the name of the norm
        self._entries = [self._bind(model, norm) for norm in norms]

    @property
    def report(self) -> FoldReport:
        """The result of folding for every norm."""
        changes = {name: pair.change() for name, pair in self._pairs.items()}
        return FoldReport(
            tuple(
                replace(entry, refused=f"its activation was changed: {changes[entry.norm]}")
                if changes.get(entry.norm)
                else entry
                for entry in self._entries
            )
        )

    def run(self, forward: Callable[..., Result], *args: Any, few: bool = False) -> Result:
        """Returns `forward(*args)`, computed with folded weights where the call allows it.

        Args:
            forward: forward of the model or of parts of it.
            args: arguments of the forward.
            few: whether the forward calls only a few of the modules, so that folded weights are
                looked up for the called ones only.
        """
        before = getattr(_running, "weights", None)
        # one look-up for all pairs: between convolutions it costs several times as much
        all_pairs = [] if few else self._pairs.values()
        weights = (
            {pair: pair.weights() for pair in all_pairs} if self._places.are_intact() else None
        )
        _running.weights = weights
        try:
            return forward(*args)
        finally:
            _running.weights = before

    def undo(self) -> None:
        """Restores the forwards of the modules."""
        for module in self._places.modules():
            _release(module)
        self._places.clear()
        self._pairs.clear()

    def _bind(self, model: nn.Module, entry: FoldedNorm) -> FoldedNorm:
        if entry.refused is not None:
            return entry
        if not entry.conv:
            return replace(entry, conv=None, refused="the model itself is the convolution")
        conv, norm = model.get_submodule(entry.conv), model.get_submodule(entry.norm)
        assert isinstance(conv, nn.Conv2d)
        problem = norm_problem(norm)
        if problem:
            return replace(entry, conv=None, activation=None, refused=problem)
        own = own_activation(norm)
        after = None
        if entry.activation is not None and own is None:
            after = model.get_submodule(entry.activation)
        fused = activation_name(own if after is None else after)
        after = None if fused is None else after
        containers = [model.get_submodule(name) for name in entry.containers]
        pair = _FoldedConv(conv, norm, after, fused, containers)
        self._pairs[entry.norm] = pair
        self._take(model, entry.conv, conv, pair.conv_forward)
        self._take(model, entry.norm, norm, pair.norm_forward)
        if after is not None:
            self._take(model, str(entry.activation), after, pair.activation_forward)
        elif own is not None:
            self._places.add(norm, "act", own)
        return replace(
            entry, activation=entry.activation if after else None, fused=fused, op=pair.op
        )

    def _take(self, model: nn.Module, name: str, module: Any, forward: Any) -> None:
        module.forward = forward
        module._replicate_for_data_parallel = partial(replica_without, module, _TAKEN)
        module.__prepare_scriptable__ = forward.__self__.__prepare_scriptable__
        parent, _, child = name.rpartition(".")
        self._places.add(model.get_submodule(parent), child, module)


# `weights`: weight and bias of each pair of the model that this thread runs; None for a pair that
# may not use folded ones
_running = threading.local()


@contextmanager
def unfolded() -> Iterator[None]:
    """Has every model that this thread runs inside the block compute with its own weights."""
    before = getattr(_running, "weights", None)
    _running.weights = None
    try:
        yield
    finally:
        _running.weights = before


def is_folded(module: nn.Module) -> bool:
    """Whether a `Folding` has set the forward of this module."""
    return isinstance(own_forward(module), _FoldedConv)


def unfold(model: nn.Module) -> None:
    """Removes the forwards of any `Folding` from a model, also those that a copy came with."""
    for module in model.modules():
        _release(module)


def _release(module: nn.Module) -> None:
    if is_folded(module):
        for name in _TAKEN:
            vars(module).pop(name, None)


_TAKEN = ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__")


def replica_without(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """Makes the replica of a module for DataParallel, without these attributes of the instance."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name in names:
        vars(replica).pop(name, None)
    return replica


class _FoldedConv(OwnForward):
    """The forwards of a convolution, its norm and its activation, which the convolution computes.

    The forwards are bound methods of a plain object, so a deep copy of the model gets forwards of
    the copied modules. The convolution decides whether a call is folded, and marks its result. By
    the mark, the norm and the activation know that their part is computed already.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module,
        after: nn.Module | None,
        fused: str | None,
        containers: Sequence[nn.Module],
    ) -> None:
        self.conv, self.norm, self.after = conv, norm, after
        self.fused = fused
        activation = None if fused is None else after or own_activation(norm)
        self._settings = None if activation is None else ModuleSettings(activation)
        self.owns_norm = owns_norm(conv, norm)
        # modules whose hooks would see the output of the last layer instead of their own
        self.seen = [conv, norm, *containers] + ([after] if after is not None else [])
        self.op = conv_op(conv.weight.shape, **self._geometry())

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias for the calls of one forward, or None if folding is not allowed."""
        if not runs_folded(self.conv, self.norm) or _has_any_global_hook():
            return None
        if any(is_observed(module) for module in self.seen) or self.change() is not None:
            return None
        # kernels read channels last; on a CPU the model keeps its layout
        return folded(self.conv, self.norm, channels_last=self.conv.weight.is_cuda)

    def change(self) -> str | None:
        """Describes a change of the fused activation, or returns None if there is none."""
        return None if self._settings is None else self._settings.change()

    def conv_forward(self, x: Tensor) -> Tensor:
        conv, weights = self.conv, self._given()
        if weights is None or not self._takes(x):
            return type(conv).forward(conv, x)
        if pads_as_tensorflow(conv):
            x = F.pad(x, _tensorflow_padding(conv, x))
        x = conv_bn_act(x, *weights, **self._geometry(), activation=self.fused)
        if not self.owns_norm:
            return self._mark(x)
        x = self._rest_of_norm(x)
        activation: Any = getattr(conv, "activation", None)
        return x if activation is None else activation(x)

    def norm_forward(self, x: Tensor) -> Tensor:
        if not self._made(x):
            return type(self.norm).forward(self.norm, x)
        return self._rest_of_norm(x if self.after is not None else self._unmark(x))

    def activation_forward(self, x: Tensor) -> Tensor:
        assert self.after is not None
        if not self._made(x):
            return type(self.after).forward(self.after, x)
        return self._unmark(x)

    def _mark(self, x: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            x._folded_by = self
        return x

    def _unmark(self, x: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            del x._folded_by
        return x

    def _made(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # a graph has no marks, and its modes do not change
            return self._given() is not None
        return getattr(x, "_folded_by", None) is self

    def _given(self) -> tuple[Tensor, Tensor] | None:
        weights = getattr(_running, "weights", None)
        if weights is None:
            return None
        if self not in weights:
            weights[self] = self.weights()
        return weights[self]

    def _takes(self, x: Tensor) -> bool:
        """Whether the input fits, and modes have not changed since the start of the forward."""
        if torch.is_grad_enabled() or autocasts(x.device.type):
            return runs_folded(self.conv, self.norm, x)
        return x.dtype == self.conv.weight.dtype

    def _rest_of_norm(self, x: Tensor) -> Tensor:
        """Applies the activation of a BatchNormAct2d if it is not fused."""
        act: Any = own_activation(self.norm)
        return x if act is None or (self.fused and self.after is None) else act(x)

    def _geometry(self) -> dict[str, Any]:
        own = geometry(self.conv)
        return {**own, "padding": 0} if pads_as_tensorflow(self.conv) else own


def _tensorflow_padding(conv: nn.Conv2d, x: Tensor) -> list[int]:
    padding: list[int] = []
    sides = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation)
    for size, kernel, stride, dilation in reversed(list(sides)):
        missing = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return padding
