"""`fastbb bench --traffic`: bytes and launches of models, upstream's and ours, their limits."""

import functools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbb.auto import AutoBackbone
from fastbb.bench import traffic
from fastbb.bench.launches import (
    ACTIVATION,
    ATTENTION,
    GEMM,
    NORM,
    PAD,
    POOL,
    RESIDUAL,
    ROLL,
    Launch,
    bytes_by_category,
    n_bytes,
)
from fastbb.bench.traffic import DEFAULT, EVERY, SEPARATE, Counts, Traffic, count_traffic
from fastbb.extraction.layout import OutputError
from fastbb.inspect.loading import config_without_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
import benchmark_pages  # noqa: E402

TITLES = {
    "swin_t_224": "Swin-T, 224, batch 64",
    "swin_s_224": "Swin-S, 224, batch 64",
    "swin_b_384": "Swin-B, 384, batch 8",
    "swin_t_800x1088": "Swin-T, 800x1088, batch 8",
    "swinv2_t": "Swinv2-T, 256, batch 64",
    "resnet50": "ResNet-50, 224, batch 64",
    "resnet18": "ResNet-18, 224, batch 64",
    "resnet101": "ResNet-101, 224, batch 64",
    "resnet50d": "timm's ResNet-50-D, 224, batch 64",
    "dinov2_s": "DINOv2-S, 224, batch 64",
    "dinov2_b": "DINOv2-B, 224, batch 64",
    "dinov3_s": "DINOv3-S, 224, batch 64",
    "dinov3_b": "DINOv3-B, 224, batch 64",
    "beit_b": "BEiT-B, 224, batch 64",
    "convnext_t": "ConvNeXt-T, 224, batch 64",
    "convnextv2_t": "ConvNeXtV2-T, 224, batch 64",
}


@functools.cache
def configs() -> Path:
    folder = Path(tempfile.mkdtemp())
    benchmark_pages.write_configs(folder)
    return folder


@functools.cache
def counts_of(model: str) -> Counts:
    return benchmark_pages.count(TITLES[model], configs()).counts


@functools.cache
def launches_of(model: str, way: str) -> list[Launch]:
    """Launches by a way of the command, by timm's own model, or by our kernels alone."""
    if way == "timm's own":
        return timm_launches(model)
    if way == TRITON:
        return triton_launches(model)
    found = counts_of(model)[way]
    assert not isinstance(found, str), found
    return found


def pixels_of(model: str) -> Any:
    _, size, batch = benchmark_pages.COUNTED[TITLES[model]]
    return torch.empty(batch, 3, *size, dtype=torch.bfloat16, device="meta")


def timm_launches(model: str) -> list[Launch]:
    import timm

    pixels = pixels_of(model)
    options: dict[str, Any] = {"out_indices": (1, 2, 3, 4)}  # stages after the stem
    if model.startswith("swin"):
        options = {"out_indices": (0, 1, 2, 3), "img_size": tuple(pixels.shape[2:])}
    with torch.device("meta"):
        module = timm.create_model(TIMM.get(model, model), features_only=True, **options)
    return traffic.count_forward(module.bfloat16().eval(), pixels)


def triton_launches(model: str) -> list[Launch]:
    name, _, _ = benchmark_pages.COUNTED[TITLES[model]]
    name = str(configs() / name) if name in benchmark_pages.CONFIGS else name
    with torch.device("meta"):
        backbone: Any = AutoBackbone.from_config(config_without_weights(name, (1, 2, 3, 4)))
    pixels = pixels_of(model)
    return traffic.count_backbone(backbone.eval(), pixels, impl="triton", blocks=False)


