"""Counts of a bench: by hand for small nets, and timm's published numbers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.bench.counts import count


def run(module: nn.Module, pixels: Tensor) -> object:
    return module(pixels)


class Net(nn.Module):
    """A convolution, attention over its 16 positions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)
        self.again = self.linear

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.norm(self.conv(pixels)).flatten(2).transpose(1, 2)
        return self.again(F.scaled_dot_product_attention(tokens, tokens, tokens))


def test_small_net_by_hand() -> None:
    net = Net().to(torch.bfloat16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = count(run, net, (8, 8))
    n_positions = 4 * 4
    assert found.params == (3 * 8 * 4 + 8) + (8 + 8) + (8 * 5 + 5)
    products = 2 * n_positions * n_positions * 8
    assert found.macs == n_positions * 8 * 3 * 4 + products + n_positions * 8 * 5
    written = n_positions * n_positions + n_positions * 8
    assert found.activations == n_positions * 8 + written + n_positions * 5
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_model_that_does_not_run_on_meta_has_parameters_only() -> None:
    class Decides(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input if bool(input.sum() > 0) else -input

    assert count(run, Decides(2, 3), (4, 4)) == (9, None, None)


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "macts"),
    [("resnet50", 25.56, 4.11, 11.11), ("swin_tiny_patch4_window7_224", 28.29, 4.51, 17.06)],
)
def test_timm_publishes_the_same(name: str, params: float, gmacs: float, macts: float) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    found = count(run, model, (224, 224))
    assert found.macs is not None and found.activations is not None
    assert round(found.params / 1e6, 2) == params
    assert round(found.activations / 1e6, 2) == macts
    # timm's have norms as well: two for each element of a batch norm
    assert 0.99 * gmacs < found.macs / 1e9 <= gmacs
