"""A whole bench: what was asked for, measured in order, whatever happens on the way."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastbb_kernels.machine import find_device

from ..engine.settings import Settings
from .backbones import BackboneSubject
from .compare import compare, regressed_cells
from .environment import describe_machine, gpu_for_smi
from .hosts import HostSubject
from .measure import SECONDS, Bench
from .rates import measure_rates
from .results import Cell, Results
from .stages import measure_end_to_end
from .subject import Subject
from .traffic import Traffic, count_traffic, totals
from .ways import check_installed


@dataclass(frozen=True)
class Asked:
    """What a bench measures; all fields are plain data, so that a file of results repeats it.

    Attributes:
        models: backbones, as `AutoBackbone.from_pretrained` takes them.
        hosts: models for `accelerate`, see `hosts.HostSubject`.
        batches: images per call.
        size: (height, width) of the images; None: each model's own.
        precisions: "fp32", "tf32", "bf16", "fp16".
        modes: of `prepare` and `accelerate`.
        against: libraries and engines to compare with.
        random_weights: load no weights and draw them.
        out_indices: of the maps; None: the model's own.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        seconds: of each way in each cell, without its start.
        budget_s: see `Bench`.
    """

    models: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    size: tuple[int, int] | None = None
    precisions: tuple[str, ...] = ("fp32",)
    modes: tuple[str, ...] = ("auto",)
    against: tuple[str, ...] = ()
    random_weights: bool = False
    out_indices: tuple[int, ...] | None = None
    device: str | None = None
    seconds: float = SECONDS
    budget_s: float | None = None

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Asked:
        """What a file of results was asked for.

        Raises:
            ValueError: these are no such options.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = options.get(field.name, field.default)
            if isinstance(field.default, tuple) and not isinstance(value, list | tuple):
                raise ValueError(f"the options of the results are damaged: {field.name}")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def new_results(asked: Asked, command: Sequence[str]) -> Results:
    """Results without cells, with the description of this machine.

    Raises:
        ValueError: there is no such device.
    """
    environment = describe_machine(find_device(asked.device))
    return Results(shlex.join(command), environment, asdict(asked))


def run_bench(
    asked: Asked,
    results: Results,
    *,
    old: Results | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Measures everything that was asked for into `results`.

    A model that cannot be had ends the bench before anything is measured.

    Args:
        asked: what to measure.
        results: see `new_results`.
        old: earlier results; a cell that seems to have regressed is measured again.
        say: is told what is going on, a line at a time.

    Raises:
        OSError: there is no such model, or it cannot be had.
        ValueError: an argument does not fit.
        Interrupted: a signal came; `results` has what was measured until then.
    """
    device = find_device(asked.device)
    check_installed(asked.against)
    for precision in asked.precisions:
        Settings(precision=precision).check_device(device, "model")  # type: ignore[arg-type]  # checks it

    def is_slower(cell: Cell) -> bool:
        if old is None:
            return False
        alone = Results(results.command, results.environment, cells=[cell])
        return bool(regressed_cells(compare(old, alone)))

    with tempfile.TemporaryDirectory(prefix="fastbb-bench-") as name:
        folder = Path(name)
        bench = Bench(
            results,
            folder,
            gpu=gpu_for_smi(device),
            seconds=asked.seconds,
            budget_s=asked.budget_s,
            say=say,
            rates=partial(measure_rates, device),
        )
        subjects = list(_subjects(asked, folder, device, say))
        bench.n_planned = len(subjects) * len(asked.precisions) * len(asked.batches)
        began = time.monotonic()
        for subject in subjects:
            bench.run(subject, asked.precisions, asked.batches, is_slower)
        took_s = time.monotonic() - began
        if asked.budget_s is not None and took_s > asked.budget_s:
            results.notes.append(
                f"It took {took_s:.0f} s, more than --budget {asked.budget_s:.0f}: what compiles "
                "nothing is never dropped."
            )


def _subjects(
    asked: Asked, folder: Path, device: torch.device, say: Callable[[str], None]
) -> Iterator[Subject]:
    for number, name in enumerate(asked.models):
        say(f"loading {name}")
        try:
            yield BackboneSubject(
                name,
                folder / f"model-{number}",
                device=device,
                size=asked.size,
                out_indices=asked.out_indices,
                random_weights=asked.random_weights,
                modes=asked.modes,
                against=asked.against,
            )
        except OSError as error:
            hint = "" if asked.random_weights else "; --random-weights loads no weights"
            raise OSError(f"{error}{hint}") from error
    for name in asked.hosts:
        say(f"loading {name}")
        yield HostSubject(
            name,
            asked.size,
            random_weights=asked.random_weights,
            modes=asked.modes,
            device=device,
        )


def run_end_to_end(
    asked: Asked,
    results: Results,
    images: str,
    *,
    null_model: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Measures the extraction of the features of images, for each model and way to run it.

    Args:
        asked: what to measure.
        results: see `new_results`.
        images: as `fastbb extract` takes them.
        null_model: measures the feed alone.
        say: is told what is going on, a line at a time.

    Raises:
        OSError, ValueError: see `measure_end_to_end`.
    """
    every = product(asked.models, asked.precisions, asked.batches, asked.modes)
    for model, precision, batch, mode in every:
        found = measure_end_to_end(
            model,
            images,
            precision=precision,
            mode=mode,
            batch=batch,
            device=asked.device,
            random_weights=asked.random_weights,
            null_model=null_model,
            seconds=4 * asked.seconds,
            say=say,
        )
        results.end_to_end.append(found.to_dict())
        if found.interrupted:
            results.interrupted = True
            return


def run_traffic(
    asked: Asked,
    results: Results,
    counted: list[Traffic],
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Counts bytes and launches on a GPU, in bf16, for each model, host and batch.

    Args:
        asked: what to count.
        results: get a cell for each.
        counted: gets the launches of each.
        say: is told what is going on, a line at a time.

    Raises:
        OSError: there is no such model.
        ValueError: an argument is invalid.
    """

    def add(kind: str, name: str, found: Traffic) -> None:
        counted.append(found)
        cell = Cell(
            name, kind, "bf16", found.batch, found.batch, found.size, next(iter(found.counts))
        )
        cell.traffic = totals(found.counts)
        results.cells.append(cell)

    for name in asked.models:
        for batch in asked.batches:
            say(f"counting {name}, batch {batch}")
            add("backbone", name, count_traffic(name, asked.size, batch, asked.out_indices))
    for name in asked.hosts:
        say(f"counting {name}")
        host = HostSubject(name, asked.size, random_weights=asked.random_weights)
        for batch in asked.batches:
            add("host", name, host.traffic(batch))
