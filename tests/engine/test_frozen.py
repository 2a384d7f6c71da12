"""Rewrites of exported graphs: constants are folded, and results equal the module's."""

from collections import Counter
from typing import Any

import pytest
import torch
from reference_models import from_hf, hf_resnet, hf_swin, images
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.backbone.base import Backbone
from fastbb.engine.frozen import attention_to_products, fold_constants, linear_to_convolution


class Maps(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.backbone.feature_maps(pixel_values)


@torch.no_grad()
def exported(module: nn.Module, *inputs: Tensor) -> Any:
    return torch.export.export(module.eval(), inputs).module()


def targets(graph: Any) -> Counter[str]:
    return Counter(
        getattr(node.target, "__name__", str(node.target))
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


@pytest.mark.parametrize("make", [hf_swin, hf_resnet], ids=["swin", "resnet"])
@torch.no_grad()
def test_rewritten_backbones_equal_upstream(make: Any) -> None:
    upstream = make()
    x = images(50, 70)
    graph = exported(Maps(from_hf(upstream)), x)
    before = targets(graph)
    fold_constants(graph)
    attention_to_products(graph)
    linear_to_convolution(graph)
    after = targets(graph)
    for pixels in (x, images(50, 70).flip(0)):
        assert_equals_upstream(graph(pixels), upstream(pixels).feature_maps)
    if make is hf_swin:
        assert before["arange.default"] and not after["arange.default"]
        assert not after["linear.default"] and not after["scaled_dot_product_attention.default"]
        assert after["_linear_as_convolution"] == before["linear.default"]
        assert not after["gelu.default"]  # it is part of the convolution


class Made(nn.Module):
    """Constants from parameters, from nothing and from a tuple; and ops that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (self.weight * 2).chunk(2)
        ramp = torch.arange(4.0).flip(0)
        return x @ torch.cat([second, first]) + ramp, F.dropout(x, 0.5, training=True)


@torch.no_grad()
def test_constants_are_folded_and_random_numbers_are_not() -> None:
    module, x = Made(), torch.randn(3, 4)
    graph = exported(module, x)
    fold_constants(graph)
    left = targets(graph)
    assert left["matmul.default"] == left["add.Tensor"] == left["dropout.default"] == 1
    assert sum(left.values()) - left["getitem"] == 3
    assert torch.equal(graph(x)[0], module(x)[0])
    torch.manual_seed(0)
    first = graph(x)[1]
    assert not torch.equal(first, graph(x)[1])  # random numbers are drawn anew


class Written(nn.Module):
    """A mask that is allocated and then filled in place, as in timm's Swin."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(4)
        mask[2:] = 1
        return x * mask


@torch.no_grad()
def test_a_constant_that_is_written_in_place_is_refused() -> None:
    graph = exported(Written(), torch.randn(3, 4))
    with pytest.raises(NotImplementedError, match="writes into a constant"):
        fold_constants(graph)


class Layers(nn.Module):
    def __init__(self, approximate: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        y = self.second(F.gelu(hidden, approximate=self.approximate))
        # a product whose result has two readers keeps its GELU outside
        again = self.first(y)
        return self.second(F.gelu(again)) + self.second(again)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 2, 3, 6), (6,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@torch.no_grad()
def test_linear_layers_become_convolutions_with_equal_results(
    shape: tuple[int, ...], bias: bool, approximate: str
) -> None:
    module, x = Layers(approximate, bias), torch.randn(shape)
    graph = exported(module, x)
    fold_constants(graph)
    linear_to_convolution(graph)
    left = targets(graph)
    assert not left["linear.default"] and left["_linear_as_convolution"] == 5
    assert left["gelu.default"] == 1
    assert_equals_upstream(graph(x), module(x))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


@torch.no_grad()
def test_attention_with_a_boolean_mask_becomes_products() -> None:
    module, tensors = Attention(), [torch.randn(2, 3, 9, 8) for _ in range(3)]
    mask = torch.rand(1, 3, 9, 9) > 0.3
    mask[..., 0] = True
    graph = exported(module, *tensors, mask)
    attention_to_products(graph)
    assert targets(graph)["_attention"] == 1
    assert_equals_upstream(graph(*tensors, mask), module(*tensors, mask))


@pytest.mark.parametrize(
    ("options", "is_written_out"),
    [({}, True), ({"scale": 0.5}, True), ({"dropout_p": 0.5}, False)],
    ids=["plain", "scale", "dropout"],
)
@torch.no_grad()
def test_only_plain_attention_becomes_products(
    options: dict[str, Any], is_written_out: bool
) -> None:
    module = Attention(**options)
    tensors = [torch.randn(2, 3, 9, 8) for _ in range(3)]
    mask = torch.randn(1, 3, 9, 9)
    graph = exported(module, *tensors, mask)
    attention_to_products(graph)
    assert targets(graph)["_attention"] == is_written_out
    if "dropout_p" not in options:
        assert_equals_upstream(graph(*tensors, mask), module(*tensors, mask))
