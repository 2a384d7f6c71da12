"""Image processors: convert images to exactly the reference's pixel values.

The reference is the library that a checkpoint comes from: transformers' PIL backend (`hf`) or
timm's evaluation transform (`timm`). For 8-bit RGB the result is bit-identical to it;
`modes` converts all other images to 8-bit RGB; `spec` holds everything that decides a pixel.

An image goes: resize (Pillow) -> centre crop -> rescale and normalise -> pad. Resizing leaves 8-bit
values, so the arithmetic has 256 possible results per channel: they are computed once, with the
reference's own operations in its order, and looked up.

DINOv3's processor (`resize_after_rescale`) has torchvision's backend only, which is its reference.
It goes: rescale -> resize -> centre crop -> normalise, in fp32. The resize is
`torch.nn.functional.interpolate`, as in torchvision, so the result is bit-identical to transformers
with the same torch; Pillow's float mode differs by up to 1.4e-5 of the range.
"""

import io
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from ..backbone.hub import (
    HubOptions,
    find_file,
    local_directory,
    read_config,
    read_json,
    timm_pretrained_cfg,
)
from .formats import readable_formats
from .modes import array_to_rgb, to_rgb
from .spec import RESAMPLE, ImageProcessorSpec
from .spec_readers import config_from_spec, spec_from_config, spec_from_timm

CONFIG_NAME = "preprocessor_config.json"


