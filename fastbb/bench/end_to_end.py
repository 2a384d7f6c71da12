"""Images per second of the stages of an extraction, alone and together: the result, in words.

`stages` measures it, `waterfall` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..engine.measuring import duration
from .markdown import escaped
from .markdown import table as markdown_table
from .table import aligned, percent, rate

# in the order of the pipeline: those of the decode threads, and those of the main thread
FEED = ("read", "decode", "resize")
MAIN = ("copy", "model", "write")
_NEAR = 0.8  # share of what the slower threads reach alone, below which something else slows them


@dataclass
class Stage:
    """The speed of one stage, or of all together.

    Attributes:
        name: "read", "decode", "resize", "copy", "model", "write" or "together".
        images_per_s: median over the rounds.
        seconds: of all rounds.
        images: that it took in all rounds.
        threads: that it used: as many as in the pipeline.
        rounds: images/s of each round.
    """

    name: str
    images_per_s: float
    seconds: float
    images: int
    threads: int
    rounds: list[float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lowest and highest images/s of the rounds; None for one round."""
        return (min(self.rounds), max(self.rounds)) if len(self.rounds) > 1 else None

    @property
    def ms(self) -> float:
        """Milliseconds of an image."""
        return 1e3 / self.images_per_s


@dataclass
class EndToEnd:
    """The speed of an extraction, and of its stages.

    Attributes:
        model: as it was asked for.
        directory: the inputs, as they were given.
        precision: "fp32", "bf16" or "fp16".
        mode: how the model ran.
        device: "cpu", "cuda" ...
        batch: images per forward pass.
        features: their names.
        n_images: among the inputs.
        n_sampled: images that were taken of these.
        rows: images of a round; more than `n_sampled` where images were taken repeatedly.
        null_model: whether a model that costs nothing took the place of the model.
        stages: each alone, in the order of the pipeline.
        together: the extraction; None if it was interrupted before.
        bound_by: name of the stage that limits the extraction.
        errors: number of sampled images that failed, by kind.
        failed: the first of these, each with its error.
        notes: what a reader of the numbers should know.
        interrupted: whether some rounds are missing.
    """

    model: str
    directory: str
    precision: str
    mode: str
    device: str
    batch: int
    features: list[str]
    n_images: int
    n_sampled: int
    rows: int
    null_model: bool
    stages: list[Stage] = field(default_factory=list)
    together: Stage | None = None
    bound_by: str | None = None
    errors: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> EndToEnd:
        """The inverse of `to_dict`, also after JSON.

        Raises:
            ValueError: the value is something else.
        """
        try:
            together = value["together"]
            stages = [Stage(**stage) for stage in value["stages"]]
            together = None if together is None else Stage(**together)
            return cls(**{**value, "stages": stages, "together": together})
        except (TypeError, KeyError) as error:
            raise ValueError(f"results of --end-to-end are damaged: {error}") from error

    @property
    def ms(self) -> float:
        """Milliseconds of an image if no two stages ran at once."""
        return sum(stage.ms for stage in self.stages)

    def lane(self, names: Sequence[str]) -> float | None:
        """Images/s of stages that take turns in the same threads; None where one is missing."""
        found = [stage for stage in self.stages if stage.name in names]
        return 1e3 / sum(stage.ms for stage in found) if len(found) == len(names) else None

    def find_bound(self) -> str | None:
        """Returns the slowest stage of the slower threads; None where a stage is missing."""
        feed, main = self.lane(FEED), self.lane(MAIN)
        if feed is None or main is None:
            return None
        slower = FEED if feed < main else MAIN
        return max((s for s in self.stages if s.name in slower), key=lambda stage: stage.ms).name


def title(result: EndToEnd) -> str:
    """Names the model, whether it is replaced, and how it runs, in one line."""
    model = f"{result.model}{' (null model: the feed alone)' if result.null_model else ''}"
    how = f"{result.precision} on {result.device} ({result.mode}), batch {result.batch}"
    return f"{model}: {', '.join(result.features)}, {how}"