TRITON = "fastbb, one kernel for each op"  # neither kernels of blocks nor convolutions of cuDNN
TIMM_OWN, TRANSFORMERS = "timm's own", "transformers"
TIMM = {
    "swin_t_224": "swin_tiny_patch4_window7_224",
    "swin_s_224": "swin_small_patch4_window7_224",
    "swin_b_384": "swin_base_patch4_window12_384",
    "swin_t_800x1088": "swin_tiny_patch4_window7_224",
}
# bytes and launches for the versions in constraints.txt
UPSTREAM = {
    ("swin_t_224", TRANSFORMERS): (11_294_472_682, 427),
    ("swin_t_224", TIMM_OWN): (13_351_210_332, 313),
    ("swin_s_224", TRANSFORMERS): (17_595_481_786, 829),
    ("swin_s_224", TIMM_OWN): (21_343_632_012, 619),
    ("swin_b_384", TRANSFORMERS): (8_991_046_128, 781),
    ("swin_b_384", TIMM_OWN): (13_669_691_120, 619),
    ("swin_t_800x1088", TRANSFORMERS): (26_609_620_178, 457),
    ("swin_t_800x1088", TIMM_OWN): (31_431_668_090, 346),
    ("resnet50", TRANSFORMERS): (10_490_577_792, 278),
    ("resnet50", TIMM_OWN): (10_490_577_792, 278),
    ("resnet50", "timm"): (10_490_577_792, 278),
    ("resnet18", TRANSFORMERS): (2_366_671_744, 106),
    ("resnet18", TIMM_OWN): (2_366_671_744, 106),
    ("resnet101", TRANSFORMERS): (15_769_867_136, 550),
    ("resnet101", TIMM_OWN): (15_769_867_136, 550),
    ("resnet50d", TIMM_OWN): (11_197_095_616, 291),
    ("resnet50d", "timm"): (11_197_095_616, 291),
}


# most bytes of a forward pass, of those of transformers
SHARES = {
    "swinv2_t": 0.16,
    "dinov2_s": 0.52,
    "dinov2_b": 0.52,
    "dinov3_s": 0.34,
    "dinov3_b": 0.34,
    "beit_b": 0.52,
    "convnext_t": 0.17,
    "convnextv2_t": 0.28,
}


@pytest.mark.parametrize("model", SHARES)
def test_traffic_is_at_most_a_share_of_upstreams(model: str) -> None:
    ours, theirs = (n_bytes(launches_of(model, way)) for way in (DEFAULT, TRANSFORMERS))
    assert ours <= SHARES[model] * theirs


@pytest.mark.parametrize(("model", "way"), UPSTREAM)
def test_bytes_and_launches_of_upstream_are_unchanged(model: str, way: str) -> None:
    launches = launches_of(model, way)
    assert (n_bytes(launches), len(launches)) == UPSTREAM[model, way]


def test_norms_of_maps_are_all_that_timms_swin_gets_in_addition() -> None:
    alone = bytes_by_category(launches_of("swin_t_224", TIMM_OWN))
    with_norms = bytes_by_category(launches_of("swin_t_224", "timm"))
    changed = {category for category, n in with_norms.items() if n != alone[category]}
    assert alone.keys() == with_norms.keys() and changed == {NORM}


def test_bytes_of_upstreams_swin_equal_those_counted_by_hand() -> None:
    parts = bytes_by_category(launches_of("swin_t_224", TRANSFORMERS))
    depths = (2, 2, 6, 2)
    maps = [2 * 64 * (56 >> stage) ** 2 * (96 << stage) for stage in range(4)]
    blocks = sum(depth * one_map for depth, one_map in zip(depths, maps))
    # two additions of two maps to a third, and the activation of four maps
    assert parts[RESIDUAL] == blocks * 2 * 3
    assert parts[ACTIVATION] == blocks * 2 * 4
    # every map is padded by zero rows, which still copies it
    assert parts[PAD] == blocks * 2
    # in every second block, there and back, two dimensions each
    assert parts[ROLL] == blocks // 2 * 2 * 2 * 2


def test_bytes_of_upstreams_resnet_equal_those_counted_by_hand() -> None:
    parts = bytes_by_category(launches_of("resnet50", TIMM_OWN))
    image, channels, depths = 2 * 64, (256, 512, 1024, 2048), (3, 4, 6, 3)
    ends = sum(
        depth * image * (56 >> stage) ** 2 * wide
        for stage, (depth, wide) in enumerate(zip(depths, channels))
    )
    # a sum of two maps, written to one of them
    assert parts[RESIDUAL] == 3 * ends
    # 112x112 in, 56x56 out, and int64 indices
    assert parts[POOL] == image * 64 * (112**2 + 56**2) + 8 * 64 * 64 * 56**2


GB, MB = 10**9, 10**6
# most bytes and launches of a forward pass
LIMITS = {
    ("swin_t_224", SEPARATE): (4.6 * GB, 70),
    ("swin_t_224", TRITON): (4.6 * GB, 70),
    ("swin_t_224", DEFAULT): (3.3 * GB, 60),
    ("resnet50", DEFAULT): (52 * MB * 64, 60),
    ("resnet50", TRITON): (52 * MB * 64, 60),
    ("resnet50", EVERY): (46 * MB * 64, 60),
}
# share of transformers' traffic: the limit of Swin-T, applied to the other models
LARGEST_SHARE = 4.6 / 11.0


