"""Whole backbones inside hosts: folded, and run by the engine, with the host's own results."""

import copy
import hashlib
import itertools
import sys
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fastbb_kernels._dispatch import computes_nothing
from fastbb_kernels.accuracy import FP32_REL, FP32_REL_FOLDED

from ..backbone.base import in_dtype
from ..engine.computation import dtype_of, in_precision
from ..engine.engine import Engine
from ..engine.measuring import Comparison
from ..engine.settings import Settings, Tools
from ..engine.trial import Candidate, Run
from ..engine.ways import compiles
from ..models.parts import Refused
from ..weights.find_norms import FoldReport, find_norms
from ..weights.folded_model import Folding, unfold
from ..weights.recognize import is_batch_norm
from ..weights.watch import ModuleStamp
from .libraries import is_known_part
from .module_forward import ModuleForward
from .replacement import replacement_of, upstream_only

# in a configuration of transformers
_DECIDE_THE_RESULT = ("return_dict", "output_hidden_states", "output_attentions")
MAX_PREPARED = 4  # forms of calls whose engines are kept, each maybe with a copy of the weights
TRACED_SIZE = 224  # side of the image for tracing the dataflow, pixels
MEASURING_S = 1.0  # for one choice of the engine, upstream's forward among the candidates


class NothingToDo(Refused):
    """Raised for a module that gains nothing as a whole; its blocks may be replaced."""


@dataclass(frozen=True)
class HostBackboneMaps:
    """The tensors that a backbone in a host returns: the `Computation` of its engine.

    Attributes:
        backbone: computes them.
        constants: the other arguments of the call.
    """

    backbone: "HostBackbone"
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.backbone.module

    @property
    def outputs(self) -> Hashable:
        return None  # the backbone has an engine for each form of a call

    @property
    def cache_key(self) -> str:
        shapes = [(name, list(p.shape)) for name, p in self.module.named_parameters()]
        described = repr((shapes, self.backbone.state(), sorted(self.constants.items())))
        digest = hashlib.sha256(described.encode()).hexdigest()[:8]
        return f"{type(self.module).__qualname__}-{digest}"

    @property
    def exactness(self) -> float:
        return self.backbone.exactness

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.backbone.tensors(pixel_values, **self.constants)

    def copied(self) -> "HostBackboneMaps":
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostBackboneMaps":
        host = copy.deepcopy(self.module, memo)
        own = replacement_of(host)
        if own is not None:
            own.unbind()  # only the engine that made the copy runs it
        return HostBackboneMaps(type(self.backbone)(host, self.backbone.settings), self.constants)


