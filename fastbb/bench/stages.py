"""Times the stages of an extraction, each alone and all together.

A stage runs the code of the extraction in as many threads as there. Rounds take every stage and the
whole extraction in turns, so that other load of the machine slows all of them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbb_kernels.machine import find_device

from ..backbone.base import Backbone
from ..engine.interruption import check_interrupted, interruption_code
from ..engine.measuring import synchronize
from ..extraction.decode import ImageError, RowError, read_bytes
from ..extraction.executor import InProcess
from ..extraction.layout import Shard
from ..extraction.listing import Listing
from ..extraction.models import FeatureModel
from ..extraction.outputs import DTYPES
from ..extraction.pillow import fixed_settings
from ..extraction.pipeline import FeatureBatch, FeatureExtractor, Row, chunked, n_decode_threads
from ..extraction.plan import DEFAULT_BATCH_SIZE, make_plan
from ..extraction.progress import Progress
from ..extraction.run import Run
from ..extraction.shards import shard_content
from ..extraction.sources import InputError, Source
from ..extraction.store import FeatureWriter
from ..images.processor import AutoImageProcessor, ImageProcessor
from ..inspect.loading import load_backbone
from .end_to_end import FEED, MAIN, EndToEnd, Stage
from .timing import warm_up

N_ROUNDS = 5
_MIN_BATCHES, _MIN_ROWS = 4, 16  # of a round
_N_FAILED_SHOWN = 3
_WARM_S = 3.0
_TOGETHER = "together"
T = TypeVar("T")


class NullModel(FeatureModel):
    """A model that costs nothing: its features are zeros, of the shape and dtype of another's.

    Args:
        model: the other one, which is not run any more.
        pixels: an example, which it is run with once.
    """

    def __init__(self, model: FeatureModel, pixels: Tensor) -> None:
        super().__init__(model.module)
        self._zeros = {
            name: torch.zeros_like(feature[:1])
            for name, feature in model.features(pixels, plain=True).items()
        }

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        return {
            name: zeros.expand(len(pixels), *zeros.shape[1:]) for name, zeros in self._zeros.items()
        }


class _Extractor(FeatureExtractor):
    """An extractor that is prepared once: a round finds its model as the one before left it."""

    _chosen: str | None = None

    def choose_mode(self, mode: str, expected_images: int) -> str:
        if self._chosen is None:
            self._chosen = super().choose_mode(mode, expected_images)
        return self._chosen

    @torch.no_grad()
    def remove_models(self) -> None:
        """Replaces the models by null models."""
        example = self._on_device(torch.zeros(1, 3, *self._example_size))
        self._models = tuple(NullModel(model, example) for model in self._models)


@dataclass
class _Work:
    """Images that a stage took in a round, and its seconds for them."""

    images: int = 0
    seconds: float = 0.0

    def add(self, images: int, seconds: float) -> None:
        self.images += images
        self.seconds += seconds

    @property
    def rate(self) -> float:
        return self.images / max(self.seconds, 1e-9)


def measure_end_to_end(
    model: str | os.PathLike[str] | Backbone,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    precision: str = "fp32",
    mode: str = "auto",
    batch: int = DEFAULT_BATCH_SIZE,
    features: str | Sequence[str] = "embedding",
    device: str | torch.device | None = None,
    processor: ImageProcessor | None = None,
    random_weights: bool = False,
    null_model: bool = False,
    seconds: float = 20.0,
    limit: int = 512,
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> EndToEnd:
    """Measures an extraction and its stages: read, decode, resize, copy, model, write.

    Together they are an extraction into a temporary directory, which is removed. A first pass reads
    every image once, so that files come from the page cache, and warms the model up.

    After Ctrl-C the result has what was measured, and says that it was interrupted.

    Args:
        model: as `FeatureExtractor` takes it.
        inputs: as `extract` takes them.
        precision: of the forward pass, "fp32", "bf16" or "fp16".
        mode: of `Backbone.prepare`; "auto" chooses for all images of the inputs.
        batch: images per forward pass.
        features: names, see `FeatureExtractor`.
        device: default: "cuda" where there is one, else "cpu".
        processor: in place of the model's own.
        random_weights: draws the weights and loads none; `model` is a name.
        null_model: replaces the model by one that costs nothing and gives zeros.
        seconds: that the stages take one after the other in all rounds; more where four batches in
            each round take longer.
        limit: takes at most so many images, at even distances; few are taken repeatedly.
        say: shows a line about what is done.
        clock: seconds from any start.

    Raises:
        InputError: the inputs cannot be listed, or are empty.
        OSError: the model cannot be had.
        ValueError: an argument is not what is wanted, or no image can be used.
    """
    if not (isinstance(limit, int) and limit >= 1):
        raise ValueError(f"limit: wanted a whole number, at least 1, got {limit!r}")
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    paths = [os.fsdecode(path) for path in given]
    if not paths or not all(paths):
        raise InputError(
            f"inputs: wanted at least one directory, glob, image, list or archive, got {paths}"
        )
    listing = Listing(paths)
    sources = list(listing)  # before the model is loaded: a wrong input is told at once
    name = type(model).__name__ if isinstance(model, Backbone) else os.fspath(model)
    say(f"loading {name}")
    if random_weights:
        processor = processor or AutoImageProcessor.from_pretrained(name)
        dtype = DTYPES.get(precision, torch.float32)  # the extractor refuses others
        model = load_backbone(name, None, dtype, find_device(device), random_weights=True)
    extractor = _Extractor(
        model,
        features,
        precision=precision,
        device=device,
        batch_size=batch,
        mode="eager",
        processor=processor,
    )
    if null_model:
        extractor.remove_models()
    bench = _Bench(extractor, paths, listing, clock)
    bench.start(mode, sources, seconds, limit)
    result = EndToEnd(
        model=name,
        directory=", ".join(paths),
        precision=precision,
        mode=extractor.choose_mode(mode, len(sources)),
        device=extractor.device.type,
        batch=extractor.batch_size,
        features=list(extractor.features),
        n_images=len(sources),
        n_sampled=bench.n_sampled,
        rows=len(bench.rows),
        null_model=null_model,
        notes=bench.notes(null_model, random_weights),
    )
    try:
        for n in range(1, N_ROUNDS + 1):
            bench.round()
            rate = bench.finished[-1][_TOGETHER].rate
            say(f"round {n} of {N_ROUNDS}: {rate:,.1f} images/s")
    except BaseException as error:
        # inside other code the interruption may become another error
        if not isinstance(error, KeyboardInterrupt) and interruption_code() is None:
            raise
        result.interrupted = True
    return bench.fill(result)


class _Bench:
    """Rounds of one extractor.

    Args:
        extractor: to measure.
        paths: of the inputs.
        listing: of these, iterated.
        clock: seconds from any start.

    Attributes:
        rows: of a round.
        n_sampled: number of images among them.
        finished: work by stage of each round.
    """

    def __init__(
        self,
        extractor: _Extractor,
        paths: Sequence[str],
        listing: Listing,
        clock: Callable[[], float],
    ) -> None:
        self._extractor, self._paths, self._listing = extractor, paths, listing
        self._device = extractor.device
        self._clock = clock
        self._n_threads = n_decode_threads(extractor.device)
        self._errors: dict[str, RowError] = {}
        self.rows: list[Row] = []
        self.n_sampled = 0
        self.finished: list[dict[str, _Work]] = []
        self._now: dict[str, _Work] = {}

    def start(self, mode: str, sources: Sequence[Source], seconds: float, limit: int) -> None:
        """Chooses the mode, warms the model up, and chooses the images of a round.

        Raises:
            ValueError: no image can be used.
        """
        size = self._extractor.batch_size
        n_least = max(_MIN_BATCHES * size, _MIN_ROWS)
        n_least = -(-n_least // size) * size
        runs = self._extractor.choose_mode(mode, max(len(sources), n_least))
        self._plan = make_plan(self._extractor, mode, runs, None)
        sample = _spread(sources, limit)
        batch_s = self._warm_up(sample)
        n_batches = round(seconds / N_ROUNDS / max(batch_s, 1e-9))
        # one shard at most, where it is no fewer than the least
        n_rows = max(n_least, min(n_batches * size, self._plan["shard_rows"]))
        sample = _spread(sources, min(limit, n_rows))
        self.n_sampled = len(sample)
        repeated = itertools.islice(itertools.cycle(sample), n_rows)
        self.rows = [(n, source.id, source) for n, source in enumerate(repeated)]
        with ThreadPoolExecutor(self._n_threads) as pool:
            for _ in pool.map(_read_once, sample):
                check_interrupted()

    def _warm_up(self, sample: Sequence[Source]) -> float:
        """Returns the seconds of a batch that has features, after some such batches."""
        size, failure = self._extractor.batch_size, None
        cycled = itertools.islice(itertools.cycle(sample), max(len(sample), size))
        rows = ((n, source.id, source) for n, source in enumerate(cycled))
        for chunk in chunked(rows, size):

            def run(chunk: list[Row] = chunk) -> FeatureBatch:
                check_interrupted()
                return next(self._extractor.run([chunk], pad_to=size))

            batch = run()
            if batch.ids:
                return warm_up(run, self._device, _WARM_S, self._clock)[-1]
            failure = failure or batch.errors[0]
        assert failure is not None, "a listing has images"
        raise ValueError(
            f"{', '.join(self._paths)}: none of {len(sample):,} images can be used; the first one, "
            f"{_shown(failure)}"
        )

    def round(self) -> None:
        """Measures every stage alone, then all together."""
        self._now = {name: _Work() for name in (*FEED, *MAIN, _TOGETHER)}
        with tempfile.TemporaryDirectory(prefix="fastbb-bench-") as folder:
            self._alone(Path(folder) / "alone")
            self._together(Path(folder) / "together")
        self.finished.append(self._now)
        self._now = {}

    def _alone(self, folder: Path) -> None:
        extractor = self._extractor
        size = extractor.batch_size
        with (
            FeatureWriter(folder) as writer,
            fixed_settings(),
            ThreadPoolExecutor(self._n_threads) as pool,
        ):
            writer.start(self._plan)
            writer.append("start", ((n, source) for n, _, source in self.rows))
            chunks = chunked(self.rows, size)
            for shard in writer.shards:
                parts: list[FeatureBatch] = []
                n_left = shard.rows
                while n_left:
                    chunk = next(chunks)
                    n_left -= len(chunk)
                    parts.append(self._batch(chunk, self._loaded(chunk, pool)))
                self._errors |= {error.id: error for part in parts for error in part.errors}
                write = partial(_write, writer, shard, parts, self._plan["outputs"])
                self._timed("write", shard.rows, write)

    def _loaded(self, chunk: list[Row], pool: ThreadPoolExecutor) -> list[Tensor | ImageError]:
        """Reads, decodes and resizes images, stage by stage, a few of them at a time.

        As many are held decoded at once as in the pipeline: two per thread.
        """
        extractor, loaded = self._extractor, list[Tensor | ImageError]()
        for rows in chunked(chunk, 2 * self._n_threads):
            check_interrupted()
            data = self._in_threads("read", read_bytes, [row[2] for row in rows], pool)
            images = self._in_threads("decode", extractor._decoded, data, pool)
            loaded += self._in_threads("resize", extractor._processed, images, pool)
        return loaded

    def _in_threads(
        self, name: str, step: Callable[[Any], T], items: Sequence[Any], pool: ThreadPoolExecutor
    ) -> list[T | ImageError]:
        """Runs a stage for images that have not failed yet.

        The seconds are those of the threads by their number: at the end some wait for the last one,
        as they would not in a longer run.
        """

        def timed(item: Any) -> tuple[T | ImageError, float | None]:
            if isinstance(item, ImageError):
                return item, None
            start = self._clock()
            try:
                result: T | ImageError = step(item)
            except ImageError as error:
                result = error
            return result, self._clock() - start

        results = list(pool.map(timed, items))
        taken = [seconds for _, seconds in results if seconds is not None]
        self._now[name].add(len(taken), sum(taken) / self._n_threads)
        return [result for result, _ in results]

    def _batch(self, chunk: list[Row], loaded: list[Tensor | ImageError]) -> FeatureBatch:
        """Copies a batch to the device and computes its features."""
        extractor = self._extractor

        def copy() -> Tensor | None:
            pixels = extractor._stacked(loaded, pad_to=extractor.batch_size)
            return None if pixels is None else extractor._on_device(pixels)

        def compute() -> FeatureBatch:
            assert pixels is not None
            return extractor._finished(chunk, loaded, extractor._forward_or_reason(pixels))

        if all(isinstance(item, ImageError) for item in loaded):
            return extractor._finished(chunk, loaded, {})
        pixels = self._timed("copy", len(chunk), copy)
        return self._timed("model", len(chunk), compute)

    def _timed(self, name: str, n_images: int, call: Callable[[], T]) -> T:
        """Runs a stage of the main thread, to the end of the device's work."""
        check_interrupted()
        synchronize(self._device)
        start = self._clock()
        result = call()
        synchronize(self._device)
        self._now[name].add(n_images, self._clock() - start)
        return result

    def _together(self, folder: Path) -> None:
        """Runs an extraction, without loading the model and listing the images."""
        sources = [source for _, _, source in self.rows]
        with FeatureWriter(folder) as writer, Progress(False) as bar:
            every = 1.0  # no share of failures ends it
            executor = InProcess(self._extractor)
            run = Run(executor, writer, bar, every, self._paths, self._listing, sources)
            run.start(self._plan["mode"], None, None, None)

            def extract() -> None:
                run.run(limit=None, update=False, retry_failed=False)

            self._timed(_TOGETHER, len(sources), extract)

    def fill(self, result: EndToEnd) -> EndToEnd:
        """Adds what was measured to a result: of rounds that are through, else of the first one."""
        rounds = self.finished or [self._now]
        for name in (*FEED, *MAIN, _TOGETHER):
            work = [one[name] for one in rounds if name in one and one[name].images]
            if not work:
                continue
            stage = Stage(
                name,
                images_per_s=statistics.median(one.rate for one in work),
                seconds=sum(one.seconds for one in work),
                images=sum(one.images for one in work),
                threads=self._threads_of(name),
                rounds=[one.rate for one in work],
            )
            if name == _TOGETHER:
                result.together = stage
            else:
                result.stages.append(stage)
        result.bound_by = result.find_bound()
        result.errors = dict(Counter(error.kind for error in self._errors.values()))
        result.failed = [_shown(e) for e in list(self._errors.values())[:_N_FAILED_SHOWN]]
        return result

    def _threads_of(self, name: str) -> int:
        on_cpu = self._device.type == "cpu"
        n_model = torch.get_num_threads() if on_cpu else 1
        if name == _TOGETHER:
            return self._n_threads + n_model
        if name in FEED:
            return self._n_threads
        return n_model if name == "model" else 1

    def notes(self, null_model: bool, random_weights: bool) -> list[str]:
        """What a reader of the numbers should know."""
        real, here = self._plan["shard_rows"], min(self._plan["shard_rows"], len(self.rows))
        notes = [
            "files were read once before, so they come from the page cache",
            f"write: shards of {here:,} images, flushed to {tempfile.gettempdir()}"
            + (f"; those of a large extraction have {real:,}" if here < real else ""),
        ]
        if null_model:
            notes.append("null model: its features are zeros, and nothing is kept")
        if random_weights:
            notes.append("random weights: features mean nothing, and nothing is kept")
        return notes


def _spread(sources: Sequence[Source], n: int) -> list[Source]:
    """At most n of the sources, at even distances."""
    if len(sources) <= n:
        return list(sources)
    return [sources[i * len(sources) // n] for i in range(n)]


def _read_once(source: Source) -> None:
    with suppress(ImageError):  # counted when the stages read it
        read_bytes(source)


def _write(
    writer: FeatureWriter,
    shard: Shard,
    parts: list[FeatureBatch],
    outputs: Mapping[str, Mapping[str, Any]],
) -> None:
    writer.commit(shard, *shard_content(parts, outputs))


def _shown(error: RowError) -> str:
    return f"{error.id}: {error.kind}, {error.message}"
