"""Features as columns of a Ray Dataset. It needs the extra `ray`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import BATCHES_PER_CALL, ColumnExtractor

if TYPE_CHECKING:
    import pyarrow
    import ray.data

_MISSING = "fastbb.integrations.ray needs Ray: pip install 'fastbb[ray]'"


def extract(
    dataset: ray.data.Dataset,
    model: str | os.PathLike[str],
    *,
    image: str = "bytes",
    id: str | None = None,
    features: str | Sequence[str] = ("embedding",),
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    actors: int | tuple[int, int] = (1, 8),
    batch_size: int = 32,
    **options: Any,
) -> ray.data.Dataset:
    """Adds features of its images to a dataset, lazily.

    No row is lost: one whose image fails has null for every feature, and says why in `error`.

    Args:
        dataset: a row for each image.
        model: name or directory of a model; all nodes must have the directory.
        image: column of the images: bytes of image files, paths that the nodes can read, or arrays
            [H, W, C].
        id: column that becomes `id`; default: none does.
        features: names of vectors, see `FeatureExtractor`.
        num_gpus: of each actor, may be a fraction; default: 1 if the cluster has GPUs now, else 0.
            Say 1 if GPUs are still to come, as on a cluster that scales by itself.
        num_cpus: of each actor; default: Ray's own.
        actors: how many processes hold the model, or their least and greatest number.
        batch_size: images per forward pass.
        options: of `FeatureExtractor`; without `device`, actors with a GPU take it, others "cpu".

    Returns:
        A dataset of the columns `id` if asked for, those of `dataset` but that of the images, a
        `list<float>` for each feature, and `error`: null or "kind: message". A column of `dataset`
        with the name of a new one becomes `column_<name>`, or `column_column_<name>` if `dataset`
        has that, too. Rows come in any order unless
        `ray.data.DataContext.get_current().execution_options.preserve_order` is set.

    Raises:
        ImportError: Ray is not installed.
        TypeError: the dataset or the model is something else, or there is no such option.
        ValueError: a feature does not exist or is no vector. One that only this model lacks is
            found where the dataset is read.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ImportError(_MISSING) from error
    if not isinstance(dataset, ray.data.Dataset):
        raise TypeError(
            "dataset: wanted a ray.data.Dataset, as `ray.data.read_binary_files` returns it, got a "
            f"{type(dataset).__name__}"
        )
    if num_gpus is None:
        num_gpus = min(1, ray.cluster_resources().get("GPU", 0))
    options = {"device": "cuda" if num_gpus else "cpu", **options, "batch_size": batch_size}
    # names that no model has are found here, not in an actor
    extractor = Extractor(model, image=image, id=id, features=features, **options)
    fewest, most = (actors, actors) if isinstance(actors, int) else actors
    return dataset.map_batches(
        Extractor,
        batch_size=batch_size * BATCHES_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        fn_constructor_args=(extractor.model,),
        fn_constructor_kwargs={"image": image, "id": id, "features": features, **options},
    )


class Extractor:
    """What `extract` runs, for a `map_batches` of your own.

    Args:
        model: see `extract`, as are image, id, features and options.
        image: column of the images.
        id: column that becomes `id`; default: none does.
        features: names of vectors.
        options: of `FeatureExtractor`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        image: str = "bytes",
        id: str | None = None,
        features: str | Sequence[str] = ("embedding",),
        **options: Any,
    ) -> None:
        self._extract = ColumnExtractor(model, features, options)
        self.model = self._extract.model
        self._image, self._id = image, id

    def __call__(self, batch: pyarrow.Table | Mapping[str, np.ndarray[Any, Any]]) -> pyarrow.Table:
        """Computes the features of a batch.

        Args:
            batch: in Ray's format "numpy" (the default) or "pyarrow", which leaves all types of
                the other columns as they are.

        Returns:
            A table of the same rows, see `extract`.

        Raises:
            TypeError: the batch is in another format.
            ValueError: there is no such column.
        """
        import pyarrow as pa
        from ray.data.block import BlockAccessor

        if not isinstance(batch, (Mapping, pa.Table)):
            raise TypeError(
                "batch: wanted a table or a dict of arrays (batch_format="
                f'"pyarrow" or "numpy"), got a {type(batch).__name__}'
            )
        names = list(batch) if isinstance(batch, Mapping) else batch.column_names
        for option, name in (("image", self._image), ("id", self._id)):
            if name is not None and name not in names:
                raise ValueError(f"{option}: no column {name!r} among {', '.join(names)}")
        if isinstance(batch, Mapping):
            kept = {n: batch[n] for n in names if n != self._image or n == self._id}
            images = list(batch[self._image])
            block = BlockAccessor.batch_to_arrow_block(kept) if kept else pa.table({})
        else:
            images, block = _cells(batch[self._image]), batch
        vectors, errors = self._extract(images)
        columns: dict[str, Any] = {} if self._id is None else {"id": block[self._id]}
        own = {*columns, *vectors, "error"}
        for name in names:
            if name not in (self._image, self._id):
                new = name
                while new in own | (set(names) - {name}):
                    new = f"column_{new}"
                columns[new] = block[name]
        for name, values in vectors.items():
            columns[name] = pa.array(values, pa.list_(pa.float32()))
        return pa.table({**columns, "error": pa.array(errors, pa.string())})


def _cells(column: pyarrow.ChunkedArray) -> list[Any]:
    """Returns the images of a column, arrays where they are tensors of Ray or Arrow."""
    import pyarrow as pa

    # Ray's own types give arrays by themselves
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [cell.to_numpy() if cell.is_valid else None for cell in column]
    return column.to_pylist()
