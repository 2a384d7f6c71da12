"""What a prompt shows of an extraction: its report, its features, their errors, the extractor."""

from collections.abc import Callable
from pathlib import Path

from fastbb.extraction import FeatureExtractor, Report, open_features
from fastbb.extraction.decode import RowError
from fastbb.extraction.features import RowErrors


def test_features_say_what_they_hold(run: Callable[..., Report], tmp_path: Path) -> None:
    report = run()
    assert repr(report) == str(report) and "9 of 10 images have features" in repr(report)
    features = open_features(tmp_path / "out")
    assert repr(features).splitlines() == [
        f"{tmp_path / 'out'}: features of 9 images, 1 failed, complete",
        "  embedding  [9, 16]  float32",
    ]
    header, row, *_ = repr(features.errors()).splitlines()
    assert header.split() == ["row", "id", "kind", "message"]
    assert row.split()[:3] == ["3", "'00003.png'", "unsupported_format"]


def test_unfinished_features_say_so(run: Callable[..., Report], tmp_path: Path) -> None:
    run()
    (tmp_path / "out" / "shards" / "commit-00002.json").unlink()
    shown = repr(open_features(tmp_path / "out"))
    assert "features of 7 images, 1 failed, not finished" in shown and "[7, 16]" in shown


def test_errors_show_the_first_ones_and_how_many_more() -> None:
    errors = RowErrors(RowError(i, f"{i}.png", "corrupt", "text") for i in range(1_012))
    assert len(repr(errors).splitlines()) == 12
    assert repr(errors).endswith("... and 1,002 more")
    assert repr(RowErrors()) == "no errors" and errors == list(errors)


def test_an_extractor_and_its_batches_say_what_they_are(
    model: Path, images: Path, tmp_path: Path
) -> None:
    extractor = FeatureExtractor(model, ("pooled", "maps"), batch_size=4, device="cpu")
    assert repr(extractor) == (
        f"FeatureExtractor({str(model)!r}: pooled, maps, fp32 on cpu, images of 32x32, "
        "batches of 4)"
    )
    batch = next(extractor.stream(sorted(images.iterdir())))
    assert repr(batch) == (
        "FeatureBatch(3 images, 1 failed, pooled [3, 16], maps.stage2 [3, 16, 4, 4])"
    )
