"""Stages of `gpu.py` that run whole models: upstream's, ours, and compiled ones, in turns.

A cell is a model, a precision and a batch. All of its columns take the same weights and images,
return all four stages, and are compared with upstream's float64 maps before they are timed.
"""

import copy
import io
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch
from gpu_device import n_processes, on_device
from gpu_measure import PRECISIONS, Clock, OurBytes, peaks, precision
from gpu_peers import (
    Cell,
    FeatureMaps,
    StateDict,
    fastbb_model,
    load_timm,
    random_weights,
    transformers_model,
)
from gpu_profile import profiled
from gpu_work import Work, describe
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastbb.engine.graphs import GraphPool
from fastbb_kernels import KernelWarning, use_impl
from fastbb_kernels.accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude
from fastbb_kernels.fp32_precision import convolution_precision
from fastbb_kernels.precompiling import n_cores

N_CHECKED = 4  # images that are compared with float64
_CELL_S = 1.5
_PROFILED_CALLS = 5

UPSTREAM = "eager upstream"
FASTBB = "fastbb"
GRAPH = "fastbb, CUDA graph"
COMPILED = "upstream, compiled"
REDUCE_OVERHEAD = "upstream, reduce-overhead"
MAX_AUTOTUNE = "upstream, max-autotune"
BASE = (UPSTREAM, FASTBB, GRAPH)
# compiled columns by the mode of torch.compile
COMPILE_MODES = {COMPILED: None, REDUCE_OVERHEAD: "reduce-overhead", MAX_AUTOTUNE: "max-autotune"}

Run = Callable[[], Sequence[Tensor]]


class Wrong(Exception):
    """The maps of a column are wrong; the message says why."""


def cell(name: str, dtype: str, batch: int, dry_run: bool) -> Cell:
    if dry_run:
        return Cell(name, dtype, batch, 32, tiny=True, stages=("stage1", "stage2"))
    return Cell(name, dtype, batch, 224)


@dataclass(frozen=True)
class Upstream:
    """A library's own model, which returns transformers' maps."""

    library: str
    module: nn.Module


@cache
def weights(name: str, dry_run: bool) -> StateDict:
    return random_weights(cell(name, "fp32", 1, dry_run))


@cache
def upstream(name: str, dtype: str, device: torch.device, dry_run: bool) -> Upstream:
    """Returns transformers' model, else timm's, else our plain PyTorch; its note says which."""
    one, state = cell(name, dtype, 1, dry_run), weights(name, dry_run)
    problems = []
    for library, load in (("transformers", _load_transformers), ("timm", load_timm)):
        try:
            module = load(one, state)
        except Exception as error:  # not installed, or a version that does not fit
            problems.append(f"{library}: {describe(error)}")
            continue
        return Upstream(_label(library, module, problems), _laid_out(module, one, device))
    module = _laid_out(FeatureMaps(_ours(one, state)), one, device)
    return Upstream("fastbb eager" + _because(problems), _PlainPyTorch(module))


def _label(library: str, module: nn.Module, problems: Sequence[str]) -> str:
    """Formats a library, its version, its attention, and why earlier libraries were not taken."""
    config = getattr(getattr(module, "backbone", None), "config", None)
    attention = getattr(config, "_attn_implementation", None)
    facts = [metadata.version(library), *([attention] if attention else [])]
    return f"{library} {', '.join(facts)}" + _because(problems)


def _because(problems: Sequence[str]) -> str:
    return f" ({'; '.join(problems)})" if problems else ""


def _load_transformers(one: Cell, state: StateDict) -> nn.Module:
    """Loads weights by the names of this version's modules: ours, or those of its checkpoints."""
    model = transformers_model(one)
    wanted = [name for name in model.state_dict() if not name.endswith("position_index")]
    renamed = fastbb_model(one)
    renamed.load_state_dict(state)
    for known in (state, renamed.to_checkpoint_names()):
        if known.keys() >= set(wanted):
            model.load_state_dict({name: known[name] for name in wanted}, strict=False)
            return FeatureMaps(model).to(one.torch_dtype)
    raise ValueError(f"this version has other names: {sorted(set(wanted) - state.keys())[:3]}")


