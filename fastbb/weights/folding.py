"""Folding in any model: which norm belongs to which convolution, and running the model so.

That is read off the dataflow of a forward pass, not off names or the order of children:
`find_norms`. `Folding` runs a model with folded weights, and activations fused with them.
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastbb_kernels import ACTIVATIONS, conv_bn_act, conv_op

from .dataflow import RESULT, Dataflow, trace_dataflow
from .fold import FROZEN_EPS, autocasts, fold_batch_norm, folded, geometry, runs_folded
from .watch import ModuleSettings, OwnForward, Places, is_observed, own_forward

Result = TypeVar("Result")

# frozen norms have no common class: torchvision, timm, detectron2 and a dozen files of transformers
# each define one of such a name
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether a module is a 2d batch norm of any library, frozen, synchronized or with activation.

    That it computes what its kind computes is checked by `Folding`.
    """
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return True
    return type(module).__name__.endswith(_FROZEN)


@dataclass(frozen=True)
class FoldedNorm:
    """One batch norm of a model.

    Attributes:
        norm: its name.
        conv: name of the convolution that it is folded into, or None.
        activation: name of the activation module after it that is fused too, or None.
        fused: what is fused as activation, by the name in `ACTIVATIONS`, or None.
        op: op that computes the convolution; None: plain PyTorch.
        containers: names of modules that return what is between the convolution and the end.
        refused: why the norm is not folded, or None.
    """

    norm: str
    conv: str | None = None
    activation: str | None = None
    fused: str | None = None
    op: str | None = None
    containers: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class FoldReport:
    """What became of every batch norm that a forward pass of a model runs."""

    norms: tuple[FoldedNorm, ...]

    @property
    def folded(self) -> list[FoldedNorm]:
        return [norm for norm in self.norms if norm.refused is None]

    @property
    def refused(self) -> list[FoldedNorm]:
        return [norm for norm in self.norms if norm.refused is not None]

    def __str__(self) -> str:
        fused = sum(norm.fused is not None for norm in self.folded)
        lines = [
            f"{len(self.norms)} batch norms: {len(self.folded)} folded, "
            f"{fused} of them with their activation, {len(self.refused)} refused"
        ]
        ops = Counter(norm.op or "plain convolution" for norm in self.folded)
        lines += [f"  {count:4d} {op}" for op, count in ops.most_common()]
        reasons: dict[str, list[str]] = {}
        for norm in self.refused:
            reasons.setdefault(str(norm.refused), []).append(norm.norm)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more}: {reason}")
        return "\n".join(lines)


def find_norms(model: nn.Module, *args: Any, **kwargs: Any) -> list[FoldedNorm]:
    """Runs a model once and finds for each batch norm the convolution it can be folded into.

    Args:
        model: on any device; it runs on the meta device, where nothing is computed.
        args: of its forward, such as one image.
        kwargs: of its forward.

    Returns:
        one entry per batch norm that ran, in their order; `op` and `fused` are not filled in.
    """
    flow = trace_dataflow(model, _is_watched, *args, **kwargs)
    names = {module: name for name, module in model.named_modules()}
    found = []
    for norm in flow.inputs:
        if is_batch_norm(norm):
            conv, refused = _conv_of(norm, flow)
            activation = None if conv is None else _activation_after(norm, conv, flow)
            found.append(
                FoldedNorm(
                    names[norm],
                    conv and names[conv],
                    activation and names[activation],
                    containers=_containers(conv, norm, activation, flow, names),
                    refused=refused,
                )
            )
    return found


def _containers(
    conv: nn.Module | None,
    norm: nn.Module,
    activation: nn.Module | None,
    flow: Dataflow,
    names: dict[nn.Module, str],
) -> tuple[str, ...]:
    """Modules around the convolution or the norm whose result is not yet that of the end."""
    inner = [] if conv is None else [conv] if activation is None else [conv, norm]
    # without a module after it, the norm may still hold an activation that gets fused: its end
    around = [module for part in inner for out in flow.outputs[part] for module in out.containers]
    return tuple(dict.fromkeys(names[module] for module in around))


def _is_watched(module: nn.Module) -> bool:
    """Norms, and modules without parts, which are read as a whole; an identity reads nothing."""
    is_leaf = next(module.children(), None) is None
    return is_batch_norm(module) or (is_leaf and not isinstance(module, nn.Identity))


