"""Comparison of two benches with injected times: what is a regression, and what is not."""

from collections.abc import Callable

import pytest
from bench_results import SPEEDS, UPSTREAM, made_cell, made_results

from fastbb.bench.compare import CellChange, Change, Comparison, compare, regressed_cells
from fastbb.bench.results import Results, Way

PLANTED = "fastbb compiled"
N_PAIRS = 20


def bench(seed: int, factor: float = 1.0, n_rounds: int = 10) -> Results:
    """Two cells; one way of the first is `factor` times as fast as usual."""
    speeds = {**SPEEDS, PLANTED: factor * SPEEDS[PLANTED]}
    return made_results(
        made_cell(speeds=speeds, seed=seed, n_rounds=n_rounds),
        made_cell("resnet50", seed=seed + 5000, n_rounds=n_rounds),
    )


def change_of(comparison: Comparison, way: str) -> Change:
    return next(one for one in comparison.cells[0].ways if one.way == way)


def regressions(comparison: Comparison) -> list[str]:
    return [one.way for cell in comparison.cells for one in cell.ways if one.regressed]


def test_equal_runs_pass_20_of_20() -> None:
    found = [compare(bench(2 * i), bench(2 * i + 1)) for i in range(N_PAIRS)]
    assert [regressions(one) for one in found] == [[]] * N_PAIRS
    assert {cell.verdict for one in found for cell in one.cells} == {"same"}
    assert "No regression in" in str(found[0])


@pytest.mark.parametrize("factor", [1 / 1.1, 0.9], ids=["time+10%", "speed-10%"])
def test_planted_slowdown_of_10_percent_is_found_20_of_20(factor: float) -> None:
    for i in range(N_PAIRS):
        old, new = bench(2 * i), bench(2 * i + 1, factor)
        found = compare(old, new)
        assert regressions(found) == [PLANTED], i
        assert regressed_cells(found) == [new.cells[0].key]
        assert [cell.verdict for cell in found.cells] == ["slower", "same"]
        change = change_of(found, PLANTED)
        assert change.low is not None and change.high is not None
        assert change.low < change.high < 1


def test_gain_is_faster_and_no_regression() -> None:
    found = compare(bench(0), bench(1, 1.15))
    assert [cell.verdict for cell in found.cells] == ["faster", "same"]
    assert not found.regressed


def test_slowdown_of_the_whole_machine_changes_nothing() -> None:
    new = bench(1)
    for cell in new.cells:
        for way in cell.ways:
            way.rounds_s = [[2 * one for one in calls] for calls in way.rounds_s]
    assert not compare(bench(0), new).regressed


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.96] * 10, "same"),
        ([0.94] * 10, "slower"),
        ([1.04] * 10, "same"),
        ([1.06] * 10, "faster"),
        ([0.85] * 7 + [1.1] * 3, "same"),  # 1 is in its 99 % interval, by 5 samples of 100
    ],
    ids=["small", "enough", "small-gain", "enough-gain", "uncertain"],
)
def test_change_counts_if_it_is_large_and_certain(ratios: list[float], verdict: str) -> None:
    old, new = (made_results(made_cell(speeds={UPSTREAM: 1.0, PLANTED: 1.0})) for _ in range(2))
    for results, of_rounds in ((old, [1.0] * 10), (new, ratios)):
        upstream, ours = results.cells[0].ways
        upstream.rounds_s = [[1.0]] * 10
        ours.rounds_s = [[1 / one] for one in of_rounds]
    change = change_of(compare(old, new), PLANTED)
    assert change.new == pytest.approx(sorted(ratios)[4])
    assert change.verdict == verdict and change.regressed == (verdict == "slower")


def test_slower_other_way_is_information() -> None:
    old, new = bench(0), bench(1)
    openvino = new.cells[0].way("OpenVINO")
    assert openvino is not None
    openvino.rounds_s = [[2 * one for one in calls] for calls in openvino.rounds_s]
    new.environment["versions"] = {**new.environment["versions"], "openvino": "2027.0"}
    found = compare(old, new)
    assert change_of(found, "OpenVINO").verdict == "slower" and not found.regressed
    assert found.cells[0].verdict == "same"
    assert found.notices == (
        "Other versions, which change other ways too: openvino 2026.4 -> 2027.0.",
    )
    assert "(slower)" in str(found)


def lose_times(way: Way) -> None:
    way.rounds_s, way.reason = [], "out of memory"


def be_wrong(way: Way) -> None:
    way.wrong = "stage4 is off"


@pytest.mark.parametrize(
    ("spoil", "verdict", "reason"),
    [(lose_times, "no times", "out of memory"), (be_wrong, "WRONG", "stage4 is off")],
)
def test_way_that_is_lost_or_wrong_is_a_regression(
    spoil: Callable[[Way], None], verdict: str, reason: str
) -> None:
    old, new = bench(0), bench(1)
    for name in (PLANTED, "OpenVINO"):
        way = new.cells[0].way(name)
        assert way is not None
        spoil(way)
    found = compare(old, new)
    assert regressions(found) == [PLANTED] and found.cells[0].verdict == verdict
    assert change_of(found, PLANTED).reason == reason
    assert f"{PLANTED}: {verdict}." in str(found)
    # the other way round it is a gain, and where it never ran nothing is said
    assert change_of(compare(new, old), PLANTED).verdict == "unknown"
    assert PLANTED not in [one.way for one in compare(new, new).cells[0].ways]


