"""Global Pillow settings of a program, made before or during extraction, change no row."""

import gc
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    PngImagePlugin,
    TiffImagePlugin,
)

from fastbb.extraction import (
    FeatureBatch,
    FeatureExtractor,
    extract,
    open_features,
    pillow,
    pipeline,
)
from fastbb.extraction.pillow import fix_settings, fixed_settings

# every setting, with a value that is not Pillow's default
CHANGED: list[tuple[Any, str, Any]] = [
    (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
    (Image, "MAX_IMAGE_PIXELS", 50),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 10),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 20),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS),
    (BmpImagePlugin, "USE_RAW_ALPHA", True),
    (TiffImagePlugin, "READ_LIBTIFF", True),
]
try:
    from PIL import AvifImagePlugin
except ImportError:
    pass
else:
    CHANGED.append((AvifImagePlugin, "DECODE_CODEC_CHOICE", "none"))
DEFAULTS = [getattr(module, name) for module, name, _ in CHANGED]
PROGRAMS = [value for _, _, value in CHANGED]


def settings() -> list[Any]:
    return [getattr(module, name) for module, name, _ in CHANGED]


def change() -> None:
    for module, name, value in CHANGED:
        setattr(module, name, value)


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    assert settings() == DEFAULTS
    yield
    assert pillow._FILTER not in warnings.filters
    for (module, name, _), value in zip(CHANGED, DEFAULTS):
        setattr(module, name, value)


def png_with_text(encoded: Callable[..., bytes]) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000, zip=True)
    return encoded(7, pnginfo=info)


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)


def bmp_with_alpha() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (9, 9), (10, 200, 30, 0)).save(file, "BMP")
    return file.getvalue()


@pytest.fixture
def files(tmp_path: Path, encoded: Callable[..., bytes]) -> list[Path]:
    """Image files; each outcome would change under some setting or with warnings as errors."""
    exif = Image.Exif()
    exif[0x927C] = b"x" * 50
    contents = {
        "cut.jpg": encoded(1, (64, 80), "JPEG")[:900],
        "cut.png": encoded(1, (64, 80))[:1000],
        "bmp-with-alpha.bmp": bmp_with_alpha(),
        "fine.png": encoded(2),
        "gif.gif": encoded(3, format="GIF", transparency=0),
        "text.png": png_with_text(encoded),
        "big-header.png": png_claiming(10_000, 10_000),
        "tiff.tif": encoded(4, format="TIFF"),
        "cut.tif": encoded(5, (64, 80), format="TIFF")[:900],
        "apng-of-no-frames.png": encoded(6).replace(
            b"\0\0\0\x00IEND", b"\0\0\0\x08acTL" + bytes(8) + struct.pack(">I", 0) + b"\0\0\0\0IEND"
        ),
        "last.jpg": encoded(8, (64, 80), "JPEG"),
    }
    paths = []
    for name, data in contents.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    return paths


def rows(batches: Any) -> list[Any]:
    """Returns everything of batches that is stored."""
    found: list[Any] = []
    for batch in batches:
        assert isinstance(batch, FeatureBatch)
        found += [
            (name, batch.features["pooled"][i].tolist()) for i, name in enumerate(batch.ids)
        ] + list(batch.errors)
    return found


@pytest.fixture
def extractor(model: Path) -> FeatureExtractor:
    return FeatureExtractor(model, "pooled", batch_size=1)


def test_settings_made_before_do_not_change_rows(
    extractor: FeatureExtractor, files: list[Path]
) -> None:
    expected = rows(extractor.stream(files))
    kinds = {Path(row.id).name: row.kind for row in expected if not isinstance(row, tuple)}
    assert kinds == {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "cut.tif": "truncated",
        "big-header.png": "too_many_pixels",
    }
    change()
    assert rows(extractor.stream(files)) == expected
    assert settings() == PROGRAMS


@pytest.mark.parametrize("index", range(len(CHANGED)), ids=[name for _, name, _ in CHANGED])
def test_settings_between_batches_do_not_change_rows(
    extractor: FeatureExtractor, files: list[Path], index: int
) -> None:
    expected = rows(extractor.stream(files))
    module, name, value = CHANGED[index]

    def setting_again() -> Iterator[FeatureBatch]:
        for batch in extractor.stream(files):
            setattr(module, name, value)
            yield batch

    assert rows(setting_again()) == expected
    kept = [*DEFAULTS]
    kept[index] = value
    assert settings() == kept  # the last setting of the program is restored