class HostBackbone(ModuleForward):
    """Runs a module of a host that takes pixels: folds its norms, and calls the engine."""

    methods = ("forward_features", "forward_intermediates")
    folds: ClassVar[bool] = True  # and runs the module's own forward
    exactness = FP32_REL_FOLDED

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        super().__init__(module, settings)
        unfold(module)  # removes folded forwards copied from another module
        self._folding = Folding(module, _norms(module) if self.folds else [])
        is_baked = compiles(settings.mode)
        self.runs_parts = self.folds and settings.precision is None and not is_baked
        # converted copies are watched by stamps of their own
        self.reads_settings = self.reads_settings or is_baked
        self.follows_settings = not is_baked
        if is_baked:  # compiled artefacts do not read settings
            self.read_at_every_call = ()
        # by the form of a call: the containers of its result, and the engine that computes it
        self._lock = threading.RLock()
        self._specs: dict[Hashable, TreeSpec] = {}
        self._engines: dict[Hashable, tuple[Engine, ModuleStamp | None]] = {}
        if not is_baked and settings.precision is None and not self.helps:
            self.close()
            raise NothingToDo("it has nothing of its own to accelerate")

    @property
    def fold_report(self) -> FoldReport:
        return self._folding.report

    @property
    def helps(self) -> bool:
        """Whether computing the whole op by op gains more than its replaced blocks."""
        return bool(self.fold_report.folded)

    def close(self) -> None:
        self._folding.undo()
        with self._lock:
            self._engines.clear()  # converted copies, and what was compiled

    def state(self) -> Hashable:
        config = getattr(self.module, "config", None)
        settings = [repr(getattr(config, name, None)) for name in _DECIDE_THE_RESULT]
        return *settings, repr(getattr(self.module, "out_features", None))

    def learn(self, result: Any, method: str, args: Any, kwargs: Any) -> None:
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
        """Computes the tensors of the result by the engine, in the dtype of the pixels."""
        if computes_nothing():
            return self.tensors(pixel_values, **constants)
        engine = self.engine(**constants)
        dtype = dtype_of(engine.module)
        tensors = engine(in_dtype(pixel_values, dtype, forced=self.settings.precision is not None))
        return tuple(x.to(pixel_values.dtype) for x in tensors)

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.run("forward_features", *args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self.run("forward_intermediates", *args, **kwargs)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own method, with norms folded and blocks replaced."""

        def call() -> Any:
            return getattr(type(self.module), method)(self.module, *args, **kwargs)

        return self._folding.run(call, few=self._has_blocks)

    @cached_property
    def _has_blocks(self) -> bool:
        """Whether most convolutions are in replaced blocks, which fold by themselves."""
        inner = itertools.islice(self.module.modules(), 1, None)
        return any(replacement_of(part) is not None for part in inner)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        """Computes the tensors of the module's result for pixels [B, C, H, W]."""
        return tuple(tree_flatten(self.run("forward", pixel_values, **constants))[0])

    def engine(self, **constants: Any) -> Engine:
        """Returns the engine for a form of call; a new one if its converted copy is out of date."""
        form = self._form(constants)
        with self._lock:
            if form in self._engines:
                engine, stamp = self._engines[form]
                if stamp is None or stamp.is_current():
                    return engine
            if len(self._engines) >= MAX_PREPARED:
                self._engines.clear()
            result = in_precision(HostBackboneMaps(self, constants), self.settings.precision)
            is_copy = result.module is not self.module
            tools = Tools(candidates=self._upstream_candidate(constants), budget_s=MEASURING_S)
            engine = Engine(result, self.settings, tools, is_converted=is_copy)
            self._engines[form] = engine, ModuleStamp(self.module) if is_copy else None
            return engine

    @property
    def engines(self) -> list[Engine]:
        """The engines that are kept ready."""
        with self._lock:
            return [engine for engine, _ in self._engines.values()]

    def measured(self, method: str, args: Any, kwargs: Any) -> Comparison | None:
        given = _pixels_and_constants(args, kwargs)
        if method != "forward" or given is None or computes_nothing():
            return None
        trials = self.engine(**given[1]).trials_of(given[0])
        seconds = {trial.name: trial.seconds for trial in trials if trial.seconds is not None}
        theirs = seconds.pop(_UPSTREAM, None)
        if theirs is None or not seconds:
            return None
        ours = min(seconds.values())
        return Comparison(ours, theirs, ours / theirs)

    def _upstream_candidate(self, constants: dict[str, Any]) -> tuple[Candidate, ...]:
        """Returns upstream's own forward as a candidate for the engine."""
        if self.settings.mode != "auto" or self.settings.precision is not None:
            return ()

        def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
            with upstream_only():
                result = type(self.module).forward(self.module, pixel_values, **constants)
            return tuple(x for x in tree_leaves(result) if isinstance(x, Tensor))

        def build() -> Run:
            return run

        return (Candidate(_UPSTREAM, build),)

    def _form(self, constants: dict[str, Any]) -> Hashable:
        return tuple(sorted(constants.items())), self.state()

    def timing_key(self) -> Hashable:
        return id(self)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        if not args and not kwargs:
            return "it was called without pixels"
        return None


_UPSTREAM = "upstream"


def _pixels_and_constants(args: Any, kwargs: Any) -> tuple[Tensor, dict[str, Any]] | None:
    """Returns the pixels of a call and its options by name; None if it has other arguments."""
    constants = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    pixels = [*args, *(value for name, value in kwargs.items() if name not in constants)]
    if len(pixels) != 1 or not isinstance(pixels[0], Tensor) or pixels[0].ndim != 4:
        return None
    if not all(isinstance(value, (bool, int, str, type(None))) for value in constants.values()):
        return None
    return pixels[0], constants


_KNOWN_ARGUMENTS = {"pixel_values", "output_attentions", "output_hidden_states", "return_dict"}


class TransformersHostBackbone(HostBackbone):
    """A backbone of transformers that computes no stage after the last requested one.

    Subclasses define `tensors`, the maps, and `output`, the full name of the class of the result.
    Those with `has_hidden_states` take `output_hidden_states=True` there, and return the states of
    all stages after the maps.
    """

    folds = False
    exactness = FP32_REL
    output: ClassVar[str] = "transformers.modeling_outputs.BackboneOutput"
    has_hidden_states: ClassVar[bool] = False

    @property
    def helps(self) -> bool:
        return True

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        if self._asked(kwargs, "output_attentions"):
            return "output_attentions is asked for"
        states = self._asked(kwargs, "output_hidden_states")
        if states and not (self.has_hidden_states and states is True):
            return "output_hidden_states is asked for"
        if len(args) > 1 or kwargs.keys() - _KNOWN_ARGUMENTS:
            return "it is called with arguments that change what it computes"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, _, name = self.output.rpartition(".")
        output = getattr(sys.modules[module], name)  # of the host's library
        pixels, constants = args[0] if args else kwargs["pixel_values"], self._constants(kwargs)
        maps, states = self.computed(pixels, **constants), None
        if constants.get("output_hidden_states"):
            n_maps = len(self.module.out_features)
            maps, states = maps[:n_maps], maps[n_maps:]
        if self._asked(kwargs, "return_dict"):
            return output(feature_maps=maps, hidden_states=states)
        return (maps,) if states is None else (maps, states)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("only `forward`, with nothing but pixels, is computed by fastbb")

    def measured(self, method: str, args: Any, kwargs: Any) -> Comparison | None:
        # the engine measured the tensors, which do not depend on the container of the result
        pixels = args[0] if args else kwargs["pixel_values"]
        return super().measured(method, (pixels,), self._constants(kwargs))

    def _constants(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that decide which tensors a call returns, also of upstream's forward."""
        name = "output_hidden_states"
        asked, configured = bool(self._asked(kwargs, name)), getattr(self.module.config, name, None)
        return {name: asked} if asked or configured else {}

    def _asked(self, kwargs: dict[str, Any], name: str) -> Any:
        """Returns an argument, or the configuration's value if it was not given."""
        value = kwargs.get(name)
        return getattr(self.module.config, name, None) if value is None else value


def check_parts(module: nn.Module) -> None:
    """Refuses parts that computing from the parameters would pass over, even if equal now.

    Raises:
        Refused: a part is of none of the libraries, such as an adapter.
    """
    for part in list(module.modules())[1:]:
        if not is_known_part(part):
            raise Refused(f"a {type(part).__name__} is inside it")


def _norms(module: nn.Module) -> Sequence[Any]:
    """Finds the batch norms of a module, and the convolution that each belongs to.

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