def test_interrupted_bench_did_not_lose_what_it_did_not_measure() -> None:
    old, new = bench(0), bench(1)
    new.interrupted = True
    new.cells.pop()
    new.cells[0].ways[3].rounds_s = []
    found = compare(old, new)
    assert not found.regressed
    assert found.notices[0].startswith("The new bench was interrupted")
    assert "Only in the old file: resnet50, fp32, batch 1, 224x224." in found.notices


@pytest.mark.parametrize("name", ["cpu", "gpu", "threads"])
def test_other_hardware_is_a_notice(name: str) -> None:
    old, new = bench(0), bench(1, 0.5)
    assert compare(old, new).regressed
    new.environment[name] = "another"
    found = compare(old, new)
    assert not found.regressed and change_of(found, PLANTED).verdict == "slower"
    assert found.notices[0].startswith(f"Other hardware, so nothing is a regression: {name} ")


def test_cells_and_ways_of_one_file_are_named() -> None:
    old, new = bench(0), bench(1)
    new.cells[1].model = "convnext"
    old.cells[0].ways[1].name = "ONNX Runtime"
    found = compare(old, new)
    place = "microsoft/swin-tiny-patch4-window7-224, fp32, batch 1, 224x224"
    assert found.notices == (
        f"Only in the new file: OpenVINO of {place}.",
        f"Only in the old file: ONNX Runtime of {place}.",
        "Only in the new file: convnext, fp32, batch 1, 224x224.",
        "Only in the old file: resnet50, fp32, batch 1, 224x224.",
    )
    assert [cell.title for cell in found.cells] == [place]


def test_other_maps_are_not_compared() -> None:
    old, new = bench(0), bench(1)
    new.cells[0].stages = ("stage4",)
    found = compare(old, new)
    assert len(found.cells) == 1 and found.notices[0].startswith("Not compared")


@pytest.mark.parametrize("n_rounds", [1, 4])
def test_few_rounds_are_not_judged(n_rounds: int) -> None:
    found = compare(bench(0), bench(1, 0.5, n_rounds))
    change = change_of(found, PLANTED)
    assert (change.verdict, change.reason) == ("unknown", "fewer than 5 rounds")
    assert found.cells[0].verdict == "unknown" and not found.regressed


def test_without_times_of_upstream_nothing_is_judged() -> None:
    old, new = bench(0), bench(1)
    upstream = new.cells[0].way(UPSTREAM)
    assert upstream is not None
    lose_times(upstream)
    found = compare(old, new)
    assert change_of(found, PLANTED).reason == "upstream has no times"
    assert not found.regressed


def test_text_has_a_table_with_footnotes() -> None:
    old, new = bench(0), bench(1, 0.8)
    be_wrong(new.cells[0].ways[2])
    shown = str(compare(old, new)).splitlines()
    assert shown[0].split() == [
        "old",
        "ratio",
        "new",
        "ratio",
        "new",
        "/",
        "old",
        "99",
        "%",
        "interval",
        "verdict",
    ]
    assert shown[1].endswith("224x224: WRONG")
    assert shown[3].split()[:3] == ["fastbb", "eager", "[1]"] and shown[3].endswith("WRONG")
    assert shown[4].endswith("slower") and "[1] fastbb eager: stage4 is off" in shown
    assert shown[-1].startswith("Regressions: microsoft/swin-tiny")
    assert max(map(len, shown[:-1])) <= 100
    nothing = Comparison((CellChange(new.cells[0].key, "a", ()),), ())
    assert nothing.cells[0].verdict == "unknown" and not nothing.regressed


def test_a_comparison_without_power_says_so() -> None:
    old, new = made_cell(seed=1), made_cell(seed=2)
    for cell in (old, new):
        ours = [way for way in cell.ways if way.ours]
        for way in ours:  # rounds that differ by a factor of three
            way.rounds_s = [
                [(1 + number % 3) * call for call in calls]
                for number, calls in enumerate(way.rounds_s)
            ]
    found = compare(made_results(old), made_results(new))
    assert {change.verdict for cell in found.cells for change in cell.ways if change.ours} == {
        "too noisy"
    }
    assert "would not show" in str(found) and not found.regressed and found.n_judged == 2


def test_a_batch_that_ran_before_and_is_halved_now_is_a_regression() -> None:
    old, new = made_cell(batch=16), made_cell(batch=16)
    new.batch = 8
    found = compare(made_results(old), made_results(new))
    assert found.regressed and "batch 8, 16 before" in str(found)
    other = compare(made_results(new), made_results(old))
    assert not other.n_judged and "ran with batch 8 before" in str(other)


def test_nothing_in_common_is_said() -> None:
    found = compare(made_results(made_cell(batch=1)), made_results(made_cell(batch=2)))
    assert found.n_judged == 0 and "Nothing was compared" in str(found)
