import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastbb.extraction import (
    ErrorBudgetError,
    FeatureExtractor,
    InputError,
    Report,
    open_features,
    plan,
    progress,
)
from fastbb.extraction.job import extract
from fastbb.extraction.layout import OutputError
from fastbb.extraction.store import FeatureWriter


def test_archive_gives_the_same_features_as_its_files(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(7)
    (root / "00002.png").write_bytes(b"")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in sorted(root.iterdir()):
            archive.add(path, path.name)
    extract(model, root, tmp_path / "a")
    extract(model, tmp_path / "x.tar", tmp_path / "b")
    a, b = open_features(tmp_path / "a"), open_features(tmp_path / "b")
    assert a.ids == b.ids and a.errors() == b.errors()
    assert a["embedding"].equal(b["embedding"])


def test_list_with_bad_rows_keeps_the_good_ones_and_reports_the_others(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(3)
    secret = "https://user:pa55@host.org/a.jpg?X-Signature=s3cret"
    names = ["00002.png", "gone.png", secret, "00000.png"]
    (root / "list.txt").write_text("\n".join(names))
    report = extract(model, root / "list.txt", tmp_path / "out")
    features = open_features(tmp_path / "out")
    assert features.ids == ["00002.png", "00000.png"]
    assert [(e.row, e.id, e.kind) for e in features.errors()] == [
        (1, "gone.png", "not_found"),
        (2, "https://host.org/a.jpg", "io"),
    ]
    assert report.errors == {"not_found": 1, "io": 1}
    for path in (tmp_path / "out").rglob("*.*"):
        assert b"s3cret" not in path.read_bytes() and b"pa55" not in path.read_bytes()


def test_several_inputs_keep_their_order(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = make_images(2, "a"), make_images(3, "b")
    (a / "z.png").write_bytes((a / "00000.png").read_bytes())
    inputs = [f"{b}/*2.png", a]
    extract(model, inputs, tmp_path / "out")
    assert open_features(tmp_path / "out").ids == ["00002.png", "00000.png", "00001.png", "z.png"]


def test_paths_may_be_bytes(model: Path, make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images(2)
    extract(model, bytes(root), tmp_path / "a")  # type: ignore[arg-type]
    extract(model, [bytes(root)], tmp_path / "a")  # type: ignore[list-item]
    assert open_features(tmp_path / "a").ids == ["00000.png", "00001.png"]
    with pytest.raises(TypeError, match="expected str, bytes or os.PathLike object, not int"):
        extract(model, [7], tmp_path / "b")  # type: ignore[list-item]


def test_a_wrong_input_makes_no_output_directory(model: Path, tmp_path: Path) -> None:
    for inputs in ([], [tmp_path / "nowhere"], [tmp_path, tmp_path / "nowhere"]):
        with pytest.raises(InputError):
            extract(model, inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("n_bad", "rate", "stops"),
    [(3, 0.05, True), (2, 0.05, False), (1, 0.0, True), (40, 1.0, False)],
    ids=["more than allowed", "just allowed", "none allowed", "all allowed"],
)
def test_too_many_failures_stop_the_run(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    n_bad: int,
    rate: float,
    stops: bool,
) -> None:
    root = make_images(40)
    for path in sorted(root.iterdir())[40 - n_bad :]:
        path.write_bytes(b"text")

    def run(rate: float) -> Report:
        options = {"batch_size": 2, "shard_rows": 4, "max_error_rate": rate}
        return extract(model, root, tmp_path / "out", **options)

    if not stops:
        assert run(rate).errors == {"unsupported_format": n_bad}
        return
    with pytest.raises(ErrorBudgetError, match="unsupported_format, .*--max-error-rate") as caught:
        run(rate)
    assert caught.value.exit_code == 4
    with pytest.raises(ErrorBudgetError):
        run(rate)
    report = run(1.0)
    assert report.resumed_rows >= 4 and report.errors == {"unsupported_format": n_bad}


def test_error_rate_is_a_share_of_the_images_tried_from_the_twentieth_on(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(1)
    names = ["gone.png" if i % 100 == 99 else "00000.png" for i in range(2000)]
    (root / "list.txt").write_text("\n".join(names))
    with pytest.raises(ErrorBudgetError, match="stopped: 1 of 100 "):
        extract(model, root / "list.txt", tmp_path / "a", max_error_rate=0.009, batch_size=20)
    report = extract(model, root / "list.txt", tmp_path / "b", max_error_rate=0.01, batch_size=20)
    assert report.errors == {"not_found": 20}


def test_a_shard_of_maps_has_fewer_rows_by_default(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_MAX_DEFAULT_SHARD_BYTES", 30_000)
    root = make_images(12)
    options = {"batch_size": 4, "features": ("maps",)}
    # 16 channels of 4 x 4 in fp32 are 1 KB, 8 channels of 8 x 8 are 2 KB
    rows = {}
    for i in (1, 2):
        extract(model, root, tmp_path / f"{i}", out_indices=(i,), **options)
        rows[i] = open_features(tmp_path / f"{i}").plan["shard_rows"]
    assert rows == {1: 12, 2: 28}
    extract(model, root, tmp_path / "vectors")
    assert open_features(tmp_path / "vectors").plan["shard_rows"] == 448


def test_progress_without_a_terminal_is_a_line_at_intervals(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    root = make_images(6)
    (root / "readme.txt").write_text("x")
    extract(model, root, tmp_path / "a", batch_size=2, progress=False)
    assert capsys.readouterr() == ("", "")
    report = extract(model, root, tmp_path / "b", batch_size=2, progress=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and lines[0].startswith("running on the CPU")
    assert lines[1:3] == ["6 images", "passed over: 1 file without an image suffix"]
    assert lines[3].startswith("2 of 6 images, ") and lines[3].endswith("minutes left")
    assert "images/s" in lines[3] and len(lines) == 6
    assert str(report).startswith(f"{tmp_path / 'b'}: 6 of 6 images have features, ")


def test_progress_is_a_bar_on_a_terminal(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    extract(model, make_images(3), tmp_path / "out", progress=True)
    assert "3/3" in terminal.getvalue() and "images/s" in terminal.getvalue()


def test_timings_are_logged_in_run_jsonl(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    extract(model, make_images(5), tmp_path / "out", shard_rows=3)
    lines = (tmp_path / "out" / "run.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "shard", "shard", "end"]
    assert events[0]["torch_threads"] >= 1 and events[1]["rows"] == 3
    with open(tmp_path / "out" / "run.jsonl", "a") as file:
        file.write('{"event":"sha')
    assert "images/s" in open_features(tmp_path / "out").describe()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (OutputError("cannot write x: No space left on device"), "cannot write x: No space left"),
        (MemoryError("no more"), "MemoryError: no more"),
    ],
    ids=["interruption", "disk", "defect"],
)
def test_a_stopped_run_shows_its_reason_until_it_goes_on(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    reason: str,
) -> None:
    def stop(*args: object) -> None:
        raise error

    root = make_images(3)

    def run() -> None:
        extract(model, root, tmp_path / "out", shard_rows=1)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "commit", stop)
        with pytest.raises(type(error)):
            run()
    lines = open_features(tmp_path / "out").describe().splitlines()
    assert "not finished" in lines[0] and lines[1].startswith(f"reason    {reason}")
    run()
    assert "reason  " not in open_features(tmp_path / "out").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_rows": 0}, "shard_rows: wanted a whole number, at least 1, got 0"),
        ({"shard_rows": 2.0}, "shard_rows: wanted a whole number, at least 1, got 2.0"),
        ({"max_error_rate": 5}, "max_error_rate: wanted a share from 0 to 1, got 5"),
    ],
    ids=["shard_rows", "shard_rows float", "max_error_rate"],
)
def test_wrong_arguments_raise_value_error(
    model: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract(model, tmp_path, tmp_path / "out", **options)


def test_every_batch_is_full_and_within_its_shard(
    model: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_images(11)
    (root / "00001.png").write_bytes(b"text")
    seen: list[torch.Tensor] = []
    forward = FeatureExtractor._forward

    def watching(
        self: FeatureExtractor, pixels: torch.Tensor, plain: bool = False
    ) -> dict[str, torch.Tensor]:
        if not plain:  # of an example
            seen.append(pixels)
        return forward(self, pixels, plain)

    monkeypatch.setattr(FeatureExtractor, "_forward", watching)
    extract(model, root, tmp_path / "out", batch_size=4, shard_rows=6)
    # images of zeros replace failed and missing ones
    full = [[bool(image.any()) for image in pixels] for pixels in seen]
    assert full == [
        [True, False, True, True],
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]