def verdict(result: EndToEnd) -> list[str]:
    """Sentences: which stage is the limit, and how much of the time overlap hides."""
    together, feed, main = result.together, result.lane(FEED), result.lane(MAIN)
    if together is None or result.bound_by is None or feed is None or main is None:
        return ["interrupted before the stages and the extraction were measured"]
    bound = next(stage for stage in result.stages if stage.name == result.bound_by)
    n_threads = next(stage.threads for stage in result.stages if stage.name == FEED[0])
    threads = "1 decode thread" if n_threads == 1 else f"{n_threads} decode threads"
    speed = f"together {rate(together.images_per_s)} images/s"
    is_slowed = together.images_per_s < _NEAR * min(feed, main)
    sentences = [
        f"slower than its stages allow: {speed}, the slower threads alone {rate(min(feed, main))}"
        if is_slowed
        else f"bound by {bound.name}: {speed}, {bound.name} alone {rate(bound.images_per_s)}",
        f"read, decode and resize by turns, in {threads}: {rate(feed)} images/s; copy, model and "
        f"write by turns: {rate(main)}",
    ]
    alone, both = result.ms, together.ms
    times = f"one stage after the other {duration(alone / 1e3)} per image, together "
    times += f"{duration(both / 1e3)}"
    if both < alone:
        sentences.append(f"{times}: overlap hides {percent(1 - both / alone)}")
    else:
        sentences.append(f"{times}: {both / alone:.2f} times as long")
    if is_slowed:
        sentences.append("decode threads and model, or other programs, compete for the CPU")
    return sentences


def text(result: EndToEnd) -> str:
    """The report, for a terminal."""
    lines = [title(result), f"{result.directory}: {_counts(result)}", ""]
    lines += aligned([_HEADER, *_cells(result)])
    return "\n".join([*lines, "", *verdict(result), *_remarks(result)])


def markdown(result: EndToEnd) -> str:
    """The report as Markdown."""
    lines = [f"**{escaped(title(result))}**", "", f"`{result.directory}`: {_counts(result)}", ""]
    lines.append(markdown_table([_HEADER, *_cells(result)]))
    first, *others = verdict(result)
    points = [f"**{first}**", *map(escaped, [*others, *_remarks(result)])]
    return "\n".join([*lines, "", *(f"* {point}" for point in points)])


_HEADER = ("stage", "images/s", "interval", "time/image", "share", "threads")


def _cells(result: EndToEnd) -> list[tuple[str, ...]]:
    whole = result.ms
    rows = [_row(stage, percent(stage.ms / whole)) for stage in result.stages]
    return rows if result.together is None else [*rows, _row(result.together, "")]


def _row(stage: Stage, share: str) -> tuple[str, ...]:
    interval = "" if stage.interval is None else " to ".join(map(rate, stage.interval))
    threads = "" if stage.name == "together" else str(stage.threads)
    time = duration(stage.ms / 1e3)
    return stage.name, rate(stage.images_per_s), interval, time, share, threads


def _counts(result: EndToEnd) -> str:
    of_all = f"{result.n_sampled:,} of {result.n_images:,} images"
    if result.n_sampled == result.n_images:
        of_all = f"{result.n_images:,} image{'' if result.n_images == 1 else 's'}"
    if result.rows == result.n_sampled:
        return f"{of_all} in each round"
    times = math.ceil(result.rows / result.n_sampled)
    return f"{of_all}, each up to {times:,} times in a round of {result.rows:,}"


def _remarks(result: EndToEnd) -> list[str]:
    n_rounds = max((len(stage.rounds) for stage in result.stages), default=0)
    remarks = list(result.notes)
    if n_rounds:
        many = f"medians of {n_rounds} rounds, with the lowest and the highest"
        remarks.insert(0, many if n_rounds > 1 else "speeds of a single round")
    if result.errors:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(result.errors.items()))
        n_failed = sum(result.errors.values())
        remarks.insert(0, f"{n_failed:,} failed ({kinds}): {'; '.join(result.failed)}")
    if result.interrupted:
        remarks.append("interrupted: some rounds are missing")
    return remarks
