"""What bounds a way, by measured rates of the machine."""

import pytest
import torch
from bench_results import UPSTREAM, made_cell, made_host, made_results

from fastbb.bench.exports import _row
from fastbb.bench.noise import speed
from fastbb.bench.rates import Rates, bound_shares, measure_rates
from fastbb.bench.table import text

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_product_is_faster_than_the_rate(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []

    def timed(call: object, seconds: float, device: torch.device) -> list[float]:
        call()  # type: ignore[operator]  # it is one
        taken.append(len(taken) + 2.0)
        return [9.0, taken[-1]]

    monkeypatch.setattr("fastbb.bench.rates.timed_calls", timed)
    rates = measure_rates(CPU, precision)
    # the fastest of PyTorch's products, each of 4 * 1024^3 multiply-adds, and the read comes last
    assert rates == Rates(4 * 1024**3 / 2.0, 2**28 / taken[-1])


def test_rates_are_those_of_a_machine() -> None:
    rates = measure_rates(CPU, "fp32")
    assert 1e8 < rates.macs_per_s < 1e14 and 1e8 < rates.bytes_per_s < 1e14


@pytest.mark.parametrize(("precision", "item_bytes"), [("fp32", 4), ("bf16", 2)])
def test_the_larger_share_is_shown(precision: str, item_bytes: int) -> None:
    cell = made_cell(precision=precision, batch=8)
    assert cell.macs is not None and cell.params is not None
    way = cell.ways[0]
    measured = speed(way, 8)
    assert measured is not None
    per_s = measured.images_per_s
    cell.rates = {"macs_per_s": cell.macs * per_s * 2, "bytes_per_s": 1e30}
    assert bound_shares(cell, way) == pytest.approx({"products": 0.5, "weights": 0.0}, abs=1e-9)
    assert "50 % products" in text(made_results(cell))
    cell.rates["bytes_per_s"] = item_bytes * cell.params * per_s / 8 / 0.75
    assert bound_shares(cell, way) == pytest.approx({"products": 0.5, "weights": 0.75})
    assert "75 % weights" in text(made_results(cell))
    row = _row(made_results(cell), cell, way)
    assert (row["fb_products_share"], row["fb_weights_share"]) == (0.5, 0.75)


def test_nothing_is_shown_without_rates_or_times() -> None:
    cell, host = made_cell(), made_host()
    host.rates = {"macs_per_s": 1e9, "bytes_per_s": 1e9}  # whose products are not counted
    assert "bound" not in text(made_results(cell, host))
    cell.rates = dict(host.rates)
    cell.ways[0].wrong = "stage4: error 0.02"
    assert bound_shares(cell, cell.ways[0]) is None and cell.ways[0].name == UPSTREAM
