"""Finds the convolution that each batch norm of a model belongs to.

The analysis uses the dataflow of a forward pass, not names or the order of children.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .dataflow import RESULT, Dataflow, trace_dataflow
from .recognize import is_batch_norm


@dataclass(frozen=True)
class FoldedNorm:
    """One batch norm of a model.

    Attributes:
        norm: name of the norm in the model.
        conv: name of the convolution that the norm is folded into, or None.
        activation: name of the activation module after the norm that is fused too, or None.
        fused: name in `ACTIVATIONS` of the fused activation, or None.
        op: op that computes the convolution; None: plain PyTorch.
        containers: names of modules that return a value from inside the fused layers.
        refused: reason why the norm is not folded, or None.
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
    """The result of folding for every batch norm that a forward pass runs; shown as a summary."""

    norms: tuple[FoldedNorm, ...]

    @property
    def folded(self) -> list[FoldedNorm]:
        return [norm for norm in self.norms if norm.refused is None]

    @property
    def refused(self) -> list[FoldedNorm]:
        return [norm for norm in self.norms if norm.refused is not None]

    def __repr__(self) -> str:
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
    """Runs a model once and finds the convolution that each batch norm can be folded into.

    Args:
        model: on any device; it runs on the meta device, where nothing is computed.
        args: of its forward, such as one image.
        kwargs: of its forward.

    Returns:
        One entry for each batch norm that ran, in order; `op` and `fused` are None.
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
    """Names of modules that return the output of the convolution or norm before the last layer."""
    inner = [] if conv is None else [conv] if activation is None else [conv, norm]
    # if no module follows, the norm is the last layer: it may contain the fused activation
    around = [module for part in inner for out in flow.outputs[part] for module in out.containers]
    return tuple(dict.fromkeys(names[module] for module in around))


def _is_watched(module: nn.Module) -> bool:
    """Whether a module is a norm or has no children; an identity does not count as a reader."""
    is_leaf = next(module.children(), None) is None
    return is_batch_norm(module) or (is_leaf and not isinstance(module, nn.Identity))


def _conv_of(norm: nn.Module, flow: Dataflow) -> tuple[nn.Conv2d | None, str | None]:
    """The only convolution that feeds a norm, and the reason if there is none."""
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
    if not all(flow.only_convolves[conv]) and not pads_as_tensorflow(conv):
        return None, f"its convolution, a {type(conv).__name__}, does more than convolve"
    if owns_norm(conv, norm) and not _ends_with_its_activation(conv, norm, flow):
        return None, f"its convolution, a {type(conv).__name__}, does more than normalize"
    return conv, None


def owns_norm(conv: nn.Module, norm: nn.Module) -> bool:
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
    """The only reader of a norm, if it is a module that reads nothing else.

    The module need not be an activation.
    """
    if owns_norm(conv, norm):
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


def pads_as_tensorflow(conv: nn.Conv2d) -> bool:
    """Whether it is timm's Conv2dSame, whose padding depends on the size of the input."""
    return type(conv).__name__ == "Conv2dSame" and type(conv).__module__.startswith("timm.")
