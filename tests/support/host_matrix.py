"""Checks of a host model: results and gradients with our forward inside equal those before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tolerance import assert_equal_gradients, assert_equals_upstream
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

import fastbb

HEAD_REL = 1e-4


@dataclass(frozen=True)
class Host:
    """A tiny random model of a library, and what `accelerate` has to find in it.

    Attributes:
        model: in eval().
        inputs: arguments of one call, by position (a tuple) or by name (a dict).
        outermost: names of the modules with our forward that are inside no other such module.
        inner: how many modules inside them have our forward too.
        head: what is around them. "none", "smooth", or "discrete": ranked queries, boxes that
            suppress others, masks cut at a threshold; there a rounding error may change anything.
        method: what is called.
        rel: largest difference allowed in a map, relative to its largest value.
        upstream: modules that run the host's own forward, each with the reason.
        frozen: what is not trained where only a head is; default: the one outermost module.
        dtype: in which its gradients are compared.
    """

    model: nn.Module
    inputs: Any
    outermost: tuple[str, ...]
    inner: int = 0
    head: str = "none"
    method: str = "forward"
    rel: float = 1e-5
    upstream: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.float64


Build = Callable[[], Host]
HOSTS: dict[str, Build] = {}


def host(build: Build) -> Build:
    """Puts a host into the matrix."""
    HOSTS[build.__name__] = build
    return build


@dataclass(frozen=True)
class Values:
    """Returned value: its tensors, and everything else about it."""

    spec: TreeSpec
    others: list[Any]
    kinds: list[tuple[Any, ...]]
    tensors: list[Tensor]

    @classmethod
    def of(cls, returned: Any) -> "Values":
        leaves, spec = tree_flatten(copied(returned))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(spec, others, [(x.shape, x.dtype, strides(x)) for x in tensors], tensors)

    def assert_like(self, want: "Values") -> None:
        assert self.spec == want.spec, f"{self.spec}, upstream {want.spec}"
        assert self.others == want.others, f"{self.others}, upstream {want.others}"
        assert self.kinds == want.kinds, f"{self.kinds}, upstream {want.kinds}"

    def assert_close(self, want: "Values", rel: float) -> None:
        self.assert_like(want)
        for ours, theirs in zip(self.tensors, want.tensors):
            if not theirs.is_floating_point() or not theirs.numel():
                assert torch.equal(ours, theirs)
                continue
            finite = theirs.isfinite()  # heads mask words by -inf
            assert torch.equal(ours.where(~finite, 0), theirs.where(~finite, 0))
            assert_equals_upstream(ours.where(finite, 0), theirs.where(finite, 0), rel)

    def assert_identical(self, want: "Values") -> None:
        self.assert_like(want)
        for i, (ours, theirs) in enumerate(zip(self.tensors, want.tensors)):
            assert torch.equal(ours, theirs), f"tensor {i} of {len(want.tensors)} differs"


def copied(values: Any) -> Any:
    """Copies containers and tensors, with equal strides, since heads may depend on them."""

    def copy(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach())

    return tree_map_only(Tensor, copy, values)


def strides(x: Tensor) -> tuple[int, ...]:
    """Returns the strides of dimensions longer than one."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape) if size > 1)


def call(host: Host) -> Any:
    """Calls the host on copies, since some hosts write into their inputs."""
    inputs = copied(host.inputs)
    # a forward through __call__, and so through hooks
    method: Any = host.model if host.method == "forward" else getattr(host.model, host.method)
    return method(**inputs) if isinstance(inputs, dict) else method(*inputs)


Maps = dict[str, list[Any]]  # results of each outermost module, call by call


