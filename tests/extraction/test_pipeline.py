import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fastbb import AutoBackbone, AutoImageProcessor
from fastbb.extraction import FeatureExtractor, ImageError, open_features, pipeline
from fastbb.extraction.job import extract


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Asserts equality up to the order of sums, which may differ with the batch size."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def maps_of(model: Path, images: Sequence[Image.Image], out_indices: tuple[int, ...]) -> list:
    backbone = AutoBackbone.from_pretrained(model, out_indices=out_indices)
    pixels = AutoImageProcessor.from_pretrained(model)(images)["pixel_values"]
    with torch.no_grad():
        return list(backbone(pixels).feature_maps)


def test_pooled_is_the_mean_of_the_last_requested_map(
    model: Path, make_images: Callable[..., Path]
) -> None:
    images = [Image.open(path).copy() for path in sorted(make_images(5).iterdir())]
    ex = FeatureExtractor(model, ("pooled", "maps"), out_indices=(0, 1), batch_size=2)
    features = ex(images)
    stem, stage1 = maps_of(model, images, (0, 1))
    assert list(features) == ["pooled", "maps.stem", "maps.stage1"]
    same(features["maps.stem"], stem)
    same(features["maps.stage1"], stage1)
    same(features["pooled"], stage1.mean((2, 3)))
    assert features["pooled"].dtype == torch.float32 and not features["pooled"].requires_grad


def test_images_may_be_of_any_supported_type(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(3))
    image = Image.open(path).copy()
    array = np.asarray(image)
    ex = FeatureExtractor(model, "pooled")
    expected = ex(image)["pooled"]
    assert expected.shape == (1, 16)
    for other in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), array):
        same(ex(other)["pooled"], expected)
    same(ex(torch.from_numpy(array.copy()).permute(2, 0, 1))["pooled"], expected)
    same(ex(np.stack([array, array]))["pooled"], expected.expand(2, -1))