def test_settings_during_decoding_do_not_change_rows(
    extractor: FeatureExtractor, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(extractor.stream(files))
    decode, n_decoded = pipeline.decode, []

    def decode_meanwhile(*args: Any) -> Image.Image:
        n_decoded.append(1)
        if len(n_decoded) % 2:
            change()
        return decode(*args)

    monkeypatch.setattr(pipeline, "decode", decode_meanwhile)
    assert rows(extractor.stream(files)) == expected
    assert len(n_decoded) == 2 * len(files)


def test_a_setting_restored_by_another_thread_counts_as_changed() -> None:
    with fixed_settings():
        before = fix_settings()
        assert fix_settings() is before
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        fix_settings()  # in another thread, while this one decodes
        assert fix_settings() is not before


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_warnings_as_errors_do_not_change_rows(
    extractor: FeatureExtractor, files: list[Path], when: str
) -> None:
    expected = rows(extractor.stream(files))

    def strictly() -> Iterator[FeatureBatch]:
        for batch in extractor.stream(files):
            warnings.simplefilter("error")
            yield batch

    with warnings.catch_warnings():
        if when == "before":
            warnings.simplefilter("error")
            assert rows(extractor.stream(files)) == expected
        else:
            assert rows(strictly()) == expected
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(next(path for path in files if path.name == "big-header.png"))


def test_pillow_warnings_are_ignored_in_any_context_until_the_run_ends() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = list(warnings.filters)
        context = fixed_settings()
        context.__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fix_settings()
            context.__exit__(None, None, None)
            assert all(entry in inside for entry in warnings.filters)
        assert list(warnings.filters) == inside
    assert list(warnings.filters) == before


def test_settings_are_restored_however_a_run_ends(
    extractor: FeatureExtractor, files: list[Path]
) -> None:
    change()
    stream: Any = extractor.stream(files)
    assert settings() == PROGRAMS  # nothing has begun
    next(stream)
    assert settings() == DEFAULTS
    stream.close()
    assert settings() == PROGRAMS

    stream = extractor.stream(files)
    next(stream)
    del stream
    gc.collect()
    assert settings() == PROGRAMS

    def failing() -> Iterator[Path]:
        yield files[3]
        raise RuntimeError("no more paths")

    with pytest.raises(RuntimeError, match="no more paths"):
        list(extractor.stream(failing()))
    assert settings() == PROGRAMS

    with pytest.raises(TypeError):
        extractor([7])
    assert settings() == PROGRAMS


def test_the_last_of_several_runs_restores_the_settings(
    extractor: FeatureExtractor, files: list[Path]
) -> None:
    change()
    first: Any = extractor.stream(files)
    next(first)
    second: Any = extractor.stream(files)
    next(second)
    first.close()
    assert settings() == DEFAULTS
    extractor(files[3])  # inside of another run
    assert settings() == DEFAULTS
    second.close()
    assert settings() == PROGRAMS


def test_runs_in_several_threads_compute_the_same(model: Path, files: list[Path]) -> None:
    expected = rows(FeatureExtractor(model, "pooled", batch_size=1).stream(files))
    change()
    found: list[Any] = []

    def work() -> None:
        extractor = FeatureExtractor(model, "pooled", batch_size=1)
        for _ in range(5):
            found.append(rows(extractor.stream(files)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20
    assert settings() == PROGRAMS


def test_an_extraction_stores_the_same_under_any_settings(
    model: Path, files: list[Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_error_rate": 1}
    inputs = [str(path) for path in files]
    extract(model, inputs, tmp_path / "a", **options)
    change()
    extract(model, inputs, tmp_path / "b", **options)
    assert settings() == PROGRAMS
    a, b = open_features(tmp_path / "a"), open_features(tmp_path / "b")
    assert a.plan == b.plan and a.errors() == b.errors() and a["embedding"].equal(b["embedding"])
