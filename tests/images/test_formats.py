"""A new image format is one row in fastbb/images/formats.py."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, features

import fastbb
from fastbb.images import formats

PACKAGE = Path(fastbb.__file__).parent
HEADER = b"qoif\0\0\0\1\0\0\0\1\3\0"  # one pixel, RGB
QOI = HEADER + b"\xfe\xc8\x64\x32" + bytes(7) + b"\1"
ROW = '    ImageFormat("QOI", (".qoi",), "zlib"),\n'
# prints how listing, decoding, processor and doctor treat a QOI file, with the table on stdin
PROGRAM = """
import json, sys, types
import fastbb.images
source, folder = sys.stdin.read(), sys.argv[1]
module = types.ModuleType("fastbb.images.formats")
sys.modules[module.__name__] = fastbb.images.formats = module
exec(compile(source, "formats.py", "exec"), module.__dict__)

from fastbb.extraction.decode import ImageError, decode
from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import InputError
from fastbb.images.processor import ImageProcessor
from fastbb.images.spec import ImageProcessorSpec
from fastbb.inspect.doctor import doctor

def pixel(read):
    try:
        return read()
    except (ImageError, ValueError):
        return None

try:
    listed = [source.id for source in Listing([folder])]
except InputError:
    listed = []
data = open(f"{folder}/a.qoi", "rb").read()
processor = ImageProcessor(ImageProcessorSpec("hf", "ViTImageProcessor", rescale_factor=None))
print(json.dumps({
    "sources": listed,
    "decode": pixel(lambda: decode(data).getpixel((0, 0))),
    "processor": pixel(lambda: processor(data)["pixel_values"].flatten().tolist()),
    "doctor": doctor().facts["image_formats"].get("QOI"),
}))
"""


@pytest.mark.parametrize("is_added", [True, False])
def test_a_row_of_the_table_adds_a_format_everywhere(is_added: bool, tmp_path: Path) -> None:
    (tmp_path / "a.qoi").write_bytes(QOI)
    source = Path(formats.__file__).read_text()
    if is_added:
        source = source.replace("FORMATS = (\n", f"FORMATS = (\n{ROW}", 1)
    assert (ROW in source) == is_added
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        input=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "sources": ["a.qoi"],
        "decode": [200, 100, 50],
        "processor": [200, 100, 50],
        "doctor": True,
    }
    if not is_added:
        expected = {"sources": [], "decode": None, "processor": None, "doctor": None}
    assert json.loads(done.stdout) == expected


def test_no_other_module_names_formats_or_suffixes() -> None:
    names = {row.name.upper() for row in formats.FORMATS}
    suffixes = {suffix.upper() for row in formats.FORMATS for suffix in row.suffixes}
    wanted = names | suffixes | {suffix.removeprefix(".") for suffix in suffixes}
    wanted |= {suffix.upper() for suffix in formats.UNREAD_SUFFIXES}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value!r}"
        for path in PACKAGE.rglob("*.py")
        if path != Path(formats.__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).upper() in wanted
    ]
    assert not found, "\n".join(found)


def test_pillow_knows_every_name_of_the_table() -> None:
    Image.init()
    known = {*Image.OPEN, "AVIF"}  # Pillow before 11.3 lacks AVIF
    assert {row.name.upper() for row in formats.FORMATS} <= known
    assert {row.feature for row in formats.FORMATS if row.feature} <= {
        *features.modules,
        *features.codecs,
        *features.features,
        "avif",
    }


def test_support_follows_the_build_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(formats.pillow_support()[name] for name in ("JPEG", "PNG", "GIF", "BMP", "PPM"))
    monkeypatch.setattr(features, "check", lambda feature: feature != "webp")
    monkeypatch.delitem(Image.OPEN, "TIFF")
    support = formats.pillow_support()
    assert support["JPEG"] and not support["WebP"] and not support["TIFF"]
    assert "TIFF" not in formats.readable_formats() and "WEBP" in formats.readable_formats()