def test_files_are_turned_upright_and_images_in_memory_are_not(model: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    ex = FeatureExtractor(model, "pooled")
    same(ex(tmp_path / "turned.png")["pooled"], ex(image.rotate(-90))["pooled"])
    same(ex(Image.open(tmp_path / "turned.png"))["pooled"], ex(image)["pooled"])


def test_an_image_without_features_raises_when_called_directly(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"text")
    ex = FeatureExtractor(model, "pooled")
    with pytest.raises(ImageError, match="image 1: none of JPEG") as caught:
        ex([Image.new("RGB", (8, 8)), tmp_path / "bad.png"])
    assert caught.value.kind == "unsupported_format"
    with pytest.raises(ValueError, match="at least one image"):
        ex([])


def test_several_images_in_the_place_of_one_are_refused(model: Path) -> None:
    ex = FeatureExtractor(model, "pooled")
    batch = np.zeros((2, 8, 8, 3), np.uint8)
    for several in (batch, torch.zeros(2, 3, 8, 8), [batch[1], batch[1]], (batch[1],)):
        with pytest.raises(ValueError, match="image 1: wanted one image, got a"):
            ex([batch[0], several])


def test_images_may_come_from_an_iterator(model: Path, make_images: Callable[..., Path]) -> None:
    ex = FeatureExtractor(model, "pooled", batch_size=2)
    paths = sorted(make_images(3).iterdir())
    same(ex(path for path in paths)["pooled"], ex(paths)["pooled"])
    with pytest.raises(ValueError, match="at least one image"):
        ex(iter([]))


def test_bad_image_in_memory_error_names_its_position(
    model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    ex = FeatureExtractor(model, "pooled", batch_size=2)
    good = Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match="^image 3: an image is a PIL image"):
        ex([good, good, good, 7])
    with pytest.raises(ValueError, match="^image 2: "):
        ex([good, good, np.zeros((8, 8, 7), np.uint8)])
    (tmp_path / "cut.jpg").write_bytes(encoded(1, (64, 80), "JPEG")[:900])
    cut = Image.open(tmp_path / "cut.jpg")
    with cut, pytest.raises(ImageError, match="image 1: .*truncated") as caught:
        ex([good, cut])
    assert caught.value.kind == "truncated"


def test_device_zero_is_the_first_gpu_and_never_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device: cuda:0 is not there: torch sees 0 GPUs"):
        FeatureExtractor(model, device=0)  # type: ignore[arg-type]


def test_stream_refuses_a_single_path(model: Path, make_images: Callable[..., Path]) -> None:
    ex = FeatureExtractor(model, "pooled")
    path = make_images(1) / "00000.png"
    for one in (path, str(path), bytes(path)):
        with pytest.raises(TypeError, match="paths: wanted a list or iterator of paths"):
            ex.stream(one)  # type: ignore[arg-type]
    (batch,) = ex.stream([bytes(path)])  # type: ignore[list-item]
    assert batch.ids == [str(path)]


def test_addresses_are_refused_without_their_credentials(model: Path) -> None:
    ex = FeatureExtractor(model, "pooled")
    (batch,) = ex.stream(["https://user:pa55@host.org/a.jpg?key=s3cret"])
    assert [(e.id, e.kind) for e in batch.errors] == [("https://host.org/a.jpg", "io")]
    with pytest.raises(ImageError, match="addresses are not fetched.*: https://host.org/a.jpg$"):
        ex("https://user:pa55@host.org/a.jpg?key=s3cret")


def test_stream_keeps_the_order_and_reports_failed_images(
    model: Path, make_images: Callable[..., Path]
) -> None:
    root = make_images(9)
    paths = sorted(root.iterdir())
    for i in (0, 4, 5):
        paths[i].write_bytes(b"text")
    ex = FeatureExtractor(model, "pooled", batch_size=4)
    batches = list(ex.stream(iter(paths)))
    assert [len(b.ids) + len(b.errors) for b in batches] == [4, 4, 1]
    good = [path for i, path in enumerate(paths) if i not in (0, 4, 5)]
    assert [name for b in batches for name in b.ids] == [path.as_posix() for path in good]
    assert [row for b in batches for row in b.rows] == [1, 2, 3, 6, 7, 8]
    assert [(e.row, e.id, e.kind) for b in batches for e in b.errors] == [
        (i, paths[i].as_posix(), "unsupported_format") for i in (0, 4, 5)
    ]
    same(torch.cat([b.features["pooled"] for b in batches]), ex(good)["pooled"])


@pytest.mark.parametrize("seed", range(6))
def test_every_row_has_the_features_of_its_own_file(
    model: Path, make_images: Callable[..., Path], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    n, batch_size, shard_rows = rng.randint(1, 40), rng.randint(1, 9), rng.randint(1, 17)
    paths = sorted(make_images(n).iterdir())
    bad = set(rng.sample(range(n), rng.randint(0, n)))
    for i in bad:
        data = paths[i].read_bytes()
        paths[i].write_bytes(rng.choice([b"", b"text", data[:40], data[: len(data) // 2]]))
    out = tmp_path / "out"
    report = extract(
        model, paths[0].parent, out, batch_size=batch_size, shard_rows=shard_rows, max_error_rate=1
    )
    features = open_features(out)
    good = [path for i, path in enumerate(paths) if i not in bad]
    assert features.ids == [path.name for path in good]
    assert [error.row for error in features.errors()] == sorted(bad)
    assert (report.ok, report.rows, sum(report.errors.values())) == (len(good), n, len(bad))
    assert len(features) == len(good) and features["embedding"].shape == (len(good), 16)
    alone = FeatureExtractor(model)
    for path, row in zip(good, features["embedding"]):
        same(alone(path)["embedding"][0], row)


def test_images_that_keep_their_aspect_ratio_run_alone(
    aspect_model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    sizes = [(32, 40), (50, 32), (64, 64), (20, 90)]
    for i, size in enumerate(sizes):
        (root / f"{i}.png").write_bytes(encoded(i, size))
    extract(aspect_model, root, tmp_path / "out", batch_size=4)
    features = open_features(tmp_path / "out")
    assert features.plan["batch_size"] == 1
    for i, row in enumerate(features["embedding"]):
        (last,) = maps_of(aspect_model, [Image.open(root / f"{i}.png")], (2,))
        same(last.mean((2, 3))[0], row)


def test_maps_need_a_size_where_images_keep_their_aspect_ratio(aspect_model: Path) -> None:
    with pytest.raises(ValueError, match="maps differ in size.*--size HxW"):
        FeatureExtractor(aspect_model, ("maps",))
    ex = FeatureExtractor(aspect_model, ("maps",), size=(48, 64))
    wide = Image.fromarray(
        np.arange(30 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 90, 3)
    )
    squeezed = wide.resize((64, 48), Image.Resampling.BICUBIC)
    features = ex([wide, squeezed])["maps.stage2"]
    assert features.shape == (2, 16, 6, 8)
    same(features[0], features[1])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom_single"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom_single"),
        (ValueError("height must be divisible by 4"), "transform"),
    ],
    ids=["gpu memory", "cpu memory", "size"],
)
def test_an_image_too_large_for_the_model_is_a_failed_row(
    aspect_model: Path, make_images: Callable[..., Path], error: Exception, kind: str
) -> None:
    ex = FeatureExtractor(aspect_model, "pooled")
    forward = ex._forward
    n_calls = []

    def failing(pixels: torch.Tensor, plain: bool = False) -> dict[str, torch.Tensor]:
        n_calls.append(1)
        if len(n_calls) == 2:
            raise error
        return forward(pixels, plain)

    ex._forward = failing
    batches = list(ex.stream(sorted(make_images(3).iterdir())))
    assert [[e.kind for e in batch.errors] for batch in batches] == [[], [kind], []]


def test_a_batch_too_large_for_the_memory_asks_for_a_smaller_one(
    model: Path, make_images: Callable[..., Path]
) -> None:
    ex = FeatureExtractor(model, "pooled", batch_size=2)

    def failing(pixels: torch.Tensor, plain: bool = False) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ex._forward = failing
    with pytest.raises(ValueError, match="batch_size: 2 images of 32 x 32 do not fit"):
        list(ex.stream(sorted(make_images(3).iterdir())))


def test_an_image_that_the_processor_refuses_is_a_failed_row(
    aspect_model: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    # one pixel high: resizing rounds its height to zero
    (tmp_path / "thin.png").write_bytes(encoded(1, (1, 5000)))
    (batch,) = FeatureExtractor(aspect_model, "pooled").stream([tmp_path / "thin.png"])
    assert [error.kind for error in batch.errors] == ["transform"] and not batch.ids


def test_a_thin_image_is_refused_before_it_is_stretched(
    tmp_path: Path, aspect_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = aspect_model / "preprocessor_config.json"
    config = {**json.loads(file.read_text()), "size": {"shortest_edge": 64}}
    stretching = shutil.copytree(aspect_model, tmp_path / "stretching")
    config["image_processor_type"] = "BitImageProcessor"
    (stretching / file.name).write_text(json.dumps(config))
    Image.new("RGB", (20_000, 1)).save(tmp_path / "thin.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    ex = FeatureExtractor(stretching)
    (batch,) = ex.stream([tmp_path / "thin.png"])
    (error,) = batch.errors
    assert error.kind == "too_many_pixels"
    assert error.message.startswith("20000 x 1 pixels would become 1280000 x 64, at most 16777216")
    assert ex.settings()["limits"]["resized_pixels"] == 2**24


def test_features_that_are_not_finite_are_a_failed_row(
    model: Path, make_images: Callable[..., Path]
) -> None:
    ex = FeatureExtractor(model, "pooled", batch_size=3)
    paths = sorted(make_images(3).iterdir())
    expected = ex(paths)["pooled"]
    load = ex.processor.process
    ex.processor.process = lambda image: (
        load(image) * (float("inf") if image.tobytes() == Image.open(paths[1]).tobytes() else 1)
    )
    (batch,) = ex.stream(paths)
    assert batch.rows == [0, 2] and [e.kind for e in batch.errors] == ["nonfinite_output"]
    same(batch.features["pooled"], expected[[0, 2]])


def test_bf16_runs_and_stores_maps_in_bf16_and_pools_in_fp32(
    model: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    extract(model, make_images(3), tmp_path / "out", features=("pooled", "maps"), precision="bf16")
    features = open_features(tmp_path / "out")
    maps = features["maps.stage2"]
    assert maps.dtype == torch.bfloat16 and features["pooled"].dtype == torch.float32
    torch.testing.assert_close(features["pooled"], maps.float().mean((2, 3)))


def test_few_images_are_held_at_a_time(
    model: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(make_images(60).iterdir())
    n_read = []
    read_bytes = pipeline.read_bytes
    monkeypatch.setattr(pipeline, "read_bytes", lambda s: n_read.append(1) or read_bytes(s))
    stream = FeatureExtractor(model, "pooled", batch_size=4).stream(paths)
    n_taken = 0
    for batch in stream:
        n_taken += len(batch.ids)
        assert len(n_read) <= n_taken + 3 * 4
        if n_taken == 20:
            break
    stream.close()  # type: ignore[attr-defined]  # a generator, which the annotation does not say
    assert len(n_read) <= 20 + 3 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ("pooled", "token")}, "features: wanted some of embedding, .*'token'"),
        ({"features": ("embeding", "nmae")}, r"'nmae'\)\. Did you mean embedding\?"),
        ({"features": ("maps.",)}, "features: wanted some of embedding, .*maps.<stage>"),
        ({"features": ()}, r"wanted some of embedding, cls, patch_mean, tokens, .*got \(\)$"),
        ({"precision": "tf32"}, "precision: wanted fp32, fp16, bf16, got 'tf32'"),
        ({"feature_dtype": "fp8"}, "feature_dtype: wanted fp32, fp16, bf16, got 'fp8'"),
        ({"norm": "last"}, "norm: wanted final or none, got 'last'"),
        ({"norm": "final"}, "norm: 'final' is for cls, patch_mean, tokens, and none of them is"),
        ({"features": "maps", "normalize": True}, "normalize: none of maps is a vector"),
        ({"batch_size": 0}, "batch_size: wanted a whole number, at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: wanted a whole number, at least 1, got 2.0"),
        ({"size": (0, 3)}, "size: wanted .height, width. in pixels"),
        ({"size": 64}, "size: wanted .height, width. in pixels, or 'test', got 64"),
        ({"size": (20_000, 20_000)}, "size: wanted at most 16,777,216 pixels.*got 20000x20000"),
        ({"out_indices": -1}, r"out_indices: wanted a list such as \[1, -1\], got -1"),
        ({"device": "gpu"}, "device: wanted cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device: wanted cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "device: cuda:99 is not there"),
        ({"features": "maps", "out_indices": (9,)}, "out_indices must be valid indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_raise_value_error(model: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(model, **options)
