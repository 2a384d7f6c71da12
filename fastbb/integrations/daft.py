"""A provider of fastbb's models for `daft.functions.embed_image`. It needs the extra `daft`."""

from __future__ import annotations

import logging
from typing import Any

try:
    from daft import DataType
except ImportError as error:
    raise ImportError("fastbb.integrations.daft needs Daft: pip install 'fastbb[daft]'") from error
from daft.ai.protocols import ImageEmbedder, ImageEmbedderDescriptor
from daft.ai.provider import Provider as DaftProvider
from daft.ai.typing import EmbeddingDimensions, UDFOptions
from daft.ai.utils import get_gpu_udf_options
from daft.runners import get_or_infer_runner_type

from .columns import BATCHES_PER_CALL, ColumnExtractor

_logger = logging.getLogger(__name__)
# what `embed_image` is told about running, in Daft's words
_OF_DAFT = ("concurrency", "max_retries", "num_gpus", "on_error")


class Provider(DaftProvider):
    """Embeds images with the models that `fastbb.FeatureExtractor` takes.

    `embed_image(column, provider=Provider(), model="microsoft/resnet-50")` takes images that Daft
    has decoded. It takes bytes of image files and paths as well: then fastbb decodes them, and the
    embeddings are those of `fastbb extract`.

    A row whose image fails is null, and a warning counts such rows; with `on_error="raise"` the
    query ends instead. The model is loaded when the expression is made, which tells Daft the length
    of the embeddings, and once more for each process that computes.

    Args:
        feature: which vector, see `FeatureExtractor`.
        options: of `FeatureExtractor`. `embed_image` takes them, too, beside Daft's `on_error`,
            `max_retries` (default: 0), `num_gpus` (default: 1 where there are GPUs) and
            `concurrency`, the number of models: by default that of the GPUs with Daft's runner on
            Ray, and 1 with the native one, which gives all of them the same GPU.

    Raises:
        ValueError: the feature is not one name.
    """

    def __init__(self, feature: str = "embedding", **options: Any) -> None:
        if not isinstance(feature, str):
            raise ValueError(f"feature: wanted one name such as 'embedding', got {feature!r}")
        self._feature, self._options = feature, options

    @property
    def name(self) -> str:
        """The provider's name."""
        return "fastbb"

    def get_image_embedder(self, model: str | None = None, **options: Any) -> _Descriptor:
        """What `embed_image` asks for.

        Args:
            model: name or directory of a model.
            options: see the class.

        Raises:
            OSError: the model cannot be had.
            TypeError: there is no such option.
            ValueError: no model is given, an option is wrong, or the feature is no vector.
        """
        if model is None:
            raise ValueError("model: wanted a name or directory, got none; see `fastbb list`")
        of_daft = {name: options.pop(name) for name in _OF_DAFT if name in options}
        extract = ColumnExtractor(model, self._feature, {**self._options, **options})
        return _Descriptor(extract, extract.size(), of_daft)


class _Descriptor(ImageEmbedderDescriptor):
    """What Daft sends to the processes that compute."""

    def __init__(self, extract: ColumnExtractor, size: int, of_daft: dict[str, Any]) -> None:
        self._extract, self._size, self._of_daft = extract, size, of_daft

    def get_provider(self) -> str:
        return "fastbb"

    def get_model(self) -> str:
        return self._extract.model

    def get_options(self) -> dict[str, Any]:
        return {**self._extract.options, **self._of_daft}

    def get_dimensions(self) -> EmbeddingDimensions:
        return EmbeddingDimensions(self._size, DataType.float32())

    def get_udf_options(self) -> UDFOptions:
        of_gpus = get_gpu_udf_options()
        # processes of the native runner all see every GPU, and would take the first
        n_models = of_gpus.concurrency if get_or_infer_runner_type() == "ray" else None
        options = {"concurrency": n_models or 1, "num_gpus": of_gpus.num_gpus}
        batch_size = BATCHES_PER_CALL * self._extract.options.get("batch_size", 32)
        options |= {"max_retries": 0, "batch_size": batch_size, **self._of_daft}
        return UDFOptions(**options)

    def instantiate(self) -> _Embedder:
        return _Embedder(self._extract, self._of_daft.get("on_error"))


class _Embedder(ImageEmbedder):
    def __init__(self, extract: ColumnExtractor, on_error: str | None) -> None:
        self._extract, self._on_error = extract, on_error

    def embed_image(self, images: list[Any]) -> list[Any]:
        """Returns an fp32 array [C] or None for each image."""
        columns, errors = self._extract(images)
        # an image that Daft could not decode is a null that it has reported, as is any other null
        failed = [error for image, error in zip(images, errors) if image is not None and error]
        if failed and self._on_error == "raise":
            raise ValueError(f"an image has no embedding: {failed[0]}")
        if failed and self._on_error != "ignore":
            _logger.warning(
                "%d of %d images have no embedding, the first: %s",
                len(failed),
                len(images),
                failed[0],
            )
        (vectors,) = columns.values()
        return vectors
