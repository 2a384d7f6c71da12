"""What the report of `accelerate` says: what runs ours now, times, their total, memory."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import images
from tiny_hosts import (
    NO_ACCELERATE_WARNING,
    PIXELS,
    infer,
    swin_backbone,
    swin_classifier,
    timm_resnet,
)
from torch import nn

import fastbb
from fastbb import AccelerateReport
from fastbb.engine.measuring import Comparison, memory
from fastbb.hosts.replacement import Timings

pytestmark = NO_ACCELERATE_WARNING

FASTER, SLOWER = Comparison(0.25, 1.0, 0.25), Comparison(3.0, 1.0, 3.0)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the times of whole backbones and those of their blocks."""

    def put(whole: Comparison, block: Comparison) -> None:
        # a whole backbone has no times in common with others, so its key is a number
        monkeypatch.setattr(
            Timings, "of", lambda self, key, *_: whole if isinstance(key, int) else block
        )

    return put


def lines(report: AccelerateReport) -> list[str]:
    return str(report).splitlines()


def total(report: AccelerateReport) -> str | None:
    return next((line for line in lines(report) if line.startswith("total of")), None)


def test_the_header_counts_what_runs_ours_now() -> None:
    model = swin_classifier()
    report = fastbb.accelerate(model, mode="eager")
    head = "SwinForImageClassification, mode eager: "
    assert lines(report)[0] == f"{head}0 of 4 modules run by fastbb, because none has run"
    infer(model)
    assert lines(report)[0] == f"{head}4 of 4 modules run by fastbb"
    model(PIXELS)  # with gradients
    assert lines(report)[0] == (
        f"{head}0 of 4 modules run by fastbb, because a gradient is needed: call the model under "
        "torch.inference_mode()"
    )
    assert all(row[2] == "upstream" for row in report.rows())
    with torch.inference_mode():
        model(PIXELS)
    assert lines(report)[0] == f"{head}4 of 4 modules run by fastbb"
    model.train()
    infer(model)
    assert lines(report)[0].endswith("because it is in training mode: call .eval()")


def test_a_restored_model_runs_nothing_of_ours(make: Callable[..., Any]) -> None:
    model = make()
    report = fastbb.accelerate(model, mode="eager")
    infer(model)
    fastbb.restore(model)
    assert {row[2:] for row in report.rows()} == {("upstream", "it was restored")}
    n = len(report.replaced)
    assert lines(report)[0].endswith(f": 0 of {n} modules run by fastbb, because it was restored")
    again = fastbb.accelerate(model, mode="eager")
    infer(model)
    assert f"{n} of {n} modules run by fastbb" in lines(again)[0]
    assert "because it was restored" in lines(report)[0]


def test_modules_inside_a_whole_that_runs_ours_count() -> None:
    model = swin_backbone()
    report = fastbb.accelerate(model, mode="eager")
    infer(model)
    assert lines(report)[0] == "SwinBackbone, mode eager: 5 of 5 modules run by fastbb"


def test_what_is_left_alone_is_counted() -> None:
    model = timm_resnet()
    model.layer2[0] = torch.jit.trace(model.layer2[0], torch.zeros(1, 8, 8, 8))
    report = fastbb.accelerate(model, mode="eager", include="layer*")
    infer(model)
    assert lines(report)[0] == "ResNet, mode eager: 4 of 5 modules run by fastbb, 1 left alone"


@torch.no_grad()
def test_times_name_both_sides(times: Callable[..., None]) -> None:
    times(SLOWER, SLOWER)
    model = timm_resnet()
    report = fastbb.accelerate(model)
    infer(model)
    assert {row[2:] for row in report.rows()} == {("upstream", "ours 3 s, upstream 1 s")}
    assert lines(report)[0].endswith("0 of 6 modules run by fastbb, because upstream is faster")
    assert total(report) is None


@pytest.mark.parametrize("ratio, runs", [(0.8, "fastbb"), (1.2, "upstream")])
@torch.no_grad()
def test_medians_that_contradict_the_verdict_have_its_ratio_beside_them(
    ratio: float, runs: str, times: Callable[..., None]
) -> None:
    medians = (2.0, 1.0) if runs == "fastbb" else (1.0, 2.0)
    times(SLOWER, Comparison(*medians, ratio))
    model = swin_classifier()
    report = fastbb.accelerate(model)
    infer(model)
    ours, theirs = (f"{seconds:.0f} s" for seconds in medians)
    why = f"ours {ours}, upstream {theirs}; median ratio of pairs {ratio:.2f}"
    assert {row[2:] for row in report.rows()} == {(runs, why)}