class _PlainPyTorch(nn.Module):
    """Our model without kernels, used if no other library is installed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        with use_impl("eager"):
            return self.module(pixels)


def _laid_out(module: nn.Module, one: Cell, device: torch.device) -> nn.Module:
    """Converts a model to the layout that is fastest for users: channels_last for convolutions."""
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if _is_resnet(one) else module


def _is_resnet(one: Cell) -> bool:
    return one.model.family == "resnet"


def _ours(one: Cell, state: StateDict) -> Any:
    model = fastbb_model(one)
    model.load_state_dict(state)
    return model.to(one.torch_dtype).eval()


@cache
def ours(name: str, dtype: str, device: torch.device, dry_run: bool) -> Any:
    return _ours(cell(name, dtype, 1, dry_run), weights(name, dry_run)).to(device)


@cache
def _images(n: int, size: int) -> Tensor:
    """Makes images [n, 3, size, size] in fp32, exact in bf16; a larger n appends images."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, size, size, generator=generator) for _ in range(n)]
    return torch.stack(images).bfloat16().float()


def pixels_of(one: Cell, device: torch.device) -> Tensor:
    return _images(one.batch, one.size).to(device, one.torch_dtype)


@dataclass(frozen=True)
class Truth:
    """Upstream's maps of a few images, in the cell's precision and in float64."""

    eager: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]

    def check(self, maps: Sequence[Tensor]) -> None:
        """Checks the first images of a result by the accuracy rule.

        Raises:
            Wrong: a map fails; the message says how.
        """
        if len(maps) != len(self.exact):
            raise Wrong(f"{len(maps)} maps, upstream {len(self.exact)}")
        for index, (got, eager, exact) in enumerate(zip(maps, self.eager, self.exact)):
            lost = 2 * max_error(eager, exact) / max_magnitude(exact)
            # fp32 has its own limit; the limit of TF32 follows from upstream's error
            relative = lost if convolution_precision() == "tf32" else FP32_REL
            problem = accuracy_problem(
                got[: len(eager)].to(eager.dtype), eager, exact, max(relative, FP32_REL)
            )
            if problem:
                raise Wrong(f"map {index}: {problem}")


@cache
def truth(name: str, dtype: str, n_images: int, device: torch.device, dry_run: bool) -> Truth:
    """Computes the truth; call it in the precision of the cell."""
    source = upstream(name, dtype, device, dry_run)
    pixels = pixels_of(cell(name, dtype, n_images, dry_run), device)
    exact = copy.deepcopy(source.module).double()
    with torch.inference_mode():
        eager = source.module(pixels)
        return Truth(
            tuple(x.to(PRECISIONS[dtype]) for x in eager),
            tuple(x.double() for x in exact(pixels.double())),
        )


# columns


def _upstream_column(one: Cell, pixels: Tensor) -> Run:
    module = upstream(one.name, one.dtype, pixels.device, one.tiny).module
    laid_out = _channels_last(pixels, one)
    return lambda: module(laid_out)


def _channels_last(pixels: Tensor, one: Cell) -> Tensor:
    if not _is_resnet(one):
        return pixels
    return pixels.contiguous(memory_format=torch.channels_last)


def _fastbb_column(one: Cell, pixels: Tensor) -> Run:
    backbone = ours(one.name, one.dtype, pixels.device, one.tiny)
    return lambda: backbone(pixels).feature_maps


def _warm_up(one: Cell, device: torch.device) -> None:
    """Makes our fused and folded weights by one run."""
    # in a dry run, which times nothing, an op that does not run its kernel is an error
    with use_impl("triton") if one.tiny else nullcontext():
        ours(one.name, one.dtype, device, one.tiny)(pixels_of(one, device)[:1])


def prepared(backbone: Any, mode: str, one: Cell, **options: Any) -> Any:
    """Prepares the engine for a cell; the only caller of `Backbone.prepare`."""
    if not hasattr(backbone, "prepare"):
        raise NotImplementedError("this version of fastbb has no Backbone.prepare()")
    return backbone.prepare(mode=mode, example=(one.batch, one.size, one.size), **options)


def _graph_column(one: Cell, pixels: Tensor) -> Run:
    run = graphed(one, pixels)
    return lambda: run(pixels)


