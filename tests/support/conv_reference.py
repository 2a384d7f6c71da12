"""References and checks for the tests of the convolution ops.

The ops are tested without fastbb, so `folded` is not `fastbb.weights.folded_weights.folded`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels import ACTIVATIONS
from fastbb_kernels.op import Op
from fastbb_kernels.testing import trace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH = {0: torch.export.Dim("batch", min=1, max=64)}  # dynamic shape of a batched input


class ConvReference:
    """Convolutions and batch norms of torch, then an addition and an activation.

    Attributes:
        block: the modules, in eval mode, with statistics as after training.
        options: arguments of the op besides its tensors.
    """

    def __init__(
        self, *layers: nn.Module, dtype: torch.dtype, activation: str | None, **options: Any
    ) -> None:
        for norm in layers:
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    assert tensor is not None
                    nn.init.uniform_(tensor, 0.5, 1.5)
        self.block = nn.Sequential(*layers).eval().requires_grad_(False).to(dtype)
        self.options = {**options, "activation": activation}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.block(x) if residual is None else self.block(x) + residual
        return activated(y, self.options["activation"])

    def exactly(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes the same in float64."""
        double = copy.copy(self)
        double.block = copy.deepcopy(self.block).double()
        return double(x.double(), None if residual is None else residual.double())


def activated(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else ACTIVATIONS[activation](y)


def conv_and_norm(channels: int, out_channels: int, stride: int) -> Any:
    """A 1x1 convolution and its norm in eval mode, with statistics as after training."""
    norm = nn.BatchNorm2d(out_channels)
    state = {name: torch.randn(out_channels) for name in ("bias", "running_mean")}
    state |= {name: torch.rand(out_channels) + 0.5 for name in ("weight", "running_var")}
    norm.load_state_dict(state, strict=False)
    module = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), norm)
    return module.eval().requires_grad_(False)


def folded(conv_and_norm: Any) -> tuple[Tensor, Tensor]:
    """Folds the norm into the convolution; returns weight and bias in float64."""
    conv, norm = (copy.deepcopy(module).double() for module in conv_and_norm)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values in channels-last memory."""
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def meta_image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A map or weight without memory, as channels-last."""
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return empty.to(memory_format=torch.channels_last)


def run_traced(op: Op[Any], *args: Any, **options: Any) -> Tensor:
    """Runs the op's kernel and checks its accesses and its result's memory.

    Args:
        op: launches one kernel, its own.
        args: of the public function, as `options`.
    """
    with torch.no_grad(), trace() as t:
        y = op.call(*args, **options, impl="triton")
    assert [launch.kernel for launch in t.launches] == [f"_{op.name}_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == op.n_bytes(*args, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def compiled_and_exported(
    model: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Returns one graph of `model` by torch.compile and one by torch.export.

    Args:
        model: calls the op.
        example: its inputs.
        shapes: dynamic shapes of the inputs, of `BATCH` and None.
    """
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return compiled, torch.export.export(model, example, dynamic_shapes=shapes).module()
