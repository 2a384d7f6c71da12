"""Gradient checkpointing: in training, the backward pass computes blocks again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

# calls its first argument, a block, with the others
BlockRunner = Callable[..., Tensor]


class GradientCheckpointing(nn.Module):
    """The switch of gradient checkpointing, by transformers' names."""

    supports_gradient_checkpointing: ClassVar[bool] = True
    gradient_checkpointing: bool = False
    _checkpoint_options: dict[str, Any] = {}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """In training, recomputes blocks in the backward pass instead of keeping activations.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.
        """
        self.gradient_checkpointing = True
        self._checkpoint_options = dict(gradient_checkpointing_kwargs or {})

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled; it applies in training mode."""
        return self.gradient_checkpointing

    def block_runner(self) -> BlockRunner | None:
        """A function that runs a block with checkpointing, or None where blocks run as they are."""
        if not (self.gradient_checkpointing and self.training):
            return None
        options = {"use_reentrant": False, **self._checkpoint_options}
        # a compiler recomputes operations, of which none writes running statistics
        if not options["use_reentrant"] and not torch.compiler.is_compiling():
            options = {"context_fn": partial(_recompute_contexts, self), **options}
        return partial(_run_checkpointed, options)


def _run_checkpointed(options: dict[str, Any], block: Callable[..., Tensor], *args: Any) -> Tensor:
    result = checkpoint(block, *args, **options)
    assert isinstance(result, Tensor)
    return result


def _recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the forward and of the recomputation, as `checkpoint` takes them."""
    return nullcontext(), _without_counting(module)


@contextmanager
def _without_counting(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch norms, which normalize as in training.

    The recomputation sees a batch a second time. The statistics must still be passed to the op,
    which saves them for the backward as it did in the first forward.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count
