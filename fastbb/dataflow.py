"""Who reads what a module wrote: recorded during one forward pass, by the identity of tensors."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

RESULT = "the result of the model"

# what looks at a tensor without reading its elements
_LOOKS = {"dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "__len__"}
_PROPERTIES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"}


@dataclass(eq=False)
class Output:
    """A tensor that a module made in one call.

    Attributes:
        producer: the module; for a convolution with a norm of its own, what its `conv2d` returned.
        consumers: what read the tensor, in order: watched modules, names of functions outside
            them, `RESULT`.
        inside: of the consumers those that are part of the module around `producer`.
    """

    producer: nn.Module
    consumers: list[nn.Module | str] = field(default_factory=list)
    inside: list[nn.Module | str] = field(default_factory=list)


class Dataflow:
    """Inputs and outputs of watched modules, call by call.

    Attributes:
        inputs: of each module and call, the output that it read, None where no module wrote it.
        outputs: of each module and call.
        weights: of each convolution and call, whether its own weight was what it convolved with.
        by_keyword: modules that were called with keyword arguments.
    """

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[Output | None]] = defaultdict(list)
        self.outputs: dict[nn.Module, list[Output]] = defaultdict(list)
        self.weights: dict[nn.Module, list[bool]] = defaultdict(list)
        self.by_keyword: set[nn.Module] = set()


def trace_dataflow(
    model: nn.Module, watched: Callable[[nn.Module], bool], *args: Any, **kwargs: Any
) -> Dataflow:
    """Runs `model(*args, **kwargs)` in eval mode and records what reads what.

    Its tensors are on the meta device meanwhile, so nothing is computed.

    Args:
        model: unchanged afterwards, its modes (training, eval) included.
        watched: picks modules that count as one reader, whatever they do inside. Convolutions
            (nn.Conv2d) are always watched.
        args: of the forward.
        kwargs: of the forward.
    """
    recorder = _Recorder()
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    weights = {
        name: _on_meta(tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        for module, _ in modes:
            module.training = False
            if isinstance(module, nn.Conv2d) or watched(module):
                stack.enter_context(recorder.watch(module))
        try:
            with recorder:
                result = functional_call(model, weights, args, kwargs)
        finally:
            for module, training in modes:
                module.training = training
    for output in recorder.written(result):
        output.consumers.append(RESULT)
    return recorder.flow


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._writers = WeakTensorKeyDictionary()
        self._within: list[nn.Module] = []

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = module.register_forward_hook(self._leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def written(self, *values: Any) -> list[Output]:
        """The outputs among tensors, of those that a watched module wrote."""
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._writers[leaf] for leaf in leaves if leaf in self._writers]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._within or isinstance(self._within[-1], nn.Conv2d):
            if kwargs:
                self.flow.by_keyword.add(module)
            read = self.written(args, kwargs)
            self.flow.inputs[module].append(read[0] if len(read) == 1 else None)
            for output in read:
                output.consumers.append(module)
        self._within.append(module)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        assert self._within.pop() is module
        if isinstance(module, nn.Conv2d):
            for output in self.flow.outputs[module][-1:]:
                for inner in (output, *self._outputs_of(output.consumers)):
                    inner.inside = list(inner.consumers)
        elif not self._within or isinstance(self._within[-1], nn.Conv2d):
            self._write(module, result)

    def _outputs_of(self, consumers: list[nn.Module | str]) -> list[Output]:
        modules = [consumer for consumer in consumers if isinstance(consumer, nn.Module)]
        return [output for module in modules for output in self.flow.outputs[module][-1:]]

    def _write(self, module: nn.Module, result: Any) -> None:
        if isinstance(result, Tensor):
            output = Output(module)
            self.flow.outputs[module].append(output)
            self._writers[result] = output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        module = self._within[-1] if self._within else None
        convolves = isinstance(module, nn.Conv2d)
        if (module is None or convolves) and not _only_looks(func):
            for output in self.written(args, kwargs):
                # what comes into a convolution was read by it, not by what it does inside
                if module is None or module not in output.consumers:
                    output.consumers.append(_name(func))
        result = func(*args, **kwargs)
        if convolves and func in (F.conv2d, torch.conv2d):
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            self.flow.weights[module].append(weight is module.weight)
            self._write(module, result)
        return result


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _only_looks(func: Any) -> bool:
    name = _name(func)
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _PROPERTIES
    return name in _LOOKS


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
