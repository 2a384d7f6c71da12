"""Statistics of a bench: speeds, paired ratios, intervals and verdicts of injected times."""

import numpy as np
import pytest
from bench_results import UPSTREAM, made_cell, made_host, made_ways

from fastbb.bench import noise
from fastbb.bench.results import Way


def rounds_of(*medians: float) -> list[list[float]]:
    return [[0.9 * one, one, 5 * one] for one in medians]


def test_speed_is_of_all_calls() -> None:
    found = noise.speed(Way("a", rounds_s=[[0.4, 0.4, 9.0], [0.5], [1.0]]), batch=2)
    assert found is not None
    assert (found.images_per_s, found.p50_s, found.n_calls) == (4.0, 0.5, 5)
    assert found.p90_s == pytest.approx(5.8) and found.p99_s == pytest.approx(8.68)
    assert found.low is None and found.high is None  # three rounds
    assert noise.speed(Way("a", rounds_s=[[]]), batch=2) is None


@pytest.mark.parametrize("seconds", [0.5, 2.0], ids=["fast", "slow"])
def test_interval_of_speed_contains_the_speed(seconds: float) -> None:
    # one round has most of the calls, so that the median call is one of them
    way = Way("a", rounds_s=[[1.0]] * 11 + [[seconds] * 30])
    found = noise.speed(way, batch=1)
    assert found is not None and found.low is not None and found.high is not None
    assert found.images_per_s == 1 / seconds
    assert found.low <= found.images_per_s <= found.high
    assert found.low <= 1 <= found.high


def test_ratio_pairs_rounds() -> None:
    load = [1.0, 3.0, 1.0, 2.0, 1.0, 1.5]  # of the machine: slows both
    upstream = Way("upstream", rounds_s=rounds_of(*load))
    ours = Way("ours", rounds_s=rounds_of(*(one / 1.25 for one in load)))
    found = noise.ratio(ours, upstream)
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((1.25,) * 3)
    assert found.verdict == "faster" and str(found) == "1.25 (1.25-1.25)"
    slower = noise.ratio(upstream, ours)
    assert slower is not None and slower.verdict == "slower" and slower.value == 0.8


def test_rounds_that_only_one_way_has_do_not_count() -> None:
    upstream = Way("upstream", rounds_s=[[1.0], [], [1.0], [7.0]])
    found = noise.ratio(Way("ours", rounds_s=[[0.5], [0.1], [0.5]]), upstream)
    assert found is not None and found.value == 2.0
    assert noise.ratio(Way("ours"), upstream) is None


@pytest.mark.parametrize("n_rounds", [1, 2, 4])
def test_few_rounds_have_no_interval(n_rounds: int) -> None:
    upstream, ours = made_ways({UPSTREAM: 1.0, "fastbb": 3.0}, n_rounds=n_rounds)
    found = noise.ratio(ours, upstream)
    assert found is not None and found.low is None and found.high is None
    assert found.verdict == "too few rounds" and str(found) == f"{found.value:.2f}"


@pytest.mark.parametrize(
    ("times_as_fast", "verdict"), [(1.1, "faster"), (0.9, "slower"), (1.0, "within noise")]
)
def test_verdicts_under_noise(times_as_fast: float, verdict: str) -> None:
    upstream, ours = made_ways({UPSTREAM: 1.0, "fastbb": times_as_fast})
    found = noise.ratio(ours, upstream)
    assert found is not None and found.verdict == verdict


@pytest.mark.parametrize("n_rounds", [5, 6, 7, 10, 20])
def test_intervals_hold_the_truth_in_at_least_94_of_100(n_rounds: int) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        low, high = noise.interval(list(np.exp(rng.normal(0, 0.028, n_rounds))))
        assert low is not None and high is not None
        held += low <= 1 <= high
    assert held / 400 >= 0.935  # 94 % with five rounds; less of it by chance


def test_results_are_repeatable() -> None:
    upstream, *_, ours = made_ways({UPSTREAM: 1.0, "fastbb": 1.1})
    assert noise.ratio(ours, upstream) == noise.ratio(ours, upstream)


def test_best_leaves_out_wrong_and_missing_ways() -> None:
    cell = made_cell()
    found = noise.best(cell)
    assert [one and one.name for one in (found.way, found.ours, found.other)] == [
        "fastbb compiled",
        "fastbb compiled",
        "OpenVINO",
    ]
    for name, why in (("fastbb compiled", "wrong"), ("OpenVINO", "reason")):
        way = cell.way(name)
        assert way is not None
        setattr(way, why, "stage4 is off")
    found = noise.best(cell)
    assert [one and one.name for one in (found.way, found.ours, found.other)] == [
        "fastbb eager",
        "fastbb eager",
        UPSTREAM,
    ]
    cell.ways = []
    assert noise.best(cell) == noise.Best(None, None, None, None)


def test_best_without_openvino_is_the_fastest_of_ours_in_pytorch() -> None:
    speeds = {UPSTREAM: 1.0, "OpenVINO": 2.0, "fastbb eager": 1.5, "fastbb openvino": 2.1}
    found = noise.best(made_cell(speeds=speeds))
    assert found.ours is not None and found.ours.name == "fastbb openvino"
    assert found.torch is not None and found.torch.name == "fastbb eager"
    cell = made_cell(speeds={UPSTREAM: 1.0, "fastbb auto": 1.5})
    auto = cell.way("fastbb auto")
    assert auto is not None and noise.best(cell).torch is auto
    auto.note = "runs openvino: the fastest that passed its check"
    assert noise.best(cell).torch is None
    for name, note, is_torch in (
        ("fastbb.accelerate openvino", "", False),
        ("fastbb openvino", "runs eager, 2 images at once: openvino failed", True),
        ("fastbb eager", "runs triton: it was asked for", True),
    ):
        auto.name, auto.note = name, note
        assert (noise.best(cell).torch is auto) == is_torch


def test_host_has_shares_and_a_ratio_inside() -> None:
    before, after = made_host().ways
    assert noise.inside_share(before) == pytest.approx(0.6)
    assert noise.inside_share(after) == pytest.approx(0.55)
    whole, inside = noise.ratio(after, before), noise.inside_ratio(after, before)
    assert whole is not None and inside is not None
    assert inside.value == pytest.approx(whole.value * 0.6 / 0.55)
    assert noise.inside_share(Way("a", rounds_s=[[1.0]])) is None
