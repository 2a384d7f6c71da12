"""Whole backbones inside hosts, run by the engine: compiled, and in another precision."""

from typing import Any

import pytest
import torch
from reference_models import images
from tiny_hosts import accelerated, infer, swin_backbone, timm_resnet, twin_of
from tolerance import assert_equals_upstream, max_error

import fastbb
from fastbb.hosts.accelerate import replacement_of

PIXELS = images(32, 32)


def engine_of(model: Any) -> Any:
    replacement = replacement_of(model)
    assert replacement is not None
    fast: Any = replacement.ours
    return fast.engine()


@pytest.mark.parametrize("make", [swin_backbone, timm_resnet])
def test_a_compiled_backbone_equals_upstream(make: Any) -> None:
    model, twin, report = accelerated(make, mode="compile")
    for _ in range(2):
        assert_equals_upstream(infer(model), infer(twin))
    assert {"fastbb"} <= {runs for _, _, runs, _ in report.rows()}
    assert "compile" in str(engine_of(model).explain())
    other = images(64, 64)  # a second size waits for no compiler
    assert_equals_upstream(infer(model, other), infer(twin, other))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with pytest.warns(UserWarning, match="changed since they were compiled"):
        got = infer(model)
    assert_equals_upstream(got, infer(twin_of(make, model)))


@pytest.mark.parametrize("make", [swin_backbone, timm_resnet])
def test_another_precision_returns_the_dtype_of_the_input(make: Any) -> None:
    model = make()
    want = infer(model)
    fastbb.accelerate(model, mode="eager", precision="bf16")
    for _ in range(2):
        got = infer(model)
        assert_equals_upstream(got, want, rel=6e-2)
        assert max(map(max_error, got, want)) > 1e-4  # the result was not computed in fp32
    assert all(p.dtype == torch.float32 for p in model.parameters())
