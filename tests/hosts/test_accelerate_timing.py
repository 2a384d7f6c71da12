"""Mode "auto" of `accelerate`: measured once, and the faster forward runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import images
from tiny_hosts import (
    PIXELS,
    accelerated,
    assert_bit_equal,
    assert_close,
    infer,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
)

from fastbb.engine import choose
from fastbb.engine.measuring import Comparison
from fastbb.engine.settings import Tools
from fastbb.hosts import host_backbone, replacement
from fastbb.hosts.replacement import replacement_of

OURS, UPSTREAM = 0.5, 1.0  # seconds on the clock of these tests


@pytest.fixture
def measuring_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[str]]:
    """Lets the engine choose as on a GPU; the argument is the time of our candidates."""
    monkeypatch.setattr(choose, "on_gpu", lambda pixels: True)
    timed: list[str] = []

    def start(ours_s: float) -> list[str]:
        running: list[str] = []
        own = host_backbone.upstream_only

        def upstream_only() -> Any:
            running.append("upstream")
            return own()

        def clock(call: Callable[[], object]) -> float:
            running.clear()
            call()
            timed.append("upstream" if running else "ours")
            return UPSTREAM if running else ours_s

        monkeypatch.setattr(host_backbone, "upstream_only", upstream_only)
        monkeypatch.setattr(
            host_backbone, "Tools", lambda **options: Tools(**options, clock=clock, progress=silent)
        )
        return timed

    return start


def silent(n_candidates: int) -> Callable[[str], None]:
    return lambda text: None


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("timed a second time")


@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone])
@pytest.mark.parametrize("ours_s", [OURS, 2.0])
def test_a_whole_backbone_is_measured_by_the_engine_alone(
    make: Callable[..., Any],
    ours_s: float,
    measuring_engine: Callable[[float], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = measuring_engine(ours_s)
    model, twin, report = accelerated(make, mode="auto", include="", exclude="?*")
    monkeypatch.setattr(replacement, "compare", never)
    for _ in range(2):
        assert_close(infer(model), infer(twin))
    n_timed = len(timed)
    assert {"ours", "upstream"} == set(timed)
    infer(model)
    assert len(timed) == n_timed
    ((_, _, runs, why),) = report.rows()
    assert runs == ("fastbb" if ours_s == OURS else "upstream")
    assert "upstream 1 s" in why
    if ours_s != OURS:
        assert_bit_equal(infer(model), infer(twin))


@torch.no_grad()
def test_each_form_of_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def compare(ours: Any, theirs: Any) -> Comparison:
        timed.append(1)
        return Comparison(1.0, 2.0, 0.5)

    monkeypatch.setattr(replacement, "compare", compare)
    model, twin, report = accelerated(swin_classifier, mode="auto")
    for size in (64, 48, 32, 80):
        pixels = images(size, size)
        assert_close(infer(model, pixels), infer(twin, pixels))
    # blocks of two widths, without a shift and with one, and a merging
    assert len(timed) == len({r.ours.timing_key() for r in report.replaced})


def test_a_call_with_nan_pixels_decides_nothing() -> None:
    model, twin, _ = accelerated(swin_classifier)
    pixels = PIXELS.clone()
    pixels[:] = float("nan")
    infer(model, pixels)
    own = [replacement_of(module) for module in model.modules()]
    assert not any(r.choices for r in own if r is not None)
    assert_close(infer(model), infer(twin))
    assert any(r.choices for r in own if r is not None)
