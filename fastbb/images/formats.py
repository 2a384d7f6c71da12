"""Image file formats: the table for listing, reading and `fastbb doctor`.

A format is added by a row of `FORMATS`; nothing else in the package names formats or suffixes.
"""

from pathlib import PurePath
from typing import NamedTuple


class ImageFormat(NamedTuple):
    """A file format that is read.

    Attributes:
        name: common name; in capitals it is Pillow's name of the format.
        suffixes: of its files, in lower case.
        feature: name for `PIL.features.check` where Pillow may have been built without support
            for the format; "" where it always reads it.
    """

    name: str
    suffixes: tuple[str, ...]
    feature: str = ""


FORMATS = (
    ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "jpg"),
    ImageFormat("PNG", (".png",), "zlib"),
    ImageFormat("WebP", (".webp",), "webp"),
    ImageFormat("GIF", (".gif",)),
    ImageFormat("BMP", (".bmp",)),
    ImageFormat("TIFF", (".tif", ".tiff"), "libtiff"),
    ImageFormat("PPM", (".ppm", ".pgm", ".pbm", ".pnm")),
    ImageFormat("AVIF", (".avif",), "avif"),
)
# of small pictures inside a page: Pillow's name and the media type
EMBEDDED = ("JPEG", "image/jpeg")
# images that are listed but not read: each becomes a failed row, instead of being skipped
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".psd", ".ico", ".tga"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"),
)
_SUFFIXES = frozenset(suffix for row in FORMATS for suffix in row.suffixes).union(UNREAD_SUFFIXES)


def has_image_suffix(name: str) -> bool:
    """Returns whether a file with this name is listed as an image."""
    return PurePath(name).suffix.lower() in _SUFFIXES


def readable_formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are opened and that this Pillow knows.

    Files may come from anywhere, and of Pillow's other formats some start programs (EPS) and most
    are hardly tested.
    """
    from PIL import Image

    Image.init()
    return tuple(row.name.upper() for row in FORMATS if row.name.upper() in Image.OPEN)


def pillow_support() -> dict[str, bool]:
    """Returns whether this Pillow reads each format, by the format's name."""
    from PIL import features

    known = readable_formats()
    return {
        row.name: row.name.upper() in known
        and (not row.feature or bool(features.check(row.feature)))
        for row in FORMATS
    }
