"""Conversion of images of any mode to 8-bit RGB, by one written rule per mode.

The libraries whose pixels fastbb reproduces define what happens to 8-bit RGB; for other modes they
raise, saturate or read the numbers of another colour space as RGB. `to_rgb` settles each mode once:

| Pillow mode | becomes |
|---|---|
| RGB, RGBX | itself |
| L, 1 | three equal channels (1-bit: 0 and 255) |
| P | its palette's colours |
| CMYK (Pillow gives YCCK files this mode), YCbCr, HSV, LAB | Pillow's conversion to sRGB |
| I;16, I;16L, I;16B, I;16N | value >> 8 (Pillow itself saturates: nearly all white) |
| I | read as 16-bit: value >> 8, clipped to 0..255 |
| F | clipped to 0..255 and truncated, as Pillow does; NaN is an error |
| RGBA, LA, PA, RGBa, La; a transparent colour in `info` | alpha rule: on white, or dropped |

ICC profiles are ignored, as in transformers and timm. The current frame of an animation is used.
"""

from typing import Literal

import numpy as np
from PIL import Image

AlphaRule = Literal["white", "drop"]

_MODES = {
    *("1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "PA"),
    *("CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"),
}


def to_rgb(image: Image.Image, *, alpha: AlphaRule = "white") -> Image.Image:
    """Converts an image of any Pillow mode to RGB by the table above; EXIF is not looked at.

    Args:
        image: any mode; never changed.
        alpha: `"white"` blends transparent pixels onto white, as transformers' `convert_to_rgb`
            does; `"drop"` keeps the colour stored under them, as `Image.convert("RGB")` does.

    Returns:
        The image in mode RGB: the same object where it was RGB already and nothing had to be done.

    Raises:
        ValueError: the mode is none of Pillow's, or a float image holds NaN.
    """
    if image.mode not in _MODES:
        raise ValueError(
            f"an image of mode {image.mode!r} has no rule for RGB; convert it to one of "
            f"{', '.join(sorted(_MODES))} first"
        )
    if image.mode == "F" and np.isnan(np.asarray(image)).any():
        raise ValueError("a float image (mode 'F') holds NaN, which is no colour; replace it first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        high_byte = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    transparency = image.info.get("transparency")
    if alpha == "white" and (image.mode in ("RGBA", "LA", "PA") or transparency is not None):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "P" and isinstance(transparency, bytes):
        # same pixels without Pillow's warning, once per file, that per-entry alpha is lost
        image = image.copy()
        del image.info["transparency"]
    return image if image.mode == "RGB" else image.convert("RGB")


def array_to_rgb(array: np.ndarray, *, alpha: AlphaRule = "white") -> np.ndarray:
    """Brings an array to three channels, last; values and dtype stay.

    Args:
        array: [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4, whole or float numbers. Where both
            ends could be the channels, as in [3, H, 3], the first is, as in transformers.
        alpha: the rule for C = 4. `"white"` is transformers' blend for arrays: integers are read
            as 0..255, floats as 0..1.

    Returns:
        [H, W, 3] array, a view where possible.

    Raises:
        ValueError: shape, dtype or range that is no picture.
    """
    if array.dtype.kind not in "uif":
        raise ValueError(f"an image array needs whole or float numbers, got dtype {array.dtype}")
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "an image array is [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, "
            f"got shape {shape}"
        )
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    if array.shape[-1] == 3 or alpha == "drop":
        return array[..., :3]
    is_float = array.dtype.kind == "f"
    if is_float and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"a float RGBA array needs values in 0..1, got {array.min()} to {array.max()}"
        )
    white = 1.0 if is_float else 255
    opacity = array[..., 3:] / white
    blend = opacity * array[..., :3] + (1 - opacity) * white
    return (blend if is_float else np.round(blend)).astype(array.dtype)
