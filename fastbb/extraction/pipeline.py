"""Feature extraction: decode threads -> bounded look-ahead -> batch -> features.

A failed image is replaced by zeros in the batch, and its row is dropped after the forward pass.
Batches never cross shards, and the last one is padded. So the neighbours of a row are always the
same, for any failures and interruptions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import PIL
import torch
from PIL import Image
from torch import Tensor

from fastbb_kernels.machine import find_device

from ..backbone.base import Backbone
from ..engine.computation import NUMERICS
from ..engine.explanation import Explanation
from ..engine.explanation import Row as ExplainedRow
from ..images.processor import ImageProcessor
from .decode import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_RESIZED_PIXELS,
    ImageError,
    RowError,
    decode,
    read_bytes,
)
from .identity import json_types, weights_digest
from .loading import LIBRARIES, load_models, load_processor
from .outputs import DTYPES, VECTORS, Storage, Wanted
from .pillow import fix_settings, fixed_settings
from .sources import Source, source_at

# position in the input, id, and the source
Row = tuple[int, str, Any]


@dataclass(frozen=True)
class FeatureBatch:
    """Some consecutive images, in the order of the input.

    Attributes:
        ids: the images that have features.
        features: tensors [len(ids), ...] on the CPU, aligned with `ids`.
        errors: the images that have none.
        rows: positions of `ids` in the input.
    """

    ids: list[str]
    features: dict[str, Tensor]
    errors: list[RowError]
    rows: list[int]

    def __repr__(self) -> str:
        features = (f"{name} {list(tensor.shape)}" for name, tensor in self.features.items())
        counts = f"{len(self.ids)} images, {len(self.errors)} failed"
        return f"FeatureBatch({', '.join([counts, *features])})"


class FeatureExtractor:
    """Extracts features of many images: a backbone with its preprocessing.

    From the first image that it computes features of to the last, Pillow's settings for decoding
    (`ImageFile.LOAD_TRUNCATED_IMAGES`, `Image.MAX_IMAGE_PIXELS` ...) are Pillow's defaults and its
    warnings are ignored, in the whole process. Other threads see that, and so does the code that
    takes the batches of `stream`; afterwards the program's own settings are back.

    Each feature is stored under its own name:

    * "embedding" [C]: what the model's own library calls its image embedding: `pooler_output` of
      transformers' SwinModel and ResNetModel, what torchvision's model gives before its classifier,
      timm's output with `num_classes=0`. CLIP's projection is not in it.
    * "cls" [C], "patch_mean" [C], "tokens" [N, C]: the class token, the mean of the other tokens
      without prefix (class token, registers), and all tokens of the last layer; a CNN has none.
    * "projection" [C]: the image embeds of CLIP and SigLIP models of timm, as `get_image_features`
      of transformers gives them.
    * "pooled" [C]: the fp32 mean of the last requested map, without the model's final norm.
    * "maps", "maps.<stage>" [C, h, w]: every requested map, or that of one stage.
    * "layer:<module>": the output of a module (its first tensor), by the name that it has in the
      model's own library, which runs it: timm's full model, transformers' SwinModel or ResNetModel,
      torchvision's SwinTransformer.

    A Swin of transformers runs once for maps and once more for the features of its last layer,
    because SwinModel shifts other windows than SwinBackbone. Of timm models "pooled" and maps come
    from a `TimmBackbone`, layers from timm's full model, all others from an accelerated full model:
    where several kinds are asked for, each runs.

    Attributes:
        model: the model that computes the first feature, in eval mode: a backbone, timm's full
            model, or the upstream model of a layer.
        processor: the image processor; its `spec` decides every pixel.
        features: the names.
        norm: of the tokens, "final" or "none"; None where no feature has it.
        stages: names of the maps that "maps" and "pooled" stand for.
        precision, normalize, feature_dtype: as given.
        batch_size: images per forward pass; 1 where the processor keeps the aspect ratio.
        decode_threads: threads that decode images.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backbone,
        features: str | Sequence[str] = "embedding",
        *,
        out_indices: Sequence[int | str] | None = None,
        norm: str | None = None,
        normalize: bool = False,
        feature_dtype: str | None = None,
        precision: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        size: tuple[int, int] | str | None = None,
        mode: str = "auto",
        expected_images: int | None = None,
        processor: ImageProcessor | None = None,
    ) -> None:
        """Loads the model.

        Args:
            model: argument of `AutoBackbone.from_pretrained`, or a backbone that it loaded, which
                stays as it is.
            features: one name or several.
            out_indices: the requested maps, by index or name; default: the model's own choice.
            norm: of "cls", "patch_mean" and "tokens": "final" is after the model's final norm, the
                default; "none" before it.
            normalize: divide vectors by their length (L2), in fp32.
            feature_dtype: what is stored, "fp32", "fp16" or "bf16"; default: fp32 for vectors, the
                precision for others.
            precision: of the forward pass, "fp32", "fp16" or "bf16"; default: "fp32", of a backbone
                that of its weights.
            device: default: "cuda" where there is one, else "cpu"; of a backbone, its own.
            batch_size: images per forward pass.
            size: (H, W) that every image is resized to, instead of the model's own resize and crop;
                or "test", the size and crop of timm's test results.
            mode: how the model runs, see `Backbone.prepare`.
            expected_images: how many are to come, see `Backbone.prepare`.
            processor: in place of the model's own.

        Raises:
            OSError: the model cannot be had.
            TypeError: the model or the processor is something else.
            ValueError: an argument is not one of these, or the model has no such feature.
        """
        wanted = Wanted.parse(features, norm)
        for name, value in (("precision", precision), ("feature_dtype", feature_dtype)):
            if value is not None and value not in DTYPES:
                raise ValueError(f"{name}: wanted {', '.join(DTYPES)}, got {value!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: wanted a whole number, at least 1, got {batch_size!r}")
        if not (size in (None, "test") or _is_size(size)):
            raise ValueError(f"size: wanted (height, width) in pixels, or 'test', got {size!r}")
        if out_indices is not None and not isinstance(out_indices, (tuple, list, range)):
            raise ValueError(f"out_indices: wanted a list such as [1, -1], got {out_indices!r}")
        if normalize and not (wanted.has_vectors or wanted.layers):
            raise ValueError(
                f"normalize: none of {', '.join(wanted.names)} is a vector; it is for "
                f"{', '.join(VECTORS)}"
            )
        if isinstance(model, Backbone):
            device = model.device if device is None else device
            names = {dtype: name for name, dtype in DTYPES.items()}
            precision = names.get(model.dtype) if precision is None else precision
        precision = precision or "fp32"
        self.device = find_device(device)
        self.decode_threads = n_decode_threads(self.device)
        self.features, self.norm = wanted.names, wanted.norm
        self.precision, self.normalize, self.feature_dtype = precision, normalize, feature_dtype
        self._storage = Storage(
            DTYPES[precision], normalize, None if feature_dtype is None else DTYPES[feature_dtype]
        )
        self.processor = load_processor(model, processor, size == "test")
        loaded = load_models(
            model,
            wanted,
            out_indices=out_indices,
            dtype=DTYPES[precision],
            device=self.device,
        )
        self._name, self._config, self.stages = loaded.name, loaded.config, loaded.stages
        self._models, self._changed = loaded.models, loaded.changed
        self._made_for = self._placed()
        if isinstance(size, (tuple, list)):
            self.processor = ImageProcessor(
                dataclasses.replace(
                    self.processor.spec,
                    resize="exact",
                    size=tuple(size),
                    crop_pct=None,
                    size_divisor=1,
                    crop_size=None,
                    do_pad=False,
                    pad_size=None,
                )
            )
        if (seen := self.processor.output_size) and math.prod(seen) > MAX_RESIZED_PIXELS:
            raise ValueError(
                f"size: wanted at most {MAX_RESIZED_PIXELS:,} pixels (4096x4096), got {seen[0]}x"
                f"{seen[1]}; give a smaller size (--size HxW)"
            )
        keeps_aspect = self.processor.output_size is None
        if keeps_aspect and not wanted.only_vectors:
            raise ValueError(
                "this model's processor keeps the aspect ratio of an image, so maps differ in size "
                "and do not stack, nor do tokens and layers; give a size (--size HxW), or ask for "
                "vectors only (embedding, pooled)"
            )
        self.batch_size = 1 if keeps_aspect else batch_size
        self.prepare(mode, expected_images)
        two = self._on_device(torch.zeros(2, 3, *self._example_size))
        for feature_model in self._models:
            with torch.no_grad(), _refusals(feature_model.module, two):
                feature_model.check(two)
        if normalize and not wanted.has_vectors:
            shapes = {name: output["shape"] for name, output in self.outputs().items()}
            if all(len(shape) != 1 for shape in shapes.values()):
                raise ValueError(f"normalize: no feature is a vector, shapes are {shapes}")

    def __repr__(self) -> str:
        height, width = self.processor.output_size or ("any", "any")
        return (
            f"FeatureExtractor({self._name!r}: {', '.join(self.features)}, {self.precision} on "
            f"{self.device}, images of {height}x{width}, batches of {self.batch_size})"
        )

    def prepare(self, mode: str, expected_images: int | None = None) -> None:
        """Changes how the model runs, see `Backbone.prepare`.

        Raises:
            ValueError: there is no such mode, or this device cannot do it.
        """
        for model in self._models:
            model.prepare(mode, expected_images)
        self.model = self._models[0].module

    def explain(self) -> Explanation:
        """How each shape of input so far runs, and why, for each model that computes features."""
        found = [model.engine.explain() for model in self._models if model.engine is not None]
        rows = [row for explanation in found for row in explanation.rows]
        if len(found) < len(self._models):
            why = "single modules run in upstream's own model"
            rows.append(ExplainedRow("layers", "upstream", why))
        copies = [explanation.copies for explanation in found if explanation.copies]
        title = "; ".join([explanation.title for explanation in found]) or repr(self)
        return Explanation(title, tuple(rows), " ".join(copies) or None)

    def choose_mode(self, mode: str, expected_images: int) -> str:
        """Prepares the model and returns the mode that computes the same in any other process.

        Args:
            mode: of `Backbone.prepare`. "auto" chooses for full batches; where images keep their
                aspect ratio there is no shape to measure, and they run op by op.
            expected_images: how many are to come.
        """
        size = self.processor.output_size
        # some features have two engines or, as layers, none
        is_measured = size is not None and len(self._models) == 1 and self._models[0].has_engine
        if mode == "auto" and not is_measured:
            mode = "triton" if self.device.type == "cuda" else "eager"
        self.prepare(mode, expected_images)
        engine = self._models[0].engine
        if not is_measured or size is None or engine is None:
            return mode
        shape = min(self.batch_size, expected_images), 3, *size
        generator = torch.Generator().manual_seed(0)
        pixels = self._on_device(torch.randn(shape, generator=generator))
        try:
            with _refusals(self._models[0].module, pixels):
                return engine.mode_for(pixels)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                raise self._too_large(pixels) from error
            raise

    def __call__(self, images: Any) -> dict[str, Tensor]:
        """Computes the features of some images.

        Args:
            images: an image or a list or iterator of them: PIL image, array, tensor, path, or bytes
                of a file; or an array or tensor of four dimensions.

        Returns:
            Tensors [n, ...] on the CPU, by the name of the feature.

        Raises:
            ImageError: an image has no features.
            ValueError: there is no image, or one of the images is several.
            TypeError: something is no image.
        """
        several = isinstance(images, (list, tuple, Iterator)) or getattr(images, "ndim", 0) == 4
        rows = ((i, str(i), image) for i, image in enumerate(images if several else [images]))
        parts: list[dict[str, Tensor]] = []
        for batch in self.run(chunked(rows, self.batch_size)):
            for error in batch.errors:
                raise ImageError(error.kind, f"image {error.row}: {error.message}")
            parts.append(batch.features)
        if not parts:
            raise ValueError("wanted at least one image, got none")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def stream(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[FeatureBatch]:
        """Computes the features of any number of image files, batch by batch, in order.

        Args:
            paths: image files; may be endless. Ids are the paths as given, with forward slashes.

        Returns:
            An iterator of batches; a file without features is among the `errors` of its batch.

        Raises:
            TypeError: one path instead of several.
        """
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError(f"paths: wanted a list or iterator of paths, got {paths!r}")
        rows = ((i, source.id, source) for i, source in enumerate(map(source_at, paths)))
        return self.run(chunked(rows, self.batch_size))

    def outputs(self) -> dict[str, dict[str, Any]]:
        """Shape without the batch, and dtype, of every feature.

        Raises:
            ValueError: the model does not take images of the processor's size.
        """
        example = self._forward(torch.zeros(1, 3, *self._example_size), plain=True)
        return {
            name: {
                "shape": list(tensor.shape[1:]),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            for name, tensor in example.items()
        }

    def settings(self) -> dict[str, Any]:
        """Returns everything about this extractor that decides the values, in JSON types."""
        states = ((type(model).__name__, model.state()) for model in self._models)
        stages = {"stages": list(self.stages)} if self.stages else {}
        library = LIBRARIES.get(type(self._config))
        return {
            "model": {
                "name": self._name,
                "class": type(self._models[0].module).__name__,
                "config": json_types(self._config.deciding_fields(), "config"),
                "weights_sha256": weights_digest(states),
                **({} if self._changed is None else {"changes_sha256": self._changed}),
            },
            "preprocessing": self.processor.spec.to_dict(),
            "limits": {
                "bytes": MAX_BYTES,
                "pixels": MAX_PIXELS,
                "resized_pixels": MAX_RESIZED_PIXELS,
            },
            "features": list(self.features),
            "norm": self.norm,
            "normalize": self.normalize,
            **stages,
            "outputs": self.outputs(),
            "precision": self.precision,
            "device": self.device.type,
            "versions": {
                "torch": torch.__version__,
                "pillow": PIL.__version__,
                **({} if library is None else {library: version(library)}),
                "fastbb_numerics": NUMERICS,
            },
        }

    def run(
        self, chunks: Iterable[list[Row]], pad_to: int = 0
    ) -> Generator[FeatureBatch, None, None]:
        """Computes chunk by chunk; the following ones are decoded meanwhile.

        Args:
            chunks: each becomes one batch.
            pad_to: batches are filled with zero images to this size.

        Raises:
            ValueError: the backbone was put into training mode, or onto another dtype or device,
                after this extractor was made.
        """
        if any(part.training for model in self._models for part in model.module.modules()):
            raise ValueError("model: the backbone is in training mode: call .eval() first")
        if self._placed() != self._made_for:
            raise ValueError(
                "model: its weights were given another dtype or device after this extractor was "
                "made: make another one"
            )
        n_threads = self.decode_threads
        # in chunks; at most two batches, or two images per thread (of 200 MB, at the limit of
        # pixels), are held decoded
        look_ahead = max(2, math.ceil(2 * n_threads / self.batch_size))
        pending: deque[tuple[list[Row], list[Future[Tensor | ImageError]]]] = deque()
        with fixed_settings():
            pool = ThreadPoolExecutor(n_threads, thread_name_prefix="fastbb-decode")
            try:
                for chunk in chunks:
                    pending.append((chunk, [pool.submit(self._load, row) for row in chunk]))
                    if len(pending) > look_ahead:
                        yield self._batch(*pending.popleft(), pad_to)
                while pending:
                    yield self._batch(*pending.popleft(), pad_to)
            finally:
                pool.shutdown(cancel_futures=True)

    def _placed(self) -> list[tuple[torch.dtype, torch.device]]:
        """dtype and device of every weight."""
        weights = (weight for model in self._models for weight in model.module.parameters())
        return [(weight.dtype, weight.device) for weight in weights]

    def _load(self, row: Row) -> Tensor | ImageError:
        """Returns fp32 [3, H, W] of an image or its error, whatever Pillow's settings are."""
        while True:
            before = fix_settings()
            loaded = self._load_once(row)
            if fix_settings() is before:
                return loaded

    def _load_once(self, row: Row) -> Tensor | ImageError:
        n, _, image = row
        try:
            if isinstance(image, (str, os.PathLike)):
                image = source_at(image)
            if isinstance(image, Source):
                image = read_bytes(image)
            if isinstance(image, (bytes, bytearray, memoryview)):
                return self._processed(self._decoded(bytes(image)))
        except ImageError as error:
            return error
        if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) > 3:
            raise ValueError(
                f"image {n}: wanted one image, got a {type(image).__name__} of several; give them "
                "one by one, or as one array of four dimensions"
            )
        try:
            return self.processor(image)["pixel_values"][0]
        except OSError as error:  # Pillow reads a file that it has opened only when it is used
            return ImageError("truncated" if "truncated" in str(error) else "corrupt", str(error))
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("images[0]: ")  # a separate list, not the caller's
            raise type(error)(f"image {n}: {text}") from error

    def _decoded(self, data: bytes) -> Image.Image:
        spec = self.processor.spec
        # a crop without a resize makes no image larger
        limited = spec.resize is not None or spec.output_size is None
        return decode(data, spec.resized_size if limited else None)

    def _processed(self, image: Image.Image) -> Tensor:
        """Returns fp32 [3, H, W] of an image that was just decoded."""
        try:
            return self.processor.process(self.processor.rgb_from_file(image))
        except Exception as error:  # any error that a library raises for an odd image
            raise ImageError("transform", f"{type(error).__name__}: {error}") from error

    def _batch(
        self,
        chunk: list[Row],
        futures: list[Future[Tensor | ImageError]],
        pad_to: int,
    ) -> FeatureBatch:
        loaded = [future.result() for future in futures]
        pixels = self._stacked(loaded, pad_to)
        result = {} if pixels is None else self._forward_or_reason(pixels)
        return self._finished(chunk, loaded, result)

    def _stacked(self, loaded: Sequence[Tensor | ImageError], pad_to: int) -> Tensor | None:
        """Returns fp32 pixels [B, 3, H, W] with zeros for what failed; None if everything has."""
        good = [item for item in loaded if isinstance(item, Tensor)]
        if not good:
            return None
        pixels = torch.zeros(max(len(loaded), pad_to), *good[0].shape)
        for i, item in enumerate(loaded):
            if isinstance(item, Tensor):
                pixels[i] = item
        return pixels

    def _finished(
        self,
        chunk: list[Row],
        loaded: list[Tensor | ImageError],
        result: dict[str, Tensor] | ImageError,
    ) -> FeatureBatch:
        """Returns the batch, from what each image was loaded as and the features of all of them."""
        features: dict[str, Tensor] = {}
        if isinstance(result, ImageError):
            loaded = [result]
        else:
            features = {name: tensor[: len(chunk)] for name, tensor in result.items()}
        for i, item in enumerate(loaded):
            finite = all(bool(tensor[i].isfinite().all()) for tensor in features.values())
            if isinstance(item, Tensor) and not finite:
                is_cast = any(bool(tensor[i].isinf().any()) for tensor in features.values())
                stored = self._storage.dtype
                hint = f" as {stored} stores it" if stored and is_cast else ""
                problem = f"a feature is NaN or infinite{hint}"
                loaded[i] = ImageError("nonfinite_output", problem)
        kept = [i for i, item in enumerate(loaded) if isinstance(item, Tensor)]
        return FeatureBatch(
            ids=[chunk[i][1] for i in kept],
            features={name: tensor[kept] for name, tensor in features.items()} if kept else {},
            errors=[
                RowError(row, name, item.kind, item.message)
                for (row, name, _), item in zip(chunk, loaded)
                if isinstance(item, ImageError)
            ],
            rows=[chunk[i][0] for i in kept],
        )

    def _forward_or_reason(self, pixels: Tensor) -> dict[str, Tensor] | ImageError:
        try:
            return self._forward(pixels)
        except (RuntimeError, ValueError) as error:
            out_of_memory = _is_out_of_memory(error)
            # only if images differ in size does the size of one image matter
            if self.processor.output_size is None:
                size = f"at {pixels.shape[2]} x {pixels.shape[3]} pixels (height x width)"
                if out_of_memory:
                    return ImageError("oom_single", f"the model runs out of memory {size}")
                return ImageError("transform", f"the model does not take it {size}: {error}")
            if out_of_memory:
                raise self._too_large(pixels) from error
            raise

    def _too_large(self, pixels: Tensor) -> ValueError:
        return ValueError(
            f"batch_size: {len(pixels)} images of {pixels.shape[2]} x {pixels.shape[3]} do "
            f"not fit into the memory of {self.device}; start again with fewer"
        )

    @torch.no_grad()
    def _forward(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        """Returns features of fp32 pixels [B, 3, H, W], on the CPU; `plain` is op by op."""
        pixels = self._on_device(pixels)
        found: dict[str, Tensor] = {}
        for model in self._models:
            with _refusals(model.module, pixels):
                found |= model.features(pixels, plain)
        return {name: self._storage.stored(feature) for name, feature in found.items()}

    def _on_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, DTYPES[self.precision])

    @property
    def _example_size(self) -> tuple[int, int]:
        """(H, W) of an example, where images keep their aspect ratio a usual one."""
        return self.processor.output_size or (224, 224)


@contextmanager
def _refusals(module: torch.nn.Module, pixels: Tensor) -> Iterator[None]:
    """Raises the error by which a model refuses the shape of an input as a ValueError."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        # errors of devices are of subclasses
        if type(error) not in (AssertionError, RuntimeError) or _is_out_of_memory(error):
            raise
        raise ValueError(
            f"{type(module).__name__} does not take pixel_values of shape {list(pixels.shape)}: "
            f"{error}"
        ) from error


def _is_size(size: Any) -> bool:
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    return is_pair and all(isinstance(edge, int) and edge >= 1 for edge in size)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "can't allocate memory" in str(error)
    )


def n_decode_threads(device: torch.device) -> int:
    """Returns how many threads decode images for a model on this device."""
    n_cores = len(os.sched_getaffinity(0))
    # on the CPU the model needs the cores, and takes far longer per image than decoding
    return min(16, n_cores) if device.type == "cuda" else max(1, min(8, n_cores // 2))


def chunked(rows: Iterable[Row], n: int) -> Iterator[list[Row]]:
    """Yields lists of n rows; the last one may be shorter."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, n)):
        yield chunk