@pytest.mark.parametrize(
    ("make", "whole", "block", "wanted"),
    [
        # the blocks inside a whole that runs ours are in its time
        (swin_backbone, FASTER, FASTER, "1 timed module, one call each: 1 s before, 250 ms now"),
        (timm_resnet, FASTER, FASTER, "1 timed module, one call each: 1 s before, 250 ms now"),
        # upstream's forward of the whole calls blocks that run ours
        (swin_backbone, SLOWER, FASTER, "4 timed modules, one call each: 4 s before, 1 s now"),
        (swin_classifier, SLOWER, FASTER, "4 timed modules, one call each: 4 s before, 1 s now"),
    ],
    ids=["whole", "folded whole", "slower whole", "blocks"],
)
def test_the_total_counts_nothing_twice(
    make: Any, whole: Comparison, block: Comparison, wanted: str, times: Callable[..., None]
) -> None:
    times(whole, block)
    model = make()
    report = fastbb.accelerate(model)
    for _ in range(2):
        infer(model)
    assert total(report) == f"total of {wanted} (4.00 times as fast)"
    model(PIXELS)  # with gradients: upstream runs, and no time of ours counts
    assert total(report) is None


def test_slower_blocks_beside_faster_ones_are_in_the_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Timings, "of", lambda self, key, *_: SLOWER if "Merging" in str(key) else FASTER
    )
    model = swin_classifier()
    report = fastbb.accelerate(model)
    infer(model)
    assert str(total(report)).startswith(
        "total of 4 timed modules, one call each: 4 s before, 1.75"
    )
    assert lines(report)[0].endswith("3 of 4 modules run by fastbb")


def test_nothing_is_totalled_that_was_not_timed() -> None:
    model = swin_classifier()
    report = fastbb.accelerate(model, mode="eager")
    infer(model)
    assert total(report) is None


def test_copies_of_weights_are_counted_once_they_are_made() -> None:
    model = timm_resnet()
    report = fastbb.accelerate(model, mode="eager")
    assert "copies of weights" not in str(report)
    infer(model)
    assert lines(report)[-1].startswith("copies of weights: ")
    assert lines(report)[-1].endswith("kB fused, folded or packed")
    fastbb.restore(model)
    assert "copies of weights" not in str(report)


def test_a_converted_copy_is_counted() -> None:
    model = swin_backbone()
    report = fastbb.accelerate(model, mode="eager", precision="bf16")
    infer(model)
    n_bytes = sum(p.numel() * 2 for p in model.parameters())
    n_bytes += sum(
        b.numel() * (2 if b.is_floating_point() else b.element_size()) for b in model.buffers()
    )
    assert f"; {memory(n_bytes)} converted to bf16" in lines(report)[-1]


def test_a_prompt_and_a_notebook_show_the_same() -> None:
    model = swin_classifier()
    report = fastbb.accelerate(model, mode="eager")
    infer(model)
    assert repr(report) == str(report)
    html = report._repr_html_()
    for text in (lines(report)[0], lines(report)[-1], "equal to upstream&#x27;s", "SwinPatchMerg"):
        assert text in html
    assert html.count("<tr>") == len(lines(report)) - 2  # but for the title and the memory


def test_a_warning_says_why_nothing_is_accelerated() -> None:
    with pytest.warns(fastbb.AccelerateWarning) as warned:
        line = fastbb.accelerate(nn.Sequential(nn.Linear(2, 2)))
    (warning,) = warned
    assert str(warning.message) == (
        "nothing in Sequential is accelerated: there is no backbone that fastbb makes faster"
    )
    assert warning.filename == __file__ and str(line).endswith("that fastbb makes faster")

    with pytest.warns(fastbb.AccelerateWarning) as warned:
        two: list[Any] = [torch.jit.trace(timm_resnet(), PIXELS) for _ in range(2)]
        fastbb.accelerate(nn.Sequential(*two))
    (warning,) = [w for w in warned if w.category is fastbb.AccelerateWarning]
    assert str(warning.message) == (
        "nothing in Sequential is accelerated: 0 (TopLevelTracedModule): it is scripted: "
        "accelerate the model that it was made of; 1 more in the report"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbb.accelerate(swin_classifier())


def test_a_warning_at_a_call_points_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbb.hosts.swin import TransformersSwinBlock

    monkeypatch.setattr(TransformersSwinBlock, "forward", lambda *args, **kwargs: None)
    model = swin_classifier()
    fastbb.accelerate(model, mode="eager")
    with torch.inference_mode(), pytest.warns(fastbb.AccelerateWarning) as warned:
        model(images(32, 32))
    assert {warning.filename for warning in warned} == {__file__}


def test_a_restored_report_keeps_no_copies_of_weights() -> None:
    model = swin_backbone()
    report = fastbb.accelerate(model, mode="eager", precision="bf16")
    infer(model)
    assert "converted to bf16" in str(report)
    fastbb.restore(model)
    assert "copies of weights" not in str(report)
