"""Features as columns of a `datasets.Dataset`, by its `map`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import PIL
import torch

from ..backbone.hub import local_directory
from ..engine.computation import NUMERICS
from .columns import ColumnExtractor


def extractor(
    model: str | os.PathLike[str],
    image: str = "image",
    features: str | Sequence[str] = ("embedding",),
    **options: Any,
) -> Extractor:
    """Returns a function for `Dataset.map(function, batched=True, with_rank=True)`.

    It adds a list of fp32 numbers for each feature, and `error`: None or "kind: message". A row
    whose image fails has None for every feature; no row is lost. A dataset that has one of these
    columns is refused, as `map` would overwrite it.

    Images that `datasets` has not decoded yet are decoded here, as `fastbb extract` decodes files,
    so one that cannot be decoded does not end the map. With `num_proc`, a process computes on the
    GPU of its rank; where the program has used a GPU before, it has to start processes by
    `multiprocess.set_start_method("spawn")`.

    Of a dataset that was loaded from files, `datasets` finds results of an earlier map again if
    model, options, the files of a local model, and the versions of what computes them are the same.
    Of a model of the Hub it compares the name only.

    Args:
        model: name or directory of a model, which each process loads at its first batch.
        image: column of the images: `datasets.Image` of any kind, bytes of image files or paths.
        features: names of vectors, see `FeatureExtractor`.
        options: of `FeatureExtractor`. `device` in place of the GPU of the rank; `batch_size` of a
            forward pass, of which a batch of the map should be a multiple.

    Raises:
        TypeError: the model is a loaded one, or there is no such option.
        ValueError: a feature does not exist or is no vector.
    """
    return Extractor(model, image, features, options)


class Extractor:
    """A function of a batch and a rank, see `extractor`."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        image: str,
        features: str | Sequence[str],
        options: dict[str, Any],
    ) -> None:
        self._extract = ColumnExtractor(model, features, options)
        self._image = image

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` hashes this to find earlier results: all that decides the values, no model
        versions = {"fastbb": NUMERICS, "pillow": PIL.__version__, "torch": torch.__version__}
        versions |= {library: _version(library) for library in ("openvino", "timm", "transformers")}
        return {**self.__dict__, "files": _files(self._extract.model), "versions": versions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._extract, self._image = state["_extract"], state["_image"]

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, list[Any]]:
        """Computes the features of a batch.

        Args:
            batch: columns by name.
            rank: of the process, as `with_rank=True` gives it.

        Raises:
            ValueError: there is no such column, a column has the name of a new one, or it is no
                batch but a row.
        """
        if self._image not in batch:
            raise ValueError(f"image: no column {self._image!r} among {', '.join(batch)}")
        for name in (*self._extract.names, "error"):
            if name in batch:
                raise ValueError(f"column {name!r}: would be overwritten by the new one; rename it")
        vectors, errors = self._extract(_images(batch, self._image), _device(rank))
        columns: dict[str, list[Any]] = {name: Vectors(v) for name, v in vectors.items()}
        return {**columns, "error": Texts(errors)}


class Vectors(list[Any]):
    """Vectors or None, of which Arrow knows the type also where a whole batch has failed."""

    def __arrow_array__(self, type: Any = None) -> Any:
        import pyarrow as pa

        return pa.array(list(self), type or pa.list_(pa.float32()))


class Texts(list[Any]):
    """Texts or None, of which Arrow knows the type also where all are None."""

    def __arrow_array__(self, type: Any = None) -> Any:
        import pyarrow as pa

        return pa.array(list(self), type or pa.string())


def _images(batch: Mapping[str, Any], name: str) -> list[Any]:
    """Returns images of a batch, encoded where `datasets` has not decoded them yet."""
    encoded, waiting = getattr(batch, "pa_table", {}), getattr(batch, "keys_to_format", ())
    is_row = type(batch).__name__ == "LazyRow"
    if is_row or not (name in waiting or _is_column(batch[name])):
        raise ValueError("wanted a batch: map(..., batched=True), got a row")
    return encoded[name].to_pylist() if name in waiting else list(batch[name])


def _is_column(value: Any) -> bool:
    """Whether this is a column of a batch, not the image of one row."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    # `datasets` formats an image as a tensor [C, H, W], or as an array [H, W, C] or [H, W]
    is_image = len(shape) == 3 and (isinstance(value, torch.Tensor) or shape[-1] <= 4)
    return len(shape) not in (0, 2) and not is_image


def _device(rank: int | None) -> str | None:
    n_gpus = 0 if rank is None else torch.cuda.device_count()
    return None if rank is None or n_gpus == 0 else f"cuda:{rank % n_gpus}"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _files(model: str) -> list[tuple[str, int, int]]:
    """Returns names, sizes and times of the files of a local model; of others nothing."""
    directory = local_directory(model)
    files = [] if directory is None else sorted(p for p in directory.rglob("*") if p.is_file())
    stats = [(str(path.relative_to(directory)), path.stat()) for path in files if directory]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
