"""Every Pillow mode to RGB: as Pillow and transformers do, or where fastbb deviates on purpose."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fastbb.images.modes import array_to_rgb, to_rgb

HEIGHT, WIDTH = 11, 14


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise in a mode; where it has alpha, alpha is noise too."""
    values = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgba = Image.fromarray(values, "RGBA")
    if mode in ("RGBA", "LA", "RGBa"):
        return rgba.convert(mode)
    if mode == "La":
        return rgba.convert("LA").convert("La")
    if mode == "PA":
        return Image.merge("PA", (rgba.convert("P"), rgba.getchannel("A")))
    if mode == "LAB":
        return Image.merge("LAB", rgba.split()[:3])
    return rgba.convert("RGB").convert(mode)


def with_transparency(mode: str) -> Image.Image:
    """A PNG with a tRNS chunk, read back: one transparent colour, or (P-bytes) alpha per entry."""
    image = picture(mode.removesuffix("-bytes"))
    first = image.getpixel((0, 0))
    transparency = bytes(range(255, -1, -1)) if mode == "P-bytes" else first
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=transparency)
    read = Image.open(buffer)
    read.load()
    assert "transparency" in read.info
    return read


def assert_same(image: Image.Image, expected: Image.Image | np.ndarray) -> None:
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def upstream_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB pixels of transformers' rule for transparency."""
    pytest.importorskip("transformers", minversion="5.21")
    from transformers.image_transforms import convert_to_rgb

    return np.asarray(convert_to_rgb(image, return_numpy=True))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "F"])
def test_opaque_modes_equal_pillow(mode: str) -> None:
    image = picture(mode)
    assert_same(to_rgb(image), image.convert("RGB"))


def test_band_a_of_lab_is_not_taken_for_alpha() -> None:
    image = picture("LAB")
    upstream = upstream_rgb(image)
    assert (upstream == 255).all()  # its bands are L, A, B, and upstream takes the A for alpha
    assert_same(to_rgb(image, alpha="white"), image.convert("RGB"))


def test_rgb_is_not_copied() -> None:
    image = picture("RGB")
    assert to_rgb(image) is image


@pytest.mark.parametrize("planes", ["cmyk", "ycck"])
def test_cmyk_and_ycck_jpegs_equal_pillow(planes: str) -> None:
    buffer = io.BytesIO()
    picture("CMYK").save(buffer, "JPEG")
    data = buffer.getvalue()
    if planes == "ycck":  # the transform flag of Adobe's marker: the same planes read as YCCK
        flag = data.index(b"Adobe") + 11
        data = data[:flag] + b"\x02" + data[flag + 1 :]
    image = Image.open(io.BytesIO(data))
    assert image.mode == "CMYK"
    assert_same(to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_is_scaled_not_saturated(mode: str) -> None:
    values = np.arange(0, 65536, 97, dtype=np.uint16).reshape(26, 26)
    dtype = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (26, 26), values.astype(dtype).tobytes())
    assert_same(to_rgb(image), np.repeat(values[..., None] >> 8, 3, axis=-1))
    assert np.asarray(image.convert("RGB")).mean() > 250  # upstream gives white


def test_16_bit_png_file_is_scaled_to_8_bits() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)).save(buffer, "PNG")
    image = to_rgb(Image.open(buffer))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_32_bit_integers_are_read_as_16_bit_and_clipped() -> None:
    image = to_rgb(Image.fromarray(np.array([[-5, 0, 256, 65535, 70000, 2**31 - 1]], np.int32)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]


def test_floats_are_clipped_and_truncated_as_pillow_does() -> None:
    image = Image.fromarray(np.array([[-1, 0.9, 254.5, 300, np.inf]], np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 254, 255, 255]
    assert_same(to_rgb(image), image.convert("RGB"))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_rgb(Image.fromarray(np.array([[0.0, np.nan]], np.float32)))


ALPHA = ["RGBA", "LA", "PA"]
TRANSPARENT = ["RGB", "L", "1", "P", "P-bytes"]


def transparent(mode: str) -> Image.Image:
    return picture(mode) if mode in ALPHA else with_transparency(mode)


@pytest.mark.parametrize("mode", ALPHA + TRANSPARENT)
def test_alpha_on_white_equals_transformers(mode: str) -> None:
    image = transparent(mode)
    expected = upstream_rgb(image)
    assert_same(to_rgb(image, alpha="white"), expected)
    assert (expected != np.asarray(to_rgb(image, alpha="drop"))).any()


@pytest.mark.parametrize("mode", ALPHA + TRANSPARENT)
def test_dropped_alpha_equals_pillow(mode: str) -> None:
    image = transparent(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's "should be converted to RGBA" must not appear
        converted = to_rgb(image, alpha="drop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(converted, image.convert("RGB"))


def test_transparent_red_is_white_or_red_by_the_alpha_rule() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(image, alpha="white").getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(image, alpha="drop").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_premultiplied_modes_equal_straight_ones(mode: str, alpha) -> None:
    image = picture(mode)
    assert_same(to_rgb(image, alpha=alpha), to_rgb(image.convert(mode.upper()), alpha=alpha))


@pytest.mark.parametrize("mode", ["P-bytes", "P", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_the_image_given_is_not_changed(mode: str, alpha) -> None:
    image = with_transparency(mode) if mode.startswith("P") else picture(mode)
    before = image.mode, image.tobytes(), dict(image.info)
    to_rgb(image, alpha=alpha)
    assert (image.mode, image.tobytes(), dict(image.info)) == before


def test_unknown_mode_raises_value_error() -> None:
    image = picture()
    image._mode = "BGR;15"  # Pillow 13 has no mode left that is unknown
    with pytest.raises(ValueError, match="'BGR;15' has no rule"):
        to_rgb(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64"])
def test_arrays_equal_transformers(channels: int, layout: str, dtype: str) -> None:
    shape = (channels, 9, 8) if layout == "first" else (9, 8, channels)
    values = np.random.default_rng(0).random(shape)
    array = (values if dtype.startswith("float") else values * 255).astype(dtype)
    expected = upstream_rgb(array)
    expected = np.moveaxis(expected, 0, -1) if layout == "first" else expected
    ours = array_to_rgb(array)
    assert ours.dtype == array.dtype
    np.testing.assert_array_equal(ours, expected)


def test_gray_arrays_are_repeated_and_alpha_is_dropped() -> None:
    gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(array_to_rgb(gray), np.stack([gray] * 3, axis=-1))
    rgba = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    np.testing.assert_array_equal(array_to_rgb(rgba, alpha="drop"), rgba[..., :3])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 6, 2), np.uint8), r"1, 3 or 4 channels, got shape \(5, 6, 2\)"),
        (np.zeros((5,), np.uint8), r"got shape \(5,\)"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), "got shape"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4, 3), complex), "dtype complex128"),
        (np.full((5, 6, 4), 3.0), "float RGBA array needs values in 0..1, got 3.0 to 3.0"),
        (np.full((5, 6, 4), np.nan), "float RGBA array needs values in 0..1, got nan"),
    ],
    ids=["2-channels", "1d", "5d", "bool", "complex", "rgba-range", "rgba-nan"],
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        array_to_rgb(array)
