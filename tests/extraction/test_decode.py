import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastbb.extraction import ERROR_KINDS, ImageError
from fastbb.extraction import decode as module
from fastbb.extraction.decode import MAX_PIXELS, decode, read_bytes
from fastbb.extraction.sources import Source


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def read(path: Path) -> Image.Image:
    return decode(read_bytes(Source(path.name, str(path))))


FORMATS = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_pixels_equal_pillow(encoded: Callable[..., bytes], name: str) -> None:
    format, options = FORMATS[name]
    data = encoded(1, (33, 47), format, **options)
    np.testing.assert_array_equal(decode(data), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.6, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_file_cut_off_anywhere_is_truncated_or_corrupt(
    encoded: Callable[..., bytes], name: str, share: float
) -> None:
    format, options = FORMATS[name]
    data = encoded(1, (64, 80), format, **options)
    with pytest.raises(ImageError) as caught:
        decode(data[: max(16, int(share * len(data)))])
    assert caught.value.kind in ("truncated", "corrupt")


def bad_files(encoded: Callable[..., bytes]) -> dict[str, tuple[bytes, str, str]]:
    """Content, kind and message by name."""
    jpeg, png = encoded(1, (64, 80), "JPEG"), encoded(1)
    return {
        "zero-byte.jpg": (b"", "truncated", "the file is empty"),
        "cut.jpg": (jpeg[: len(jpeg) * 6 // 10], "truncated", "image file is truncated"),
        "cut-in-header.jpg": (jpeg[:60], "truncated", "Truncated"),
        "text.jpg": (b"no image at all\n", "unsupported_format", "none of JPEG, PNG"),
        "print.eps": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "unsupported_format",
            "",
        ),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format", ""),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported_format", ""),
        "icon.ico": (encoded(1, format="ICO"), "unsupported_format", ""),
        "layers.psd": (b"8BPS\0\1" + bytes(30), "unsupported_format", ""),
        "damaged.png": (png[:20] + b"\xff" * 10 + png[30:], "corrupt", ""),
        "garbage.jpg": (b"\xff\xd8\xff\xe0" + bytes(range(200)), "corrupt", ""),
        "huge-header.png": (png_claiming(100_000, 100_000), "too_many_pixels", ""),
        "big-header.png": (png_claiming(10_000, 10_000), "too_many_pixels", "10000 x 10000 pixels"),
    }


BAD_NAMES = list(bad_files(lambda *_, **__: bytes(100)))


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_has_an_error_kind_and_a_message(
    tmp_path: Path, encoded: Callable[..., bytes], name: str
) -> None:
    data, kind, message = bad_files(encoded)[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message or None) as caught:
        read(tmp_path / name)
    assert caught.value.kind == kind
    assert caught.value.kind in ERROR_KINDS and " at 0x" not in caught.value.message


def test_a_bomb_is_refused_before_its_pixels_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    with pytest.raises(ImageError, match=f"at most {MAX_PIXELS}"):
        decode(png_claiming(100_000, 100_000))
    assert not loaded


def test_the_bomb_warning_raised_as_an_error_is_an_image_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError) as caught:
            decode(png_claiming(10_000, 10_000))
    assert caught.value.kind == "too_many_pixels"


def test_animation_gives_its_first_frame(encoded: Callable[..., bytes]) -> None:
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "green", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        options = {"lossless": True} if format == "WEBP" else {}
        frames[0].save(file, format, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode(file.getvalue()).convert("RGB"), frames[0], format)


def test_too_many_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    with pytest.raises(ImageError, match="1001 bytes, at most 1000 are read") as caught:
        read(tmp_path / "a.jpg")
    assert caught.value.kind == "too_many_bytes"


def test_paths_without_a_regular_file_have_an_error_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "directory.jpg").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    expected = {
        "nowhere.jpg": "not_found",
        "file/below.jpg": "not_found",
        "x" * 300: "not_found",
        "nul\0.jpg": "not_found",
        "fifo.jpg": "io",
        "directory.jpg": "io",
        "loop.jpg": "io",
    }
    kinds = {}
    for name in expected:
        with pytest.raises(ImageError) as caught:
            read_bytes(Source(name, f"{tmp_path}/{name}"))
        kinds[name] = caught.value.kind
    assert kinds == expected


def test_an_address_is_not_fetched() -> None:
    with pytest.raises(ImageError, match="addresses are not fetched") as caught:
        read_bytes(Source("x", "https://host.org/a.jpg"))
    assert caught.value.kind == "io"


def test_member_of_an_archive_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"headIMAGEtail")
    path = str(tmp_path / "x.tar")
    assert read_bytes(Source("m", path, 4, 5)) == b"IMAGE"
    with pytest.raises(ImageError, match="empty"):
        read_bytes(Source("m", path, 4, 0))


@pytest.mark.parametrize(
    ("number", "n_failures", "n_calls", "kind"),
    [
        (errno.EIO, 2, 3, None),
        (errno.ESTALE, 1, 2, None),
        (errno.ETIMEDOUT, 9, 3, "io"),
        (errno.EACCES, 9, 1, "io"),
        (errno.ENOENT, 9, 1, "not_found"),
    ],
    ids=["EIO twice", "ESTALE once", "ETIMEDOUT for ever", "EACCES", "ENOENT"],
)
def test_temporary_failures_are_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    n_failures: int,
    n_calls: int,
    kind: str | None,
) -> None:
    (tmp_path / "a").write_bytes(b"data")
    calls, waits, open_file = [], [], os.open

    def failing(path, flags):
        calls.append(path)
        if len(calls) <= n_failures:
            raise OSError(number, os.strerror(number), path)
        return open_file(path, flags)

    monkeypatch.setattr(module.os, "open", failing)
    monkeypatch.setattr(module.time, "sleep", waits.append)
    if kind is None:
        assert read_bytes(Source("a", str(tmp_path / "a"))) == b"data"
    else:
        with pytest.raises(ImageError) as caught:
            read_bytes(Source("a", str(tmp_path / "a")))
        assert (caught.value.kind, caught.value.message) == (kind, os.strerror(number))
    assert len(calls) == n_calls and waits == sorted(waits) and len(waits) == n_calls - 1


def test_message_is_one_line_of_at_most_200_characters() -> None:
    message = ImageError("corrupt", "first\nsecond " + "x" * 500).message
    assert message.startswith("first second xxx") and len(message) == 200
