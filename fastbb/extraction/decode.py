"""Reading and decoding of a `Source` to pixels in memory, or to one of a closed set of error kinds.

The header is checked before any pixel is decoded, and only formats of an allow-list are opened, so
a file of an enormous size or an exotic format costs nothing.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal, get_args

from PIL import Image, UnidentifiedImageError

from ..images.formats import readable_formats
from .parquet import read_cell
from .sources import ABSENT, Source, is_url, redact

ErrorKind = Literal[
    "not_found",
    "io",
    "too_many_bytes",
    "unsupported_format",
    "too_many_pixels",
    "truncated",
    "corrupt",
    "decode_timeout",  # reserved: decoding has no time limit yet
    "decoder_crash",  # reserved: a native decoder that crashes ends the run or its worker
    "transform",
    "nonfinite_output",
    "oom_single",
    "worker_crash",
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
# signature, version, flags, method, date and time, CRC-32, two sizes, lengths of name and extra
_ZIP_HEADER = struct.Struct("<4sHHHIIIIHH")
_ZIP_DESCRIPTOR_BYTES = 24
_CHUNK_BYTES = 2**16
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
    _refuse_url(source.path)
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


def _refuse_url(path: str) -> None:
    if is_url(path):
        raise ImageError("io", f"addresses are not fetched, download it first: {redact(path)}")


def _read_once(source: Source) -> bytes:
    if source.image_column is not None:
        return _read_cell(source)
    # O_NONBLOCK: opening a named pipe must not wait for somebody to write into it
    descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("io", "not a regular file")
        n_bytes = _limited(status.st_size if source.n_bytes is None else source.n_bytes)
        file.seek(source.offset or 0)
        if source.member is None:
            data = file.read(n_bytes)
        else:
            data = _read_zip_member(file, source.member, n_bytes)
    if not data:
        raise ImageError("truncated", "the file is empty")
    return data


def _limited(n_bytes: int) -> int:
    if n_bytes > MAX_BYTES:
        raise ImageError("too_many_bytes", f"{n_bytes} bytes, at most {MAX_BYTES} are read")
    return n_bytes


def _read_zip_member(file: BinaryIO, name: str, n_bytes: int) -> bytes:
    """Reads a member from its local header on; no more than `n_bytes` are inflated."""
    header = file.read(_ZIP_HEADER.size)
    if len(header) < _ZIP_HEADER.size:
        raise ImageError("truncated", "the zip archive is cut off")
    signature, _, flags, method, _, crc, _, _, n_name, n_extra = _ZIP_HEADER.unpack(header)
    found = file.read(n_name)
    names = (found.decode("utf-8", "replace"), found.decode("cp437"))
    if signature != b"PK\3\4" or name not in names:
        raise ImageError("corrupt", "not the member that was listed; the zip archive was changed")
    if flags & 0x1:
        raise ImageError("unsupported_format", "encrypted in the zip archive")
    file.seek(n_extra, os.SEEK_CUR)
    if method == zipfile.ZIP_STORED:
        data = file.read(n_bytes)
        rest = file.read(_ZIP_DESCRIPTOR_BYTES)
    elif method == zipfile.ZIP_DEFLATED:
        data, rest = _inflate(file, n_bytes)
    else:
        raise ImageError(
            "unsupported_format",
            f"zip compression method {method}; stored and deflated members are read",
        )
    if len(data) < n_bytes:
        raise ImageError("truncated", f"{len(data)} of {n_bytes} bytes in the zip archive")
    if flags & 0x8:  # the checksum follows the data, after an optional signature
        rest = rest.removeprefix(b"PK\7\x08")
        crc = int.from_bytes(rest[:4], "little")
    if zlib.crc32(data) != crc:
        raise ImageError("corrupt", "the checksum in the zip archive differs")
    return data


def _inflate(file: BinaryIO, n_bytes: int) -> tuple[bytes, bytes]:
    """Returns the inflated data and bytes that follow it in the file."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = bytearray()
    try:
        while not inflater.eof:
            chunk = inflater.unconsumed_tail or file.read(_CHUNK_BYTES)
            # one byte more shows that there is more
            data += inflater.decompress(chunk, n_bytes + 1 - len(data))
            if len(data) > n_bytes:
                raise ImageError("corrupt", f"inflates to more than the {n_bytes} bytes it claims")
            if not chunk:
                break
    except zlib.error as error:
        raise ImageError("corrupt", f"zip archive: {error}") from error
    return bytes(data), inflater.unused_data + file.read(_ZIP_DESCRIPTOR_BYTES)


def _read_cell(source: Source) -> bytes:
    """Reads an image out of a Parquet file, or the file that is named in its place."""
    assert source.image_column is not None and source.offset is not None
    if not stat.S_ISREG(os.stat(source.path).st_mode):
        raise ImageError("io", "not a regular file")
    try:
        data, path = read_cell(source.path, source.image_column, source.offset)
    except ImportError as error:
        raise ImageError("io", "needs pyarrow; pip install 'fastbb[parquet]'") from error
    except MemoryError as error:
        raise ImageError("oom_single", "not enough memory to read it") from error
    # Arrow raises OSError without a number, ArrowInvalid, IndexError and others for damaged files
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError("corrupt", f"Parquet file: {error}") from error
    if data is None:
        if not path:
            raise ImageError("not_found", "the row has neither bytes nor a path")
        _refuse_url(path)
        directory = os.path.dirname(source.path)
        return _read_once(Source(source.id, os.path.join(directory, path)))
    _limited(len(data))
    if not data:
        raise ImageError("truncated", "the image is empty")
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
