"""Runs an extraction: lists the inputs, plans, runs shard by shard, and resumes."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..engine.interruption import check_interrupted, interruption_code, interruption_word
from .decode import RowError
from .layout import ExtractionError, is_started, totals
from .pipeline import FeatureBatch, FeatureExtractor, chunked, n_decode_threads
from .sources import InputError, Source, archive_states, first_few, list_sources
from .store import FeatureWriter

_DEFAULT_SHARD_ROWS = 4096
_MAX_DEFAULT_SHARD_BYTES = 256 * 2**20
# number of rows after which a share of failures is meaningful
_MIN_BUDGET_ROWS = 1000
_SECONDS_PER_LINE = 30.0


class ErrorBudgetError(ExtractionError):
    """More rows failed than the caller allows."""

    exit_code = 4


@dataclass(frozen=True)
class Report:
    """The outcome of an extraction.

    Attributes:
        directory: the features directory.
        rows: images in the input.
        ok: images that have features.
        errors: number of failed images by kind.
        resumed_rows: images that an earlier run had already done.
        seconds: time of this run, without loading the model.
        unreadable_directories: those whose images are missing, as they could not be read when the
            images were listed; each with the reason.
    """

    directory: Path
    rows: int
    ok: int
    errors: dict[str, int]
    resumed_rows: int
    seconds: float
    unreadable_directories: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(self.errors.items()))
        failed = f", {self.rows - self.ok:,} failed ({kinds})" if kinds else ""
        done = self.rows - self.resumed_rows
        speed = f", {done / self.seconds:,.1f} images/s" if done else ", nothing was left to do"
        lost = self.unreadable_directories
        unread = f"; {len(lost):,} directories were not read: {first_few(lost)}" if lost else ""
        counts = f"{self.ok:,} of {self.rows:,} images have features{failed}{speed}"
        return f"{self.directory}: {counts}{unread}"


class _Progress:
    """Progress on stderr: a bar on a terminal, else a line at intervals."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._n_rows = self._n_first = self.n_done = 0
        self._started = self._last_line = time.perf_counter()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        if self._enabled and sys.stderr is not None:
            with suppress(OSError):  # progress cannot be shown, and the run does not depend on it
                print(text, file=sys.stderr, flush=True)

    def start(self, n_rows: int, n_done: int) -> None:
        self._n_rows, self._n_first, self.n_done = n_rows, n_done, n_done
        self._started = self._last_line = time.perf_counter()
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=n_rows, initial=n_done, unit=" images", dynamic_ncols=True)

    def advance(self, n_rows: int) -> None:
        self.n_done += n_rows
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(n_rows)
        elif now - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = now
            speed = (self.n_done - self._n_first) / (now - self._started)
            left_s = (self._n_rows - self.n_done) / speed
            self.say(
                f"{self.n_done:,} of {self._n_rows:,} images, {speed:,.1f} images/s, "
                f"{left_s / 60:,.1f} minutes left"
            )