@pytest.mark.parametrize(("model", "way"), LIMITS)
def test_our_bytes_and_launches_stay_within_their_limits(model: str, way: str) -> None:
    launches = launches_of(model, way)
    most_bytes, most_launches = LIMITS[model, way]
    assert n_bytes(launches) <= most_bytes
    assert len(launches) <= most_launches


@pytest.mark.parametrize("way", [SEPARATE, DEFAULT])
@pytest.mark.parametrize("model", ["swin_s_224", "swin_b_384", "swin_t_800x1088"])
def test_our_share_of_upstreams_traffic_holds_on_other_swins(model: str, way: str) -> None:
    upstream, _ = UPSTREAM[model, TRANSFORMERS]
    assert n_bytes(launches_of(model, way)) <= LARGEST_SHARE * upstream


@pytest.mark.parametrize("model", ["resnet18", "resnet101", "resnet50d"])
def test_our_share_of_upstreams_traffic_holds_on_other_resnets(model: str) -> None:
    upstream, _ = UPSTREAM[model, TIMM_OWN]
    share = 52 / 163 if model != "resnet50d" else 58.5 / 175  # its average pools stay
    assert n_bytes(launches_of(model, TRITON)) <= share * upstream
    if model != "resnet50d":
        assert n_bytes(launches_of(model, DEFAULT)) <= share * upstream


@pytest.mark.parametrize("model", ["resnet50", "resnet18", "resnet101"])
def test_our_resnets_launch_only_convolutions(model: str) -> None:
    assert bytes_by_category(launches_of(model, TRITON)).keys() == {GEMM}
    # an epilogue follows cuDNN's convolutions with a stride, in three stages
    by_default = launches_of(model, DEFAULT)
    assert bytes_by_category(by_default).keys() == {GEMM, ACTIVATION}
    assert sum(launch.category == ACTIVATION for launch in by_default) == 3


def test_bytes_of_our_resnet_equal_those_counted_by_hand() -> None:
    image, size, inputs = 2 * 64, 56, 64
    elements = 3 * 224**2 + 64 * 56**2  # of one image: the stem
    weights = 64 * 3 * 49 + 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, outputs = 64 << stage, 256 << stage
        for block in range(depth):
            before, first = inputs * size**2, block == 0
            size = size // 2 if first and stage else size
            wide = before // inputs * inner  # the 1x1 runs before the stride
            inside, after = inner * size**2, outputs * size**2
            # reduce, 3x3, and expand with the residual or its convolution
            elements += before + wide + wide + inside + inside + before + after
            weights += inputs * inner + 9 * inner**2 + inner * outputs + 2 * inner + outputs
            weights += inputs * outputs if first else 0
            inputs = outputs
    assert n_bytes(launches_of("resnet50", TRITON)) == image * elements + 2 * weights


@pytest.mark.parametrize("way", [SEPARATE, DEFAULT])
def test_our_swin_stores_no_rolled_padded_or_masked_tensor(way: str) -> None:
    # 800x1088 needs padding in every stage
    parts = bytes_by_category(launches_of("swin_t_800x1088", way))
    assert parts.keys() <= {GEMM, ATTENTION, NORM}


def test_timm_has_a_reason_at_a_size_that_it_pads_otherwise() -> None:
    reason = counts_of("swin_t_800x1088")["timm"]
    assert isinstance(reason, str) and "multiple of 224x224" in reason


TWO_WAYS: Counts = {
    TRANSFORMERS: [Launch("mm", GEMM, 3 * GB), Launch("roll", ROLL, GB)],
    "timm": "NotImplementedError: no such op",
    DEFAULT: [Launch("_linear_residual_fwd_kernel", GEMM, GB)],
}
MODEL = Traffic("Swin-T, 224, batch 64", 64, (224, 224), TWO_WAYS)


def test_summary_has_a_row_per_model_and_the_reasons_below() -> None:
    other = Traffic(
        "another", 1, (9, 9), {"timm": [Launch("mm", GEMM, GB)], DEFAULT: "no such kernel"}
    )
    assert traffic.summary([MODEL, other]).splitlines() == [
        "| traffic (ratio), launches |   transformers |           timm |         fastbb |",
        "|---------------------------|---------------:|---------------:|---------------:|",
        "| Swin-T, 224, batch 64     | 4 GB (1.00), 2 |              - | 1 GB (0.25), 1 |",
        "| another                   |              - | 1 GB (1.00), 1 |              - |",
        "",
        "* Swin-T, 224, batch 64, timm: NotImplementedError: no such op",
        "* another, fastbb: no such kernel",
    ]


