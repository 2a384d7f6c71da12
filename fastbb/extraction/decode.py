"""Decoding of a `Source` to pixels in memory, or to one of a closed set of error kinds.

The header is checked before any pixel is decoded, and only formats of an allow-list are opened, so
a file of an enormous size or an exotic format costs nothing.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, UnidentifiedImageError

from ..images.formats import readable_formats
from .sources import ABSENT, Source, is_url

ErrorKind = Literal[
    "not_found",
    "io",
    "too_many_bytes",
    "unsupported_format",
    "too_many_pixels",
    "truncated",
    "corrupt",
    "decode_timeout",  # reserved: decoding has no time limit yet
    "decoder_crash",  # reserved: a crash of a native decoder still ends the process
    "transform",
    "nonfinite_output",
    "oom_single",
]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 89_478_485  # above this Pillow itself warns of a decompression bomb
# after the resize: 4096 x 4096, which is 200 MB of fp32 and far more in a model
MAX_RESIZED_PIXELS = 2**24
_MAX_MESSAGE_CHARS = 200
# temporary errors of network file systems and overloaded disks
_TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EBUSY})
_N_TRIES = 3
_FIRST_WAIT_S = 0.1


class ImageError(Exception):
    """An image has no features; the error becomes a row of the output, and other images go on.

    Attributes:
        kind: one of `ERROR_KINDS`.
        message: one line of at most 200 characters.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.kind: ErrorKind = kind
        self.message = " ".join(message.split())[:_MAX_MESSAGE_CHARS]
        super().__init__(f"{kind}: {self.message}")


@dataclass(frozen=True)
class RowError:
    """The error of a row that has no features.

    Attributes:
        row: position in the input.
        id: the id of the row.
        kind: one of `ERROR_KINDS`.
        message: one line of at most 200 characters.
    """

    row: int
    id: str
    kind: ErrorKind
    message: str


def read_bytes(source: Source) -> bytes:
    """Reads the encoded image; a failure that may be temporary is tried again.

    Raises:
        ImageError: of kind not_found, io, too_many_bytes or truncated.
    """
    if is_url(source.path):
        raise ImageError("io", f"addresses are not fetched, download it first: {source.path}")
    for attempt in range(1, _N_TRIES + 1):
        try:
            return _read_once(source)
        except OSError as error:
            if error.errno in ABSENT:
                raise ImageError("not_found", os.strerror(error.errno)) from error
            if error.errno not in _TRANSIENT or attempt == _N_TRIES:
                raise ImageError("io", error.strerror or str(error)) from error
            time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
        except ValueError as error:  # a NUL in the path
            raise ImageError("not_found", str(error)) from error
    raise AssertionError("unreachable: the last try returns or raises")


def _read_once(source: Source) -> bytes:
    # O_NONBLOCK: opening a named pipe must not wait for somebody to write into it
    descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("io", "not a regular file")
        n_bytes = status.st_size if source.n_bytes is None else source.n_bytes
        if n_bytes > MAX_BYTES:
            raise ImageError("too_many_bytes", f"{n_bytes} bytes, at most {MAX_BYTES} are read")
        file.seek(source.offset or 0)
        data = file.read(n_bytes)
    if not data:
        raise ImageError("truncated", "the file is empty")
    return data


def decode(
    data: bytes, resized_size: Callable[[int, int], tuple[int, int]] | None = None
) -> Image.Image:
    """Decodes an encoded image; of an animation, the first frame.

    Args:
        data: the bytes of an image file.
        resized_size: the (H, W) that an image of a height and a width will be resized to, which is
            limited as well.

    Returns:
        The image, pixels loaded, in its own mode.

    Raises:
        ImageError: of kind unsupported_format, too_many_pixels, truncated, corrupt or oom_single.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                "too_many_pixels", f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded"
            )
        to_height, to_width = resized_size(height, width) if resized_size else (0, 0)
        if to_height * to_width > MAX_RESIZED_PIXELS:
            raise ImageError(
                "too_many_pixels",
                f"{width} x {height} pixels would become {to_width} x {to_height}, at most "
                f"{MAX_RESIZED_PIXELS} are made",
            )
        image.load()
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # raised before the size can be asked for; Pillow's text names a limit that is not ours
        message = f"too many pixels, at most {MAX_PIXELS} are decoded"
        raise ImageError("too_many_pixels", message) from error
    except UnidentifiedImageError as error:
        if _has_known_signature(data):
            raise ImageError("corrupt", "the header is damaged or cut off") from error
        raise ImageError(
            "unsupported_format",
            f"none of {', '.join(readable_formats())}; starts with {data[:12]!r}",
        ) from error
    except MemoryError as error:
        raise ImageError("oom_single", "not enough memory to decode it") from error
    # Pillow's plugins let almost anything escape on damaged data: OSError, SyntaxError,
    # ValueError, struct.error, zlib.error, IndexError, OverflowError ...
    except Exception as error:
        text = str(error) or type(error).__name__
        cut_off = isinstance(error, EOFError) or "truncated" in text.lower()
        raise ImageError("truncated" if cut_off else "corrupt", text) from error
    return image


def _has_known_signature(data: bytes) -> bool:
    accepts = (Image.OPEN[name][1] for name in readable_formats())
    return any(accept is not None and accept(data[:16]) is True for accept in accepts)
