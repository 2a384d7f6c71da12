"""A whole backbone inside a host: folded, and run by the engine, behind the host's own contract."""

import copy
import itertools
import sys
import threading
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastbb_kernels._dispatch import launches_directly

from ..backbone.base import Backbone
from ..backbone.configuration import BackboneConfig
from ..models.parts import Refused
from ..weights.folding import Folding, FoldReport, find_norms, is_batch_norm, unfold
from ..weights.watch import ModuleStamp
from .libraries import is_known_part
from .replacement import Fast, HowToRun, replacement_of

# in a configuration of transformers
_DECIDE_THE_RESULT = ("return_dict", "output_hidden_states", "output_attentions")
MAX_PREPARED = 4  # forms of calls that are kept ready, each maybe with a copy of the weights
TRACED_SIZE = 224  # pixels, of the image that the dataflow is read off


class NothingToDo(Refused):
    """A module that gains nothing from being replaced as a whole; its blocks may."""


class HostConfig(BackboneConfig):
    """What an engine knows of a backbone inside a host."""

    model_type: ClassVar[str] = "fastbb-host"

    def __init__(self, *, architecture: str = "", num_channels: int = 3, **unknown: Any) -> None:
        super().__init__(**unknown)
        self.architecture = architecture
        self.num_channels = num_channels
        self._set_stages(["result"], None, None)


