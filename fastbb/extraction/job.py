"""`extract`: lists the inputs, makes or compares the plan, and runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.base import Backbone
from ..engine.interruption import interruption_code, interruption_word
from ..images.processor import ImageProcessor
from .layout import (
    ExtractionError,
    OutputLockedError,
    is_started,
)
from .listing import Listing
from .pipeline import FeatureExtractor
from .plan import (
    DEFAULT_BATCH_SIZE,
    check_plan,
    extractor_arguments,
)
from .progress import Progress
from .run import Run
from .sources import InputError
from .store import FeatureWriter


def extract(
    model: str | os.PathLike[str] | Backbone | None = None,
    inputs: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    features: str | Sequence[str] | None = None,
    out_indices: Sequence[int | str] | None = None,
    norm: str | None = None,
    normalize: bool | None = None,
    feature_dtype: str | None = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | str | None = None,
    processor: ImageProcessor | None = None,
    mode: str | None = None,
    shard_rows: int | None = None,
    limit: int | None = None,
    update: bool = False,
    retry_failed: bool = False,
    follow_symlinks: bool = False,
    max_error_rate: float = 0.05,
    progress: bool = True,
) -> Any:
    """Stores the features of every image; the same call again goes on where it was interrupted.

    What a later call for the same directory does not say is as it was at the first: model,
    features, pixels, precision. Batch size, mode and rows per shard always are.

    Meanwhile Pillow's settings for decoding are its defaults, in the whole process, see
    `FeatureExtractor`, and torch's number of threads is that of the first start.

    A directory below an input that cannot be read is passed over and named in the report.

    Args:
        model: argument of `AutoBackbone.from_pretrained`, or a loaded backbone; needed for a first
            start.
        inputs: directories, globs, images, lists (.txt, .csv, .tsv, .jsonl, .parquet), archives
            (.tar, .zip); without `out`, images in memory.
        out: the features directory; `open_features` reads it.
        features: see `FeatureExtractor`, as are out_indices, norm, normalize, feature_dtype,
            precision, device, batch_size, size and processor.
        out_indices: the requested maps, by index or name; default: the model's own choice.
        norm: of tokens, "final" or "none".
        normalize: whether vectors are divided by their L2 norm.
        feature_dtype: what is stored, "fp32", "fp16" or "bf16".
        precision: of the forward pass, "fp32", "bf16" or "fp16"; default: "fp32", of a loaded
            backbone that of its weights.
        device: default: "cuda" where there is one, else "cpu".
        batch_size: images per forward pass; default: 32.
        size: (H, W) that every image is resized to; "test" for a timm model's test-time size.
        processor: what makes pixels of an image; default: the model's own.
        mode: of `Backbone.prepare`. What "auto" (the default) chooses at the first start the plan
            records, and a resumed run takes.
        shard_rows: images per shard, which is what an interrupted run loses at most; default: 4096,
            or fewer where the features of a shard would pass 256 MiB.
        limit: the directory gets at most so many images, the first ones.
        update: also extract the images that the directory does not have yet.
        retry_failed: also try the failed images again.
        follow_symlinks: follow symbolic links below directories.
        max_error_rate: the run stops when more than this share of the images fails, from the 20th
            image on. Images of a run that was interrupted count in the next one, too.
        progress: show a bar (a line every 30 s where stderr is no terminal) and what is done.

    Returns:
        A `Report`; without `out` the features in memory, tensors [n, ...] by name.

    Raises:
        ValueError: an argument or an input is not what is wanted.
        OSError: the model cannot be had.
        ExtractionError: plan mismatch, error budget, lock, or an output that cannot be written.
        ImageError: without `out`, an image has no features.
    """
    for name, value in (("shard_rows", shard_rows), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}: wanted a whole number, at least 1, got {value!r}")
    if not 0 <= max_error_rate <= 1:
        raise ValueError(f"max_error_rate: wanted a share from 0 to 1, got {max_error_rate}")
    said = {
        "features": features,
        "out_indices": out_indices,
        "norm": norm,
        "normalize": normalize,
        "feature_dtype": feature_dtype,
        "precision": precision,
        "device": device,
        "size": size,
        "processor": processor,
    }
    if out is None:
        if model is None:
            raise ValueError(_NO_MODEL)
        of_files = {"shard_rows": shard_rows, "limit": limit}
        of_files |= {"update": update, "retry_failed": retry_failed}
        if needless := [name for name, value in of_files.items() if value]:
            raise ValueError(f"{needless[0]}: it is for a directory, and there is no `out`")
        return _in_memory(model, inputs, mode, batch_size, said)
    given = _paths(inputs)
    with ExitStack() as held:
        writer = FeatureWriter(out)
        resumed = is_started(writer.directory)
        if resumed:
            held.enter_context(writer)  # another process is told before anything takes long
        elif model is None:
            raise ValueError(_NO_MODEL)
        listing = Listing(given, follow_symlinks)
        try:
            # all at once: a wrong input is found before the model is loaded and anything is made
            sources = list(listing)
        except InputError as error:
            if not resumed or update or retry_failed:
                raise
            sources = error  # the list of the first start is frozen
        plan = writer.plan if resumed else None
        held.enter_context(_threads(plan))
        extractor = _extractor(model, writer.directory, plan, said, batch_size)
        if plan is not None:
            check_plan(writer.directory, plan, extractor.settings())
        else:
            held.enter_context(writer)
            if writer.plan:
                raise OutputLockedError(
                    f"another process has started {out} meanwhile; run the same again"
                )
        bar = held.enter_context(Progress(progress))
        run = Run(extractor, writer, bar, max_error_rate, given, listing, sources)
        try:
            run.start(mode, batch_size, shard_rows, limit)
            return run.run(limit, update, retry_failed)
        except BaseException as error:
            if writer.plan:
                with suppress(ExtractionError):  # the disk may be full
                    code = getattr(error, "exit_code", None)
                    stop = {"event": "stop", "reason": _reason(error), "exit_code": code}
                    writer.log({**stop, "time": time.time()})
            raise


_NO_MODEL = (
    "model: wanted a name or directory for a first start (--model), got none; `fastbb list` prints "
    "names"
)


def _paths(inputs: Any) -> list[str]:
    is_one = isinstance(inputs, (str, bytes, os.PathLike))
    given = [inputs] if is_one else list(() if inputs is None else inputs)
    for path in given:
        if hasattr(path, "shape") or hasattr(path, "getpixel"):
            raise ValueError(
                f"out: a features directory holds images of files, got a {type(path).__name__} in "
                "memory; leave `out` out, and the features are returned"
            )
    given = [os.fsdecode(path) for path in given]
    if not given or not all(given):
        raise InputError(
            "inputs: wanted at least one directory, glob, image, list or archive, and none of them "
            f"empty, got {given}"
        )
    return given


def _in_memory(
    model: str | os.PathLike[str] | Backbone,
    images: Any,
    mode: str | None,
    batch_size: int | None,
    said: Mapping[str, Any],
) -> dict[str, Tensor]:
    if images is None:
        raise ValueError("inputs: wanted images, or files and a directory `out`, got none")
    items = images if isinstance(images, (list, tuple)) else [images]
    if any(isinstance(image, (str, os.PathLike)) for image in items):
        raise ValueError(
            "out: wanted a directory for the features of files, got none; only images in memory "
            "need none"
        )
    extractor = _extractor(model, None, None, said, batch_size)
    extractor.prepare(mode or "auto", len(images) if isinstance(images, Sized) else None)
    return extractor(images)


def _extractor(
    model: str | os.PathLike[str] | Backbone | None,
    directory: Path | None,
    plan: Mapping[str, Any] | None,
    said: Mapping[str, Any],
    batch_size: int | None,
) -> FeatureExtractor:
    if plan is None or directory is None:
        arguments = {name: value for name, value in said.items() if value is not None}
        arguments["batch_size"] = batch_size or DEFAULT_BATCH_SIZE
    else:
        arguments = extractor_arguments(directory, plan, said)
        if model is None:
            return _as_at_first(plan["model"]["name"], arguments)
    assert model is not None, "a first start without a model was refused"
    return FeatureExtractor(model, mode="eager", **arguments)


def _as_at_first(name: str, arguments: dict[str, Any]) -> FeatureExtractor:
    try:
        return FeatureExtractor(name, mode="eager", **arguments)
    except OSError as error:
        raise OSError(
            f"the model of the first start, {name}, cannot be had: give where it is now (--model). "
            f"{error}"
        ) from error


@contextmanager
def _threads(plan: Mapping[str, Any] | None) -> Iterator[None]:
    """Lets torch use the number of threads that the plan records; sums depend on it."""
    before = torch.get_num_threads()
    wanted = before if plan is None else plan.get("threads", before)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reason(error: BaseException) -> str:
    if interruption_code() is not None or isinstance(error, KeyboardInterrupt):
        return interruption_word()
    if isinstance(error, (ExtractionError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
