"""Dataflow of folding: the convolution that a norm folds into, and what forbids folding."""

from collections.abc import Callable
from typing import Any

import pytest
from fold_models import PIXELS, assert_folds, reasons, small
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastbb.weights.find_norms import find_norms


class Wired(nn.Module):
    """Two convolutions and two norms, wired by a function."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        # registered in an order that is not that of the computation
        self.norm2, self.norm1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.act = nn.ReLU()
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    return m.act(x + m.norm2(m.conv2(m.act(m.norm1(m.conv1(x))))))


def inplace_residual(m: Any, x: Tensor) -> Tensor:
    y = m.norm1(m.conv1(x))
    y += x
    return F.relu_(y)


def same_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(m.act(m.norm1(m.conv1(x)))))


def two_names(m: Any, x: Tensor) -> Tensor:
    y = m.conv2(x)
    z = m.conv1(x)
    return m.norm1(y) - m.norm2(z)


@pytest.mark.parametrize(
    ("wiring", "pairs"),
    [
        (residual, {"norm1": "conv1", "norm2": "conv2"}),
        (inplace_residual, {"norm1": "conv1"}),
        (same_twice, {"norm1": "conv1"}),
        (two_names, {"norm1": "conv2", "norm2": "conv1"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pairs_are_found_by_dataflow(wiring: Any, pairs: dict[str, str]) -> None:
    report = assert_folds(small(Wired(wiring)), len(pairs))
    assert {norm.norm: norm.conv for norm in report.folded} == {
        f"0.{norm}": f"0.{conv}" for norm, conv in pairs.items()
    }
    # the one ReLU runs twice, so it stays a module
    assert not any(norm.activation for norm in report.folded)


def read_by_a_function(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.norm1(y) + y


def read_by_a_module(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.norm1(y) + m.conv2(y)


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y.mul_(2)
    return m.norm1(y)


def activated_between(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.act(m.conv1(x)))


def after_an_addition(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x) + x)


def two_norms(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x)) + m.norm2(m.conv1(x))


def two_convolutions(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x)) + m.norm1(m.conv2(x))


def functional_weight(m: Any, x: Tensor) -> Tensor:
    return m.norm1(m.conv1(x) if x is None else F.conv2d(x, m.conv1.weight, padding=1))


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (read_by_a_function, "also read by `add`"),
        (read_by_a_module, "also read by a Conv2d"),
        (changed_in_place, "also read by `mul_`"),
        (activated_between, "it reads the output of a ReLU, not the output of a convolution"),
        (after_an_addition, "it reads something computed, not the output of a convolution"),
        (two_norms, "also read by a BatchNorm2d"),
        (two_convolutions, "runs several times, after different modules"),
        (functional_weight, "it reads something computed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dataflow_that_forbids_folding_is_refused_with_the_reason(wiring: Any, reason: str) -> None:
    assert all(reason in why for why in reasons(small(Wired(wiring))))


def test_an_output_that_the_model_returns_is_not_folded() -> None:
    class Returns(nn.Sequential):
        def forward(self, input: Tensor) -> Any:
            y = self[0](input)
            return {"map": [y], "norm": self[1](y)}

    model = Returns(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)).eval().double()
    (norm,) = find_norms(model, PIXELS)
    assert norm.refused == ("the output of its convolution is also read by the result of the model")


class NotABatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([StdConv2d(6, 8, 3), nn.BatchNorm2d(8)], "computes its weights (weight standard"),
        (
            [parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), nn.BatchNorm2d(8)],
            "computes its weights",
        ),
        ([nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)], "no running stat"),
        ([nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)], "'reflect'"),
        ([nn.Conv2d(6, 8, 3), NotABatchNorm(8)], "NotABatchNorm does not compute what batch"),
        ([nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8)], "output of a ConvTranspose2d"),
        ([nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)], "it reads something computed"),
    ],
    ids=lambda value: "",
)
def test_modules_that_forbid_folding_are_refused_with_the_reason(
    modules: list[nn.Module], reason: str
) -> None:
    (why,) = reasons(small(*modules))
    assert reason in why


def keywords(m: Any, x: Tensor) -> Tensor:
    return m.norm1(input=m.conv1(input=x))


def keyword_activation(m: Any, x: Tensor) -> Tensor:
    return m.act(input=m.norm1(m.conv1(x)))


def test_calls_with_keyword_arguments_are_not_folded() -> None:
    assert reasons(small(Wired(keywords))) == [
        "it or its convolution is called with keyword arguments"
    ]
    (norm,) = assert_folds(small(Wired(keyword_activation)), 1).norms
    assert norm.activation is None