def test_breakdown_has_a_row_per_category() -> None:
    assert traffic.breakdown(MODEL).splitlines() == [
        "| Swin-T, 224, batch 64: traffic (launches) | transformers |   fastbb |",
        "|-------------------------------------------|-------------:|---------:|",
        "| GEMM                                      |     3 GB (1) | 1 GB (1) |",
        "| roll                                      |     1 GB (1) |          |",
        "| total                                     |     4 GB (2) | 1 GB (1) |",
        "| per image                                 |      62.5 MB |  15.6 MB |",
    ]


def test_small_models_and_odd_names_have_a_table() -> None:
    counts: Counts = {"a|b": [Launch("mm", GEMM, 12_000)], DEFAULT: [Launch("k", GEMM, 3_000)]}
    model = Traffic("c|<d>", 2, (8, 8), counts)
    header, rule, row = traffic.summary([model]).splitlines()
    assert r"a\|b" in header and r"| c\|&lt;d&gt; " in row and "12 kB (1.00), 1" in row
    assert len(header) == len(rule) == len(row)
    assert "3 kB (1)" in traffic.breakdown(model) and "1.5 kB" in traffic.breakdown(model)


def test_nothing_counted_is_no_table_and_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    none = Traffic("none", 1, (9, 9), {DEFAULT: "accelerate() replaces nothing in it"})
    assert traffic.breakdown(none) == ""
    assert "accelerate() replaces nothing" in traffic.summary([none])
    with pytest.raises(ValueError, match="nothing to draw, no launches were counted"):
        traffic.plot([none], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_picture_takes_any_name_and_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = replace(MODEL, title=r"$\frac$" + "long" * 50, counts={"$^$": [Launch("mm", GEMM, 9)]})
    traffic.plot([odd], tmp_path / "a.png")
    with pytest.raises(OutputError, match="cannot write"):
        traffic.plot([odd], tmp_path / "none" / "a.png")


def test_totals_are_bytes_and_launches_or_the_reason() -> None:
    assert traffic.totals(TWO_WAYS) == {
        TRANSFORMERS: {"bytes": 4 * GB, "launches": 2},
        "timm": {"reason": "NotImplementedError: no such op"},
        DEFAULT: {"bytes": GB, "launches": 1},
    }


def test_picture_is_drawn_without_the_ways_that_have_a_reason(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traffic.plot([MODEL, Traffic("none", 1, (9, 9), {"timm": "why"})], tmp_path / "traffic.png")
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")


def tiny(folder: Path, **fields: Any) -> str:
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32]}
    text = json.dumps({**config, "depths": [1, 1], **fields})
    (folder / "config.json").write_text(text)
    return str(folder)


def test_unknown_op_is_the_reason_of_its_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbb.bench import launches

    without = {name: kind for name, kind in launches.KERNELS.items() if name != "relu"}
    monkeypatch.setattr(launches, "KERNELS", without)
    counts = count_traffic(tiny(tmp_path), (64, 64), 2).counts
    assert "how many kernels aten.relu" in str(counts[TRANSFORMERS])
    assert isinstance(counts[DEFAULT], list)


def test_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    counts = count_traffic(tiny(tmp_path), (64, 64), 2).counts
    assert isinstance(counts[TRANSFORMERS], list) and isinstance(counts["timm"], str)


def test_maps_that_are_asked_for_are_counted(tmp_path: Path) -> None:
    name = tiny(tmp_path)
    few, all_ = (count_traffic(name, (64, 64), 2, indices).counts for indices in ([1], [1, 2]))
    assert n_bytes(few[DEFAULT]) < n_bytes(all_[DEFAULT])  # type: ignore[arg-type]


def test_wrong_name_is_an_error() -> None:
    with pytest.raises((OSError, ValueError), match="no-such-model"):
        count_traffic("./no-such-model", (64, 64), 1)


def test_traffic_page_shows_the_counted_numbers() -> None:
    page = benchmark_pages.PAGE.read_text()
    models = [Traffic(title, 1, (1, 1), counts_of(name)) for name, title in TITLES.items()]
    models = [replace(m, batch=benchmark_pages.COUNTED[m.title][2]) for m in models]
    assert benchmark_pages.with_table(page, traffic.summary(models)) == page