class BatchFeature(dict[str, Any]):
    """A processed batch: a dict for `model(**inputs)`, entries also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} among {', '.join(self)}") from None

    def to(self, *targets: torch.device | torch.dtype | str | int) -> "BatchFeature":
        """Moves every tensor to a device and casts the floating-point ones to a dtype, in place.

        Args:
            targets: a device, a dtype, or both.
        """
        for name, value in self.items():
            for target in targets:
                if not isinstance(target, torch.dtype) or value.is_floating_point():
                    value = value.to(target)
            self[name] = value
        return self


class ImageProcessor:
    """Converts images to the input of a model, by a spec.

    Args:
        spec: everything that decides a pixel.
    """

    def __init__(self, spec: ImageProcessorSpec) -> None:
        self.spec = spec
        every_value = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        # [3, 256]: the result of each 8-bit value in each channel
        self._table = np.ascontiguousarray(self._arithmetic(every_value).T)

    def __repr__(self) -> str:
        return f"ImageProcessor({self.spec})"

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(H, W) of every processed image, or None where it depends on the image."""
        return self.spec.output_size

    def __call__(
        self, images: Any, return_tensors: Literal["pt", "np"] | None = "pt"
    ) -> BatchFeature:
        """Processes one image or a list of them into one batch.

        Args:
            images: a PIL image, an array or tensor ([H, W], [H, W, C], [C, H, W], or a batch of
                them), a path, the bytes of an image file, or a list or tuple of these. Float
                arrays are taken as transformers' PIL backend takes them: whole numbers as 0..255,
                else 0..1, and rescaled all the same (`resize_after_rescale`: as they are).
            return_tensors: `"pt"` (None is the same) or `"np"`.

        Returns:
            `pixel_values` fp32 [B, 3, H, W] and, where the spec asks for it, `pixel_mask` int64
            [B, H, W].

        Raises:
            ValueError: no image, one that is not a picture, or sizes that make no batch.
            TypeError: something that is no image.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("the list of images is empty: give at least one image")
        pixels = []
        for index, image in enumerate(images):
            try:
                pixels.append(self._pixels(self._as_rgb(image)))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"images[{index}]: {error}") from error
        batch = self._batch(pixels)
        if return_tensors == "np":
            return BatchFeature(batch)
        return BatchFeature({name: torch.from_numpy(value) for name, value in batch.items()})

    def process(self, image: Image.Image) -> torch.Tensor:
        """Processes one RGB image; callable from several threads at once.

        Args:
            image: mode RGB, as `rgb_from_file` or `to_rgb` gives it.

        Returns:
            fp32 [3, H, W] on the CPU, padded only where the spec has a `pad_size`.
        """
        if image.mode != "RGB":
            raise ValueError(f"needs an RGB image, got mode {image.mode!r}: use to_rgb first")
        pixels = self._pixels(image)
        if self.spec.pad_size is not None:
            pixels = self._batch([pixels])["pixel_values"][0]
        return torch.from_numpy(pixels)

    def rgb_from_file(self, image: Image.Image) -> Image.Image:
        """RGB of an image just opened from a file or bytes, by the spec's rules for files.

        Args:
            image: as `PIL.Image.open` gives it, any mode; it is decoded, and turned in place.

        Returns:
            The decoded image in mode RGB, turned upright where the reference does so.
        """
        image.load()
        if self.spec.exif_in_files:
            ImageOps.exif_transpose(image, in_place=True)
        return self._rgb_in_memory(to_rgb(image, alpha=self.spec.alpha_in_files))

    def _rgb_in_memory(self, image: Image.Image) -> Image.Image:
        if image.mode == "RGB" and not self.spec.do_convert_rgb:
            return image
        return to_rgb(image, alpha=self.spec.alpha_in_memory)

    def _as_rgb(self, image: Any) -> Image.Image | np.ndarray:
        """RGB image, or an array [H, W, 3] of any real dtype."""
        if isinstance(image, Image.Image):
            return self._rgb_in_memory(image)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if isinstance(image, np.ndarray):
            return array_to_rgb(image, alpha=self.spec.alpha_in_memory)
        if isinstance(image, (bytes, bytearray, memoryview)):
            try:
                with Image.open(io.BytesIO(image), formats=readable_formats()) as opened:
                    return self.rgb_from_file(opened)
            except UnidentifiedImageError:
                raise ValueError(
                    f"{len(image)} bytes that are no image file of {', '.join(readable_formats())}"
                    "; of others, pass the image that you decode"
                ) from None
        if isinstance(image, (str, os.PathLike)):
            if str(image).startswith(("http://", "https://")):
                raise ValueError(f"images are not downloaded; fetch {image} and pass its bytes")
            try:
                with Image.open(image, formats=readable_formats()) as opened:
                    return self.rgb_from_file(opened)
            except UnidentifiedImageError:
                raise UnidentifiedImageError(
                    f"{image}: no image file of {', '.join(readable_formats())}; of others, pass "
                    "the image that you decode"
                ) from None
            except OSError as error:
                if str(image) in str(error):
                    raise
                raise OSError(f"{image}: {error}") from error
        raise TypeError(
            "an image is a PIL image, a numpy array, a torch tensor, a path or the bytes of an "
            f"image file; got {type(image).__name__}"
        )

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """fp32 [3, H, W] of an RGB image or an array [H, W, 3], before padding."""
        spec = self.spec
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        if height == 0 or width == 0:
            raise ValueError(f"an image of {height}x{width} pixels is empty")
        if spec.resize is not None:
            values = self._resize(image, spec.resized_size(height, width))
        else:
            values = np.asarray(image)
        if spec.crop_size is not None:
            values = _center_crop(values, spec.crop_size, spec)
        if values.dtype != np.uint8:
            if spec.resize is None or not spec.resize_after_rescale:
                values = self._rescale(values)
            return np.ascontiguousarray(np.moveaxis(self._normalize(values), -1, 0))
        pixels = np.empty((3, *values.shape[:2]), np.float32)
        for channel in range(3):
            # clip: no index can be out of range, and this mode writes straight into `out`
            table, index = self._table[channel], values[..., channel]
            np.take(table, index, out=pixels[channel], mode="clip")
        return pixels

    def _resize(self, image: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """[H, W, 3] array of `size`: uint8, or float32 for arrays that hold 0..1 (hf).

        With `resize_after_rescale` it is a float array, and rescaled.
        """
        height, width = size
        limit = Image.MAX_IMAGE_PIXELS
        if 0 in size or (limit is not None and height * width > 2 * limit):
            raise ValueError(
                f"this image's aspect ratio makes its resized copy {height}x{width} pixels, "
                f"{'nothing' if 0 in size else 'more than Pillow allows an image to have'}: crop "
                "the image, or use a processor that does not keep the aspect ratio"
            )
        if self.spec.resize_after_rescale:
            return _resize_floats(self._rescale(np.asarray(image)), size, self.spec.resample)
        unit_range = False
        if isinstance(image, np.ndarray):
            image, unit_range = _array_to_image(image)
        resized = np.asarray(image.resize((width, height), RESAMPLE[self.spec.resample]))
        if unit_range and self.spec.reference == "hf":
            return (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
        return resized

    def _arithmetic(self, values: np.ndarray) -> np.ndarray:
        """Rescales and normalises [..., 3] values: transformers' operations, in its order.

        For 8-bit values and 1/255 the first is timm's fp32 division by 255 too, to the bit.
        """
        return self._normalize(self._rescale(values))

    def _rescale(self, values: np.ndarray) -> np.ndarray:
        factor = self.spec.rescale_factor
        if factor is None:
            return values
        if self.spec.resize_after_rescale:  # torchvision's backend keeps fp64, the rest is fp32
            dtype = np.float64 if values.dtype == np.float64 else np.float32
            return values.astype(dtype) * dtype(factor)
        return (values.astype(np.float64) * factor).astype(np.float32)

    def _normalize(self, values: np.ndarray) -> np.ndarray:
        spec = self.spec
        if spec.image_mean is not None:
            if values.dtype.kind != "f":
                values = values.astype(np.float32)
            mean, std = (np.array(v, values.dtype) for v in (spec.image_mean, spec.image_std))
            values = (values - mean) / std
        return values.astype(np.float32)

    def _batch(self, pixels: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Stacks fp32 [3, H, W] arrays, padded and with a mask where the spec asks for it."""
        sizes = [image.shape[1:] for image in pixels]
        target = max(height for height, _ in sizes), max(width for _, width in sizes)
        if self.spec.do_pad and self.spec.pad_size is not None:
            if target[0] > self.spec.pad_size[0] or target[1] > self.spec.pad_size[1]:
                raise ValueError(
                    f"pad_size {self.spec.pad_size} is smaller than a resized image, {target}"
                )
            target = self.spec.pad_size
        if not self.spec.do_pad and len(set(sizes)) > 1:
            raise ValueError(
                "this processor keeps the aspect ratio and does not pad, so images of "
                f"{len(set(sizes))} sizes make no batch: {sorted(set(sizes))}; pass one at a time"
            )
        if all(size == target for size in sizes):
            values = np.stack(pixels)
        else:
            values = np.zeros((len(pixels), 3, *target), np.float32)
            for row, (height, width), image in zip(values, sizes, pixels):
                row[:, :height, :width] = image
        if not self.spec.pixel_mask:
            return {"pixel_values": values}
        mask = np.zeros((len(pixels), *target), np.int64)
        for row, (height, width) in zip(mask, sizes):
            row[:height, :width] = 1
        return {"pixel_values": values, "pixel_mask": mask}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json`, which fastbb and transformers load.

        Args:
            save_directory: made if it does not exist.

        Raises:
            ValueError: the spec's `image_processor_type` has no words for this spec.
        """
        text = json.dumps(config_from_spec(self.spec), indent=2, sort_keys=True) + "\n"
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(text, encoding="utf-8")


def _center_crop(values: np.ndarray, size: tuple[int, int], spec: ImageProcessorSpec) -> np.ndarray:
    """Returns the middle [h, w, 3] of [H, W, 3] values; a view unless the image is too small."""
    starts = []
    for length, wanted in zip(values.shape, size):
        spare = length - wanted
        if spare >= 0:  # timm rounds half to even
            starts.append(round(spare / 2) if spec.reference == "timm" else spare // 2)
        elif spec.reference == "timm" or spec.resize_after_rescale:
            starts.append(-(-spare // 2))  # torchvision: the odd pixel of padding at the end
        else:
            starts.append(spare // 2)
    (top, left), (height, width) = starts, size
    inside = values[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == size:
        return inside
    canvas = np.empty((height, width, 3), values.dtype)
    canvas[...] = spec.crop_fill
    top, left = max(-top, 0), max(-left, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def _resize_floats(values: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resizes float [H, W, 3] values as torchvision resizes a float tensor."""
    if values.shape[:2] == size:
        return values
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
    resized = F.interpolate(planes[None], size, mode=resample, antialias=True)[0]
    return np.moveaxis(resized.numpy(), 0, -1)


def _array_to_image(array: np.ndarray) -> tuple[Image.Image, bool]:
    """RGB image of an array [H, W, 3], and whether it held 0..1 rather than 0..255.

    The rule is transformers' `to_pil_image`: whole numbers are 0..255, others 0..1, truncated.
    """
    unit_range = False
    if array.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            unit_range = not np.allclose(array, array.astype(int))
        low, high, highest = array.min(), array.max(), 1 if unit_range else 255
        if not (low >= 0 and high <= highest):
            raise ValueError(
                "an array to be resized needs whole numbers in 0..255 or fractions in 0..1, got "
                f"{array.dtype} values from {low} to {high}"
            )
        if unit_range:
            array = (array.astype(np.float64) * 255).astype(np.float32)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8))), unit_range


class AutoImageProcessor:
    """Makes the image processor that belongs to a model.

    Supported are timm's data config and transformers' `BeitImageProcessor`, `BitImageProcessor`
    (DINOv2, FocalNet, Hiera), `CLIPImageProcessor`, `ConvNextImageProcessor` (ResNet),
    `DeiTImageProcessor`, `DINOv3ViTImageProcessor`, `DPTImageProcessor`, `PvtImageProcessor`,
    `SegformerImageProcessor`, `SiglipImageProcessor`, `TextNetImageProcessor`, `ViTImageProcessor`
    (Swin), and those of MaskFormer, Mask2Former, DETR, Conditional DETR and Deformable DETR, with
    or without `Fast`, and as `...FeatureExtractor` in old files.
    """

    def __init__(self) -> None:
        raise OSError(
            "AutoImageProcessor is used as AutoImageProcessor.from_pretrained(name_or_dir)"
        )

    @staticmethod
    def from_pretrained(
        name_or_dir: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> ImageProcessor:
        """Reads `preprocessor_config.json`, or timm's data config.

        Args:
            name_or_dir: local directory, bundled model, timm name or Hub repository.
            revision: of the Hub repository.
            cache_dir: of huggingface_hub.
            token: for the Hub.
            local_files_only: never ask the Hub.
            overrides: keys of `preprocessor_config.json` (or of timm's data config) to replace, and
                `alpha_in_memory`, `alpha_in_files`, `exif_in_files`. `use_test_size=True` takes
                the size and crop of timm's test results, where a timm model has others for them.

        Returns:
            The processor, with the pixels of transformers' PIL backend (DINOv3: of torchvision's,
            it has no other) or of timm.

        Raises:
            OSError: no such model, or it says nothing about its preprocessing.
            ValueError: a type of processor, a key or a value that is not supported.
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        is_local = local_directory(name_or_dir) is not None
        # a processor saved beside a timm model counts, but a bare timm name is no Hub repository
        path = find_file(name_or_dir, CONFIG_NAME, hub) if is_local else None
        if path is None:
            pretrained_cfg = timm_pretrained_cfg(name_or_dir, hub)
            if pretrained_cfg is not None:
                return ImageProcessor(spec_from_timm(pretrained_cfg, **overrides))
            path = find_file(name_or_dir, CONFIG_NAME, hub)
        if path is None:
            raise OSError(
                f"{str(name_or_dir)!r} has no {CONFIG_NAME} and is not a timm model, so how its "
                "images are to be processed is unknown; save one there, or use ImageProcessor(spec)"
            )
        config = read_json(path)
        model_type = None
        if not {"image_processor_type", "feature_extractor_type"} & set(config):
            model_type = read_config(name_or_dir, hub).get("model_type")
        try:
            return ImageProcessor(spec_from_config(config, model_type, **overrides))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