def _conv_of(norm: nn.Module, flow: Dataflow) -> tuple[nn.Conv2d | None, str | None]:
    """The convolution that alone feeds a norm, or why there is none."""
    if getattr(norm, "running_mean", None) is None:
        return None, "it has no running statistics"
    inputs = flow.inputs[norm]
    writers = {output and output.producer for output in inputs}
    conv = writers.pop()
    if writers:
        return None, "it runs several times, after different modules"
    if not isinstance(conv, nn.Conv2d):
        what = "something computed" if conv is None else f"the output of a {type(conv).__name__}"
        return None, f"it reads {what}, not the output of a convolution"
    if flow.by_keyword & {conv, norm}:
        return None, "it or its convolution is called with keyword arguments"
    for output in flow.outputs[conv]:
        others = [reader for reader in output.consumers if reader is not norm]
        if others:
            return None, f"the output of its convolution is also read by {_described(others)}"
    if len(inputs) != len(flow.outputs[conv]) or not all(flow.own_weights[conv]):
        return None, "its convolution computes its weights (weight standardization?)"
    if conv.padding_mode != "zeros":
        return None, f"its convolution pads with padding_mode={conv.padding_mode!r}"
    if not all(flow.only_convolves[conv]) and not _pads_as_tensorflow(conv):
        return None, f"its convolution, a {type(conv).__name__}, does more than convolve"
    if _owns(conv, norm) and not _ends_with_its_activation(conv, norm, flow):
        return None, f"its convolution, a {type(conv).__name__}, does more than normalize"
    return conv, None


