"""The page about a features directory: what it says, and what a browser shows of it."""

import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from feature_directories import Directory, row
from PIL import Image, ImageChops

from fastbb.cli import main
from fastbb.extraction import extract, open_features
from fastbb.extraction.layout import OutputError
from fastbb.inspect.features_report import report

MODEL = "nano-resnet-digits"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
COLORS = {"red": (220, 30, 40), "green": (40, 160, 60), "blue": (30, 60, 200)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve pictures of three colours in folders of their names, and two broken files."""
    root = tmp_path / "images"
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for i in range(4):
            picture = Image.new("RGB", (40, 30), color)
            picture.paste((255, 255, 255), (0, 0, 5 + 5 * i, 10))
            picture.save(root / name / f"{i}.png")
    (root / "red" / "<b>&.png").write_bytes(b"text")
    (root / "red" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture
def features(images: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*names: str) -> Path:
        options = {"shard_rows": 4, "batch_size": 4, "max_error_rate": 1, "progress": False}
        extract(MODEL, images, tmp_path / "out", features=names or "pooled", **options)
        return tmp_path / "out"

    return run


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", page))


def test_page_says_what_ran_what_failed_and_what_is_alike(
    features: Callable[..., Path], tmp_path: Path
) -> None:
    page = report(features(), tmp_path / "page.html").read_text()
    text = text_of(page)
    for part in (
        *(MODEL, "ResNetBackbone", "12", "images with features", "14", "pooled [", "finished"),
        *("unsupported_format", "red/<b>&.png", "truncated", "red/empty.png", "the file is empty"),
        *("12 of 12 images on the first two principal components", "shards, in the order of"),
    ):
        assert part in text, part
    assert "<b>&" not in page, "ids are escaped"
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert page.count("<circle ") == 12 and page.count('src="data:image/jpeg') >= 12
    assert len(set(re.findall(r'fill="(#\w+)"', page))) == 3, "a colour for each folder"


def test_neighbours_are_those_of_search(features: Callable[..., Path], tmp_path: Path) -> None:
    out = features()
    page = report(out, tmp_path / "page.html").read_text()
    captions = re.findall(r"<figcaption><bdi>(.*?)</bdi>", page)
    first = open_features(out).ids[0]
    found = open_features(out).search(first, 5)
    lines = [f"{score:.3f} {id}" for id, score in zip(found.ids, found.scores)]
    start = [caption.strip() for caption in captions].index(first)
    assert captions[start + 1 : start + 6] == lines


def test_pictures_that_are_gone_are_named(
    features: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    out = features()
    shutil.rmtree(images / "blue")
    page = report(out, tmp_path / "page.html").read_text()
    assert "no picture" in page and "No such file or directory blue/0.png" in text_of(page)


@pytest.mark.parametrize(
    "names", [("maps",), ("maps", "pooled")], ids=lambda names: "+".join(names)
)
def test_vectors_are_drawn_or_else_means_of_maps(
    features: Callable[..., Path], tmp_path: Path, names: tuple[str, ...]
) -> None:
    page = report(features(*names), tmp_path / "page.html").read_text()
    assert ("Features: pooled" if "pooled" in names else "Features: maps.stage4") in page
    assert page.count("<circle ") == 12 and "Nearest neighbours" in page


@pytest.mark.parametrize("n_shards", [0, 1])
def test_an_unfinished_directory_has_a_page(
    features: Callable[..., Path], tmp_path: Path, n_shards: int
) -> None:
    out = features()
    for path in sorted(out.glob("shards/commit-*"))[n_shards:]:
        path.unlink()
    text = text_of(report(out, tmp_path / "page.html").read_text())
    assert "not finished" in text and ("Nearest neighbours" in text) == bool(n_shards)


def test_command_writes_the_page_and_refuses_wrong_paths(
    features: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["report", *map(str, arguments)])
        return result.exit_code, result.output

    out = features()
    assert run(out, "-o", tmp_path / "a.html") == (0, f"wrote {tmp_path / 'a.html'}\n")
    assert run(images)[0] == 2
    code, output = run(out, "-o", images / "red" / "0.png" / "a.html")
    assert code == 6 and "cannot write" in output
    with pytest.raises(OutputError):
        report(out, images / "red" / "0.png" / "a.html")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("out/plan.json", "outside of the features directory"),
        ("out/new/page.html", "outside of the features directory"),
        ("images/red/0.png", "is no .html file"),
        ("folder.html", "is a directory"),
        ("link.html", "is no .html file"),
    ],
)
def test_only_an_earlier_page_is_replaced(
    features: Callable[..., Path], images: Path, tmp_path: Path, place: str, message: str
) -> None:
    out = features()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to(images / "red" / "0.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(main, ["report", str(out), "-o", str(tmp_path / place)])
    assert result.exit_code == 2 and re.search(message, " ".join(result.output.split()))
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "page.HTM").write_text("an earlier page")
    assert "<html" in report(out, tmp_path / "page.HTM").read_text()


def test_pictures_of_a_changed_archive_are_not_shown(images: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "images.tar", tmp_path / "out"

    def pack(*names: str) -> None:
        with tarfile.open(archive, "w") as tar:
            for name in names:
                tar.add(images / name, name)

    pack("red/0.png", "blue/0.png", "green/0.png")
    extract(MODEL, archive, out, features="pooled", progress=False)
    assert "no picture" not in report(out, tmp_path / "page.html").read_text()
    pack("blue/0.png", "red/0.png", "green/0.png")
    page = report(out, tmp_path / "page.html").read_text()
    assert "data:image" not in page and "the archive was changed red/0.png" in text_of(page)


def test_odd_names_and_a_damaged_log_do_not_end_the_page(
    features: Callable[..., Path], tmp_path: Path
) -> None:
    odd = tmp_path / "a\n\nb"
    directory = Directory(odd, {"pooled": {"shape": [4], "dtype": "float32"}})
    directory.start(row(i, {"": i, "x\n\ny": i}) for i in range(4))
    lines = ['{"event":"shard"}', '{"a":1}', '{"event":["shard"]}', '{"event":"start"}']
    lines += ['{"event":"shard","rows":"8","seconds":1}', '{"event":"start","time":1e300}']
    lines += ['{"event":"start","time":0}', '{"event":"shard","rows":6,"seconds":2}']
    (odd / "run.jsonl").write_text("\n".join(lines))
    text = text_of(report(odd, tmp_path / "page.html").read_text())
    assert r", x\n\ny" in text and "3.0 images/s" in text
    assert "speed     3.0 images/s" in open_features(odd).describe()


def test_directories_that_were_not_read_are_named(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "out", {"pooled": {"shape": [4], "dtype": "float32"}})
    directory.start([row(0)])
    path = directory.path / "rows" / "generation-00000.json"
    path.write_text(path.read_text().replace('"unreadable":[]', '"unreadable":["secret: denied"]'))
    page = report(directory.path, tmp_path / "page.html").read_text()
    assert "<th>not read</th><td>1 directories: secret: denied</td>" in page


def test_a_program_cannot_change_how_pictures_are_read(
    features: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = features()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "no picture" not in report(out, tmp_path / "page.html").read_text()


def test_a_class_is_the_folder_of_an_image(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "out", {"pooled": {"shape": [4], "dtype": "float32"}})
    rows = [row(i) for i in range(6)]
    for i, given in enumerate(rows):
        given.id = f"train/{'cat' if i % 2 else 'dog'}/{i}.png"
    directory.start(rows)
    page = report(directory.path, tmp_path / "page.html").read_text()
    assert re.findall(r'<span style="--color: [^"]*">(.*?)</span>', page) == ["cat", "dog"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_thumbnails_and_points(
    features: Callable[..., Path], tmp_path: Path
) -> None:
    def shot(page: Path) -> Image.Image:
        file = page.with_suffix(".png")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,4000"]
        command = [str(CHROMIUM), *options, f"--screenshot={file}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(file) as picture:
            return picture.convert("RGB").reduce(2)

    page = report(features(), tmp_path / "page.html")
    shown = shot(page)
    pixels = np.asarray(shown).astype(int)
    for name, color in COLORS.items():
        # four lines of six thumbnails of 60 x 45 pixels
        assert (np.abs(pixels - color).max(-1) < 12).sum() > 8_000, name
    without = tmp_path / "without.html"
    without.write_text(re.sub(r"<circle .*</circle>", "", page.read_text()))
    left, top, right, bottom = ImageChops.difference(shown, shot(without)).getbbox() or (0, 0, 0, 0)
    assert right - left > 200 and bottom - top > 100, "the points"