def graphed(one: Cell, pixels: Tensor) -> Callable[[Tensor], Sequence[Tensor]]:
    """Returns our model as CUDA graphs, recorded for these pixels; other shapes at first use."""
    backbone = ours(one.name, one.dtype, pixels.device, one.tiny)
    ready = prepared(backbone, "triton", one, cuda_graph=pixels.is_cuda)
    with torch.inference_mode():
        ready(pixels)
    runs = _decisions(ready)[0]
    if one.tiny:  # the engine takes this way only for tensors of a GPU
        return GraphPool(lambda x: tuple(ready(x).feature_maps))
    if "graph" not in runs["runs"].lower():
        raise RuntimeError(f"runs {runs['runs']}, not a CUDA graph: {runs['why']}")
    return lambda x: ready(x).feature_maps


def _decisions(ready: Any) -> list[dict[str, str]]:
    """Returns the rows of a prepared backbone's explanation."""
    with redirect_stdout(io.StringIO()):  # it also prints them
        rows = ready.explain().rows
    return [
        {name: str(getattr(row, name)) for name in ("what", "runs", "why", "others")}
        for row in rows
    ]


def _compiled_column(one: Cell, pixels: Tensor, mode: str | None) -> Run:
    from torch._inductor import config

    # a choice that was made while other processes used the GPU would be unfair to upstream
    if hasattr(config, "autotune_local_cache"):
        config.autotune_local_cache = False
    module = upstream(one.name, one.dtype, pixels.device, one.tiny).module
    if one.tiny and mode is None:
        run = torch.compile(module, backend="eager")
    elif one.tiny:  # the same as above with another name
        assert mode in torch._inductor.list_mode_options()
        run = module
    else:
        run = torch.compile(module, mode=mode, dynamic=False)
    laid_out = _channels_last(pixels, one)

    def call() -> Sequence[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return run(laid_out)

    with torch.inference_mode():
        for _ in range(3):  # torch records its graph after a first run
            call()
    return call


COLUMNS: dict[str, Callable[[Cell, Tensor], Run]] = {
    UPSTREAM: _upstream_column,
    FASTBB: _fastbb_column,
    GRAPH: _graph_column,
    **{name: partial(_compiled_column, mode=mode) for name, mode in COMPILE_MODES.items()},
}


# stages


MAIN = (
    ("swin_t", 64),
    ("resnet50", 64),
    ("swin_t", 1),
    ("resnet50", 1),
    ("swin_b", 64),
    ("swin_b", 1),
)
OTHER_BATCHES = tuple((name, batch) for batch in (8, 256) for name in ("swin_t", "resnet50"))


def _cells(
    cells: Sequence[tuple[str, int]], dtypes: Sequence[str], dry_run: bool, n_dry: int = 1
) -> list[Cell]:
    if dry_run:
        return [cell(name, dtypes[0], 1, True) for name, _ in cells[:n_dry]]
    return [cell(name, dtype, batch, False) for name, batch in cells for dtype in dtypes]


def main_cells(work: Work, dry_run: bool) -> None:
    """Measures the main cells in bf16: upstream, ours, and ours as a CUDA graph."""
    run_cells(work, _cells(MAIN, ("bf16",), dry_run, n_dry=2))


def other_batches(work: Work, dry_run: bool) -> None:
    """Measures the same in bf16 for the other batches."""
    run_cells(work, _cells(OTHER_BATCHES, ("bf16",), dry_run))


def other_precisions(work: Work, dry_run: bool) -> None:
    """Measures the main cells in fp16, TF32 and fp32."""
    run_cells(work, _cells(MAIN, ("fp16", "tf32", "fp32"), dry_run))


def compile_ahead(work: Work, dry_run: bool) -> None:
    """Fills torch.compile's caches for `compiled`, in several processes; times nothing."""
    n = n_processes(dry_run)
    tasks = {
        f"{one.title}, {column}": partial(_compile, one, column, n_cores() // n)
        for one in _cells(MAIN, ("bf16",), dry_run)
        for column in (COMPILED, REDUCE_OVERHEAD)
    }
    work.in_processes(tasks, n)


def _compile(one: Cell, column: str, n_threads: int) -> dict[str, Any]:
    from torch._inductor import config

    config.compile_threads = max(1, n_threads)
    start = time.perf_counter()
    with on_device(one.tiny) as device, precision(one.dtype), torch.inference_mode():
        COLUMNS[column](one, pixels_of(one, device))
        torch.cuda.synchronize()
    return {"seconds": round(time.perf_counter() - start, 1)}


def compiled(work: Work, dry_run: bool, name: str) -> None:
    """Measures torch.compile of upstream's model in two modes, beside the other columns."""
    cells = [one for one in MAIN if one[0] == name]
    run_cells(work, _cells(cells, ("bf16",), dry_run), (*BASE, COMPILED, REDUCE_OVERHEAD))


def max_autotune(work: Work, dry_run: bool, name: str) -> None:
    """Measures torch.compile with max-autotune, which takes minutes and therefore runs last."""
    run_cells(work, _cells(((name, 64),), ("bf16",), dry_run), (*BASE, MAX_AUTOTUNE))


def run_cells(work: Work, cells: Sequence[Cell], columns: Sequence[str] = BASE) -> None:
    """Measures cells until the time is over; writes a row for each.

    A row names the ops that are off in this process; PyTorch's own ops run in their place.
    """
    items = {f"{one.title} ({', '.join(columns)})": one for one in cells}
    with on_device(cells[0].tiny) as device, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", KernelWarning)
        for item, one in work.in_time(items):
            start = time.perf_counter()
            try:
                with precision(one.dtype):
                    row = measure(one, columns, device)
            except Exception as error:
                row: dict[str, Any] = {"problem": describe(error)}
            row["off"] = [str(w.message) for w in said if w.category is KernelWarning]
            where = {"model": one.name, "precision": one.dtype, "batch": one.batch}
            work.row(item, **where, **row)
            work.say(f"{one.title}: {time.perf_counter() - start:.1f} s")
            torch.cuda.synchronize()  # raises if the device is lost: a new process runs the rest
            torch.cuda.empty_cache()


def measure(one: Cell, columns: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Measures a cell; returns its row."""
    pixels = pixels_of(one, device)
    reference = truth(one.name, one.dtype, min(N_CHECKED, one.batch), device, one.tiny)
    source = upstream(one.name, one.dtype, device, one.tiny)
    _warm_up(one, device)  # the weights must not count as memory of a column
    torch.compiler.reset()  # it stops compiling after 8 variants of one function
    cells: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name in columns:
        cells[name] = {}
        before = _start_memory(device)
        try:
            run = COLUMNS[name](one, pixels)
            if name in COMPILE_MODES:
                torch.cuda.reset_peak_memory_stats(device)
            with torch.inference_mode():
                found = run()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated(device)
                cells[name]["peak_mb"] = (peak - before) / 2**20
                reference.check(found)
            runs[name] = run
        except Exception as error:
            cells[name]["problem"] = _problem(error)
        found = None
    with torch.inference_mode():
        times = Clock(device).times(runs, max_s=_CELL_S, max_rounds=1 if one.tiny else 30)
        for name, run in runs.items():
            cells[name] |= profiled(run, 1 if one.tiny else _PROFILED_CALLS)
    floor = floor_of(one, device)
    for name, taken in times.items():
        images_per_s = 1e3 * one.batch / taken.median_ms
        cells[name] |= {**taken.to_dict(), "images_per_s": images_per_s}
    return {"upstream": source.library, "columns": cells, **floor}


def _problem(error: Exception) -> str:
    if isinstance(error, Wrong):
        return f"wrong, not timed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {describe(error)}"
    return describe(error)


def floor_of(one: Cell, device: torch.device) -> dict[str, Any]:
    """Lower bounds of the time of a forward pass through our ops, from traffic and arithmetic."""
    try:
        with torch.inference_mode(), OurBytes() as counted:
            ours(one.name, one.dtype, device, one.tiny)(pixels_of(one, device))
        n_flops = one.batch * _flops(one.name, one.tiny)
    except Exception as error:
        return {"floor_ms": None, "floor_problem": describe(error)}
    return {
        "n_bytes": counted.n_bytes,
        "n_launches": counted.n_launches,
        "n_flops": n_flops,
        "floor_ms": peaks(device).floor_ms(counted.n_bytes, n_flops, one.dtype),
    }


@cache
def _flops(name: str, dry_run: bool) -> int:
    """Multiplications and additions for one image."""
    one = cell(name, "fp32", 1, dry_run)
    backbone = fastbb_model(one).to("meta").eval()
    with torch.no_grad(), use_impl("eager"), FlopCounterMode(display=False) as counted:
        backbone(torch.empty(1, 3, one.size, one.size, device="meta"))
    return counted.get_total_flops()


def _start_memory(device: torch.device) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
