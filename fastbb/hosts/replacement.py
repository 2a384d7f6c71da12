"""Binds our forward on one module of another library's model, checks it, and undoes it.

A `ModuleForward` computes the result of a module from the module's own parameters. A `Replacement`
binds it on the instance and decides at every call whether it may run: the module's own forward runs
if a gradient or a graph is recorded, a layer inside was changed or has hooks, the results differ,
or ours takes longer.
"""

import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from fastbb_kernels import use_impl
from fastbb_kernels._dispatch import computes_nothing, launches_on
from fastbb_kernels.fp32_precision import fp32_products
from fastbb_kernels.warning import warn_caller

from ..engine.measuring import TIE, Comparison, compare, describe, duration, wall_clock
from ..engine.openvino import OPENVINO
from ..engine.settings import DTYPES, Settings
from ..models.parts import Refused
from ..weights.derived import forget_derived, is_tracing, is_transformed
from ..weights.folded_model import replica_without, unfold, unfolded
from ..weights.folded_weights import autocasts
from ..weights.watch import (
    ModuleSettings,
    ModuleStructure,
    OwnForward,
    is_capturing,
    note_written,
    own_forward,
)
from .calls import (
    cast,
    difference,
    form_of,
    format_of,
    in_formats,
    is_telling,
    picked,
    rows_to_compare,
    size_of,
    tensors_in,
)
from .module_forward import ModuleForward


class AccelerateWarning(UserWarning):
    """Part of an accelerated model runs upstream's forward; results are still right."""


@dataclass
class Choice:
    """The forward that runs for one form of call, and why.

    Attributes:
        ours: whether ours does.
        why: it does, or does not.
        size: of the call that decided, see `size_of`; a much larger call decides anew.
        formats: memory format of each tensor of upstream's result; None where it has another.
        times: of ours and of upstream's, where both were measured.
    """

    ours: bool
    why: str
    size: int = 0
    formats: list[torch.memory_format | None] = field(default_factory=list)
    times: Comparison | None = None


class Timings:
    """Times by `ModuleForward.timing_key` and form of call, which the modules of a model share."""

    def __init__(self) -> None:
        self._measured: dict[Hashable, Comparison] = {}

    def of(
        self, timing_key: Hashable, form: Hashable, measure: Callable[[], Comparison]
    ) -> Comparison:
        """Returns the times of modules with this key; measured once."""
        key = (timing_key, form)
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]


