"""Images in, columns out: for every image a vector or None, and the reason where it has none."""

from __future__ import annotations

import difflib
import inspect
import os
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..backbone.hub import local_directory
from ..extraction.decode import ImageError
from ..extraction.outputs import Wanted
from ..extraction.pipeline import FeatureExtractor, Row, chunked

# batches in a call where a library lets us choose: images of one are decoded while the model
# computes another
BATCHES_PER_CALL = 4
_ONLY_VECTORS = "columns hold vectors; `fastbb extract` stores features of any shape"

Vectors = list["np.ndarray[Any, Any] | None"]

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


class ColumnExtractor:
    """Extracts vectors of images that are rows of a table.

    A process loads the model at its first images; what is pickled are the arguments. Batches are
    padded to `batch_size`, so a row's values do not depend on how many rows stand beside it.

    Args:
        model: name or directory of a model.
        features: names of vectors.
        options: of `FeatureExtractor`.

    Attributes:
        names: of the features, in the order of the columns.

    Raises:
        TypeError: the model is a loaded one, or there is no such option.
        ValueError: a feature does not exist, or is no vector.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        features: str | Sequence[str],
        options: dict[str, Any],
    ) -> None:
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(
                "model: wanted a name or a directory, which every process loads for itself, got a "
                f"{type(model).__name__}"
            )
        parameters = inspect.signature(FeatureExtractor).parameters.values()
        known = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
        if unknown := [name for name in options if name not in known]:
            close = [c for name in unknown for c in difflib.get_close_matches(name, known)]
            raise TypeError(
                f"options: wanted those of FeatureExtractor, {', '.join(known)}, got "
                f"{', '.join(unknown)}" + (f". Did you mean {', '.join(close)}?" if close else "")
            )
        self.names = Wanted.parse(features, options.get("norm")).names
        for name in self.names:
            if name == "tokens" or name.startswith("maps"):
                raise ValueError(f"features: {name} is no vector: {_ONLY_VECTORS}")
        directory = local_directory(model)
        # other processes may have another working directory
        self.model = os.fspath(model) if directory is None else str(directory.absolute())
        self.options = options
        self._loaded: dict[str | None, _RowExtractor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.names, self.options)

    def load(self, device: str | None = None) -> FeatureExtractor:
        """Loads the model if this process has not yet.

        Args:
            device: where the options name none; default: as `FeatureExtractor`.

        Raises:
            OSError: the model cannot be had.
            ValueError: an option is wrong, or the model has no such feature.
        """
        device = self.options.get("device", device)
        if device not in self._loaded:
            options = {**self.options, "device": device}
            self._loaded[device] = _RowExtractor(self.model, self.names, **options)
        return self._loaded[device]

    def size(self) -> int:
        """Returns the length of the first feature, without a GPU; the model is loaded for it."""
        options = {**self.options, "device": "cpu", "precision": "fp32", "mode": "eager"}
        (output, *_) = FeatureExtractor(self.model, self.names, **options).outputs().values()
        if len(output["shape"]) != 1:
            raise _no_vector(self.names[0], output["shape"])
        return output["shape"][0]

    def __call__(
        self, images: Sequence[Any], device: str | None = None
    ) -> tuple[dict[str, Vectors], list[str | None]]:
        """Computes the features of some rows.

        Args:
            images: bytes of an image file, paths, PIL images, arrays [H, W, C], dicts of `bytes`
                and `path` as `datasets` has them, or None.
            device: see `load`.

        Returns:
            For every feature an fp32 array [C] or None for each image; and for each image None or
            "kind: message", with the kinds of `fastbb.extraction.ERROR_KINDS`.
        """
        if _is_forked:
            # OpenMP waits for ever for threads of the process that was forked, as DataLoader knows
            torch.set_num_threads(1)
        with self._lock:  # an engine runs one call at a time
            extractor = self.load(device)
            n = extractor.batch_size
            rows = ((i, "", _image(image)) for i, image in enumerate(images))
            columns: dict[str, Vectors] = {name: [None] * len(images) for name in self.names}
            errors: list[str | None] = [None] * len(images)
            with closing(extractor.run(chunked(rows, n), pad_to=n)) as batches:
                for batch in batches:
                    for name, feature in batch.features.items():
                        if feature.ndim != 2:
                            raise _no_vector(name, feature.shape[1:])
                        for row, vector in zip(batch.rows, feature.float().numpy()):
                            columns[name][row] = vector
                    for error in batch.errors:
                        errors[error.row] = f"{error.kind}: {error.message}"
        return columns, errors


class _RowExtractor(FeatureExtractor):
    """A `FeatureExtractor` whose images in memory, too, have errors that fail only their row."""

    def _load_once(self, row: Row) -> Tensor | ImageError:
        if row[2] is None:
            return ImageError("not_found", "there is no image in this row")
        try:
            return super()._load_once(row)
        except (TypeError, ValueError) as error:
            return ImageError("transform", str(error).removeprefix(f"image {row[0]}: "))


def _image(value: Any) -> Any:
    """Returns an image as `FeatureExtractor` takes it."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    # as an array, one with 3 rows would be taken as [C, H, W]
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        height, width, channels = value.shape
        if channels <= 4 and height * width * channels > 0:
            return Image.fromarray(np.ascontiguousarray(value[..., 0] if channels == 1 else value))
    return value


def _no_vector(name: str, shape: Sequence[int] | torch.Size) -> ValueError:
    return ValueError(f"features: {name} is of shape {list(shape)}, no vector: {_ONLY_VECTORS}")
