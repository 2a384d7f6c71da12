"""Engine: decides how a backbone runs, and explains why.

Static reasons come first (device, gradient, changed weights), then the choice for the shape of the
input (`choose.Chooser`). If anything fails, eager runs.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbb_kernels.fp32_precision import fp32_products, is_in_force

from ..backbone.base import Backbone
from ..weights.derived import is_tracing
from ..weights.watch import (
    ModuleStamp,
    follow_layers,
    has_hooks,
    hooks_in,
    is_capturing,
    is_training,
    statistics_note,
    untraced,
)
from .choose import Chooser, Plan, by
from .computation import Computation, device_of, dtype_of
from .copies import copies_note
from .explanation import Explanation, Row
from .graphs import GraphPool
from .measuring import describe
from .settings import Settings, Tools
from .trial import Trial
from .ways import compiles

MAX_PLANS = 256  # shapes that are remembered
_flags_lock = threading.RLock()


class Engine:
    """Runs one computation; `Backbone.prepare` makes it.

    Args:
        computation: to run.
        settings: that were asked for.
        tools: to measure and remember with.
        is_converted: whether the computation has a copy of the weights in another dtype.
    """

    def __init__(
        self,
        computation: Computation,
        settings: Settings,
        tools: Tools | None = None,
        is_converted: bool = False,
    ) -> None:
        self.settings = settings
        self.tools = tools or Tools()
        self._is_converted = is_converted
        self._computation = computation
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forgets compiled artefacts, graphs and choices."""
        with self._lock:
            self._state: tuple[Any, ...] | None = None  # outputs, dtype and device of the plans
            self._modules: list[nn.Module] | None = None
            self._layers: list[dict[str, Any]] = []  # inside a backbone; their attributes
            self._last_layer: object = None
            self._chooser: Chooser | None = None
            self._stamp: ModuleStamp | None = None  # of what is baked into plans
            self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
            self._notes: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        # artefacts belong to the tensors that they were made from
        computation = copy.deepcopy(self._computation, memo)
        return Engine(computation, self.settings, self.tools, self._is_converted)

    def __getstate__(self) -> dict[str, Any]:
        names = ("_computation", "settings", "_is_converted")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tools = Tools()
        self._lock = threading.RLock()
        self.reset()  # asks nothing of the modules, which are not whole yet

    @property
    def module(self) -> nn.Module:
        """The module that computes; a converted copy if another precision was requested."""
        return self._computation.module

    @property
    def chooser(self) -> Chooser:
        """The chooser of each shape; made at first use."""
        if self._chooser is None:
            self._chooser = Chooser(self._computation, self.settings, self.tools)
        return self._chooser

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps of checked pixels [B, C, H, W]."""
        baked = None if is_tracing() else self._baked_plan(pixel_values)
        maps = None if baked is None else self._run_if_current(*baked, pixel_values)
        if maps is not None:
            return maps
        self._follow_outputs()
        if self._why_plain(pixel_values) is not None:
            return self._computation.feature_maps(pixel_values)
        plan = self._plan(pixel_values)
        if plan.way.is_baked and not self._is_current():
            plan = self._after_change() or self._plan(pixel_values)
        return self._run(plan, pixel_values)

    def _run(self, plan: Plan, pixel_values: Tensor) -> tuple[Tensor, ...]:
        try:
            return self.in_precision(plan.way.run, pixel_values)
        except Exception as error:
            # whatever failed, eager does not; where the input is at fault it raises the same
            maps = self.in_precision(self.chooser.ways.eager, pixel_values)
            self._replace(pixel_values, plan, describe(error))
            return maps

    def _run_if_current(
        self, plan: Plan, stamp: ModuleStamp, pixel_values: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Runs a baked plan; returns None if it must not run, or anything has changed since."""
        if self._why_plain(pixel_values, is_baked=True) is not None:
            return None
        maps = None
        # a graph reads the memory that the weights had when it was recorded
        if isinstance(plan.way.run, GraphPool) and stamp.has_same_memory():
            with suppress(Exception):  # which the run below raises again
                # the GPU works while the modules are read
                maps = self.in_precision(plan.way.run.replayed, pixel_values)
        if not stamp.is_current():
            return None
        return self._run(plan, pixel_values) if maps is None else maps

    def prepare_for(self, pixel_values: Tensor) -> None:
        """Compiles, captures and measures now for pixels of this shape."""
        with torch.no_grad():  # it is inference that is prepared for
            self(pixel_values)

    def tune(self, pixel_values: Tensor) -> Plan:
        """Measures the candidates for pixels of this shape now, and takes the fastest."""
        with self._lock, torch.no_grad():
            self._stamp = self._stamp or ModuleStamp(self._computation.module)
            plan = self.in_precision(self.chooser.tune, pixel_values)
            self._plans[tuple(pixel_values.shape)] = plan
        return plan

    def mode_for(self, pixel_values: Tensor) -> str:
        """Returns the mode that computes the same maps for this shape here and in other processes.

        Mode "auto" measures, and may choose another mode the next time.
        """
        self._follow_outputs()
        with torch.no_grad():
            plain = self._why_plain(pixel_values) is not None
            return "eager" if plain else self._plan(pixel_values).way.mode

    def trials_of(self, pixel_values: Tensor) -> list[Trial]:
        """Returns the measured ways for pixels of this shape; empty if none were measured."""
        plan = self._plans.get(tuple(pixel_values.shape))
        return [] if plan is None else plan.trials

    def in_precision(self, run: Callable[[Tensor], Any], pixel_values: Tensor) -> Any:
        """Runs a call in the precision of fp32 products, which PyTorch keeps in global flags."""
        precision = self.settings.precision
        if precision is None or dtype_of(self._computation.module) != torch.float32:
            return run(pixel_values)
        wanted = "tf32" if precision == "tf32" else "ieee"
        with _flags_lock:  # one after the other: the flags are the process's
            if not is_in_force(wanted):
                with fp32_products(wanted):
                    return run(pixel_values)
        return run(pixel_values)

    def _follow_outputs(self) -> None:
        """Forgets everything if the selected maps, the dtype or the device changed."""
        computation = self._computation
        module = computation.module
        state = (computation.outputs, dtype_of(module), device_of(module))
        if self._state not in (None, state) and not (
            self._state[0] == state[0] and self._has_compiled
        ):
            self.reset()  # what was compiled is found to be out of date
        self._state = state

    # --- why nothing but the computation's own forward may run

    def _why_plain(self, pixel_values: Tensor, is_baked: bool = False) -> str | None:
        """Returns why only the computation's own forward may run, or None.

        Args:
            pixel_values: [B, C, H, W].
            is_baked: whether a plan runs whose stamp is read, so that modules need no look here.
        """
        if is_tracing():
            return "inside a graph that is being recorded"
        if not is_baked and (reason := self._why_plain_modules()):
            return reason
        if self._layers and _has_any_global_hook():
            return self._hooked()
        if torch.is_autocast_enabled(pixel_values.device.type):
            return self._note("autocast", "under torch.autocast, which chooses dtypes itself")
        module = self._computation.module
        if torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(p.requires_grad for p in module.parameters())
        ):
            return self._warn_once(
                "gradient",
                "a gradient is needed here, so it runs eager: call it under torch.no_grad() or "
                "torch.inference_mode()",
            )
        return None

    def _why_plain_modules(self) -> str | None:
        """As `_why_plain`, of what the modules say."""
        module = self._computation.module
        if self._modules is None or self._last_layer is not untraced.last_layer:
            last_layer, modules = untraced.last_layer, list(module.modules())
            follow_layers(modules)
            # of a host, `accelerate` knows which hooks only look
            layers = modules[1:] if isinstance(module, Backbone) else []
            self._layers = list(map(vars, layers))
            self._last_layer, self._modules = last_layer, modules  # last: other threads ask it
        if has_hooks(self._layers) and not all(map(is_capturing, hooks_in(self._layers))):
            return self._hooked()
        if any(map(is_training, self._modules or ())):
            return self._note("training", "in training mode: call .eval()")
        return None

    def _hooked(self) -> str:  # measuring would call them, and compiled code might not
        reason = "layers have hooks, which only run where it runs eager"
        is_slower = self.settings.mode != "auto" or self._has_compiled
        return (self._warn_once if is_slower else self._note)("hooks", reason)

    def _note(self, topic: str, reason: str) -> str:
        self._notes[topic] = reason
        return reason

    def _warn_once(self, topic: str, reason: str) -> str:
        if topic not in self._notes:
            self.chooser.warn(reason)
        return self._note(topic, reason)

    # --- changes

    def _is_current(self) -> bool:
        return self._stamp is None or self._stamp.is_current()

    def _after_change(self) -> Plan | None:
        """Forgets baked ways; returns the plan to run instead if making them again takes long."""
        with self._lock:
            return None if self._is_current() else self._forget_baked()

    @property
    def _has_compiled(self) -> bool:
        """Whether some shape runs a way that takes long to make again."""
        return any(compiles(plan.way.name) for plan in list(self._plans.values()))

    def _forget_baked(self) -> Plan | None:
        if self._has_compiled:
            reason = "weights, settings, layers or hooks changed since they were compiled"
            reason = f"{reason}, so it runs eager: prepare or accelerate it again"
            reason = self._warn_once("changed", reason)
            return self.chooser.plain_plan(reason)
        if any(plan.way.is_baked for plan in self._plans.values()):
            self.reset()  # graphs are recorded again in no time
        else:
            self.chooser.renew_ways()
            self._stamp = None
        return None

    # --- memory

    @property
    def converted(self) -> list[nn.Module]:
        """Copies of the weights in another dtype, which this engine computes with."""
        own = [self.module] if self._is_converted else []
        return own if self._chooser is None else own + self._chooser.ways.copies

    @property
    def has_compiled(self) -> bool:
        """Whether a compiler keeps weights of its own."""
        return self._chooser is not None and self._chooser.ways.has_artefact()

    # --- what to run

    def _baked_plan(self, pixel_values: Tensor) -> tuple[Plan, ModuleStamp] | None:
        """The baked plan of this shape, and the stamp that has to be current for it to run.

        Then dtype, device and modes are as they were too, so that modules are read once: of all
        that is in memory, a call finds only little in the caches.
        """
        stamp, plan = self._stamp, self._plans.get(tuple(pixel_values.shape))
        if plan is None or plan.n_left is not None or not plan.way.is_baked:
            return None
        state = self._state  # read once: another thread may reset it
        has_outputs = state is not None and state[0] == self._computation.outputs
        return (plan, stamp) if has_outputs and stamp is not None and stamp.is_plain else None

    def _plan(self, pixel_values: Tensor) -> Plan:
        """Returns the plan for this shape; made once, and again when the shape is frequent."""
        key = tuple(pixel_values.shape)
        plan = self._plans.get(key)
        if plan is not None and plan.n_left is None:
            return plan
        with self._lock, torch.no_grad():
            plan = self._plans.get(key)
            if plan is not None and plan.n_left is not None:
                plan.n_left -= 1
            if plan is None or (plan.n_left is not None and plan.n_left <= 0):
                instead = self._after_change()
                if instead is not None:
                    return instead
                if self._stamp is None:
                    self._stamp = ModuleStamp(self._computation.module)
                plan = self._plans[key] = self._try_to_decide(pixel_values, plan is not None)
                while len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _try_to_decide(self, pixel_values: Tensor, seen_often: bool) -> Plan:
        chooser, is_first = self.chooser, not self._plans
        try:
            return self.in_precision(
                lambda x: chooser.decide(x, seen_often, is_first), pixel_values
            )
        except Exception as error:  # eager raises the same where the input is at fault
            self.in_precision(chooser.ways.eager, pixel_values)
            problem = f"choosing what runs failed: {describe(error)}"
            chooser.warn(f"eager runs, {problem}")
            return chooser.plain_plan(problem)

    def _replace(self, pixel_values: Tensor, plan: Plan, problem: str) -> None:
        """Makes a shape run eager from now on, after its plan failed and eager did not."""
        self.chooser.warn(f"{plan.way.runs} failed, eager runs: {problem}")
        trials = [*plan.trials, Trial(plan.way.name, problem=problem)]
        instead = self.chooser.eager_plan(pixel_values, f"{plan.way.runs} failed", *trials)
        with self._lock:
            self._plans[tuple(pixel_values.shape)] = instead

    @property
    def notes(self) -> list[str]:
        """The reasons why some calls ran eager."""
        return list(self._notes.values())

    def explain(self) -> Explanation:
        """Returns the way that runs for each shape so far, and the reason."""
        is_current = self._is_current()
        rows = [
            Row(
                by(shape),
                plan.way.runs if is_current or not compiles(plan.way.name) else "eager",
                plan.why,
                "; ".join(str(trial) for trial in plan.trials if trial.name != plan.way.name),
                plan.time,
            )
            for shape, plan in list(self._plans.items())
        ]
        if not rows:
            rows = [Row("any", "not decided", "nothing has run yet, and no example= was given")]
        rows += [Row("some calls", "eager", why) for why in self.notes]
        rows += notes_on(self._computation.module)
        notes = [] if self.tools.cache is None else self.tools.cache.notes
        rows += [Row("cache", "-", note) for note in [*notes, *self.chooser.ways.notes]]
        copies = copies_note([self.module], self.converted, self.has_compiled)
        return Explanation(f"{self.chooser.name}, mode {self.settings.mode}", tuple(rows), copies)


def notes_on(module: nn.Module) -> list[Row]:
    """Notes on a model that hold for every way to run it."""
    note = statistics_note(module)
    rows = [] if note is None else [Row("note", "-", note)]
    called = module.called_modules() if isinstance(module, Backbone) else {}
    for reason in dict.fromkeys(called.values()):
        first, *more = [name or "all" for name, why in called.items() if why == reason]
        names = f"{first} and {len(more)} more" if more else first
        rows.append(Row("note", "layer by layer", f"{names}: {reason}"))
    return rows
