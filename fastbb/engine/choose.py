"""Chooses the way to run one shape of input: the one of the mode, or the measured fastest."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache
from fastbb_kernels.warning import warn_caller

from .compile_cost import CompileCost
from .computation import Computation, device_of, dtype_of
from .measuring import Clock, describe, duration, wall_clock
from .memory import free_bytes, tensor_memory
from .openvino import MISSING, OPENVINO, openvino_version, why_not_openvino
from .settings import EngineWarning, Settings, Tools, dtype_name
from .trial import Candidate, Run, Trial, is_not_tried, run_trials, winner
from .truth import Truth
from .ways import GRAPH, Way, Ways, bakes, compiles, on_gpu

MAX_TUNED = 8  # shapes that mode "auto" measures by itself in one process
# calls after which a second shape is measured, and its graph recorded
SEEN_BEFORE_TUNED = 3
# of the free memory of a GPU, which the maps of a graph take as long as it is kept
MOST_OF_FREE_MEMORY = 0.25
_FASTEST = "the fastest that passed its check (ties within 3 % go to the simpler)"


@dataclass
class Plan:
    """The way in which one shape of input runs, and the reason.

    Attributes:
        way: the way that runs.
        why: the reason.
        trials: outcomes of the ways that were tried.
        n_left: calls before the shape is decided again; None: the decision is final.
    """

    way: Way
    why: str
    trials: list[Trial] = field(default_factory=list)
    n_left: int | None = None

    def __post_init__(self) -> None:
        self.why = "; ".join(filter(None, (self.why, self.way.why)))

    @property
    def time(self) -> str:
        """The measured time of its way, or ""."""
        seconds = [t.seconds for t in self.trials if t.name == self.way.name and t.seconds]
        return duration(seconds[0]) if seconds else ""


class Chooser:
    """Chooses the way to run each shape of input of one computation.

    Args:
        computation: the computation to run.
        settings: the requested settings.
        tools: clock, cache and candidates.

    Attributes:
        ways: builds the ways to run.
        cost: decides whether compiling pays.
    """

    def __init__(self, computation: Computation, settings: Settings, tools: Tools) -> None:
        self._computation, self._settings, self._tools = computation, settings, tools
        self._tuned: dict[tuple[int, ...], str] = {}  # shape -> name of the winner
        self._no_graph: dict[tuple[int, ...], str | None] = {}  # shape -> why it gets no graph
        self.renew_ways()
        self._cost: CompileCost | None = None

    def renew_ways(self) -> None:
        """Forgets what was compiled and recorded."""
        self.ways = Ways(self._computation, self._compiling)

    @property
    def cost(self) -> CompileCost:
        if self._cost is None:
            key = f"{self._computation.cache_key}/{self.precision}"
            expected = self._settings.expected_images
            self._cost = CompileCost(expected, self._plain, self._clock, self.cache, key)
        return self._cost

    def _compiling(self, name: str, pixels: Tensor) -> AbstractContextManager[Callable[[], None]]:
        return self.cost.compiling(name, f"{self.name} for {by(tuple(pixels.shape))}")

    @property
    def name(self) -> str:
        """Class, precision and device, for messages."""
        module = self._computation.module
        return f"{type(module).__name__} in {self.precision} on {device_of(module)}"

    @property
    def precision(self) -> str:
        """Precision of the computation."""
        is_tf32 = self._settings.precision == "tf32"
        return "tf32" if is_tf32 else dtype_name(dtype_of(self._computation.module))

    @property
    def cache(self) -> ResultCache:
        """Cache file of measured choices."""
        if self._tools.cache is None:
            self._tools.cache = ResultCache(Machine.of(device_of(self._computation.module)))
        return self._tools.cache

    def warn(self, text: str) -> None:
        """Warns of something that does not run as it was asked to."""
        warn_caller(f"{self.name}: {text}", EngineWarning)

    def decide(self, pixels: Tensor, seen_often: bool, is_first: bool) -> Plan:
        """Returns the plan for pixels of this shape.

        Args:
            pixels: [B, C, H, W].
            seen_often: whether the shape came often enough for measuring and recording to pay.
            is_first: whether no other shape has a plan.
        """
        mode = self._settings.mode
        if len(pixels) == 0:
            return self.plain_plan("an empty batch")
        if pixels.device.type not in ("cpu", "cuda", "meta"):
            return self.plain_plan(f"nothing else is known for {pixels.device.type}")
        if mode == "auto":
            plan = self._fastest(pixels, seen_often)
            plan.why = self._with_hint(plan.why, pixels)
            return plan
        if compiles(mode):
            return self._compiled(mode, pixels)
        if on_gpu(pixels):
            return self._op_by_op(mode, pixels, seen_often, is_first)
        return self.eager_plan(pixels, f"mode={mode!r}")

    def eager_plan(self, pixels: Tensor, why: str, *trials: Trial) -> Plan:
        """Returns the eager plan for this shape; a CPU may split the batch to save memory."""
        return Plan(self.ways.build("eager", pixels), why, list(trials))

    def plain_plan(self, why: str) -> Plan:
        """Returns the eager plan for pixels of any shape, with whole batches."""
        return Plan(Way("eager", self.ways.eager), why)

    # --- by the requested mode

    def _compiled(self, mode: str, pixels: Tensor) -> Plan:
        if not self.ways.has_artefact(mode):
            wasted = self.cost.wasted(mode, pixels)
            if wasted is not None:
                self.warn(f"{wasted}; mode='auto' would not")
        recorded = self._settings.cuda_graph is True and self._may_capture(pixels)
        return self._verified_plan(mode + GRAPH if recorded else mode, pixels, f"mode={mode!r}")

    def _op_by_op(self, mode: str, pixels: Tensor, seen_often: bool, is_first: bool) -> Plan:
        """Returns the plan op by op on a GPU, as a CUDA graph if requested or worth it."""
        plan = Plan(self.ways.build(mode, pixels), f"mode={mode!r}")
        asked = self._settings.cuda_graph is True
        if not self._may_capture(pixels):
            return plan
        if not (asked or seen_often or is_first):
            plan.n_left = SEEN_BEFORE_TUNED
            plan.why += "; recorded as a CUDA graph when the shape came more often"
            return plan
        if too_large := self._why_no_graph(pixels):
            plan.why += f"; {too_large}"
            return plan
        return self._verified_plan(mode + GRAPH, pixels, plan.why, plan)

    def _why_no_graph(self, pixels: Tensor) -> str | None:
        """The reason why a graph would take too much memory, or None; found once for a shape."""
        if self._settings.cuda_graph is True:
            return None
        shape = tuple(pixels.shape)
        if shape not in self._no_graph:
            needed = tensor_memory(self._plain(pixels), pixels).peak
            free = free_bytes(pixels.device)
            self._no_graph[shape] = None
            if needed > MOST_OF_FREE_MEMORY * free:
                self._no_graph[shape] = (
                    f"a CUDA graph would keep {needed / 1e9:.2g} GB, more than "
                    f"{MOST_OF_FREE_MEMORY:.0%} of the {free / 1e9:.2g} GB that are free"
                )
        return self._no_graph[shape]

    def _may_capture(self, pixels: Tensor) -> bool:
        return self._settings.cuda_graph is not False and pixels.is_cuda

    def _verified_plan(
        self, name: str, pixels: Tensor, why: str, instead: Plan | None = None
    ) -> Plan:
        """Returns the plan of a way if its maps are right, else another plan with the reason."""
        truth = cache(lambda: Truth.of(self._computation, pixels))
        try:
            way = self._way(name, pixels, truth)
            problem = truth().problem(way.run(pixels)) if way.is_baked else None
            if problem is None:
                return self._freeing_memory(Plan(way, why))
        except Exception as error:  # any error of a compiler, a capture or a device
            problem = describe(error)
        instead = instead or self.eager_plan(pixels, "")
        self.warn(f"{name} is off, {instead.way.runs} runs: {problem}")
        return Plan(instead.way, f"{name} failed", [*instead.trials, Trial(name, problem=problem)])

    def _freeing_memory(self, plan: Plan) -> Plan:
        """Frees what eager derived from the weights on a CPU, if a way that does without runs.

        On a GPU, kernels on another stream may still read it.
        """
        if compiles(plan.way.name) and device_of(self._computation.module).type == "cpu":
            self.ways.free_derived()
        return plan

    def _way(self, name: str, pixels: Tensor, truth: Callable[[], Truth]) -> Way:
        """Builds a way by its name, among the engine's own and those of `tools`."""
        for candidate in self._tools.candidates:
            if candidate.name == name:
                return Way(name, candidate.build(), True)
        return self.ways.build(name, pixels, truth)

    # --- mode "auto"

    def _fastest(self, pixels: Tensor, seen_often: bool) -> Plan:
        """Returns the measured choice for this or a similar shape; measures if there is none."""
        remembered = self._remembered(pixels)
        if remembered:
            return self._best_remembered(pixels, remembered)
        is_gpu = on_gpu(pixels)
        if not self._tuned or (is_gpu and seen_often and len(self._tuned) < MAX_TUNED):
            slow = [c.name for c in self._candidates(pixels) if c.compiles]
            why_not = {name: self.cost.why_not(name, pixels) for name in slow}
            paying = [name for name in slow if why_not[name] is None]
            if not paying and not is_gpu:
                # OpenVINO takes less to build, so its reason says more
                first = OPENVINO if OPENVINO in slow else "compile"
                return self.eager_plan(pixels, why_not[first] or "")
            plan = self.tune(pixels, paying)
            if not is_gpu:  # which measures one shape only
                self.ways.drop_losers(plan.way.name)
            return plan
        # the most similar shape: by size first, then by number of images
        like = min(self._tuned, key=lambda shape: _distance(shape, tuple(pixels.shape)))
        name = self._tuned[like].removesuffix(GRAPH)
        plan = self._verified_plan(name, pixels, f"what won for {by(like)}")
        if is_gpu and not seen_often and len(self._tuned) < MAX_TUNED:
            plan.n_left = SEEN_BEFORE_TUNED
        return plan

    def _best_remembered(self, pixels: Tensor, trials: list[Trial]) -> Plan:
        """Returns the best of earlier trials; a compiled one only if compiling pays now."""
        plain = winner([trial for trial in trials if not compiles(trial.name)])
        left, whys = list(trials), ["measured before on this machine"]
        while True:
            best = winner(left)
            assert best is not None and best.seconds is not None
            is_there = not compiles(best.name) or self.ways.has_artefact(best.name)
            if is_there or plain is None or plain.seconds is None:
                break
            saved = (plain.seconds - best.seconds) / len(pixels)
            why_not = self.cost.why_not_measured(best.name, saved)
            if why_not is None:
                break
            left.remove(best)
            whys.append(why_not)
        plan = self._verified_plan(best.name, pixels, "; ".join(whys))
        plan.trials += trials
        self._tuned[tuple(pixels.shape)] = best.name
        return plan

    def tune(self, pixels: Tensor, paying: Collection[str] | None = None) -> Plan:
        """Measures the candidates on these pixels; stores and returns the best.

        Args:
            pixels: [B, C, H, W].
            paying: names of those that are worth seconds to build; None: all.
        """
        pixels = pixels.detach()
        truth = Truth.of(self._computation, pixels)
        every = self._candidates(pixels, lambda: truth)
        candidates = [c for c in every if not c.compiles or paying is None or c.name in paying]
        trials, runs = run_trials(
            candidates,
            pixels,
            truth.problem,
            clock=self._clock,
            budget_s=self._tools.budget_s,
            report=self._tools.progress(len(candidates)),
        )
        best = winner(trials)
        if best is None:
            plan = self.eager_plan(pixels, "nothing passed: eager is what others are held to")
        else:
            is_own = all(c.name != best.name for c in self._tools.candidates)
            way = Way(best.name, runs[best.name], bakes(best.name))
            plan = Plan(self.ways.build(best.name, pixels) if is_own else way, _FASTEST)
            plan = self._freeing_memory(plan)
            self._tuned[tuple(pixels.shape)] = best.name
            if candidates == every and not any(is_not_tried(trial) for trial in trials):
                value = {"trials": [trial.to_dict() for trial in trials], "winner": best.name}
                self.cache.put("tuned", self.key(pixels), value)
        plan.trials = trials
        for trial in trials:
            if trial.problem is not None and not is_not_tried(trial):
                self.warn(f"{trial.name} is off: {trial.problem}")
        return plan

    def _candidates(
        self, pixels: Tensor, truth: Callable[[], Truth] | None = None
    ) -> list[Candidate]:
        """Returns the ways to run, simplest first."""
        names = ["triton", "eager", "triton+compile", "compile"]
        if not on_gpu(pixels):
            names = ["eager", *([OPENVINO] if self._openvino(pixels) else []), "compile"]
        elif self._may_capture(pixels) and self._why_no_graph(pixels) is None:
            names += [name + GRAPH for name in names]

        def candidate(name: str) -> Candidate:
            def build() -> Run:
                return self.ways.build(name, pixels, truth).run

            # if it were charged, compiling might never be tried beside it
            return Candidate(name, build, compiles(name), is_charged=name != OPENVINO)

        return [*map(candidate, names), *self._tools.candidates]

    def _openvino(self, pixels: Tensor) -> str | None:
        """The version of OpenVINO if it can run here."""
        is_possible = not on_gpu(pixels) and why_not_openvino(self._computation) is None
        return openvino_version() if is_possible else None

    def _with_hint(self, why: str, pixels: Tensor) -> str:
        """Adds that OpenVINO could be installed, if that is why it was not considered."""
        is_missing = not on_gpu(pixels) and why_not_openvino(self._computation) == MISSING
        hint = f"{MISSING}, which may be faster" if is_missing else ""
        return "; ".join(filter(None, (why, hint)))

    def _remembered(self, pixels: Tensor) -> list[Trial]:
        """Returns the trials of an earlier process if their winner can still be built."""
        value: Any = self.cache.get("tuned", self.key(pixels))
        try:
            trials = [Trial.from_dict(trial) for trial in value["trials"]]
        except (TypeError, KeyError, ValueError):
            return []
        names = [c.name for c in self._candidates(pixels)]
        best = winner(trials)
        return trials if best is not None and all(t.name in names for t in trials) else []

    def key(self, pixels: Tensor) -> str:
        """Key of a measured choice: model, maps, precision, shape, OpenVINO if it can run."""
        shape = "x".join(map(str, (len(pixels), *pixels.shape[2:])))
        openvino = self._openvino(pixels)
        suffix = "" if openvino is None else f"/openvino-{openvino}"
        return f"{self._computation.cache_key}/{self.precision}/{shape}{suffix}"

    def _plain(self, pixels: Tensor) -> Run:
        """Returns the run without a compiler."""
        return self.ways.build("triton" if on_gpu(pixels) else "eager", pixels).run

    @property
    def _clock(self) -> Clock:
        return self._tools.clock or wall_clock(device_of(self._computation.module))


def by(shape: tuple[int, ...]) -> str:
    """Formats images, height and width of a shape [B, C, H, W]."""
    return "x".join(map(str, (shape[0], *shape[2:])))


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[bool, int, int]:
    """Returns the differences of two shapes [B, C, H, W]: in size, in pixels, in images."""
    pixels = abs(one[2] * one[3] - other[2] * other[3])
    return one[2:] != other[2:], pixels, abs(one[0] - other[0])