class Replacement(OwnForward):
    """The forward of one module of a host; `bind` puts it there.

    Args:
        module: of the host.
        name: of the module in the host.
        make: class that computes its result.
        settings: the requested mode and precision.
        timings: of the host.

    Attributes:
        choices: made so far, by form of call.
        last_reason: the reason why the last call ran upstream's forward, or None.
        off: the reason why it will not run again, or None.
        is_bound: whether it is on the module.

    Raises:
        Refused: by `make`.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        make: type[ModuleForward],
        settings: Settings,
        timings: Timings,
    ) -> None:
        self.module, self.name, self.settings = module, name, settings
        self.choices: dict[Hashable, Choice] = {}
        self.last_reason: str | None = None
        self.off: str | None = None
        self.is_bound = False
        self._make, self._timings = make, timings
        self._ours: ModuleForward | None = self._made()
        self._module_settings = self._read_module_settings()
        # at once, to notice layers that are replaced before the first call
        self._structure: ModuleStructure | None = self._read_structure()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replacement":
        # the copied module is incomplete here, so our forward is made at its first call
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(self.__getstate__())
        other.module = copy.deepcopy(self.module, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        new = {"choices": {}, "last_reason": None, "off": None}
        new |= {"_ours": None, "_structure": None, "_module_settings": None}
        return {**self.__dict__, **new}

    @property
    def ours(self) -> ModuleForward:
        if self._ours is None:
            with _making:
                self._ours = self._ours or self._made()
                self._module_settings = self._read_module_settings()
        return self._ours

    def _made(self) -> ModuleForward:
        """Makes our forward, from the module as it is now.

        Raises:
            Refused: something about the module is not covered; upstream may still run it.
        """
        try:
            with upstream_only():
                return self._make(self.module, self.settings)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"reading it failed: {describe(error)}") from error

    @property
    def last_choice(self) -> Choice | None:
        """The choice for the form of call decided last; None if the last call was upstream's."""
        choices = list(self.choices.values())
        return choices[-1] if self.why_upstream is None and choices else None

    @property
    def why_upstream(self) -> str | None:
        """Why upstream's forward runs whatever was chosen, or None."""
        return (self.off or self.last_reason) if self.is_bound else "it was restored"

    @property
    def is_running_ours(self) -> bool:
        """Whether ours runs: for the form of call decided last, and nothing spoke against it."""
        choice = self.last_choice
        return choice is not None and choice.ours

    # --- bound on the module

    def bind(self) -> None:
        """Replaces the module's forward, and the methods that move its parameters."""
        self.is_bound = True
        methods = [n for n in ("forward", *self._make.methods) if hasattr(type(self.module), n)]
        for name in (*methods, *MOVES):
            setattr(self.module, name, getattr(self, name))

    def _method(self, name: str) -> Callable[..., Any]:
        """Makes a method that replaces one of the module, with the same signature."""

        @wraps(getattr(type(self.module), name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, Replacement):  # a library bound the method on the module again
                return getattr(type(self), name)(self, *args, **kwargs)
            return self._call(name, args, kwargs)

        method.__name__ = name  # a pickle finds the method by this name
        return MethodType(method, self)

    def unbind(self) -> None:
        """Restores the module's own methods."""
        self.is_bound = False
        for name in ("forward", *self._make.methods, *MOVES):
            if getattr(vars(self.module).get(name), "__self__", None) is self:
                delattr(self.module, name)
        if self._ours is not None:
            self._ours.close()
        else:  # a copy that has not run still has folded forwards of the original
            unfold(self.module)
        forget_derived(self.module)

    def refresh(self) -> None:
        """Forgets everything derived from the parameters; the next call computes it again."""
        forget_derived(self.module)
        note_written(self.module.parameters())

    def train(self, mode: bool = True) -> nn.Module:
        forget_derived(self.module)
        return type(self.module).train(self.module, mode)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        forget_derived(self.module)
        return type(self.module)._apply(self.module, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return replica_without(self.module, ("forward", *self._make.methods, *MOVES))

    @property
    def forward(self) -> Callable[..., Any]:
        return self._method("forward")

    @property
    def forward_features(self) -> Callable[..., Any]:
        return self._method("forward_features")

    @property
    def forward_intermediates(self) -> Callable[..., Any]:
        return self._method("forward_intermediates")

    # --- what runs

    def upstream(self, method: str, args: Any, kwargs: Any) -> Any:
        """Computes the result of the module's own method."""
        return getattr(type(self.module), method)(self.module, *args, **kwargs)

    def _call(self, method: str, args: Any, kwargs: Any) -> Any:
        # a traced graph holds upstream's forward, which the compiler of the host fuses
        if is_tracing() or _local.upstream_only or self in _local.running:
            return self.upstream(method, args, kwargs)
        if self._module_settings is not None and self._module_settings.change() is not None:
            self._follow()
        # a replacement around this one has checked everything inside it
        outer = _local.running[-1]._structure if _local.running else None
        is_inner = outer is not None and self.module in outer
        if is_inner and self.off is None and self._ours is not None:
            look = self._ours.why_not
        else:
            look = self._why_upstream
        try:
            reason = look(*args, **kwargs)
        except TypeError as error:  # arguments with names that ours does not know
            reason = describe(error)
        self.last_reason = reason
        if reason is not None:
            return self.upstream(method, args, kwargs)
        if computes_nothing():  # there is no result to compare with or to time
            return self._run(Choice(True, ""), method, args, kwargs)
        form = (method, self.ours.state(), *form_of(args, kwargs))
        choice, size = self.choices.get(form), size_of(args, kwargs)
        if choice is None or size > MUCH_LARGER * choice.size:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return self.upstream(method, args, kwargs)  # nothing can be compared or timed
            return self._decide(form, size, method, args, kwargs)
        if not choice.ours:
            return self.upstream(method, args, kwargs)
        try:
            return self._run(choice, method, args, kwargs)
        except Exception as error:  # if the input is wrong, upstream raises its own error
            result = self.upstream(method, args, kwargs)
            if not isinstance(error, torch.OutOfMemoryError | MemoryError):
                self._turn_off(describe(error))
            return result

    def _run(self, choice: Choice, method: str, args: Any, kwargs: Any) -> Any:
        outermost = not _local.running
        _local.running.append(self)
        try:
            if outermost and self.settings.mode in ("eager", "compile", OPENVINO):
                with use_impl("eager"):
                    result = getattr(self.ours, method)(*args, **kwargs)
            else:
                result = getattr(self.ours, method)(*args, **kwargs)
        finally:
            _local.running.pop()
        # parts of one backbone ignore strides
        return in_formats(result, choice.formats) if outermost else result

    def _why_upstream(self, *args: Any, **kwargs: Any) -> str | None:
        if self.off is not None:
            return self.off
        if self._structure is None:  # this is a copy
            with _making:
                try:
                    _ = self.ours
                except Refused as refused:  # because of a change since then
                    self.off, self._module_settings = str(refused), self._read_module_settings()
                    return self.off
                self._structure = self._structure or self._read_structure()
        problem = self._why_not_parameters(self._structure)
        if problem is not None:
            return problem
        values = [*args, *kwargs.values()]
        if any(isinstance(value, torch.fx.Proxy) for value in values):
            return "torch.fx records a graph"
        tensors = list(tensors_in(values))
        if torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in tensors) or any(self._trained)
        ):
            forget_derived(self.module)  # the parameters are about to change
            return "a gradient is needed: call the model under torch.inference_mode()"
        like = next(self._structure.parameters(), None)
        if like is None:
            return "it has no parameters"
        if like.device.type != "cpu" and not launches_on(like.device):
            return f"it is on the {like.device.type} device"
        if autocasts(like.device.type):
            return "torch.autocast chooses the dtypes: convert the model, or give precision="
        free = [kwargs[name] for name in self.ours.any_dtype if name in kwargs]
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) or is_transformed(tensor):
                return "it is called by a transform of torch.func, or with fake tensors"
            if not tensor.numel():  # many upstream models raise for it
                return "the input is empty"
            if tensor.device != like.device:
                return f"the input is on {tensor.device}, the weights on {like.device}"
            differs = tensor.is_floating_point() and tensor.dtype != like.dtype
            if differs and not any(tensor is other for other in free):
                return f"the input is {tensor.dtype}, the weights {like.dtype}"
        return self.ours.why_not(*args, **kwargs)

    def _why_not_parameters(self, structure: ModuleStructure) -> str | None:
        """Returns why the parameters inside do not determine the module's result, or None."""
        if structure.trains():
            return "it is in training mode: call .eval()"
        if not all(map(is_capturing, structure.hooks())):
            return "a layer inside it has hooks"
        if _has_any_global_hook():
            return "hooks of all modules are registered"
        if not structure.is_intact():
            forget_derived(self.module)
            return "layers inside it were replaced: call accelerate() again"
        if structure.foreign_forwards():
            forget_derived(self.module)
            return "something else was put over the forward of a layer inside it"
        parameters = list(structure.parameters())
        for parameter in parameters:
            if type(parameter) is not nn.Parameter:
                return f"a parameter inside it is a {type(parameter).__name__}"
        # freezing often comes with changes without a new version, such as merged LoRA
        trained = [parameter.requires_grad for parameter in parameters]
        if trained != self._trained:
            self._trained = trained
            forget_derived(self.module)
        return None

    def _read_structure(self) -> ModuleStructure:
        structure = ModuleStructure(self.module)
        self._trained = [parameter.requires_grad for parameter in structure.parameters()]
        return structure

    def _read_module_settings(self) -> ModuleSettings | None:
        made = self._ours or self._make
        if not made.reads_settings:
            return None
        return ModuleSettings(self.module, made.read_at_every_call)

    def _follow(self) -> None:
        """Makes ours again from the current settings; it is compared with upstream's again."""
        with _making:
            change = self._module_settings and self._module_settings.change()
            if change is None:  # another thread has followed the change
                return
            ours = self._ours
            forget_derived(self.module)
            self.choices.clear()
            if ours is None or ours.follows_settings:
                try:
                    if ours is not None:
                        ours.close()
                    self._ours, self.off = self._made(), None
                except Refused as refused:
                    self.off = f"{refused} ({change})"
            else:
                self.off = f"it was compiled before {change}: call accelerate() again"
            self._module_settings = self._read_module_settings()

    def _decide(self, form: Hashable, size: int, method: str, args: Any, kwargs: Any) -> Any:
        """Compares ours with upstream's on this input, times both, and returns the result."""
        with upstream_only():
            want = self.upstream(method, args, kwargs)
        if self._module_settings is not None:
            # settings that upstream's forward sets are no change
            self._module_settings = self._read_module_settings()
        self.ours.learn(want, method, args, kwargs)
        compared = self.ours.comparable
        if not is_telling(compared(want)):  # a later call decides
            self.last_reason = "its last result has no finite values to compare with"
            return want
        formats = [format_of(x) for x in tree_leaves(want) if isinstance(x, Tensor)]
        choice, got = Choice(True, "equal to upstream's", size, formats), None

        def truth() -> tuple[Any, Any, list[int] | None]:
            rows = rows_to_compare(args, kwargs, compared(want))
            same, exact = self._truth(want, rows, method, args, kwargs)
            return compared(same), compared(exact), rows

        try:
            got = self._run(choice, method, args, kwargs)
            problem = difference(compared(got), compared(want), truth, self.ours.exactness)
        except (torch.OutOfMemoryError, MemoryError) as error:  # a later call may fit into memory
            self.last_reason = describe(error)
            return want
        except Exception as error:  # upstream's result is returned after any error of ours
            problem = describe(error)
        if problem is not None:
            self._turn_off(problem)
            return want
        if self.settings.mode == "auto":
            times = self.ours.measured(method, args, kwargs) or self._timings.of(
                self.ours.timing_key(),
                (form, size.bit_length() // 2),  # within a factor of four
                lambda: self._time(choice, method, args, kwargs),
            )
            choice.ours, choice.times = times.ratio <= 1 + TIE, times
            choice.why = f"ours {duration(times.ours)}, upstream {duration(times.theirs)}"
            if (times.ours <= (1 + TIE) * times.theirs) != choice.ours:  # on a busy machine
                choice.why += f"; median ratio of pairs {times.ratio:.2f}"
        self.choices[form] = choice
        return got if choice.ours else want

    def _truth(
        self, want: Any, rows: list[int] | None, method: str, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Upstream's result for these rows in the precision that ours computes in, and in float64.

        Where a copy of the module does not run in float64, its own result stands for both.
        """
        want, args, kwargs = (picked(values, rows) for values in (want, args, kwargs))
        precision = self.settings.precision
        try:
            twin = self._upstream_twin()

            def upstream(dtype: torch.dtype) -> Any:
                own = getattr(type(twin), method)
                with upstream_only():
                    return own(twin.to(dtype), *cast(args, dtype), **cast(kwargs, dtype))

            exact = upstream(torch.float64)
            if precision in ("bf16", "fp16"):
                return upstream(DTYPES[precision]), exact
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # it cannot be copied, or computes with constants in fp32
            return want, cast(want, torch.float64)
        if precision == "tf32":
            with fp32_products("tf32"), upstream_only():
                return self.upstream(method, args, kwargs), exact
        return want, exact

    def _upstream_twin(self) -> nn.Module:
        """Copies the module without our forwards, which would keep the copy alive."""
        twin = copy.deepcopy(self.module)
        for part in twin.modules():
            own = replacement_of(part)
            if own is not None:
                own.unbind()  # this also removes folded forwards
        return twin

    def _time(self, choice: Choice, method: str, args: Any, kwargs: Any) -> Comparison:
        like = self._structure and next(self._structure.parameters(), None)
        clock = wall_clock(torch.device("cpu") if like is None else like.device)

        def ours() -> float:
            return clock(lambda: self._run(choice, method, args, kwargs))

        def theirs() -> float:
            with upstream_only():
                return clock(lambda: self.upstream(method, args, kwargs))

        return compare(ours, theirs)

    def _turn_off(self, problem: str) -> None:
        self.off = problem
        self.choices.clear()
        what = f"{self.name or 'the model'} ({type(self.module).__name__})"
        warn_caller(f"{what} runs upstream's forward: {problem}", AccelerateWarning)


# a call with this many times the elements is compared and timed again
MUCH_LARGER = 4

MOVES = ("train", "_apply", "_replicate_for_data_parallel", "__prepare_scriptable__")


def replacement_of(module: nn.Module) -> "Replacement | None":
    """Returns the replacement that is bound on a module, or None."""
    own = own_forward(module)
    return own if isinstance(own, Replacement) else None


# one thread at a time, so that a module does not change while another thread reads it
_making = threading.RLock()


class _Local(threading.local):
    upstream_only = False

    def __init__(self) -> None:
        self.running: list[Replacement] = []  # whose forward is running, outermost first


_local = _Local()


@contextmanager
def upstream_only() -> Iterator[None]:
    """Makes every forward that this thread calls upstream's, inside the block."""
    before, _local.upstream_only = _local.upstream_only, True
    try:
        with unfolded():
            yield
    finally:
        _local.upstream_only = before