class HostBackbone(Backbone):
    """The modules of a host behind the backbone API; `feature_maps` are the host's results.

    Args:
        config: what is known of it.
        region: computes the results.
        constants: what it is given beside the pixels.
    """

    config_class = HostConfig
    config: HostConfig
    host: nn.Module

    def __init__(
        self, config: HostConfig, region: "Region", constants: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config)
        self._constants = constants or {}
        self.stage_names = list(config.stage_names or ())
        # not registered: a layer that is put somewhere counts as changed, see `derived`
        self._modules["host"] = region.module
        self._region = region
        self.training = False  # whether anything inside trains is asked before

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostBackbone":
        host = copy.deepcopy(self.host, memo)
        own = replacement_of(host)
        if own is not None:
            own.unbind()  # the copy is run by whom it was made for
        region = type(self._region)(host, self._region.how)
        return HostBackbone(copy.copy(self.config), region, self._constants)

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self._region.tensors(pixel_values, **self._constants)

    def forward_stages(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise NotImplementedError("a host returns all its results at once")


class Region(Fast):
    """A module of a host that takes pixels: its norms folded, its calls run by the engine."""

    methods = ("forward_features", "forward_intermediates")
    folds: ClassVar[bool] = True  # and runs the module's own forward

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        unfold(module)  # what the copy of a module has from the original
        self._folding = Folding(module, _norms(module) if self.folds else [])
        compiles = "compile" in how.mode
        self.runs_parts = self.folds and how.precision is None and not compiles
        # converted copies are watched by stamps of their own
        self.reads_settings = self.reads_settings or compiles
        self.follows_settings = not compiles
        if compiles:  # what was compiled reads nothing
            self.read_at_every_call = ()
        # by what is given beside the pixels, and by state: the form of results, and what runs
        self._lock = threading.RLock()
        self._specs: dict[Hashable, TreeSpec] = {}
        self._prepared: dict[Hashable, tuple[HostBackbone, ModuleStamp | None]] = {}
        if "compile" not in how.mode and how.precision is None and not self.helps:
            self.close()
            raise NothingToDo("it has nothing of its own to accelerate")

    @property
    def fold_report(self) -> FoldReport:
        return self._folding.report

    @property
    def helps(self) -> bool:
        """Whether computing op by op gains something, beyond what its blocks gain."""
        return bool(self.fold_report.folded)

    def close(self) -> None:
        self._folding.undo()

    def state(self) -> Hashable:
        config = getattr(self.module, "config", None)
        settings = [repr(getattr(config, name, None)) for name in _DECIDE_THE_RESULT]
        return *settings, repr(getattr(self.module, "out_features", None))

    def see(self, result: Any, method: str, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten(result)
        tensors = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        given = _pixels_and_constants(args, kwargs)
        if method == "forward" and given is not None and tensors:
            self._specs[self._form(given[1])] = spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _pixels_and_constants(args, kwargs)
        spec = None if given is None else self._specs.get(self._form(given[1]))
        if given is None or spec is None:
            return self.run("forward", *args, **kwargs)
        return tree_unflatten(list(self.computed(given[0], **given[1])), spec)

    def computed(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        """The tensors of the result, as the engine computes them; in the dtype of the pixels."""
        if launches_directly():
            return self.tensors(pixel_values, **constants)
        backbone = self.prepared(**constants)
        assert backbone._engine is not None
        tensors = backbone._engine(backbone._in_own_dtype(pixel_values))
        return tuple(x.to(pixel_values.dtype) for x in tensors)

    def _form(self, constants: dict[str, Any]) -> Hashable:
        return tuple(sorted(constants.items())), self.state()

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.run("forward_features", *args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self.run("forward_intermediates", *args, **kwargs)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The module's own method, with norms folded and blocks replaced."""

        def call() -> Any:
            return getattr(type(self.module), method)(self.module, *args, **kwargs)

        return self._folding.run(call, few=self._has_blocks)

    @cached_property
    def _has_blocks(self) -> bool:
        """Whether most convolutions are in blocks that are replaced, and fold by themselves."""
        inner = itertools.islice(self.module.modules(), 1, None)
        return any(replacement_of(part) is not None for part in inner)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        """The tensors of the module's result for pixels [B, C, H, W]."""
        return tuple(tree_flatten(self.run("forward", pixel_values, **constants))[0])

    def prepared(self, **constants: Any) -> HostBackbone:
        """The module behind the engine, made anew where a converted copy is out of date."""
        form = self._form(constants)
        with self._lock:
            return self._prepare(form, constants)

    def _prepare(self, form: Hashable, constants: dict[str, Any]) -> HostBackbone:
        if form in self._prepared:
            backbone, stamp = self._prepared[form]
            if stamp is None or stamp.is_current():
                return backbone
        if len(self._prepared) >= MAX_PREPARED:
            self._prepared.clear()
        config = HostConfig(architecture=type(self.module).__qualname__)
        backbone = HostBackbone(config, self, constants)
        prepared = backbone.prepare(self.how.mode, self.how.precision)
        is_copy = prepared.host is not self.module
        self._prepared[form] = prepared, ModuleStamp(self.module) if is_copy else None
        return prepared

    def likeness(self) -> Hashable:
        return id(self)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        if not args and not kwargs:
            return "it was called without pixels"
        return None


def _pixels_and_constants(args: Any, kwargs: Any) -> tuple[Tensor, dict[str, Any]] | None:
    """The pixels of a call, and what else it is given by name; None if there is more to it."""
    constants = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    pixels = [*args, *(value for name, value in kwargs.items() if name not in constants)]
    if len(pixels) != 1 or not isinstance(pixels[0], Tensor) or pixels[0].ndim != 4:
        return None
    if not all(isinstance(value, (bool, int, str, type(None))) for value in constants.values()):
        return None
    return pixels[0], constants


_KNOWN_ARGUMENTS = {"pixel_values", "output_attentions", "output_hidden_states", "return_dict"}


class TransformersBackbone(Region):
    """A backbone of transformers that computes no stage beyond the last that is asked for.

    Everything but the maps is upstream's to compute. Subclasses give `tensors`, the maps.
    """

    folds = False

    @property
    def helps(self) -> bool:
        return True

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        for name in ("output_attentions", "output_hidden_states"):
            if self._asked(kwargs, name):
                return f"{name} is asked for"
        if len(args) > 1 or kwargs.keys() - _KNOWN_ARGUMENTS:
            return "it is called with arguments that change what it computes"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = sys.modules["transformers.modeling_outputs"].BackboneOutput  # the host's library
        maps = self.computed(args[0] if args else kwargs["pixel_values"])
        return output(feature_maps=maps) if self._asked(kwargs, "return_dict") else (maps,)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("only `forward`, with nothing but pixels, is computed by fastbb")

    def _asked(self, kwargs: dict[str, Any], name: str) -> Any:
        """An argument, or what the configuration says where it is not given."""
        value = kwargs.get(name)
        return getattr(self.module.config, name, None) if value is None else value


def check_parts(module: nn.Module) -> None:
    """Refuses what computing from the parameters would pass over, though it may be equal now.

    Raises:
        Refused: a part is of none of the libraries, such as an adapter.
    """
    for part in list(module.modules())[1:]:
        if not is_known_part(part):
            raise Refused(f"a {type(part).__name__} is inside it")


def _norms(module: nn.Module) -> Sequence[Any]:
    """The batch norms of a module, and which convolution each belongs to.

    Raises:
        Refused: the module does not take pixels alone.
    """
    if not any(is_batch_norm(part) for part in module.modules()):
        return []
    like = next(module.parameters(), None)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if like is None or first is None:
        raise Refused("it has no convolution")
    default_cfg = getattr(module, "default_cfg", None) or {}  # timm's
    size = default_cfg.get("input_size", (3, TRACED_SIZE, TRACED_SIZE))[1:]
    pixels = torch.empty(1, first.in_channels, *size, dtype=like.dtype, device="meta")
    try:
        return find_norms(module, pixels)
    except Exception as error:
        raise Refused(f"it does not run on the meta device: {error}") from error
