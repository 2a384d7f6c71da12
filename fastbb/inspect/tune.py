"""Measures what is fastest for a model on this machine, and remembers it: `fastbb tune`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from fastbb_kernels.machine import Machine, find_device
from fastbb_kernels.result_cache import ResultCache

from ..backbone.base import Backbone
from ..engine.explanation import Explanation
from ..engine.prepare import example_pixels, prepare
from ..engine.settings import Tools
from ..engine.trial import Trial, winner
from .loading import load_backbone

BATCHES = (1, 8)
BUDGET_S = 180.0


@dataclass(frozen=True)
class Tuned:
    """Measurements of one shape of input.

    Attributes:
        precision: "fp32", "tf32", "bf16" or "fp16".
        shape: images, their height and width.
        trials: what was tried, each with its time or what was wrong with it.
        explanation: what runs now, and why.
    """

    precision: str
    shape: tuple[int, int, int]
    trials: tuple[Trial, ...]
    explanation: Explanation

    def __repr__(self) -> str:
        best = winner(self.trials)
        cell = f"{self.precision}, {'x'.join(map(str, self.shape))}"
        if best is None or best.seconds is None:
            head = f"{cell}: nothing passed its check, eager runs"
        else:
            head = f"{cell}: {best.name}, {self.shape[0] / best.seconds:.1f} images/s"
        return "\n".join([head, *(f"  {trial}" for trial in self.trials)])


def tune_model(
    name: str,
    batches: Sequence[int] = (),
    sizes: Sequence[tuple[int, int]] = (),
    precisions: Sequence[str] = (),
    device: str | None = None,
    out_indices: Sequence[int] | None = None,
    budget_s: float = BUDGET_S,
    progress: Callable[[str], None] = lambda text: None,
    tools: Callable[[], Tools] = Tools,
    random_weights: bool = False,
) -> Iterator[Tuned]:
    """Measures every combination of batch, size and precision; yields them one by one.

    What mode "auto" finds remembered it does not measure again. Images are random.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        batches: images per forward pass; default: 1 and 8.
        sizes: (height, width); default: the model's own.
        precisions: default: fp32 on a CPU, bf16 on a GPU.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        out_indices: of the maps; default: the model's own.
        budget_s: seconds for each combination; what was begun is finished.
        progress: is told what is measured next.
        tools: makes what a measurement measures and remembers with.
        random_weights: loads no weights; times do not depend on them.

    Raises:
        OSError: there is no such model, or it cannot be had.
        ValueError: an argument is invalid.
    """
    where = find_device(device)
    backbone = load_backbone(name, out_indices, torch.float32, where, random_weights)
    default = "bf16" if where.type == "cuda" else "fp32"
    sizes = sizes or (backbone.default_size,)
    for precision, size, batch in product(
        precisions or (default,), sizes, sorted(batches or BATCHES, reverse=True)
    ):
        shape = (batch, *size)
        progress(f"{precision}, {'x'.join(map(str, shape))}")
        with_budget = tools()
        with_budget.budget_s = budget_s
        yield _tuned(backbone, precision, shape, with_budget)


def _tuned(backbone: Backbone, precision: str, shape: tuple[int, int, int], tools: Tools) -> Tuned:
    # what is compiled for one shape is not what would be compiled for another
    prepared = prepare(backbone, "auto", precision, tools=tools)
    engine = prepared._engine
    assert engine is not None
    pixels = example_pixels(prepared, shape)
    plan = engine.tune(pixels)
    return Tuned(precision, shape, tuple(plan.trials), engine.explain())


def remembered_in(device: str | None, results: Sequence[Tuned]) -> str:
    """Where results are kept, or the reason why they are not, in sentences of a line each."""
    cache = ResultCache(Machine.of(find_device(device)))
    found = (row for result in results for row in result.explanation.rows if row.what == "cache")
    notes = list(dict.fromkeys([*cache.notes, *(row.why for row in found)]))
    if not any("not kept" in note for note in notes):
        notes.append(f"remembered in {cache.path}")
    return "\n".join(notes)
