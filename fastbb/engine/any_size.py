"""One compiled artefact of a backbone for images of every size, without a second trace."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastbb_kernels import Impl, use_impl

from ..backbone.base import Backbone
from ..models.resnet import ResNetBackbone
from ..models.swin import SwinBackbone
from ..models.swin_any_size import SwinAnySize, swin_any_size_unsupported
from .compiled import local_inductor_options, own_code
from .trial import Run

# no length in the first is that of another dimension, and none is 1; the second proves the first
EXAMPLES = ((2, 70, 106), (3, 134, 90))
RESNET_STRIDE = 32  # images no larger end in maps of one pixel


class AnySizeForward(Protocol):
    """The maps of a backbone as `maps(forward(*inputs(x)), x)`; `forward` is what is compiled."""

    def inputs(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Tensors whose number, and whose shapes but for some dimensions, are always the same."""
        ...

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    def maps(self, outputs: tuple[Tensor, ...], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[B, C, h, w] of each selected stage."""
        ...


def compile_any_size(
    backbone: Backbone, impl: Impl = "eager", backend: str | Callable[..., Any] = "inductor"
) -> Run | str:
    """Compiles the feature maps of a backbone once, for images of every size and number.

    A Swin becomes one artefact. A ResNet becomes one for single images and one for batches, for
    compilers take a length of 1 for a constant; each is made when it is first needed. Batches of no
    image, and maps of a single token of a ResNet, run eager.

    The weights are baked in: whoever calls the result watches them (`ModuleStamp`).

    Args:
        backbone: in eval mode.
        impl: "eager" hands PyTorch's operations to the compiler, "auto" leaves our kernels in the
            graph as they are.
        backend: of torch.compile.

    Returns:
        A function of pixels [B, C, H, W], or why there can be none.

    Raises:
        Exception: whatever the compiler raises, among it a size that it took for a constant.
    """
    if backbone.training:
        return "the backbone is training: call .eval()"
    if isinstance(backbone, SwinBackbone):
        reason = swin_any_size_unsupported(backbone)
        if reason is not None:
            return reason
        run = _compile(SwinAnySize(backbone), [0], EXAMPLES, impl, backend, backbone)
        return lambda x: run(x) if len(x) else backbone.feature_maps(x)
    if type(backbone) is ResNetBackbone:
        return _by_batch(backbone, impl, backend)
    return f"a {type(backbone).__name__} has no form that compiles for every size"


class _Pixels:
    """A backbone without sizes in its arithmetic: its forward as it is."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def inputs(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        # the strides of one image are not unique, and another stride is another artefact
        return (pixel_values.contiguous().clone(),)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._backbone.feature_maps(*tensors)

    def maps(self, outputs: tuple[Tensor, ...], pixel_values: Tensor) -> tuple[Tensor, ...]:
        return outputs


def _by_batch(backbone: ResNetBackbone, impl: Impl, backend: str | Callable[..., Any]) -> Run:
    runs: dict[bool, Run] = {}
    form = _Pixels(backbone)

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        batch, _, height, width = pixel_values.shape
        if batch == 0 or min(height, width) <= RESNET_STRIDE:
            return backbone.feature_maps(pixel_values)
        single = batch == 1
        if single not in runs:
            examples = [(1 if single else n, height, width) for n, height, width in EXAMPLES]
            dynamic = [2, 3] if single else [0, 2, 3]
            runs[single] = _compile(form, dynamic, examples, impl, backend, backbone)
        return runs[single](pixel_values)

    return run


def _compile(
    form: AnySizeForward,
    dynamic: Sequence[int],
    examples: Sequence[tuple[int, int, int]],
    impl: Impl,
    backend: str | Callable[..., Any],
    backbone: Backbone,
) -> Run:
    """Compiles a form for the first example and runs the second.

    Args:
        form: what to compile.
        dynamic: dimensions of every input that depend on the images.
        examples: (batch, height, width) of two sizes.
        impl: as in `compile_any_size`.
        backend: as in `compile_any_size`.
        backbone: that of the form.
    """
    from torch.fx.experimental import _config as shapes

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return form.forward(*tensors)

    compiled = torch.compile(
        own_code(forward),
        fullgraph=True,
        backend=backend,
        options={"guard_filter_fn": _of_tensors},
    )

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        # inference tensors do not trace
        with torch.inference_mode(False), torch.no_grad():
            outputs = compiled(*form.inputs(pixel_values))
        return form.maps(outputs, pixel_values)

    channels = backbone.config.num_channels
    size = {"dtype": backbone.dtype, "device": backbone.device}
    first, second = (
        torch.zeros(n, channels, height, width, **size) for n, height, width in examples
    )
    with torch.inference_mode(False), torch.no_grad(), use_impl(impl):
        tensors = form.inputs(first)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, list(dynamic))
        # equal lengths are not taken for the same one
        any_shapes = shapes.patch(use_duck_shape=False)  # pyright: ignore[reportAttributeAccessIssue] - torch puts it there when it is imported
        with local_inductor_options(), any_shapes:
            compiled(*tensors)
        run(second)
    return run


def _of_tensors(guards: Sequence[Any]) -> list[bool]:
    """Keeps what holds for the tensors of a call; the rest the engine knows.

    Without them a size that was taken for a constant would not be noticed.
    """
    return [guard.guard_type in ("SHAPE_ENV", "TENSOR_MATCH") for guard in guards]
