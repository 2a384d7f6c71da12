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
from ..backbone.hub import absolute_name
from ..engine.interruption import interruption_code, interruption_word
from ..images.processor import ImageProcessor
from .executor import InProcess
from .layout import ExtractionError, already_started, is_started
from .listing import Listing
from .plan import make_extractor
from .pool import Pool
from .progress import Progress
from .ray_workers import RayOptions
from .run import Run
from .sources import InputError
from .store import FeatureWriter
from .worker import Start, said_in_json
from .workers import Workers, parse_share


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
    workers: int | None = None,
    devices: str | Sequence[int | str] | None = None,
    ray: RayOptions | None = None,
    record_crashes: bool = False,
    shard_index: str | tuple[int, int] | None = None,
    progress: bool = True,
) -> Any:
    """Stores the features of every image; the same call again goes on where it was interrupted.

    What a later call for the same directory does not say is as it was at the first: model,
    features, pixels, precision. Batch size, mode and rows per shard always are.

    Meanwhile Pillow's settings for decoding are its defaults, in the whole process, see
    `FeatureExtractor`, and torch's number of threads is that of the first start.

    A directory below an input that cannot be read is passed over and named in the report.

    Several processes may do the shards: workers of this machine (`workers`, `devices`), actors of
    Ray (`ray`), and other calls (`shard_index`). The features are the same, byte for byte, as those
    of one process with as many threads as each of them.

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
            or fewer where the features of a shard would pass 256 MiB or a process would have less
            than four shards.
        limit: the directory gets at most so many images, the first ones.
        update: also extract the images that the directory does not have yet.
        retry_failed: also try the failed images again.
        follow_symlinks: follow symbolic links below directories.
        max_error_rate: the run stops when more than this share of the images fails, from the 20th
            image on. Images of a run that was interrupted count in the next one, too.
        workers: so many processes on the CPU do the shards. A first start gives each an equal part
            of the cores as threads; later there are fewer where their threads exceed the cores.
        devices: one process for each of these GPUs does the shards: numbers, or "all".
        ray: actors on a cluster of Ray, which sees the same directories, do the shards.
        record_crashes: of a shard that ended its worker three times, store the images as failed
            ("worker_crash"); else they are left to a later call. It needs workers, devices or ray.
        shard_index: "i/n": this call does every n-th shard, from the i-th on (i from 0); other
            calls, on this machine or on one with the same directories, do the rest.
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
        of_files |= {"update": update, "retry_failed": retry_failed, "workers": workers}
        of_files |= {"devices": devices, "ray": ray, "shard_index": shard_index}
        of_files |= {"record_crashes": record_crashes}
        if needless := [name for name, value in of_files.items() if value]:
            raise ValueError(f"{needless[0]}: it is for a directory, and there is no `out`")
        return _in_memory(model, inputs, mode, batch_size, said)
    given = _paths(inputs)
    share = None if shard_index is None else parse_share(shard_index)
    if share is not None and retry_failed:
        raise ValueError(
            "retry_failed: it does not go with shard_index, as all that failed is known when every "
            "shard is done; run it alone afterwards"
        )
    pooled = Workers.parse(workers, devices, ray, device, record_crashes)
    with ExitStack() as held:
        bar = held.enter_context(Progress(progress))
        writer = FeatureWriter(out, share)
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
        if share is not None and not resumed:
            held.enter_context(writer)
        with _planning(writer, bar) as plan:
            if pooled is None:
                held.enter_context(_threads(plan))
                extractor = make_extractor(model, writer.directory, plan, said, batch_size)
                executor = InProcess(extractor)
            else:
                start = _start(model, writer.directory, said, batch_size)
                executor = held.enter_context(Pool(pooled.backend(start, plan, bar.say), bar.say))
            if plan is not None:
                executor.check_plan(writer)
            elif share is None:
                held.enter_context(writer)
                if writer.plan:
                    raise already_started(writer.directory)
            run = Run(
                *(executor, writer, bar, max_error_rate, given, listing, sources, record_crashes)
            )
            with _logged_stop(writer):
                run.start(mode, batch_size, shard_rows, limit)
        with _logged_stop(writer):
            return run.run(limit, update, retry_failed)


@contextmanager
def _planning(writer: FeatureWriter, bar: Progress) -> Iterator[dict[str, Any] | None]:
    """Gives the plan; None to the one process that makes it, while others wait for it here."""

    def on_wait() -> None:
        bar.say(f"waiting for the plan of {writer.directory}, which another process makes")

    with ExitStack() as planning:
        planning.enter_context(writer.planning(on_wait))
        if writer.plan:
            planning.close()
        yield writer.plan or None


@contextmanager
def _logged_stop(writer: FeatureWriter) -> Iterator[None]:
    """Logs the error that ends a run."""
    try:
        yield
    except BaseException as error:
        if writer.plan:
            with suppress(ExtractionError):  # the disk may be full
                code = getattr(error, "exit_code", None)
                stop = {"event": "stop", "reason": _reason(error), "exit_code": code}
                writer.log({**stop, "time": time.time()})
        raise


def _start(
    model: str | os.PathLike[str] | Backbone | None,
    directory: Path,
    said: Mapping[str, Any],
    batch_size: int | None,
) -> Start:
    """How a worker begins, but for its device and threads."""
    if isinstance(model, Backbone):
        raise ValueError(
            "model: workers load it themselves, by the name or the directory of a checkpoint, got "
            f"a {type(model).__name__}; save it (save_pretrained) and give the directory"
        )
    name = None if model is None else absolute_name(model)
    return Start(os.path.abspath(directory), name, said_in_json(said), batch_size)


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
    extractor = make_extractor(model, None, None, said, batch_size)
    extractor.prepare(mode or "auto", len(images) if isinstance(images, Sized) else None)
    return extractor(images)


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
