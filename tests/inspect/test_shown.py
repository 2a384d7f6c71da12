"""Reports show at a prompt what they print."""

from typing import Any

import pytest

from fastbb.engine.explanation import Explanation, Row
from fastbb.engine.trial import Trial
from fastbb.inspect.tune import Tuned
from fastbb.inspect.verify import VerifiedMap, VerifyReport
from fastbb.inspect.warmup import Warmth
from fastbb.weights.find_norms import FoldedNorm, FoldReport

EXPLANATION = Explanation("a backbone", (Row("1x8x8", "eager", "why"),))
MAP = VerifiedMap((1, 3, 8, 8), "stage1", (1, 4, 2, 2), 1e-6, 1e-5, 1e-6, None)

REPORTS: dict[str, tuple[Any, str]] = {
    "explanation": (EXPLANATION, "a backbone\nwhat   runs   why\n1x8x8  eager  why"),
    "folding": (
        FoldReport((FoldedNorm("bn", "conv", op="conv1x1_bn_act"),)),
        "1 batch norms: 1 folded, 0 of them with their activation, 0 refused\n"
        "     1 conv1x1_bn_act",
    ),
    "tuned": (
        Tuned("fp32", (2, 8, 8), (Trial("eager", 0.5),), EXPLANATION),
        "fp32, 2x8x8: eager, 4.0 images/s\n  eager: 500 ms",
    ),
    "verified": (
        VerifyReport("ours", "theirs", "equal", (MAP,), ("a note",)),
        "ours against theirs: passed\nrule: equal\n"
        "input    stage   map      error    allowed  reference's own\n"
        "1x3x8x8  stage1  1x4x2x2  1.0e-06  1.0e-05  1.0e-06          ok\n"
        "note: a note",
    ),
    "warm-up": (
        Warmth(80, (), 1.0, 1, ()),
        "nothing to compile for sm_80: the model launches none of fastbb's kernels",
    ),
}


@pytest.mark.parametrize("report, text", REPORTS.values(), ids=REPORTS)
def test_a_report_is_shown_as_it_is_printed(report: Any, text: str) -> None:
    assert repr(report) == str(report) == text