def extract(
    model: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    features: str | Sequence[str] = ("pooled",),
    out_indices: Sequence[int] | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    batch_size: int = 32,
    size: tuple[int, int] | None = None,
    mode: str = "auto",
    shard_rows: int | None = None,
    max_error_rate: float = 0.05,
    progress: bool = False,
) -> Report:
    """Stores the features of every image; the same call again goes on where it was interrupted.

    Meanwhile Pillow's settings for decoding are its defaults, in the whole process, see
    `FeatureExtractor`.

    A directory below an input that cannot be read is passed over and named in the report.

    Args:
        model: argument of `AutoBackbone.from_pretrained`.
        inputs: directories, globs, images, lists (.txt, .csv, .jsonl, .parquet), .tar archives.
        out: the features directory; `open_features` reads it.
        features: see `FeatureExtractor`, as are out_indices, precision, device, batch_size, size.
        out_indices: the requested maps; default: the model's own choice.
        precision: of the forward pass, "fp32" or "bf16".
        device: default: "cuda" where there is one, else "cpu".
        batch_size: images per forward pass.
        size: (H, W) that every image is resized to.
        mode: of `Backbone.prepare`. What "auto" chooses at the first start the plan records, and a
            resumed run takes.
        shard_rows: images per shard, which is what an interrupted run loses at most; default: 4096,
            or fewer where the features of a shard would pass 256 MiB.
        max_error_rate: the run stops when more than this share of the images fails, those of
            earlier runs included; up to 1000 images count as 1000.
        progress: show a bar (a line every 30 s where stderr is no terminal) and what is done.

    Raises:
        ValueError: an argument or an input is not what is wanted.
        OSError: the model cannot be had.
        ExtractionError: plan mismatch, error budget, lock, or an output that cannot be written.
    """
    if shard_rows is not None and not (isinstance(shard_rows, int) and shard_rows >= 1):
        raise ValueError(f"shard_rows: wanted a whole number, at least 1, got {shard_rows!r}")
    if not 0 <= max_error_rate <= 1:
        raise ValueError(f"max_error_rate: wanted a share from 0 to 1, got {max_error_rate}")
    is_one = isinstance(inputs, (str, bytes, os.PathLike))
    given = [os.fsdecode(path) for path in ([inputs] if is_one else inputs)]
    if not given or not all(given):
        raise InputError(
            "inputs: wanted at least one directory, glob, image, list or archive, and none of them "
            f"empty, got {given}"
        )
    skipped: Counter[str] = Counter()
    archives = archive_states(given)
    unreadable: list[str] = []
    sources = list_sources(given, skipped, unreadable)
    if not is_started(Path(out)):
        # all at once: a wrong input is found before the model is loaded and anything is made;
        # an iterator gives the list up when it is at its end
        sources = iter(list(sources))

    extractor = FeatureExtractor(
        model,
        features,
        out_indices=out_indices,
        precision=precision,
        device=device,
        batch_size=batch_size,
        size=size,
        mode=mode,
    )

    def choose_mode(n_rows: int) -> str:
        chosen = extractor.choose_mode(mode, n_rows)
        check_interrupted()  # before the plan records a choice of an interrupted trial
        return chosen

    settings = {**extractor.settings(), "mode": mode}
    settings["inputs"] = [os.path.abspath(path) for path in given]
    settings["archives"] = archives
    settings["shard_rows"] = shard_rows or _default_shard_rows(settings)
    with FeatureWriter(out) as writer, _Progress(progress) as bar:
        if extractor.device.type == "cpu":
            bar.say(f"running on the CPU ({torch.get_num_threads()} torch threads), no GPU in use")
        resumed = writer.start(settings, sources, choose_mode, unreadable)
        if resumed:
            extractor.prepare(writer.plan["runs"], writer.plan["rows"])
        else:
            passed_over = (f", passed over {n:,} {what}" for what, n in sorted(skipped.items()))
            bar.say(f"{writer.plan['rows']:,} images{''.join(passed_over)}")
            if unreadable:
                bar.say(f"cannot list {first_few(unreadable)}")
        try:
            return _extract_shards(extractor, writer, bar, max_error_rate, resumed)
        except BaseException as error:
            with suppress(ExtractionError):  # the disk may be full
                writer.log({"event": "stop", "time": time.time(), "reason": _reason(error)})
            raise


