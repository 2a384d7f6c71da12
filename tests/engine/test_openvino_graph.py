"""The rewrites of a converted model: what they find, what they leave, and that results stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_models import hf_pair, hf_swin, images, randomize_
from torch import Tensor, nn
from vit_models import upstream_class, vit_config

from fastbb.engine import openvino
from fastbb.engine.computation import BackboneMaps, without_engine
from fastbb.engine.openvino_graph import rewrite_for_cpu

library: Any = pytest.importorskip("openvino")
PARTS, HEADS, WIDTH = 3, 2, 4
CHANNELS = HEADS * WIDTH


def converted(module: nn.Module, x: Tensor) -> Any:
    model = library.convert_model(torch.export.export(module.eval(), (x,)))
    model.reshape(list(x.shape))
    return model


def results(model: Any, x: Tensor) -> list[np.ndarray]:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return list(library.Core().compile_model(model, "CPU", settings)([x.numpy()]).values())


def kinds(nodes: Any) -> list[str]:
    return [node.get_type_name() for node in nodes]


def linears(model: Any) -> int:
    """Products with constant weights whose result is read."""
    products = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]
    return kinds(op.input_value(1).get_node() for op in products).count("Constant")


def assert_results_stay(module: nn.Module, x: Tensor) -> Any:
    """Rewrites a module; returns the model."""
    expected = [y.detach().numpy() for y in module.eval()(x)]
    model = converted(module, x)
    rewrite_for_cpu(model)
    for y, wanted in zip(results(model, x), expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    return model


def hf_dinov2() -> Any:
    return randomize_(upstream_class("dinov2", "Backbone")(vit_config("dinov2")))


class Attention(nn.Module):
    """q, k and v of maps [B, H, W, C]; each is returned with a factor of its own.

    Args:
        take: takes the parts [PARTS, ...] out of those that one product computes.
        roll: of the product, or None.
    """

    def __init__(self, take: Callable[[Tensor], Any], roll: Any = None, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(CHANNELS, PARTS * CHANNELS, bias=bias)
        self.take, self.roll = take, roll

    def forward(self, x: Tensor) -> Any:
        y = self.qkv(x)
        if self.roll is not None:
            y = torch.roll(y, *self.roll)
        return tuple((i + 2) * part for i, part in enumerate(self.take(y)))


def of_tokens(y: Tensor) -> Any:
    """As in a ViT."""
    return y.view(len(y), 16, PARTS, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def of_windows(y: Tensor) -> Any:
    """As in Swin, with windows of 2x2."""
    y = y.view(len(y), 2, 2, 2, 2, PARTS, HEADS, WIDTH).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return y.reshape(PARTS, -1, HEADS, 4, WIDTH).unbind(0)


def of_maps(y: Tensor) -> Any:
    return y.view(*y.shape[:3], PARTS, HEADS, WIDTH).permute(3, 0, 1, 2, 4, 5).unbind(0)


MAPS = (3, 4, 4, CHANNELS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("roll", [None, ((-1, 1), (1, 2))])
@pytest.mark.parametrize("take", [of_tokens, of_windows, of_maps])
def test_each_part_has_a_product(take: Any, roll: Any, bias: bool) -> None:
    model = assert_results_stay(Attention(take, roll, bias), torch.randn(MAPS))
    assert linears(model) == PARTS
    found = kinds(model.get_ordered_ops())
    assert "Slice" not in found and found.count("Roll") == (0 if roll is None else 1)


def inner_parts(y: Tensor) -> Any:
    """The parts of a head lie together, as in GPT-NeoX."""
    return y.view(*y.shape[:3], HEADS, PARTS, WIDTH).permute(4, 0, 1, 2, 3, 5).unbind(0)


def two_of_three(y: Tensor) -> Any:
    return of_maps(y)[:2]


def a_part_twice(y: Tensor) -> Any:
    y = y.view(*y.shape[:3], PARTS, HEADS, WIDTH).permute(3, 0, 1, 2, 4, 5)
    return y[0], y[1] + 1, y[1:] + y[1]


def a_larger_part(y: Tensor) -> Any:
    y = y.view(*y.shape[:3], PARTS, HEADS, WIDTH).permute(3, 0, 1, 2, 4, 5)
    return y[:2], y[1:2], y[2:]


def parts_of_images(y: Tensor) -> Any:
    """There are as many images as parts, and they come first."""
    y = y.view(*y.shape[:3], PARTS, HEADS, WIDTH).permute(0, 3, 1, 2, 4, 5)
    return y.unbind(0)


def regrouped(y: Tensor) -> Any:
    """A reshape mixes the parts."""
    y = y.view(*y.shape[:3], PARTS, HEADS, WIDTH).permute(3, 0, 1, 2, 4, 5)
    return y.reshape(2, -1).unbind(0)


@pytest.mark.parametrize(
    ("take", "roll"),
    [
        (inner_parts, None),
        (two_of_three, None),
        (a_part_twice, None),
        (a_larger_part, None),
        (parts_of_images, None),
        (regrouped, None),
        (of_maps, ((1,), (3,))),  # over the channels
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_parts_are_left_alone(take: Any, roll: Any) -> None:
    model = assert_results_stay(Attention(take, roll), torch.randn(MAPS))
    assert linears(model) == 1


def whole_windows() -> Any:
    """A Swin whose maps need no padding; that of a product of three parts stands in the way."""
    return hf_swin(depths=(2, 1), num_heads=(2, 4), window_size=4, out_indices=[0, 1, 2])


@pytest.mark.parametrize("make", [whole_windows, hf_dinov2])
@torch.no_grad()
def test_every_linear_layer_of_upstream_has_a_product(make: Any) -> None:
    """Upstream computes q, k and v by layers of their own; the batch is dynamic, as in use."""
    upstream = make()
    computation = BackboneMaps(without_engine(hf_pair(upstream).ours))
    model = openvino._convert(computation, images(64, 64))
    assert model.input(0).partial_shape[0].is_dynamic
    assert linears(model) == sum(isinstance(m, nn.Linear) for m in upstream.modules())


def test_a_product_that_is_read_otherwise_too_is_left_alone() -> None:
    class Both(Attention):
        def forward(self, x: Tensor) -> Any:
            y = self.qkv(x)
            return (y + 1, *of_maps(y))

    assert linears(assert_results_stay(Both(of_maps), torch.randn(MAPS))) == 1


class Norm(nn.Module):
    """A layer norm of maps [B, H, W, C] beside a residual."""

    def __init__(self, affine: bool = True, shape: Any = (CHANNELS,)) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape, elementwise_affine=affine)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Any:
        x = x * 2
        y = self.norm(x)
        return x + torch.relu(y), y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_of_maps_are_computed_of_tokens_with_their_scale_and_shift(
    affine: bool,
) -> None:
    model = assert_results_stay(Norm(affine), torch.randn(MAPS))
    (norm,) = [op for op in model.get_ops() if op.get_type_name() == "MVN"]
    chain = [norm]
    while chain[-1].get_type_name() != "Reshape":
        (reader,) = chain[-1].output(0).get_target_inputs()
        chain.append(reader.get_node())
    assert kinds(chain[1:-1]) == (["Multiply", "Add"] if affine else [])
    assert {len(node.get_output_partial_shape(0)) for node in chain[:-1]} == {3}
    # a second reader keeps the norm from writing into what it reads
    assert len(norm.input_value(0).get_target_inputs()) == 2


def test_norms_of_more_than_the_channels_are_left_alone() -> None:
    model = assert_results_stay(Norm(shape=(4, CHANNELS)), torch.randn(MAPS))
    for op in model.get_ops():
        assert op.get_type_name() != "MVN" or len(op.get_output_partial_shape(0)) == 4


def test_a_norm_whose_scale_is_a_map_is_flattened_without_it() -> None:
    class Scaled(Norm):
        def forward(self, x: Tensor) -> Any:
            scale = torch.arange(16.0 * CHANNELS).view(1, 4, 4, CHANNELS)
            return (self.norm(x) * scale,)

    model = assert_results_stay(Scaled(affine=False), torch.randn(MAPS))
    (norm,) = [op for op in model.get_ops() if op.get_type_name() == "MVN"]
    assert len(norm.get_output_partial_shape(0)) == 3
