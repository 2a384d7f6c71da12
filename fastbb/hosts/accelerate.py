"""One line that makes an existing model fast: its own modules and parameters, our forward."""

import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from fastbb_kernels._dispatch import launches_on
from fastbb_kernels.warning import warn_caller

from .. import models
from ..backbone.base import Backbone
from ..engine.copies import copies_note
from ..engine.explanation import Report
from ..engine.measuring import duration
from ..engine.settings import Settings
from ..models.parts import Refused
from ..weights.recognize import is_batch_norm
from ..weights.watch import statistics_note
from .host_backbone import HostBackbone, NothingToDo
from .libraries import full_name, is_backbone
from .module_forward import ModuleForward
from .replacement import (
    MOVES,
    AccelerateWarning,
    Replacement,
    Timings,
    replacement_of,
)


def _replaced() -> dict[str, type[ModuleForward]]:
    """Full names of upstream's classes, and what computes the same in their place.

    A family has them in the file of its name in this folder.
    """
    families = {module.name for module in pkgutil.iter_modules(models.__path__)}
    found: dict[str, type[ModuleForward]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name in families:
            found |= import_module(f".{module.name}", __package__).REPLACED
    return found


REPLACED = _replaced()

_NOTHING_FASTER = "there is no backbone that fastbb makes faster"

__all__ = ["AccelerateReport", "AccelerateWarning", "LeftAlone", "accelerate", "restore"]


@dataclass(frozen=True)
class LeftAlone:
    """A module that could have been accelerated, and was not.

    Attributes:
        name: of the module in the model.
        was: its class.
        why: the reason.
    """

    name: str
    was: str
    why: str


class AccelerateReport:
    """The modules that `accelerate` replaced or left alone, and what runs now; shown as a table.

    Attributes:
        replaced: modules with our forward, outer ones first.
        left_alone: modules that could have got one, each with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        replaced: Sequence[Replacement],
        left_alone: Sequence[LeftAlone],
    ) -> None:
        self._model = model
        self._title = f"{type(model).__name__}, mode {settings.mode}"
        if settings.precision is not None:
            self._title += f", precision {settings.precision}"
        self.replaced = list(replaced)
        self.left_alone = list(left_alone)

    @property
    def accelerated(self) -> list[str]:
        """Names of the modules with our forward, "" for the model itself."""
        return [replacement.name for replacement in self.replaced]

    def refresh(self) -> None:
        """Forgets what was computed from the parameters, after a change that leaves no trace.

        Such as one made through `.data`, or on a GPU running statistics moved by `F.batch_norm`.
        """
        for replacement in self.replaced:
            replacement.refresh()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, class, what runs now and why, of every module."""
        whole = [
            r.name for r in self.replaced if isinstance(r.ours, HostBackbone) and r.is_running_ours
        ]
        passed_over = [r.name for r in self.replaced if r.name in whole and not r.ours.runs_parts]
        rows = []
        for r in self.replaced:
            runs, why = _state(r)
            has_run = r.choices or r.last_reason or r.off
            around = passed_over if has_run else whole
            outer = [name for name in around if name != r.name and _is_inside(r.name, name)]
            if outer:
                runs, why = "-", f"{outer[0] or 'the model'} runs as a whole"
            rows.append((r.name, type(r.module).__name__, runs, why))
        return rows + [(left.name, left.was, "upstream", left.why) for left in self.left_alone]

    def __repr__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        rows = self.rows()
        alike: dict[tuple[str, str, str], list[str]] = {}
        for name, was, runs, why in rows:
            alike.setdefault((was, runs, why), []).append(name)
        lines = [(_names(names), was, runs, why) for (was, runs, why), names in alike.items()]
        notes = (statistics_note(self._model), self._total(), self._copies())
        return Report(
            self._header(rows),
            [("module", "was", "runs", "why"), *lines],
            [note for note in notes if note is not None],
        )

    def _header(self, rows: Sequence[tuple[str, str, str, str]]) -> str:
        """The number of modules that run ours now, and the usual reason if none does."""
        if not rows:
            return f"{self._title}: {_NOTHING_FASTER}"
        n_ours = sum(runs == "-" or runs.startswith("fastbb") for _, _, runs, _ in rows)
        title = f"{self._title}: {n_ours} of {len(rows)} modules run by fastbb"
        if self.left_alone:
            title += f", {len(self.left_alone)} left alone"
        if n_ours or not self.replaced:
            return title
        has_run = any(r.choices for r in self.replaced)
        reasons = Counter(filter(None, (r.why_upstream for r in self.replaced)))
        usual = reasons.most_common(1) or [("upstream is faster" if has_run else "none has run", 0)]
        return f"{title}, because {usual[0][0]}"

    def _total(self) -> str | None:
        """The times before and now of what was timed; a module inside another counts once."""
        times: dict[str, tuple[float, float]] = {}
        for r in reversed(self.replaced):  # inner ones first
            choice = r.last_choice
            if choice is None or choice.times is None:
                continue
            inside = [name for name in times if _is_inside(name, r.name)]
            saves = any(now < before for before, now in map(times.__getitem__, inside))
            if saves and not choice.ours:  # upstream's forward calls those inside
                continue
            for name in inside:
                del times[name]
            before = choice.times.theirs
            times[r.name] = before, choice.times.ours if choice.ours else before
        before, now = (sum(pair[i] for pair in times.values()) for i in (0, 1))
        if not now or before == now:  # nothing was timed, or nothing runs ours
            return None
        timed = "1 timed module" if len(times) == 1 else f"{len(times)} timed modules"
        return (
            f"total of {timed}, one call each: {duration(before)} before, {duration(now)} now "
            f"({before / now:.2f} times as fast)"
        )

    def _copies(self) -> str | None:
        ours = [r.ours for r in self.replaced]
        engines = [engine for o in ours if isinstance(o, HostBackbone) for engine in o.engines]
        converted = [module for engine in engines for module in engine.converted]
        return copies_note([self._model], converted, any(e.has_compiled for e in engines))


def accelerate(
    model: nn.Module,
    *,
    mode: str = "auto",
    precision: str | None = None,
    strict: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> AccelerateReport:
    """Makes the backbones inside a model fast, in place; `restore` undoes it.

    Modules, parameters, state dict, hooks and what is returned stay. Whole backbones, and the
    blocks of Swin, ViTs and ResNets wherever they are, get a forward of ours on the instance, over
    the very same parameters. It runs in inference only; wherever it cannot keep the maths,
    something is hooked or replaced inside, or a graph is recorded, the module's own forward runs.
    The first call of each form (dtype, device, layout and options), and one more than four times as
    large, compares both in float64, and keeps the module's own where they differ.

    Args:
        model: of transformers, timm, torchvision or segmentation-models-pytorch, or around one.
        mode: "auto" also times both, and keeps the module's own where it is faster; "eager" and
            "triton" do not; "compile", "triton+compile" and "openvino" compile whole backbones at
            their first call. See `Backbone.prepare`.
        precision: "fp32", "tf32", "bf16" or "fp16" computes whole backbones in it, from a copy of
            the weights; what they return has the dtype of the input.
        strict: raise where something is left alone, or nothing is found.
        include: names of modules, with wildcards, to look at, and in; default: all.
        exclude: names of modules, with wildcards, to leave alone, with what is inside.

    Returns:
        What was done, for each module; look at it again later to see what runs. Where nothing can
        be accelerated, an `AccelerateWarning` says so at once.

    Raises:
        TypeError: `model` is no module.
        ValueError: an argument is none of these, this device cannot do it, a name fits no module,
            or `strict` is set and something is left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate() takes a torch.nn.Module, got {type(model).__name__}; "
            "of a pipeline give its model (pipe.model)"
        )
    settings = Settings(mode, precision)  # type: ignore[arg-type]  # checks both
    settings.check_device(
        next((p.device for p in model.parameters()), torch.device("cpu")), "model"
    )
    chosen = _chosen(model, include, exclude)
    for module in model.modules():  # what `heads.register` made waits for its first call
        upstream = getattr(type(module), "waits_for_fastbb", None)
        if upstream is not None:
            module.__class__ = upstream
    restore(model)
    replaced: list[Replacement] = []
    left_alone: list[LeftAlone] = []
    timings = Timings()
    for name, module, make in _found(model, chosen, replaced):
        was = type(module).__name__
        if isinstance(make, str):
            left_alone.append(LeftAlone(name, was, make))
            continue
        try:
            replacement = Replacement(module, name, make, settings, timings)
        except NothingToDo:
            continue
        except Refused as refused:
            left_alone.append(LeftAlone(name, was, str(refused)))
            continue
        replaced.append(replacement)
        replacement.bind()
    if precision is not None and not any(isinstance(r.ours, HostBackbone) for r in replaced):
        why = f"precision={precision!r} is for whole backbones, and there is none to replace"
        left_alone.append(LeftAlone("", type(model).__name__, why))
    report = AccelerateReport(model, settings, replaced, left_alone)
    if strict and (left_alone or not replaced):
        problem = f"strict=True, and not everything can be accelerated.\n{report}"
        restore(model)
        raise ValueError(problem)
    if not replaced:
        why = _NOTHING_FASTER
        if left_alone:
            first = left_alone[0]
            why = f"{first.name} ({first.was}): {first.why}" if first.name else first.why
            if len(left_alone) > 1:
                why += f"; {len(left_alone) - 1} more in the report"
        warn_caller(f"nothing in {type(model).__name__} is accelerated: {why}", AccelerateWarning)
    return report


def restore(model: nn.Module) -> None:
    """Takes away what `accelerate` put on a model, which then computes bit by bit what it did.

    Args:
        model: that was accelerated, wholly or in part; nothing happens to any other.
    """
    for module in model.modules():
        replacement = replacement_of(module)
        if replacement is not None:
            replacement.unbind()


def _chosen(
    model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> set[str]:
    """Names of the modules to look at."""
    names = [name for name, _ in model.named_modules()]

    def matching(patterns: str | Sequence[str], what: str) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fits = [n for n in names if fnmatch(n, pattern)]
            if not fits:
                raise ValueError(
                    f"{what}: no module is called {pattern!r}; there are, for example, "
                    f"{', '.join(names[1:6])}"
                )
            inside = [n for n in names if any(n.startswith(f"{fit}.") for fit in fits)]
            found.update(fits, inside)
        return found

    chosen = set(names) if include is None else matching(include, "include")
    return chosen if exclude is None else chosen - matching(exclude, "exclude")


def _found(
    model: nn.Module, chosen: set[str], replaced: Sequence[Replacement]
) -> Iterator[tuple[str, nn.Module, type[ModuleForward] | str]]:
    """Modules of a model that could be accelerated, and settings, or why not; outer ones first."""
    closed: list[str] = []  # nothing inside these is looked at
    for name, module in model.named_modules():
        if name not in chosen or any(_is_inside(name, outer) for outer in closed):
            continue
        problem = _closed(module)
        if problem is not None:
            closed.append(name)
            yield name, module, problem
            continue
        path, make = _known_class(module)
        if make is not None:
            changed = path and _changes(type(module), path)
            problem = f"a subclass of {path} with its own {changed}" if changed else None
            problem = problem or _meta(module) or _patched(module, make)
            yield name, module, problem or make
        elif is_backbone(module) and not any(
            isinstance(r.ours, HostBackbone) and _is_inside(name, r.name) for r in replaced
        ):
            problem = _meta(module) if any(map(is_batch_norm, module.modules())) else None
            yield name, module, problem or _patched(module, HostBackbone) or HostBackbone


def _is_inside(name: str, outer: str) -> bool:
    return name == outer or outer == "" or name.startswith(f"{outer}.")


def _closed(module: nn.Module) -> str | None:
    """Why nothing inside a module can be replaced, or None."""
    if isinstance(module, Backbone):
        return "it is fastbb's own: prepare() makes it faster"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: accelerate the model that it was made of"
    is_compiled = type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
    if is_compiled or module._compiled_call_impl is not None:  # by module.compile()
        return "it is compiled: accelerate the model before torch.compile, or instead"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a traced graph: accelerate the model that it was made of"
    if isinstance(module, nn.DataParallel):
        return "DataParallel copies modules without moving our forward: use DistributedDataParallel"
    return None


def _meta(module: nn.Module) -> str | None:
    if any(p.is_meta and not launches_on(p.device) for p in module.parameters()):
        return "its weights are on the meta device: load them first"
    return None


def _patched(module: nn.Module, make: type[ModuleForward]) -> str | None:
    methods = [name for name in ("forward", *make.methods, *MOVES) if name in vars(module)]
    return f"something else was put over its {methods[0]}" if methods else None


def _known_class(module: nn.Module) -> tuple[str | None, type[ModuleForward] | None]:
    """The class that we know, of the module or the nearest above it, and what computes the same."""
    for cls in type(module).__mro__:
        name = full_name(cls)
        if name in REPLACED:
            return name, REPLACED[name]
    return None, None


def _changes(cls: type, path: str) -> str | None:
    """Name of the first method that a class overrides of the known class above it, or None."""
    for part in cls.__mro__:
        if full_name(part) == path:
            return None
        base = next(c for c in cls.__mro__ if full_name(c) == path)
        own = [n for n in vars(part) if callable(getattr(base, n, None)) and n != "__init__"]
        if own:
            return own[0]
    return None


def _state(replacement: Replacement) -> tuple[str, str]:
    """The forward of a replaced module that runs now, and the reason."""
    why = replacement.why_upstream  # once: another thread may run the model
    if why is not None:
        return "upstream", why
    choices = list(replacement.choices.values())
    if not choices:
        return "not decided", "it has not run yet"
    ours = [choice for choice in choices if choice.ours]
    if len(ours) == len(choices):
        engines = replacement.ours.engines if isinstance(replacement.ours, HostBackbone) else []
        notes = [f"some calls: {note}" for engine in engines for note in engine.notes]
        return "fastbb", "; ".join([choices[-1].why, *notes])
    if not ours:
        return "upstream", choices[-1].why
    return f"fastbb for {len(ours)} of {len(choices)} forms of call", choices[-1].why


def _names(names: Sequence[str]) -> str:
    first = names[0] or "the model"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
