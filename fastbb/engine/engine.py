"""One object decides how a backbone runs, and can always say why.

Static reasons first (device, gradient, changed weights), then what the mode asks for; mode "auto"
measures on a GPU, and on a CPU compiles where that pays off. Whatever fails, eager runs.
"""

import copy
import hashlib
import json
import statistics
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastbb_kernels.fp32_precision import fp32_products, is_in_force
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

from ..backbone.base import Backbone
from ..weights.derived import is_tracing
from ..weights.watch import ModuleStamp, statistics_note
from .explanation import Explanation, Row
from .measuring import Clock, describe, duration, wall_clock
from .settings import DTYPES, EngineWarning, Settings, Tools
from .trial import Candidate, Run, Trial, is_not_tried, run_trials, winner
from .truth import Truth
from .ways import GRAPH, Way, Ways, on_gpu

MAX_PLANS = 256  # shapes that are remembered
MAX_TUNED = 8  # shapes that mode "auto" measures by itself in one process
# a second shape is measured, and a graph of it recorded, when it came so often
SEEN_BEFORE_TUNED = 3
# what compiling costs and gains before it was measured (Swin-T and ResNet-50, 2 cores of a CPU)
COMPILE_S = 90.0
COMPILE_GAIN = 0.15
# up to as many pixels in a batch, launches cost more than what they launch
SMALL_BATCH_PIXELS = 16 * 224 * 224
_flags_lock = threading.RLock()
_FASTEST = "the fastest that passed its check (ties within 3 % go to the simpler)"


@dataclass
class Plan:
    """How one shape of input runs, and why.

    Attributes:
        way: what runs.
        why: it does.
        trials: what else was tried.
        n_left: times that it runs before the shape is decided anew; None: it is decided.
    """

    way: Way
    why: str
    trials: list[Trial] = field(default_factory=list)
    n_left: int | None = None

    def __post_init__(self) -> None:
        self.why = "; ".join(filter(None, (self.why, self.way.why)))