def _owns(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the convolution itself calls the norm, as detectron2's does."""
    return getattr(conv, "norm", None) is norm


def _ends_with_its_activation(conv: nn.Module, norm: nn.Module, flow: Dataflow) -> bool:
    """Whether a convolution that owns its norm returns `activation(norm(...))`, or the norm's."""
    activation: Any = getattr(conv, "activation", None)
    inside = [output.inside for output in flow.outputs[norm]]
    if activation is None:
        ends, readers = norm, []
    else:
        ends = activation if isinstance(activation, nn.Module) else activation.__name__
        readers = [ends]
    returned = [output and output.producer for output in flow.returned[conv]]
    in_place = isinstance(ends, str) and ends.endswith("_")  # the result is the norm's output
    return all(read == readers for read in inside) and all(
        producer is ends or producer == ends or (in_place and producer is norm)
        for producer in returned
    )


def _activation_after(norm: nn.Module, conv: nn.Conv2d, flow: Dataflow) -> nn.Module | None:
    """The one module that reads a norm and nothing else; whether it is an activation is open."""
    if _owns(conv, norm):
        return None
    readers = {reader for output in flow.outputs[norm] for reader in output.consumers}
    reader = readers.pop() if len(readers) == 1 else None
    if not isinstance(reader, nn.Module) or reader in flow.by_keyword:
        return None
    reads = flow.inputs[reader]
    alone = all(output is not None and output.producer is norm for output in reads)
    return reader if alone and len(reads) == len(flow.outputs[norm]) else None


def _described(readers: Sequence[nn.Module | str]) -> str:
    reader = readers[0]
    if reader == RESULT:
        return RESULT
    return f"a {type(reader).__name__}" if isinstance(reader, nn.Module) else f"`{reader}`"


def _pads_as_tensorflow(conv: nn.Conv2d) -> bool:
    """timm's Conv2dSame: as much padding as the input needs, more of it at the far sides."""
    return type(conv).__name__ == "Conv2dSame" and type(conv).__module__.startswith("timm.")


class Folding:
    """Folded forwards bound on the modules of a model, which apply where `run` calls it.

    Parameters, buffers, hooks and types of modules stay, and a module called on its own computes
    what it always did. So does the whole model once one of its folded modules was replaced.

    Args:
        model: its modules get forwards bound on the instances.
        norms: what `find_norms` found in it.
    """

    def __init__(self, model: nn.Module, norms: Iterable[FoldedNorm]) -> None:
        self._places = Places()
        self._pairs: dict[str, _FoldedConv] = {}  # by the name of the norm
        self._entries = [self._bind(model, norm) for norm in norms]

    @property
    def report(self) -> FoldReport:
        """What became of every norm."""
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
        """`forward(*args)`, a forward of the model, with folded weights where a call allows it.

        Args:
            forward: of the model or of parts of it.
            args: its arguments.
            few: it calls few of the modules, and computes from parameters besides.
        """
        before = getattr(_running, "weights", None)
        # for all at once: between convolutions the same look costs several times as much
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
        """Gives the modules their own forwards back."""
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
        problem = _norm_problem(norm)
        if problem:
            return replace(entry, conv=None, activation=None, refused=problem)
        own = _own_activation(norm)
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
        parent, _, child = name.rpartition(".")
        self._places.add(model.get_submodule(parent), child, module)


# of the model that this thread is running: weight and bias of each pair, None for one that may not
_running = threading.local()


def is_folded(module: nn.Module) -> bool:
    """Whether a `Folding` has bound the forward of this module."""
    return isinstance(own_forward(module), _FoldedConv)


def unfold(model: nn.Module) -> None:
    """Takes away forwards that any `Folding` bound, on this module or the one it is a copy of."""
    for module in model.modules():
        _release(module)


def _release(module: nn.Module) -> None:
    if is_folded(module):
        for name in _TAKEN:
            vars(module).pop(name, None)


_TAKEN = ("forward", "_replicate_for_data_parallel")


def replica_without(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """What DataParallel runs on another device: the module without what was put over it."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name in names:
        vars(replica).pop(name, None)
    return replica


class _FoldedConv(OwnForward):
    """The forwards of a convolution, its norm and its activation, where the first does it all.

    Bound methods of a plain object: a deep copy of the model binds those of the copied modules.
    The convolution decides and marks its result, so that the others know what they are given.
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
        activation = None if fused is None else after or _own_activation(norm)
        self._settings = None if activation is None else ModuleSettings(activation)
        self.owns_norm = _owns(conv, norm)
        # whose hooks would see the values of the end
        self.seen = [conv, norm, *containers] + ([after] if after is not None else [])
        self.op = conv_op(conv.weight.shape, **self._geometry())

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias for the calls of one forward, or None if it may not use folded ones."""
        if not runs_folded(self.conv, self.norm) or _has_any_global_hook():
            return None
        if any(is_observed(module) for module in self.seen) or self.change() is not None:
            return None
        # kernels want channels last; elsewhere the model gets the layout it expects
        return folded(self.conv, self.norm, channels_last=self.conv.weight.is_cuda)

    def change(self) -> str | None:
        """What was changed of the activation that is fused, or None."""
        return None if self._settings is None else self._settings.change()

    def conv_forward(self, x: Tensor) -> Tensor:
        conv, weights = self.conv, self._given()
        if weights is None or not self._takes(x):
            return type(conv).forward(conv, x)
        if _pads_as_tensorflow(conv):
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
        if torch.compiler.is_compiling():  # a graph has no marks; its modes are those at its start
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
        """Whether the modes are still those at the start of the forward, and the input fits."""
        if torch.is_grad_enabled() or autocasts(x.device.type):
            return runs_folded(self.conv, self.norm, x)
        return x.dtype == self.conv.weight.dtype

    def _rest_of_norm(self, x: Tensor) -> Tensor:
        """The activation of a BatchNormAct2d, where it is not fused."""
        act: Any = _own_activation(self.norm)
        return x if act is None or (self.fused and self.after is None) else act(x)

    def _geometry(self) -> dict[str, Any]:
        own = geometry(self.conv)
        return {**own, "padding": 0} if _pads_as_tensorflow(self.conv) else own


def _own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside a BatchNormAct2d; a converted norm may hold one that it never runs."""
    act = None if type(norm).forward in _PLAIN_FORWARDS else getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


_PLAIN_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def _tensorflow_padding(conv: nn.Conv2d, x: Tensor) -> list[int]:
    padding: list[int] = []
    sides = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation)
    for size, kernel, stride, dilation in reversed(list(sides)):
        missing = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return padding


@torch.no_grad()
def _norm_problem(norm: Any) -> str | None:
    """Why a norm cannot be folded, by what it computes, which its class does not always tell."""
    if is_observed(norm):
        return "it has hooks"
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return "it drops values at random"
    if type(norm).forward in _PLAIN_FORWARDS or isinstance(norm.running_mean, FakeTensor):
        return None
    # a copy with values of its own: under those of a new model much looks like a batch norm
    norm = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    like: Any = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults are
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.is_floating_point():
            low = 0.5 if name == "running_var" else -1.5
            values = torch.rand(tensor.shape, generator=generator, **like)
            tensor.copy_(values * (1.5 - low) + low)
    channels = len(norm.running_mean)
    x = torch.linspace(-3, 3, 4 * channels, **like).view(1, channels, 2, 2)
    one = torch.ones(channels, 1, 1, 1, **like)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    scale, shift = fold_batch_norm(one, None, *statistics, eps=getattr(norm, "eps", FROZEN_EPS))
    want = (x.double() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).float()
    act = _own_activation(norm)
    want = want if act is None else act(want)
    if not torch.allclose(norm(x), want, rtol=1e-5, atol=1e-5):
        return f"a {type(norm).__name__} does not compute what batch norms do"
    return None


@torch.no_grad()
@unset_fake_temporarily()
def activation_name(module: nn.Module | None) -> str | None:
    """The name in `ACTIVATIONS` of what a module computes, or None.

    Libraries have many classes for the same function, so the function is what is compared.
    """
    if module is None or isinstance(module, nn.Identity) or is_observed(module):
        return None
    if next(module.parameters(), None) is not None:
        return None
    x = torch.linspace(-8, 8, 256, device="cpu", dtype=torch.float32).view(1, 4, 8, 8)
    try:
        got = module(x.clone())
    except (RuntimeError, ValueError, TypeError):  # not for such a tensor: no activation
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    for name, function in ACTIVATIONS.items():
        if torch.allclose(got, function(x), rtol=1e-6, atol=1e-6):
            return name
    return None