@contextmanager
def hooks(host: Host, on_result: Callable[[str, Any], Any]) -> Iterator[None]:
    """Passes the results of the outermost modules to a function, which may replace them."""
    handles = []
    for name in host.outermost:

        def hook(module: nn.Module, args: Any, result: Any, name: str = name) -> Any:
            return on_result(name, result)

        handles.append(host.model.get_submodule(name).register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def recorded_call(host: Host) -> tuple[Values, Maps]:
    """Returns the result of a call, and the results of its outermost modules."""
    maps: Maps = {name: [] for name in host.outermost}
    with hooks(host, lambda name, result: maps[name].append(copied(result))):
        result = Values.of(call(host))
    return result, maps


@torch.no_grad()
def call_on_maps(host: Host, maps: Maps) -> Values:
    """Returns the result of the host on recorded maps instead of those of its outermost modules."""
    left = {name: iter(returned) for name, returned in maps.items()}
    with hooks(host, lambda name, result: copied(next(left[name]))):
        return Values.of(call(host))


def outermost(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the modules that are inside no other."""

    def is_inside(name: str, other: str) -> bool:
        return name != other and (other == "" or name.startswith(f"{other}."))

    return tuple(n for n in names if not any(is_inside(n, other) for other in names))


def assert_runs_ours(report: fastbb.AccelerateReport, host: Host) -> None:
    """Checks that every found module runs our forward, since a fallback would pass all else."""
    assert outermost(report.accelerated) == host.outermost, report
    assert len(report.accelerated) == len(host.outermost) + host.inner, report
    upstream = {name: why for name, _, runs, why in report.rows() if runs == "upstream"}
    assert upstream == host.upstream, report
    runs = {name: runs for name, _, runs, _ in report.rows() if name not in upstream}
    assert all(runs[name] == "fastbb" for name in host.outermost if name not in upstream), report
    # blocks of a backbone that computes from the parameters of all of them do not run themselves
    assert set(runs.values()) <= {"fastbb", "-"}, report


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """Returns the names of each module's own attributes."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


def assert_same_parameters(model: nn.Module, want: dict[str, nn.Parameter]) -> None:
    now = dict(model.named_parameters())
    assert now.keys() == want.keys()
    assert all(now[name] is parameter for name, parameter in want.items())


def check_results(build: Build) -> None:
    """Compares results, parameters and attributes before, with and after our forward."""
    host = build()
    model = host.model
    want, their_maps = recorded_call(host)
    before = attributes(model)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())

    report = fastbb.accelerate(model, mode="eager")
    for _ in ("held to upstream's", "nothing but ours"):
        got, maps = recorded_call(host)
        assert_runs_ours(report, host)
        for name, returned in their_maps.items():
            assert len(maps[name]) == len(returned)
            for ours, theirs in zip(maps[name], returned):
                Values.of(ours).assert_close(Values.of(theirs), host.rel)
        if host.head != "discrete":
            got.assert_close(want, host.rel if host.head == "none" else HEAD_REL)
    assert list(model.state_dict()) == keys
    assert_same_parameters(model, parameters)

    fastbb.restore(model)
    if host.head != "none":
        call_on_maps(host, maps).assert_identical(got)
    after, _ = recorded_call(host)
    after.assert_identical(want)
    assert attributes(model) == before
    assert_same_parameters(model, parameters)


def check_gradients(build: Build) -> None:
    """Compares gradients of the host, then of a head around a frozen backbone that runs ours."""
    host, report = compare_gradients(build, ())
    why = {name: why for name, _, _, why in report.rows()}
    for name in host.outermost:
        if any(p.requires_grad for p in host.model.get_submodule(name).parameters()):
            assert why[name].startswith("a gradient is needed"), report
    one = host.outermost if len(host.outermost) == 1 and host.outermost != ("",) else ()
    frozen = one if host.frozen is None else host.frozen
    if frozen:
        host, report = compare_gradients(build, frozen)
        assert_runs_ours(report, host)


def compare_gradients(build: Build, frozen: Sequence[str]) -> tuple[Host, fastbb.AccelerateReport]:
    """Compares the gradients of a host with our forward with those of one without."""
    # two models: some keep what they computed, with its graph
    want = gradients(build(), frozen)
    host = build()
    report = fastbb.accelerate(host.model, mode="eager")
    got = gradients(host, frozen)
    assert want
    if host.dtype == torch.float64:
        assert_equal_gradients(got, want)
    else:
        assert got.keys() == want.keys()
        largest = max(float(x.abs().max()) for x in want.values())
        assert all((got[n] - x).abs().max() <= HEAD_REL * largest for n, x in want.items())
    return host, report


def gradients(host: Host, frozen: Sequence[str]) -> dict[str, Tensor]:
    """Returns gradients of the mean squares of everything that a host returns."""
    host.model.to(host.dtype)
    for name in frozen:
        host.model.get_submodule(name).requires_grad_(False)

    def converted(x: Tensor) -> Tensor:
        return x.to(host.dtype) if x.is_floating_point() else x

    inputs = tree_map_only(Tensor, converted, host.inputs)
    leaves, _ = tree_flatten(call(replace(host, inputs=inputs)))
    results = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x.numel()]
    torch.stack([(x.where(x.isfinite(), 0) ** 2).mean() for x in results]).sum().backward()
    named = host.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}
