"""Pretended GPU for the engine, on a CPU: a device with a clock, and a compiler."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_kernels import MACHINE, correct, launching
from torch import Tensor

from fastbb.backbone.base import Backbone
from fastbb.engine import compile_cost
from fastbb.engine.computation import BackboneMaps, Computation
from fastbb.engine.explanation import Explanation, Row
from fastbb.engine.settings import Tools
from fastbb.engine.trial import Candidate, Run
from fastbb_kernels import Impl, use_impl
from fastbb_kernels.machine import Machine
from fastbb_kernels.op import op_names
from fastbb_kernels.result_cache import ResultCache

MANY = 10**6  # number of images for which compiling always pays
MIN_RUNS = 4  # calls of a measured candidate: one alone, and three rounds


@contextmanager
def gpu(**launches: Callable[..., Any]) -> Iterator[None]:
    """Treats CPU tensors as a GPU's; kernels compute the right results, except `launches`."""
    with launching(**{**{op: correct(op) for op in op_names()}, **launches}):
        yield


class Device:
    """Device whose clock reports the time that the called code declares.

    Attributes:
        own_s: seconds of a call that declares no time, as the engine's own ways.
        n_timed: calls that were timed.
    """

    def __init__(self, own_s: float = 1.0) -> None:
        self.own_s = own_s
        self.n_timed = 0
        self._said: float | None = None

    def clock(self, call: Callable[[], object]) -> float:
        self.n_timed += 1
        self._said = None
        call()
        return self.own_s if self._said is None else self._said

    def say(self, seconds: float) -> None:
        """Declares the time of the current call."""
        self._said = seconds

    def candidate(
        self, name: str, seconds: float, build: Callable[[], Run], compiles: bool = False
    ) -> Candidate:
        """Returns a candidate whose runs take `seconds` of this clock."""

        def timed() -> Run:
            run = build()

            def runs(pixel_values: Tensor) -> tuple[Tensor, ...]:
                self.say(seconds)
                return run(pixel_values)

            return runs

        return Candidate(name, timed, compiles)

    def tools(self, folder: Path, *candidates: Candidate, machine: Machine = MACHINE) -> Tools:
        """Returns tools that measure on this device in few rounds, with a cache in `folder`."""
        cache = ResultCache(machine, folder)
        return Tools(self.clock, cache, candidates, budget_s=5.0, progress=silent)


def silent(n_candidates: int) -> Callable[[str], None]:
    return lambda text: None


def baked(computation: Computation | Backbone) -> Run:
    """Returns a run with eager maps and copied weights."""
    if isinstance(computation, Backbone):
        computation = BackboneMaps(computation)
    copied = computation.copied()

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), use_impl("eager"):
            return copied.feature_maps(pixel_values)

    return run


class Compiler:
    """Replacement of `compile_maps` that bakes a copy of a backbone.

    Attributes:
        device: runs what is compiled; None: calls declare no time.
        seconds: duration of a compiled call on the device.
        compiled: shapes of the examples, in order.
        impls: implementations of the ops, in order.
        error: raised instead of compiling, if there is one.
        spoil: changes the maps.
    """

    def __init__(self) -> None:
        self.device: Device | None = None
        self.seconds = 0.5
        self.compiled: list[tuple[int, ...]] = []
        self.impls: list[Impl] = []
        self.error: Exception | None = None
        self.spoil: Callable[[Tensor], Tensor] = lambda x: x

    def maps(self, computation: Computation, example: Tensor, impl: Impl = "eager") -> Run:
        run = self._compile(computation, tuple(example.shape), impl)

        def of_that_shape(pixel_values: Tensor) -> tuple[Tensor, ...]:
            assert pixel_values.shape == example.shape and pixel_values.dtype == example.dtype
            return run(pixel_values)

        return of_that_shape

    def _compile(self, computation: Computation, shape: tuple[int, ...], impl: Impl) -> Run:
        self.compiled.append(shape)
        self.impls.append(impl)
        if self.error is not None:
            raise self.error
        run = baked(computation)

        def compiled(pixel_values: Tensor) -> tuple[Tensor, ...]:
            if self.device is not None:
                self.device.say(self.seconds)
            return tuple(self.spoil(x) for x in run(pixel_values))

        return compiled


def install(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Replaces torch's compiler."""
    monkeypatch.setattr("fastbb.engine.ways.compile_maps", compiler.maps)
    return compiler


def explained(backbone: Backbone) -> Explanation:
    """Returns the result of `explain()` and checks that nothing is printed."""
    with redirect_stdout(StringIO()) as printed:
        explanation = backbone.explain()
    assert not printed.getvalue()
    return explanation


def only_row(backbone: Backbone) -> Row:
    """Returns the only row of an explanation."""
    (row,) = explained(backbone).rows
    return row


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def compiling_takes(monkeypatch: pytest.MonkeyPatch, seconds: float, gain: float = 0.15) -> None:
    """Sets the seconds that compiling is said to take, and the share of time that it saves."""
    usual = compile_cost.USUAL["compile"]._replace(seconds=seconds, gain=gain)
    monkeypatch.setitem(compile_cost.USUAL, "compile", usual)
