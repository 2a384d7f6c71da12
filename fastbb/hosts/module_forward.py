"""Forward of one module of another library's model, computed by fastbb."""

from collections.abc import Hashable
from typing import Any, ClassVar

from torch import nn

from fastbb_kernels.accuracy import FP32_REL

from ..engine.measuring import Comparison
from ..engine.settings import Settings


class ModuleForward:
    """Computes the result of one module of a host from the module's parameters.

    Subclasses are written for one class of a library each; `REPLACED` in the file of a family maps
    the full names of those classes to them.

    Args:
        module: of exactly the class that this is written for.
        settings: the requested mode and precision.

    Raises:
        Refused: the module computes something that is not covered.
    """

    # methods besides `forward` that hosts call; they are replaced too
    methods: ClassVar[tuple[str, ...]] = ()
    # whether it calls the modules inside, which may be replaced as well
    runs_parts: bool = False
    # whether it keeps settings of the module, and settings that it reads at every call
    reads_settings: bool = False
    read_at_every_call: tuple[str, ...] = ()
    # names of tensors of a call that may have another dtype than the weights
    any_dtype: tuple[str, ...] = ()
    # whether it is made again after a setting changed; otherwise that takes too long
    follows_settings: bool = True
    # allowed error in fp32, relative to the largest magnitude of a result
    exactness: ClassVar[float] = FP32_REL

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.module: Any = module
        self.settings = settings

    def timing_key(self) -> Hashable:
        """A key that is equal for modules of a model that take equally long on equal inputs."""
        return type(self.module).__name__

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this call is upstream's, or None.

        Called before each call of ours, so it may also do what upstream's forward does to the
        module first (transformers' Swin sets its windows by the size of the map).
        """
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the result of the module's own forward."""
        raise NotImplementedError

    def comparable(self, result: Any) -> Any:
        """Returns the part of a result that must equal upstream's."""
        return result

    def state(self) -> Hashable:
        """Returns the current settings, outside a call's arguments, that decide its result."""
        return None

    def learn(self, result: Any, method: str, args: Any, kwargs: Any) -> None:
        """Called with upstream's result, before ours first computes a call of its form."""

    def measured(self, method: str, args: Any, kwargs: Any) -> Comparison | None:
        """Returns the times of ours and upstream's, if this call has measured them."""
        return None

    def close(self) -> None:
        """Removes everything that it has set on modules."""
