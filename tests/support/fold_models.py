"""Small models to fold, and the comparison of folded results: equal but for rounding."""

from typing import Any

import torch
from reference_models import images, randomize_
from tolerance import assert_equals_upstream
from torch import Tensor, nn

from fastbb.weights.find_norms import FoldReport, find_norms
from fastbb.weights.folded_model import Folding, is_folded

PIXELS = images(13, 10, channels=6).double()


def small(*modules: nn.Module) -> Any:
    """Builds a model with random float64 weights and small variances, so that a wrong eps shows."""
    model = randomize_(nn.Sequential(*modules)).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.01)
    return model


def fold(model: Any, pixels: Tensor = PIXELS) -> Folding:
    return Folding(model, find_norms(model, pixels))


@torch.no_grad()
def assert_folds(model: Any, n_folded: int, pixels: Tensor = PIXELS) -> FoldReport:
    """Folds a model, compares its results with those before, and returns the report."""
    want = model(pixels)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    folding = fold(model, pixels)
    assert len(folding.report.folded) == n_folded, str(folding.report)
    got = folding.run(model, pixels)
    assert n_folded == 0 or not torch.equal(got, want)  # it is another computation
    assert_equals_upstream(got, want, rel=1e-12)
    assert torch.equal(model(pixels), want)
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    folding.undo()
    assert torch.equal(folding.run(model, pixels), want)
    assert not any(is_folded(module) for module in model.modules())
    return folding.report


def reasons(model: Any, pixels: Tensor = PIXELS) -> list[str]:
    return [str(norm.refused) for norm in assert_folds(model, 0, pixels).norms]
