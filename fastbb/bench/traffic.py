"""`fastbb bench --traffic`: bytes and launches of a forward pass on a GPU, counted without one.

Everything runs on the meta device: bf16, eval, no gradients, no weights. The dispatcher reports
ops, and the launcher our kernels; `launches` has the rule. Each model runs twice and the second run
counts, without values that are computed once per set of weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels import find_op, op_names, use_impl
from fastbb_kernels.recorder import record_launches

from ..auto import AutoBackbone
from ..backbone.base import Backbone
from ..backbone.registry import Upstream
from ..engine.measuring import describe, memory
from ..inspect.loading import config_without_weights
from ..inspect.upstream import upstream_of
from .counts import meta_copy
from .host_models import ACCELERATED, AS_IS, accelerated, make_inputs, on_meta, outermost
from .launches import CATEGORIES, Launch, count_kernels, count_launches, n_bytes
from .markdown import escaped, table
from .ways import library_of, other_upstream

LEGEND = (
    "Counted for bf16 on an H100, not measured. fastbb: what runs by default; separate ops: "
    "without kernels of whole blocks; every kernel: with those that are off by default. Equal "
    "columns are left out."
)
SEPARATE, DEFAULT, EVERY = "fastbb, separate ops", "fastbb", "fastbb, every kernel"

# launches of one forward pass by way, upstream first; a string says why there are none
Counts = dict[str, "list[Launch] | str"]


@dataclass(frozen=True)
class Traffic:
    """A model whose traffic was counted.

    Attributes:
        title: in tables.
        batch: images per forward pass.
        size: (height, width) of the images, pixels.
        counts: launches by way, upstream first, or the reason why there are none.
    """

    title: str
    batch: int
    size: tuple[int, int]
    counts: Counts


def count_traffic(
    name: str,
    size: tuple[int, int] | None,
    batch: int,
    out_indices: Sequence[int] | None = None,
) -> Traffic:
    """Counts the launches of one forward pass of a model, in bf16 on an H100, by every way.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it; no weights are loaded.
        size: (height, width) of the images, pixels; None: the model's own.
        batch: images per forward pass.
        out_indices: of the maps; default: the model's own.

    Returns:
        Counts of these ways: upstream's library, timm where it is another, "fastbb" as it runs by
        default, and, where they differ, "fastbb, separate ops" without kernels of whole blocks and
        "fastbb, every kernel" with those that are off by default and no convolution of a library.
        Instead of launches the reason why they cannot be counted.

    Raises:
        OSError: there is no such model, or its configuration cannot be had.
        ValueError: an argument is invalid.
    """
    config = config_without_weights(name, out_indices)
    with torch.device("meta"):
        backbone: Any = AutoBackbone.from_config(config)
    backbone = backbone.eval()
    height, width = size or backbone.default_size
    pixels = torch.empty(
        batch, config.num_channels, height, width, dtype=torch.bfloat16, device="meta"
    )
    # before ours, whose forwards keep derived weights on the modules
    counts = _of_libraries(backbone, pixels)
    ours = {way: _count_ours(backbone, pixels, *how) for way, how in _OURS.items()}
    usual = ours[DEFAULT]
    counts |= {way: n for way, n in ours.items() if way == DEFAULT or n != usual}
    title = f"{name}, {height}x{width}, batch {batch}"
    return Traffic(title, batch, (height, width), counts)


# implementation of ops, and whether kernels of whole blocks may run
_OURS: dict[str, tuple[Any, bool]] = {
    SEPARATE: ("auto", False),
    DEFAULT: ("auto", True),
    EVERY: ("triton", True),
}


def _of_libraries(backbone: Backbone, pixels: Tensor) -> Counts:
    upstream, _ = upstream_of(backbone)
    library = library_of(upstream)
    counts: Counts = {library: _count_upstream(upstream, pixels)}
    if library == "timm":
        return counts
    try:
        with torch.device("meta"):
            other = other_upstream(backbone, "timm", (pixels.shape[2], pixels.shape[3]))
    except Exception as error:  # timm has no such model, or is not installed
        counts["timm"] = describe(error)
    else:
        counts["timm"] = _count_upstream(other, pixels)
    return counts


def _count_upstream(upstream: Upstream, pixels: Tensor) -> list[Launch] | str:
    module = upstream.module.to(pixels.device, pixels.dtype)
    return _counted(lambda: count_forward(module, pixels, upstream.maps))


def _count_ours(backbone: Backbone, pixels: Tensor, impl: Any, blocks: bool) -> list[Launch] | str:
    return _counted(lambda: count_backbone(backbone, pixels, impl=impl, blocks=blocks))


def _counted(count: Callable[[], list[Launch]]) -> list[Launch] | str:
    try:
        return count()
    except Exception as error:  # an op that the count does not know, or a size that does not run
        return describe(error)


def count_backbone(
    backbone: Backbone, pixels: Tensor, *, impl: Any = "auto", blocks: bool = True
) -> list[Launch]:
    """Counts the launches of a backbone of ours.

    Args:
        backbone: on the meta device.
        pixels: [B, C, H, W] on the meta device, in the dtype that counts.
        impl: see `use_impl`.
        blocks: whether kernels of whole blocks may run, instead of those of their ops.
    """
    block_ops = [name for name in op_names() if find_op(name).is_block]
    with ExitStack() as stack:
        stack.enter_context(use_impl(impl))
        if not blocks:
            stack.enter_context(use_impl("eager", ops=block_ops))
        return count_forward(backbone.to(pixels.dtype), pixels, count=count_kernels)


def count_forward(
    module: nn.Module,
    pixels: Tensor,
    forward: Callable[[nn.Module, Tensor], object] = lambda module, pixels: module(pixels),
    count: Callable[[list[Tensor]], AbstractContextManager[list[Launch]]] = count_launches,
) -> list[Launch]:
    """Counts the launches of the second forward pass of a module.

    Args:
        module: on the meta device, in eval mode.
        pixels: [B, C, H, W] on the meta device.
        forward: calls the module.
        count: `count_launches`, or `count_kernels` for what runs our kernels.
    """
    weights = [*module.parameters(), *module.buffers()]
    with torch.no_grad(), record_launches():
        forward(module, pixels)  # computes values that are made once per set of weights
    with torch.no_grad(), count(weights) as launches:
        forward(module, pixels)
    return launches


@torch.no_grad()
def count_host(module: nn.Module, batch: int, size: tuple[int, int]) -> Counts:
    """Counts the launches of the modules that `accelerate` replaces on an H100, in bf16.

    The model runs once on its device, to see with what it calls these modules; they are counted on
    the meta device, without the rest of the model.

    Args:
        module: as it is.
        batch: images.
        size: (height, width) of the images, pixels.
    """
    try:
        theirs, ours = (meta_copy(module).to(torch.bfloat16) for _ in range(2))
        with record_launches():
            names = outermost(accelerated(ours).accelerated)
        if not names:
            return {ACCELERATED: "accelerate() replaces nothing in it"}
        calls = _calls_of(module, names, batch, size)
        return {
            AS_IS: _count_calls(theirs, calls, count_launches),
            ACCELERATED: _count_calls(ours, calls, count_kernels),
        }
    except Exception as error:  # an op that the count does not know, or code that needs values
        return {ACCELERATED: describe(error)}


_Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # name of a module, and its arguments


def _calls_of(
    module: nn.Module, names: Sequence[str], batch: int, size: tuple[int, int]
) -> list[_Call]:
    """The calls of modules in a forward pass, with arguments on the meta device."""
    calls: list[_Call] = []

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, *(on_meta(values, torch.bfloat16) for values in (args, kwargs))))

        return module.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(name) for name in names]
    try:
        make_inputs(module, batch, size).call(module)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _count_calls(module: nn.Module, calls: Sequence[_Call], count: Any) -> list[Launch]:
    weights = [*module.parameters(), *module.buffers()]

    def run() -> None:
        for name, args, kwargs in calls:
            module.get_submodule(name)(*args, **kwargs)

    with record_launches():
        run()  # computes values that are made once per set of weights
    with count(weights) as launches:
        run()
    return launches


def totals(counts: Counts) -> dict[str, dict[str, Any]]:
    """Bytes and launches by way, or the reason why there are none, see `Cell.traffic`."""
    return {
        way: {"reason": found}
        if isinstance(found, str)
        else {"bytes": n_bytes(found), "launches": len(found)}
        for way, found in counts.items()
    }


def summary(models: Sequence[Traffic]) -> str:
    """Formats traffic, its ratio to upstream's, and launches: a row of Markdown for each model.

    Reasons of ways without a count stand below the table.
    """
    upstreams = list(dict.fromkeys(next(iter(model.counts)) for model in models))
    found = dict.fromkeys(way for model in models for way in model.counts)
    ours = [way for way in _OURS if way in found]
    ways = [*upstreams, *(way for way in found if way not in (*upstreams, *ours)), *ours]
    rows = [[escaped(model.title), *(_cell(model, way) for way in ways)] for model in models]
    reasons = [
        escaped(f"* {model.title}, {way}: {found}")
        for model in models
        for way, found in model.counts.items()
        if isinstance(found, str)
    ]
    lines = table([["traffic (ratio), launches", *map(escaped, ways)], *rows], readable=True)
    return "\n".join([lines, "", *reasons]) if reasons else lines


def _cell(model: Traffic, way: str) -> str:
    found = model.counts.get(way)
    if found is None or isinstance(found, str):
        return "-"
    upstream = next(iter(model.counts.values()))
    ratio = "" if isinstance(upstream, str) else f" ({n_bytes(found) / n_bytes(upstream):.2f})"
    return f"{memory(n_bytes(found))}{ratio}, {len(found)}"


def breakdown(model: Traffic) -> str:
    """Formats the traffic of a model by category, with launches in brackets; "" without any."""
    counts = _found(model.counts)
    if not counts:
        return ""

    def row(name: str, wanted: Collection[str]) -> list[str]:
        chosen = [[x for x in launches if x.category in wanted] for launches in counts.values()]
        return [name, *(f"{memory(n_bytes(x))} ({len(x)})" if x else "" for x in chosen)]

    rows = [row(category, [category]) for category in CATEGORIES] + [row("total", CATEGORIES)]
    per_image = [memory(round(n_bytes(x) / model.batch)) for x in counts.values()]
    rows = [row for row in rows if any(row[1:])] + [["per image", *per_image]]
    header = [f"{escaped(model.title)}: traffic (launches)", *map(escaped, counts)]
    return table([header, *rows], readable=True)


def _found(counts: Mapping[str, list[Launch] | str]) -> dict[str, list[Launch]]:
    return {way: found for way, found in counts.items() if not isinstance(found, str)}


def plot(models: Sequence[Traffic], path: str | os.PathLike[str]) -> None:
    """Draws where the bytes go, one panel for each model; see `traffic_plot.draw`."""
    from .traffic_plot import draw

    counts = {model.title: _found(model.counts) for model in models}
    draw({title: ways for title, ways in counts.items() if ways}, path)
