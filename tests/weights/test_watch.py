"""`ModuleSettings`, `ModuleStamp`, and the measurement that decides between two forwards."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from fastbb.engine import measuring
from fastbb.weights.watch import ModuleSettings, ModuleStamp


class Odd(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.sizes = [1, [2, 3]]
        self.function = torch.relu
        self.table = torch.zeros(3)  # no setting
        self.names = {"a": 1}  # nor is this
        self.layer = nn.LayerNorm(4)


def test_change_names_the_changed_setting() -> None:
    module = Odd()
    settings = ModuleSettings(module)
    assert settings.change() is None
    module.sizes[1][0] = 4  # type: ignore[index]  # a list in a list
    assert settings.change() == "sizes is [1, [4, 3]], was [1, [2, 3]]"
    module.sizes = [1, [2, 3]]
    assert settings.change() is None
    module.forward, module.scale = torch.relu, 1.0
    assert settings.change() == "scale is 1.0, was 2.0"
    module.scale = 2.0
    module.names["a"] = 2  # type: ignore[index]  # in place
    assert settings.change() == "names is {'a': 2}, was {'a': 1}"
    module.names = {"a": 1}
    module.table = torch.ones(3)
    module.layer.eval().requires_grad_(False)
    assert settings.change() is None
    module.layer.eps = 1.0
    assert settings.change() == "layer.eps is 1.0, was 1e-05"
    module.layer.eps = 1e-5
    module.function = torch.tanh
    assert str(settings.change()).startswith("function is <built-in method tanh")
    del module.function
    assert str(settings.change()).startswith("function is 'gone'")
    assert ModuleSettings(module, ignored=("sizes",)).change() is None
    module.sizes = []
    assert ModuleSettings(module).change() is None


def test_copied_settings_watch_the_copied_module() -> None:
    """A `Folding` is copied together with its model."""
    module, settings = copy.deepcopy((model := Odd(), ModuleSettings(model)))
    model.layer.eps = 1.0
    assert settings.change() is None
    module.layer.eps = 1.0
    assert settings.change() == "layer.eps is 1.0, was 1e-05"


class Seconds:
    """Returns the numbers in turn, then repeats the last."""

    def __init__(self, *seconds: float) -> None:
        self.left = list(seconds)

    def __call__(self) -> float:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


@pytest.mark.parametrize(
    "slow", [(20.0,), (1.0, 20.0), (20.0, 20.0), (1.0, 1.0, 20.0, 1.0, 20.0)], ids=str
)
def test_outliers_do_not_decide_a_comparison(slow: tuple[float, ...]) -> None:
    found = measuring.compare(Seconds(*slow, 1.0), Seconds(1.2), tie=0.03)
    assert found.ratio < 1 and (found.ours, found.theirs) == (1.0, 1.2)
    other = measuring.compare(Seconds(1.2), Seconds(*slow, 1.0), tie=0.03)
    assert other.ratio > 1.03


def test_comparison_that_ours_loses_is_measured_twice() -> None:
    """The first half of the measurement is disturbed by another program."""
    stalled = Seconds(*[20.0] * measuring.MIN_PAIRS, 1.0)
    assert measuring.compare(stalled, Seconds(1.2), tie=0.03).ratio >= 1.03  # a tie of halves
    stalled = Seconds(*[20.0] * (measuring.MIN_PAIRS - 1), 1.0)
    assert measuring.compare(stalled, Seconds(1.2), tie=0.03).ratio < 1


def test_a_stamp_says_whether_layers_trained_or_had_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    assert ModuleStamp(model).is_plain
    model[1].train()
    assert not ModuleStamp(model).is_plain
    model.eval()
    handle = model[0].register_forward_hook(lambda *_: None)
    stamp = ModuleStamp(model)
    assert not stamp.is_plain and stamp.is_current()
    handle.remove()
    assert not stamp.is_current() and ModuleStamp(model).is_plain


def test_a_tensor_in_another_place_is_a_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    stamp = ModuleStamp(model)
    first, second = model[0].weight, model[1].weight
    model[0].weight, model[1].weight = second, first
    assert not stamp.is_current()
    model[0].weight, model[1].weight = first, second
    assert stamp.is_current()
    model[1].register_parameter("bias", None)
    assert not stamp.is_current()


def test_a_hook_in_a_new_dictionary_is_a_change() -> None:
    """Programs clear the hooks of a layer by assigning an empty dictionary."""
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    stamp = ModuleStamp(model)
    model[0]._forward_hooks = OrderedDict()
    assert stamp.is_current()
    model[0].register_forward_hook(lambda *_: None)
    assert not stamp.is_current()


def test_statistics_count_by_their_values_and_the_number_of_batches_does_not() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    norm: Any = model[0]
    stamp = ModuleStamp(model)
    norm.running_mean.add_(1).sub_(1)
    norm.num_batches_tracked.add_(1)
    assert stamp.is_current()
    norm.running_var.mul_(2)
    assert not stamp.is_current()
    norm.running_var.div_(2)
    assert stamp.is_current()
    norm.running_mean = norm.running_mean.clone()
    assert not stamp.is_current()