def _reason(error: BaseException) -> str:
    if interruption_code() is not None or isinstance(error, KeyboardInterrupt):
        return interruption_word()
    if isinstance(error, (ExtractionError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _extract_shards(
    extractor: FeatureExtractor,
    writer: FeatureWriter,
    bar: _Progress,
    max_error_rate: float,
    resumed: bool,
) -> Report:
    n_rows, batch_size = writer.plan["rows"], extractor.batch_size
    commits = [writer.committed(shard) for shard in range(writer.n_shards)]
    todo = [shard for shard, commit in enumerate(commits) if commit is None]
    done = totals(commits)
    if resumed:
        bar.say(
            f"resuming {writer.directory}: {done['shards']:,} of {writer.n_shards:,} shards are "
            "done; the list of images is the one of the first start"
        )
    n_failed = done["rows"] - done["ok"]
    _check_budget(n_failed, done["rows"], max_error_rate)
    bar.start(n_rows, done["rows"])
    start = shard_start = time.perf_counter()
    writer.log({"event": "start", "time": time.time(), **_environment(extractor)})

    def chunks() -> Iterator[list[tuple[int, str, Source]]]:
        for shard in todo:
            first = shard * writer.plan["shard_rows"]
            rows = ((first + i, s.id, s) for i, s in enumerate(writer.rows(shard)))
            yield from chunked(rows, batch_size)

    # the whole job smaller than a batch is not padded to one: the plan fixes its size as well
    with closing(extractor.run(chunks(), pad_to=min(batch_size, n_rows))) as batches:
        for shard in todo:
            n_left = min(writer.plan["shard_rows"], n_rows - shard * writer.plan["shard_rows"])
            n_shard = n_left
            parts: list[FeatureBatch] = []
            while n_left:
                batch = next(batches)
                check_interrupted()
                parts.append(batch)
                n_batch = len(batch.ids) + len(batch.errors)
                n_left -= n_batch
                n_failed += len(batch.errors)
                bar.advance(n_batch)
                _check_budget(n_failed, bar.n_done, max_error_rate, batch.errors)
            commits[shard] = writer.commit(shard, *_shard_content(parts, writer.plan["outputs"]))
            check_interrupted()
            now = time.perf_counter()
            seconds, shard_start = now - shard_start, now
            writer.log({"event": "shard", "shard": shard, "rows": n_shard, "seconds": seconds})
    writer.finish(commits)
    final = totals(commits)
    return Report(
        writer.directory,
        n_rows,
        final["ok"],
        final["errors"],
        done["rows"],
        time.perf_counter() - start,
        tuple(writer.plan.get("unreadable_directories", ())),
    )


def _check_budget(
    n_failed: int, n_done: int, max_error_rate: float, errors: Sequence[RowError] = ()
) -> None:
    if n_failed > max_error_rate * max(_MIN_BUDGET_ROWS, n_done):
        last = "".join(f" (last: {e.id!r}: {e.kind}, {e.message})" for e in errors[-1:])
        raise ErrorBudgetError(
            f"stopped: {n_failed:,} of {n_done:,} images failed, more than the share of "
            f"{max_error_rate:g} allowed{last}; mend the input, or allow more with max_error_rate "
            "(--max-error-rate)"
        )


def _shard_content(
    parts: list[FeatureBatch], outputs: dict[str, Any]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Returns tensors and index of a shard."""
    rows = [row for part in parts for row in part.rows]
    tensors = {"row_id": torch.tensor(rows, dtype=torch.int64)}
    for name, output in outputs.items():
        found = [part.features[name] for part in parts if part.ids]
        empty = torch.empty(0, *output["shape"], dtype=getattr(torch, output["dtype"]))
        tensors[name] = torch.cat([empty, *found])
    index: list[dict[str, Any]] = [
        {"row": error.row, "id": error.id, "status": "error"}
        | {"kind": error.kind, "message": error.message}
        for part in parts
        for error in part.errors
    ]
    ids = [name for part in parts for name in part.ids]
    index += [
        {"row": row, "id": name, "status": "ok", "pos": pos}
        for pos, (row, name) in enumerate(zip(rows, ids))
    ]
    return tensors, sorted(index, key=lambda entry: entry["row"])


def _default_shard_rows(settings: dict[str, Any]) -> int:
    row_bytes = sum(
        math.prod(output["shape"]) * getattr(torch, output["dtype"]).itemsize
        for output in settings["outputs"].values()
    )
    rows = min(_DEFAULT_SHARD_ROWS, _MAX_DEFAULT_SHARD_BYTES // row_bytes)
    batch_size = settings["batch_size"]
    return max(rows // batch_size, 1) * batch_size


def _environment(extractor: FeatureExtractor) -> dict[str, Any]:
    on_gpu = extractor.device.type == "cuda"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(extractor.device) if on_gpu else platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "decode_threads": n_decode_threads(extractor.device),
    }
