"""Records which module reads the output of which, in one forward pass, by tensor identity."""

import gc
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

# functions and properties that do not read the elements of a tensor
_LOOKS = {"dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "__len__"}
_PROPERTIES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"}


@dataclass(eq=False)
class Output:
    """A tensor that a module made in one call.

    Attributes:
        producer: the module. In a convolution that does more than convolve, the convolution is the
            producer of the output of `conv2d`, and the names of other functions of theirs.
        consumers: the readers of the tensor, in order: watched modules, names of functions outside
            of them, `RESULT`.
        inside: the consumers inside the convolution that contains `producer`.
        containers: unwatched modules that returned this tensor.
    """

    producer: nn.Module | str
    consumers: list[nn.Module | str] = field(default_factory=list)
    inside: list[nn.Module | str] = field(default_factory=list)
    containers: list[nn.Module] = field(default_factory=list)


class Dataflow:
    """Inputs and outputs of watched modules, call by call.

    Attributes:
        inputs: for each call of a module, the output that it read, None if no module wrote it.
        outputs: for each call of a module, its output.
        returned: for each call of a convolution, the returned output, None if no module wrote it.
        own_weights: for each call of a convolution, whether it convolved with its own weight.
        only_convolves: for each call of a convolution, whether it called `conv2d` with its own
            input and arguments.
        by_keyword: modules that were called with keyword arguments.
    """

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[Output | None]] = defaultdict(list)
        self.outputs: dict[nn.Module, list[Output]] = defaultdict(list)
        self.returned: dict[nn.Module, list[Output | None]] = defaultdict(list)
        self.own_weights: dict[nn.Module, list[bool]] = defaultdict(list)
        self.only_convolves: dict[nn.Module, list[bool]] = defaultdict(list)
        self.by_keyword: set[nn.Module] = set()


def trace_dataflow(
    model: nn.Module, watched: Callable[[nn.Module], bool], *args: Any, **kwargs: Any
) -> Dataflow:
    """Runs `model(*args, **kwargs)` in eval mode and records the dataflow between modules.

    The tensors of the call are on the meta device, so nothing is computed.

    Args:
        model: is unchanged afterwards, including its modes (training, eval).
        watched: chooses modules that count as one reader, whatever they do inside. Convolutions
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
            else:
                stack.callback(module.register_forward_hook(recorder.contain).remove)
        try:
            with recorder:
                result = functional_call(model, weights, args, kwargs)
        finally:
            for module, training in modes:
                module.training = training
    # tensors that still exist were returned, in any container, or kept by the model
    if recorder.alive() - set(recorder.written(result)):
        gc.collect()
    for output in recorder.alive():
        output.consumers.append(RESULT)
    return recorder.flow


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._writers = WeakTensorKeyDictionary()
        self._within: list[nn.Module] = []
        self._inputs: list[Any] = []

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
        """The outputs of watched modules among the tensors in `values`."""
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._writers[leaf] for leaf in leaves if leaf in self._writers]

    def alive(self) -> set[Output]:
        """The outputs whose tensors still exist."""
        return set(self._writers.values())

    def contain(self, module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            for output in self.written(result):
                output.containers.append(module)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._within or isinstance(self._within[-1], nn.Conv2d):
            if kwargs:
                self.flow.by_keyword.add(module)
            read = self.written(args, kwargs)
            self.flow.inputs[module].append(read[0] if len(read) == 1 else None)
            for output in read:
                output.consumers.append(module)
        self._within.append(module)
        self._inputs.append(args[0] if args else None)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        assert self._within.pop() is module
        self._inputs.pop()
        if isinstance(module, nn.Conv2d):
            written = self.written(result)
            self.flow.returned[module].append(written[0] if len(written) == 1 else None)
            for output in self.flow.outputs[module][-1:]:
                for inner in (output, *self._outputs_of(output.consumers)):
                    inner.inside = list(inner.consumers)
        elif not self._within or isinstance(self._within[-1], nn.Conv2d):
            self._write(module, result)

    def _outputs_of(self, consumers: list[nn.Module | str]) -> list[Output]:
        modules = [consumer for consumer in consumers if isinstance(consumer, nn.Module)]
        return [output for module in modules for output in self.flow.outputs[module][-1:]]

    def _write(self, producer: nn.Module | str, result: Any) -> None:
        if isinstance(result, Tensor):
            output = self._writers[result] = Output(producer)
            if isinstance(producer, nn.Module):
                self.flow.outputs[producer].append(output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        module = self._within[-1] if self._within else None
        read = [] if _only_looks(func) else self.written(args, kwargs)
        for output in read:
            # the module is the reader of its inputs, not the functions inside it
            if module is None or module not in output.consumers:
                output.consumers.append(_name(func))
        result = func(*args, **kwargs)
        if isinstance(module, nn.Conv2d):
            if func in (F.conv2d, torch.conv2d):
                self._convolved(module, *args, **kwargs)
                self._write(module, result)
            elif read and not self.written(result):
                self._write(_name(func), result)
        return result

    def _convolved(
        self,
        conv: nn.Conv2d,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> None:
        given = (stride, padding, dilation, groups)
        wanted = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.flow.own_weights[conv].append(weight is conv.weight)
        self.flow.only_convolves[conv].append(
            input is self._inputs[-1] and bias is conv.bias and given == wanted
        )


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _only_looks(func: Any) -> bool:
    name = _name(func)
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _PROPERTIES
    return name in _LOOKS


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