class Engine:
    """Runs the feature maps of one backbone; `Backbone.prepare` makes it."""

    def __init__(self, backbone: Backbone, settings: Settings, tools: Tools | None = None) -> None:
        self.settings = settings
        self.tools = tools or Tools()
        self._backbone = backbone
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forgets what was compiled, captured and chosen."""
        with self._lock:
            self._state: tuple[Any, ...] | None = None  # what plans were made for
            self._parts: list[torch.nn.Module] | None = None
            self._ways = Ways(self._backbone)
            self._stamp: ModuleStamp | None = None  # of what is baked into plans
            self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
            self._tuned: dict[tuple[int, ...], str] = {}  # shape -> name of what won
            self._s_per_pixel: float | None = None
            self._first_s_per_pixel: float | None = None
            self._notes: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        # artefacts belong to the tensors that they were made from
        return Engine(copy.deepcopy(self._backbone, memo), self.settings, self.tools)

    def __getstate__(self) -> dict[str, Any]:
        return {"_backbone": self._backbone, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tools = Tools()
        self._lock = threading.RLock()
        self.reset()  # asks nothing of the backbone, which is not whole yet

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The feature maps, checked pixels [B, C, H, W] given."""
        self._follow_outputs()
        if self._why_plain(pixel_values) is not None:
            return self._backbone.feature_maps(pixel_values)
        plan = self._plan(pixel_values)
        if plan.way.is_baked and not self._is_current():
            plan = self._after_change() or self._plan(pixel_values)
        try:
            return self.in_precision(plan.way.run, pixel_values)
        except Exception as error:
            # whatever failed, eager does not; where the input is at fault it raises the same
            maps = self.in_precision(self._ways.eager, pixel_values)
            self._replace(pixel_values, plan, describe(error))
            return maps

    def prepare_for(self, pixel_values: Tensor) -> None:
        """Compiles, captures and measures now what pixels of this shape need."""
        with torch.no_grad():  # it is inference that is prepared for
            self(pixel_values)

    def mode_for(self, pixel_values: Tensor) -> str:
        """The mode that computes what pixels of this shape are given, now and in other processes.

        Mode "auto" measures, and may choose otherwise the next time.
        """
        self._follow_outputs()
        with torch.no_grad():
            plain = self._why_plain(pixel_values) is not None
            return "eager" if plain else self._plan(pixel_values).way.mode

    def _follow_outputs(self) -> None:
        """Forgets everything where other maps are wanted, or of another dtype or device."""
        backbone = self._backbone
        state = (list(backbone.out_features), backbone.dtype, backbone.device)
        if self._state not in (None, state) and not (self._state[0] == state[0] and self._compiled):
            self.reset()  # what was compiled is found to be out of date
        self._state = state

    def in_precision(self, run: Any, pixel_values: Tensor) -> Any:
        """A call with fp32 multiplied as `precision` asks, which PyTorch keeps in global flags."""
        if self.settings.precision is None or self._backbone.dtype != torch.float32:
            return run(pixel_values)
        wanted = "tf32" if self.settings.precision == "tf32" else "ieee"
        with _flags_lock:  # one after the other: the flags are the process's
            if not is_in_force(wanted):
                with fp32_products(wanted):
                    return run(pixel_values)
        return run(pixel_values)

    # --- why nothing but the backbone's own forward may run

    def _why_plain(self, pixel_values: Tensor) -> str | None:
        backbone = self._backbone
        if is_tracing():
            return "inside a graph that is being recorded"
        if self._parts is None:
            self._parts = list(backbone.modules())
        if any(part.training for part in self._parts):
            return self._note("training", "in training mode: call .eval()")
        if torch.is_autocast_enabled(pixel_values.device.type):
            return self._note("autocast", "under torch.autocast, which chooses dtypes itself")
        if torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(p.requires_grad for p in backbone.parameters())
        ):
            return self._warn_once(
                "gradient",
                "a gradient is needed here, so it runs eager: call it under torch.no_grad() or "
                "torch.inference_mode()",
            )
        return None

    def _is_current(self) -> bool:
        return self._stamp is None or self._stamp.is_current()

    def _after_change(self) -> Plan | None:
        """Forgets what was baked; what runs instead where making it again takes long."""
        with self._lock:
            return None if self._is_current() else self._forget_baked()

    @property
    def _compiled(self) -> bool:
        """Whether a shape runs what takes long to make again."""
        return any(_compiles(plan.way.name) for plan in list(self._plans.values()))

    def _forget_baked(self) -> Plan | None:
        if self._compiled:
            reason = "weights, settings, layers or hooks changed since they were compiled"
            reason = f"{reason}, so it runs eager: call prepare() again"
            reason = self._warn_once("changed", reason)
            return Plan(Way("eager", self._ways.eager), reason)
        if any(plan.way.is_baked for plan in self._plans.values()):
            self.reset()  # graphs are recorded again in no time
        self._ways, self._stamp = Ways(self._backbone), None
        return None

    def _note(self, topic: str, reason: str) -> str:
        self._notes[topic] = reason
        return reason

    def _warn_once(self, topic: str, reason: str) -> str:
        if topic not in self._notes:
            self._warn(reason)
        return self._note(topic, reason)

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self._name}: {text}", EngineWarning, stacklevel=2)

    # --- what to run

    def _plan(self, pixel_values: Tensor) -> Plan:
        """How pixels of this shape run; decided once, or once more when the shape came often."""
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
                    self._stamp = ModuleStamp(self._backbone)
                plan = self._plans[key] = self._try_to_decide(pixel_values, plan is not None)
                while len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _try_to_decide(self, pixel_values: Tensor, seen_often: bool) -> Plan:
        try:
            return self.in_precision(lambda x: self._decide(x, seen_often), pixel_values)
        except Exception as error:  # eager raises the same where the input is at fault
            self.in_precision(self._ways.eager, pixel_values)
            problem = f"choosing what runs failed: {describe(error)}"
            self._warn(f"eager runs, {problem}")
            return Plan(Way("eager", self._ways.eager), problem)

    def _decide(self, pixel_values: Tensor, seen_often: bool) -> Plan:
        mode = self.settings.mode
        if len(pixel_values) == 0:
            return Plan(Way("eager", self._ways.eager), "an empty batch")
        if pixel_values.device.type not in ("cpu", "cuda", "meta"):
            why = f"nothing else is known for {pixel_values.device.type}"
            return Plan(Way("eager", self._ways.eager), why)
        is_gpu = on_gpu(pixel_values)
        if mode == "auto":
            plan = self._choose(pixel_values, is_gpu, seen_often)
        elif "compile" in mode:
            plan = self._plan_compiled(mode, pixel_values)
        elif is_gpu:
            plan = self._plan_op_by_op(mode, pixel_values, seen_often)
        else:
            plan = self._eager_plan(pixel_values, f"mode={mode!r}")
        return plan

    def _eager_plan(self, pixel_values: Tensor, why: str, *trials: Trial) -> Plan:
        return Plan(self._ways.build("eager", pixel_values), why, list(trials))

    def _plan_compiled(self, mode: str, pixel_values: Tensor) -> Plan:
        """What a mode that the user named compiles, held to the truth before it may run."""
        if self._needs_another_for_few(mode, pixel_values):
            why = f"another size than {mode} is for; a second artefact pays for more images"
            return self._eager_plan(pixel_values, f"{why}: say expected_images=")
        if not self._ways.has_artefact(mode, pixel_values):
            self._warn_if_wasted(pixel_values)
        recorded = self.settings.cuda_graph is True and self._may_capture(pixel_values)
        return self._checked(mode + GRAPH if recorded else mode, pixel_values, f"mode={mode!r}")

    def _plan_op_by_op(self, mode: str, pixel_values: Tensor, seen_often: bool) -> Plan:
        """On a GPU; as a CUDA graph where that was asked for, or the batch is small and usual."""
        plan = Plan(self._ways.build(mode, pixel_values), f"mode={mode!r}")
        asked = self.settings.cuda_graph is True
        if not self._may_capture(pixel_values):
            return plan
        if not asked and len(pixel_values) * pixel_values.shape[2:].numel() > SMALL_BATCH_PIXELS:
            plan.why += "; the batch is too large to gain from a CUDA graph"
            return plan
        if not (asked or seen_often or not self._plans):
            plan.n_left = SEEN_BEFORE_TUNED
            plan.why += "; recorded as a CUDA graph when the shape came more often"
            return plan
        return self._checked(mode + GRAPH, pixel_values, plan.why, plan)

    def _checked(
        self, name: str, pixel_values: Tensor, why: str, instead: Plan | None = None
    ) -> Plan:
        """A way that is held to the truth once; another plan, with the reason, if it fails."""
        try:
            way = self._way(name, pixel_values)
            problem = None
            if way.is_baked:
                problem = Truth.of(self._backbone, pixel_values).problem(way.run(pixel_values))
            if problem is None:
                return Plan(way, why)
        except Exception as error:  # whatever a compiler, a capture or a device raises
            problem = describe(error)
        instead = instead or self._eager_plan(pixel_values, "")
        self._warn(f"{name} is off, {instead.way.runs} runs: {problem}")
        return Plan(instead.way, f"{name} failed", [*instead.trials, Trial(name, problem=problem)])

    def _may_capture(self, pixel_values: Tensor) -> bool:
        return self.settings.cuda_graph is not False and pixel_values.is_cuda

    # --- what compiling costs and saves

    def _compiling_pays(self, pixel_values: Tensor) -> bool:
        return self._saved_s(pixel_values) >= COMPILE_S

    def _needs_another_for_few(self, name: str, pixel_values: Tensor) -> bool:
        """Whether this shape needs a second artefact, which does not pay."""
        return (
            self._ways.is_compiled(name)
            and not self._ways.has_artefact(name, pixel_values)
            and not self._compiling_pays(pixel_values)
        )

    def _saved_s(self, pixel_values: Tensor, gain: float = COMPILE_GAIN) -> float:
        """Seconds that compiling saves on all expected images."""
        expected = self.settings.expected_images
        if expected is None:
            return 0.0
        saved_pixels = pixel_values.shape[2:].numel() * expected * gain
        if self._s_per_pixel is None:
            clock, way = self._clock(pixel_values), self._plain_name(pixel_values)
            few = pixel_values[:1]
            run = self._ways.build(way, few).run
            if self._first_s_per_pixel is None:
                self._first_s_per_pixel = clock(lambda: run(few)) / few.shape[2:].numel()
            if self._first_s_per_pixel * saved_pixels < COMPILE_S:
                # no first run is faster than those that follow
                return self._first_s_per_pixel * saved_pixels
            run = self._ways.build(way, pixel_values).run
            run(pixel_values)
            times = [clock(lambda: run(pixel_values)) for _ in range(3)]
            n_pixels = len(pixel_values) * pixel_values.shape[2:].numel()
            self._s_per_pixel = statistics.median(times) / n_pixels
        return self._s_per_pixel * saved_pixels

    def _plain_name(self, pixel_values: Tensor) -> str:
        return "triton" if on_gpu(pixel_values) else "eager"

    def _warn_if_wasted(self, pixel_values: Tensor) -> None:
        expected = self.settings.expected_images
        if expected is not None and not self._compiling_pays(pixel_values):
            self._warn(
                f"compiling takes about {COMPILE_S:.0f} s and saves about "
                f"{duration(self._saved_s(pixel_values))} on {expected} images; mode='auto' "
                "would not compile"
            )

    def _clock(self, pixel_values: Tensor) -> Clock:
        return self.tools.clock or wall_clock(pixel_values.device)

    # --- measured

    def _choose(self, pixels: Tensor, is_gpu: bool, seen_often: bool) -> Plan:
        """Mode "auto": what was measured, for this shape or a similar one; else it is measured."""
        remembered = self._remembered(pixels)
        if remembered:
            return self._choose_remembered(pixels, remembered)
        if not self._tuned or (is_gpu and seen_often and len(self._tuned) < MAX_TUNED):
            if is_gpu:
                return self.tune(pixels, compiling=self._compiling_pays(pixels))
            if self.settings.expected_images is None:
                why = "compiling takes a minute or more: say expected_images=, or mode='compile'"
                return self._eager_plan(pixels, why)
            if not self._compiling_pays(pixels):
                return self._eager_plan(pixels, self._why_not_compiled(self._saved_s(pixels)))
            return self.tune(pixels)
        # most like it: the size first, then the number of images
        like = min(self._tuned, key=lambda shape: _distance(shape, tuple(pixels.shape)))
        name = self._tuned[like].removesuffix(GRAPH)
        plan = self._named(name, pixels, f"what won for {_by(like)}")
        if is_gpu and not seen_often and len(self._tuned) < MAX_TUNED:
            plan.n_left = SEEN_BEFORE_TUNED
        return plan

    def _choose_remembered(self, pixels: Tensor, trials: list[Trial]) -> Plan:
        """The best of earlier trials; one that has to be compiled only where that pays now."""
        best = winner(trials)
        assert best is not None and best.seconds is not None
        plain = winner([trial for trial in trials if not _compiles(trial.name)])
        why = "measured before on this machine"
        if _compiles(best.name) and plain is not None and plain.seconds is not None:
            saved_s = (plain.seconds - best.seconds) / len(pixels)
            saved_s *= self.settings.expected_images or 0
            if saved_s < COMPILE_S and not self._ways.has_artefact(best.name, pixels):
                best, why = plain, f"{why}; {self._why_not_compiled(saved_s)}"
        plan = self._named(best.name, pixels, why)
        plan.trials += trials
        self._tuned[tuple(pixels.shape)] = best.name
        return plan

    def _why_not_compiled(self, saved_s: float) -> str:
        expected = self.settings.expected_images
        if expected is None:
            return "compiling takes a minute or more: say expected_images="
        return (
            f"compiling takes about {COMPILE_S:.0f} s and would save about {duration(saved_s)} on "
            f"{expected} images"
        )

    def _way(self, name: str, pixels: Tensor) -> Way:
        """A way by its name, among the engine's own and those of `tools`."""
        for candidate in self.tools.candidates:
            if candidate.name == name:
                return Way(name, candidate.build(), True)
        return self._ways.build(name, pixels)

    def _named(self, name: str, pixels: Tensor, why: str) -> Plan:
        """What was chosen by its name, held to the truth for these pixels."""
        if self._needs_another_for_few(name, pixels):
            why = f"another size than {name} is for; a second artefact pays for more images"
            return self._eager_plan(pixels, why)
        return self._checked(name, pixels, why)

    def tune(self, pixels: Tensor, compiling: bool = True) -> Plan:
        """Measures the candidates on these pixels, remembers and returns the best.

        Args:
            pixels: [B, C, H, W].
            compiling: also what needs a compiler.
        """
        pixels = pixels.detach()
        candidates = self._candidates(pixels, compiling)
        truth = Truth.of(self._backbone, pixels)
        trials, runs = run_trials(
            candidates,
            pixels,
            truth.problem,
            clock=self._clock(pixels),
            budget_s=self.tools.budget_s,
            report=self.tools.progress(len(candidates)),
        )
        best = winner(trials)
        if best is None:
            plan = self._eager_plan(pixels, "nothing passed: eager is what others are held to")
        else:
            is_own = all(c.name != best.name for c in self.tools.candidates)
            way = Way(best.name, runs[best.name], _bakes(best.name))
            plan = Plan(self._ways.build(best.name, pixels) if is_own else way, _FASTEST)
            self._tuned[tuple(pixels.shape)] = best.name
            if compiling and not any(is_not_tried(trial) for trial in trials):
                value = {"trials": [trial.to_dict() for trial in trials], "winner": best.name}
                self.cache(pixels.device).put("tuned", self.key(pixels), value)
        plan.trials = trials
        for trial in trials:
            if trial.problem is not None and not is_not_tried(trial):
                self._warn(f"{trial.name} is off: {trial.problem}")
        with self._lock:
            self._plans[tuple(pixels.shape)] = plan
        return plan

    def _candidates(self, pixels: Tensor, compiling: bool) -> list[Candidate]:
        """The ways to run, simplest first."""
        names = ["triton", "eager", "triton+compile", "compile"]
        if not on_gpu(pixels):
            names = ["eager", "compile"]
        elif self._may_capture(pixels):
            names += [name + GRAPH for name in names]

        def candidate(name: str) -> Candidate:
            def build() -> Run:
                return self._ways.build(name, pixels).run

            return Candidate(name, build, _compiles(name))

        own = [candidate(name) for name in names if compiling or not _compiles(name)]
        return [*own, *(c for c in self.tools.candidates if compiling or not c.compiles)]

    def _remembered(self, pixels: Tensor) -> list[Trial]:
        """The trials of an earlier process, if their winner still can be built."""
        value: Any = self.cache(pixels.device).get("tuned", self.key(pixels))
        try:
            trials = [Trial.from_dict(trial) for trial in value["trials"]]
        except (TypeError, KeyError, ValueError):
            return []
        names = [c.name for c in self._candidates(pixels, compiling=True)]
        best = winner(trials)
        return trials if best is not None and all(t.name in names for t in trials) else []

    def cache(self, device: torch.device) -> ResultCache:
        """Where measured choices are remembered."""
        if self.tools.cache is None:
            self.tools.cache = ResultCache(Machine.of(device))
        return self.tools.cache

    def key(self, pixels: Tensor) -> str:
        """What a measured choice is remembered by: model, maps, precision and shape."""
        config = self._backbone.config.to_dict()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        name = config.get("backbone") or config["model_type"]
        shape = "x".join(map(str, (len(pixels), *pixels.shape[2:])))
        return f"{name}-{digest.hexdigest()[:8]}/{self._precision}/{shape}"

    # --- what happened

    def _replace(self, pixel_values: Tensor, plan: Plan, problem: str) -> None:
        """A plan failed where eager did not: this shape runs eager from now on."""
        self._warn(f"{plan.way.runs} failed, eager runs: {problem}")
        trials = [*plan.trials, Trial(plan.way.name, problem=problem)]
        with self._lock:
            self._plans[tuple(pixel_values.shape)] = self._eager_plan(
                pixel_values, f"{plan.way.runs} failed", *trials
            )

    def explain(self) -> Explanation:
        """What runs for each shape so far, and why."""
        rows = [
            Row(
                _by(shape),
                plan.way.runs,
                plan.why,
                "; ".join(str(trial) for trial in plan.trials if trial.name != plan.way.name),
            )
            for shape, plan in list(self._plans.items())
        ]
        if not rows:
            rows = [Row("any", "not decided", "nothing has run yet, and no example= was given")]
        rows += [Row("note", "eager", reason) for reason in self._notes.values()]
        rows += notes_on(self._backbone)
        notes = [] if self.tools.cache is None else self.tools.cache.notes
        rows += [Row("cache", "-", note) for note in notes]
        return Explanation(f"{self._name}, mode {self.settings.mode}", tuple(rows))

    @property
    def _name(self) -> str:
        backbone = self._backbone
        return f"{type(backbone).__name__} in {self._precision} on {backbone.device}"

    @property
    def _precision(self) -> str:
        names = {dtype: name for name, dtype in DTYPES.items()}
        own = names.get(self._backbone.dtype, str(self._backbone.dtype).removeprefix("torch."))
        return "tf32" if self.settings.precision == "tf32" else own


def notes_on(backbone: Backbone) -> list[Row]:
    """What to know about a backbone, however it runs."""
    note = statistics_note(backbone)
    return [] if note is None else [Row("note", "-", note)]


def _compiles(name: str) -> bool:
    return "compile" in name


def _bakes(name: str) -> bool:
    return name not in ("eager", "triton")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, (shape[0], *shape[2:])))


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[bool, int, int]:
    """How unlike two shapes [B, C, H, W] are: in size, in pixels, in images."""
    pixels = abs(one[2] * one[3] - other[2] * other[3])
    return one[2:] != other[2:], pixels, abs(one[0] - other[0])
