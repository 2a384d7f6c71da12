"""The image processor spec: everything that decides a pixel, in one form for every library.

`spec_readers` makes it from the configuration files of transformers and timm.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from ..backbone.configuration import check_choice
from .modes import AlphaRule

RESAMPLE = {f.name.lower(): f for f in Image.Resampling}
ResizeRule = Literal[
    "exact", "shortest_edge", "shortest_longest", "within", "closest", "cover", "contain"
]
# fields that older plans lack; `to_dict` leaves them out at their default, so that these resume
_ADDED_FIELDS = {"resize_after_rescale": False}


@dataclass(frozen=True)
class ImageProcessorSpec:
    """Everything that decides a pixel. Sizes are (height, width); None means "not done".

    Attributes:
        reference: whose arithmetic and rounding is reproduced.
        image_processor_type: transformers' class name, or `TimmWrapperImageProcessor`.
        resize: `exact` (to `size`), `shortest_edge` (to `size[0]`), `shortest_longest` (shortest
            edge to `size[0]` unless the longest then passes `size[1]`), `within` (as large as fits
            into `size`), `closest` (DPT: one edge as in `size`, the one that changes the scale
            less), `cover` and `contain` (timm: smallest that covers, largest that fits).
        size: the resize rule's numbers; None where `crop_pct` gives them.
        crop_pct: the resize goes to `floor(crop_size / crop_pct)`.
        size_divisor: the resized edges are rounded up to a multiple of it, those of `closest` to
            the nearest one.
        resample: Pillow's filter, in lower case.
        crop_size: centre crop; what lies outside the image is `crop_fill`.
        crop_fill: RGB, 0..255.
        rescale_factor: pixel values are multiplied by it.
        image_mean: per channel, subtracted after the rescale.
        image_std: per channel, divided by after the mean.
        do_pad: pad with zeros at the bottom and right, to `pad_size` or else the batch's maximum.
        pad_size: fixed size to pad to.
        pixel_mask: also return a mask, 1 on the image and 0 on padding.
        do_convert_rgb: RGB images go through `alpha_in_memory` too (it matters for a PNG with a
            transparent colour).
        alpha_in_memory: the rule for transparency in PIL images and arrays.
        alpha_in_files: the same for paths and bytes.
        exif_in_files: paths and bytes are turned upright by their EXIF orientation; images in
            memory never are.
        resize_after_rescale: DINOv3: rescale, then resize and crop in fp32 without rounding to
            8 bits, as torchvision does; `resample` is `bilinear` or `bicubic`.
    """

    reference: Literal["hf", "timm"]
    image_processor_type: str
    resize: ResizeRule | None = None
    size: tuple[int, ...] | None = None
    crop_pct: float | None = None
    size_divisor: int = 1
    resample: str = "bilinear"
    crop_size: tuple[int, int] | None = None
    crop_fill: tuple[int, int, int] = (0, 0, 0)
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    do_pad: bool = False
    pad_size: tuple[int, int] | None = None
    pixel_mask: bool = False
    do_convert_rgb: bool = False
    alpha_in_memory: AlphaRule = "white"
    alpha_in_files: AlphaRule = "drop"
    exif_in_files: bool = True
    resize_after_rescale: bool = False

    def __post_init__(self) -> None:
        check_choice("reference", self.reference, ("hf", "timm"))
        check_choice("resize", self.resize, (None, *get_args(ResizeRule)))
        check_choice("resample", self.resample, tuple(RESAMPLE))
        check_choice("alpha_in_memory", self.alpha_in_memory, get_args(AlphaRule))
        check_choice("alpha_in_files", self.alpha_in_files, get_args(AlphaRule))
        if self.size is not None and self.resize is not None:
            check_sizes("size", self.size, 1 if self.resize == "shortest_edge" else 2)
        check_sizes("size_divisor", (self.size_divisor,), 1)
        if self.crop_size is not None:
            check_sizes("crop_size", self.crop_size, 2)
        if self.pad_size is not None:
            check_sizes("pad_size", self.pad_size, 2)
        for name in ("crop_pct", "rescale_factor"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, tuple) and len(value) == 3 and all(map(_is_finite, value))
            ):
                raise ValueError(f"{name} must be 3 finite numbers, one per channel, got {value!r}")
        if self.resize_after_rescale and self.resize is not None:
            check_choice("resample of a float image", self.resample, ("bilinear", "bicubic"))
            if self.rescale_factor is None:
                raise ValueError("resize_after_rescale needs a rescale_factor, got None")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std must both be given, or neither")
        if self.image_std is not None and 0 in self.image_std:
            raise ValueError(f"image_std must not hold 0, got {self.image_std!r}")
        derived = self.crop_pct is not None and self.crop_size is not None
        if (self.size is not None or derived) != (self.resize is not None) or (
            self.size is not None and self.crop_pct is not None
        ):
            raise ValueError(
                "resize needs exactly one of `size` and `crop_pct` (with `crop_size`), and no "
                f"resize neither; got resize={self.resize!r}, size={self.size!r}, "
                f"crop_pct={self.crop_pct!r}, crop_size={self.crop_size!r}"
            )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(H, W) of every processed image, or None where it depends on the image."""
        if self.do_pad and self.pad_size is not None:
            return self.pad_size
        if self.crop_size is not None:
            return self.crop_size
        return self.resized_size(1, 1) if self.resize == "exact" else None

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that an image of `height` x `width` is resized to, before any crop and pad."""
        if self.resize is None:
            return height, width
        size = self.size
        if size is None:
            assert self.crop_pct is not None and self.crop_size is not None
            size = tuple(math.floor(edge / self.crop_pct) for edge in self.crop_size)
        new_height, new_width = _resized(self.resize, size, height, width)
        to_whole = round if self.resize == "closest" else math.ceil
        return (
            to_whole(new_height / self.size_divisor) * self.size_divisor,
            to_whole(new_width / self.size_divisor) * self.size_divisor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as values that JSON can hold; `from_dict` restores an equal spec.

        Fields that were added after the first release are left out where they have their default.
        """
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in (getattr(self, field.name),)
            if field.name not in _ADDED_FIELDS or value != _ADDED_FIELDS[field.name]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageProcessorSpec":
        """Restores the spec that `to_dict` wrote.

        Raises:
            ValueError: a name that is no field, a missing field, or a value out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(
                f"an image processor spec has no field {', '.join(map(repr, unknown))}; it was "
                f"written by another version or edited. The fields are {', '.join(sorted(names))}"
            )
        if missing := sorted(names - set(values) - set(_ADDED_FIELDS)):
            raise ValueError(
                f"an image processor spec needs all of its fields; missing: {', '.join(missing)}"
            )
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_sizes(name: str, value: object, count: int) -> None:
    """Checks that a value is a tuple of `count` edges in pixels.

    Raises:
        ValueError: it is something else; `name` names it in the message.
    """
    if not (
        isinstance(value, tuple)
        and len(value) == count
        and all(type(edge) is int and edge > 0 for edge in value)
    ):
        raise ValueError(
            f"{name} must be {count} positive whole number(s) of pixels, got {value!r}"
        )


def _resized(rule: str, size: tuple[int, ...], height: int, width: int) -> tuple[float, float]:
    """(H, W) after the resize rule, rounded as its reference rounds (`closest`: not yet)."""
    short, long = sorted((height, width))
    match rule, size:
        case "exact", (to_height, to_width):
            return to_height, to_width
        case "shortest_edge", (edge, *_):  # two equal numbers when they come from a crop size
            new_long = int(edge * long / short)
            return (new_long, edge) if width <= height else (edge, new_long)
        case "shortest_longest", (shortest, longest):
            edge = shortest
            if long / short * shortest > longest:
                edge = longest * short / long
            new_short = round(edge)
            if new_short == short:
                return height, width
            # the other side comes from the edge before rounding
            if width < height:
                return int(edge * height / width), new_short
            return new_short, int(edge * width / height)
        case "within", (max_height, max_width):
            scale = min(max_height / height, max_width / width)
            return int(height * scale), int(width * scale)
        case "closest", (to_height, to_width):
            scale, scale_width = to_height / height, to_width / width
            if abs(1 - scale_width) < abs(1 - scale):
                scale = scale_width
            return scale * height, scale * width
        case _, (to_height, to_width):
            choose = min if rule == "cover" else max
            ratio = choose(height / to_height, width / to_width)
            return round(height / ratio), round(width / ratio)
    raise AssertionError(f"{rule} {size}")
