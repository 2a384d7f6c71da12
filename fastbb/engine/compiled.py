"""Compiles a whole backbone by torch.compile, for one size of images, with frozen weights."""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastbb_kernels import Impl, use_impl

from .computation import Computation, MapsModule
from .cpu import multiplies_faster_as_convolution
from .frozen import attention_to_products, fold_constants, linear_to_convolution
from .trial import Run

# set while compiling only. Freezing folds batch norms and packs weights for the CPU's library
_INDUCTOR = {"freezing": True}
# calls one kernel after the other from C++: at batch 1 Python takes a tenth of the time
_INDUCTOR_ON_CPU = {**_INDUCTOR, "cpp_wrapper": True}


def compile_maps(computation: Computation, example: Tensor, impl: Impl = "eager") -> Run:
    """Compiles the maps of a computation for the shape of an example.

    The weights are baked in: the caller has to watch them by a `ModuleStamp`, and to pass pixels of
    exactly this shape, dtype and device.

    Args:
        computation: in eval mode.
        example: [B, C, H, W].
        impl: "eager" hands PyTorch's operations to the compiler, "auto" leaves our kernels in the
            graph as they are.

    Raises:
        Exception: any error of the compiler.
    """
    on_cpu = example.device.type == "cpu"
    example = example.contiguous()  # as every call; no guard checks it
    # inference tensors do not trace
    with torch.inference_mode(False), torch.no_grad(), use_impl(impl):
        forward = _frozen(computation, example) if on_cpu else computation.feature_maps
        compiled = torch.compile(
            own_code(lambda pixel_values: forward(pixel_values)),
            fullgraph=True,
            dynamic=False,
            # the engine checks what guards would check in every call
            options={"guard_filter_fn": lambda guards: [False] * len(guards)},
        )
        with local_inductor_options(_INDUCTOR_ON_CPU if on_cpu else _INDUCTOR):
            compiled(example.clone())

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return compiled(pixel_values.contiguous())

    return run


class _Maps(MapsModule):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        # convolutions and what follows them are fastest in this layout, maps included
        return super().forward(pixel_values.contiguous(memory_format=torch.channels_last))


def _frozen(computation: Computation, example: Tensor) -> Callable[[Tensor], Any]:
    """Exports the forward pass as a graph; everything independent of the pixels is a constant.

    The compiler folds parameters too, but not tensors made of `arange`, such as masks and indices
    of relative positions; it would compute these for every element of every window.
    """
    try:
        graph: Any = torch.export.export(_Maps(computation), (example.clone(),)).module()
        fold_constants(graph)
        attention_to_products(graph)
    except Exception:  # some timm models can be compiled and not exported
        return _Maps(computation)
    if example.dtype == torch.float32 and multiplies_faster_as_convolution():
        linear_to_convolution(graph)
    return graph


def local_inductor_options(options: dict[str, Any] = _INDUCTOR) -> AbstractContextManager[None]:
    """Sets the compiler's options inside the block."""
    from torch._inductor import config

    return config.patch(options)


def own_code(function: Callable) -> Callable:
    """Copies a function with its own code object: dynamo counts and keeps artefacts per code."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def in_chunks(run: Run, n_images: int, other: Run | None = None) -> Run:
    """Runs a batch `n_images` at a time; images do not depend on their neighbours.

    Args:
        run: takes `n_images`, and any number if `other` is None.
        n_images: images per call.
        other: takes the rest of a batch if it is less than half of `n_images`; a longer rest is
            padded with empty images.
    """

    def chunked(pixel_values: Tensor) -> tuple[Tensor, ...]:
        batch = pixel_values.shape[0]
        if batch == n_images or (batch < n_images and other is None):
            return run(pixel_values)
        parts = []
        for part in pixel_values.split(n_images):
            missing = n_images - part.shape[0]
            if missing == 0 or other is None:
                parts.append(run(part))
            elif 2 * part.shape[0] < n_images:
                parts.append(other(part))
            else:
                filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
                parts.append(tuple(maps[: part.shape[0]] for maps in run(filled)))
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(maps) for maps in zip(*parts))

    return chunked
