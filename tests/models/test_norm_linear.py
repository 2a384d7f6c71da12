"""Norms folded into linear layers: whole models by the kernels, in the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from convnext_models import hf_convnext
from reference_models import Pair, hf_pair, hf_swin, images
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from vit_models import hf_vit

from fastbb.models import layers as module
from fastbb.models.layers import norm_linear
from fastbb.weights.derived import derived_bytes
from fastbb_kernels import use_impl
from fastbb_kernels.ops import folded_norm_linear as op_module
from fastbb_kernels.testing import interpret, trace

pytest.importorskip("transformers")

FOLDED = "_folded_norm_linear_fwd_kernel"
# widths that are multiples of 32, as the kernel needs them
SWIN = {"depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2), "window_size": 4}


def build(kind: str) -> Pair:
    if kind == "swin":
        return hf_pair(hf_swin("w7", **SWIN, out_indices=[0, 1, 2]))
    if kind == "convnext":
        return hf_pair(hf_convnext("ConvNext", hidden_sizes=[32, 64, 64, 32]))
    return hf_pair(hf_vit(kind, num_hidden_layers=2, out_indices=[0, 1, 2]))


@pytest.fixture(autouse=True)
def fold_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds norms of small models too."""
    monkeypatch.setattr(op_module, "MOST_UNFOLDED_FEATURES", 0)


@contextmanager
def by_kernels() -> Iterator[None]:
    """Runs ops by their kernels, blocks by those of their parts."""
    blocks = ("swin_attention_block", "mlp_block", "convnext_block")
    with torch.no_grad(), use_impl("triton"), interpret(), use_impl("eager", ops=blocks):
        yield


def n_folded(model: Any, pixels: Tensor) -> int:
    """Launches of the folded kernel in a forward pass."""
    with by_kernels(), trace() as t:
        model(pixels)
    return sum(launch.kernel == FOLDED for launch in t.launches)


@pytest.mark.parametrize(("kind", "n"), [("swin", 4), ("convnext", 5), ("dinov2", 4), ("beit", 4)])
def test_every_norm_before_a_linear_layer_is_folded(kind: str, n: int) -> None:
    pair, pixels = build(kind), images(32, 32, batch=1)
    assert n_folded(pair.ours.bfloat16(), pixels.bfloat16()) == n
    assert n_folded(pair.ours.float(), pixels) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["swin", "convnext", "dinov2", "clip_vision_model"])
@torch.no_grad()
def test_models_are_as_accurate_as_upstream(kind: str, dtype: torch.dtype) -> None:
    pair, pixels = build(kind), images(32, 36, batch=1).to(dtype)
    pair.ours.to(dtype)
    eager = pair.upstream.to(dtype)(pixels).feature_maps
    exact = pair.upstream.double()(pixels.double()).feature_maps
    with by_kernels():
        got = pair.ours(pixels).feature_maps
    for index, maps in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(f"map {index}", *maps)


class Layers(nn.Module):
    """A norm and a linear layer, as a block calls them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 48, bias=bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        run = norm_linear(self, "fc1")
        return run(x, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_changed_weights_are_folded_anew(bias: bool) -> None:
    layers, x = Layers(bias).bfloat16(), torch.randn(5, 64).bfloat16()
    upstream = nn.Sequential(layers.norm, layers.linear)

    def assert_right() -> None:
        with by_kernels():
            got = layers(x)
        with torch.no_grad():
            eager = upstream(x)
            exact = upstream.double()(x.double())
            upstream.bfloat16()
        assert_as_accurate_as_eager("y", got, eager, exact)

    assert_right()
    for tensor in layers.parameters():
        with torch.no_grad():
            tensor.mul_(-3).add_(0.5)
        assert_right()
    layers.linear = upstream[1] = nn.Linear(64, 48, bias=bias).bfloat16()
    assert_right()


def test_folded_weights_are_kept_counted_and_freed() -> None:
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    calls = []
    fold = op_module.fold_norm

    def counted(*tensors: Tensor) -> Any:
        calls.append(tensors)
        return fold(*tensors)

    with pytest.MonkeyPatch.context() as patch, by_kernels():
        patch.setattr(module, "fold_norm", counted)
        first, second = layers(x), layers(x)
    assert torch.equal(first, second) and len(calls) == 1
    assert derived_bytes([layers]) == 48 * 64 * 2 + (48 + 1 + 48) * 4


def test_a_lack_of_memory_leaves_the_norm_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fold(*tensors: Tensor) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(module, "fold_norm", fold)
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    assert n_folded(layers, x) == 0
    with by_kernels():
        got = layers(x)
    with torch.no_grad():
        eager = nn.Sequential(layers.norm, layers.linear)(x)
    torch.testing.assert_close(got, eager, rtol=0.05, atol=0.05)


def test_traced_calls_and_calls_that_name_an_implementation_are_not_folded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    norm, linear = layers.norm, layers.linear
    weights = norm.weight, norm.bias, linear.weight, linear.bias
    with torch.no_grad(), interpret(), trace() as t:
        norm_linear(layers, "fc1")(x, *weights, eps=norm.eps, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_layer_norm_linear_fwd_kernel"]
    # inside a graph the weight would be folded in every call
    monkeypatch.setattr(module, "folds_norm", lambda *_, **options: True)
    graph = torch.export.export(layers, (x,)).graph
    assert not any("folded" in str(node.target) for node in graph.nodes)


def test_a_weight_that_lives_for_one_call_is_not_folded() -> None:
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    norm, linear = layers.norm, layers.linear
    with by_kernels(), trace() as t:
        norm_linear(layers, "fc1")(
            x, norm.weight, norm.bias, linear.weight.view(48, 64), linear.bias, eps=norm.eps
        )
    assert [launch.kernel for launch in t.launches] == ["_layer_norm_linear_fwd_kernel"]


def test_an_op_that_somebody_named_runs() -> None:
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    with by_kernels(), trace() as t, use_impl("eager", ops=("layer_norm_linear",)):
        layers(x)
    assert not t.launches


def test_layers_that_do_not_fit_raise() -> None:
    layers = Layers().bfloat16()
    with by_kernels(), pytest.raises(ValueError, match="layer_norm_linear: weight must be"):
        layers(torch.randn(5, 128).bfloat16())


def test_weights_that_cannot_be_followed_are_not_folded_in_every_call() -> None:
    with torch.inference_mode():  # such tensors have no version
        layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
        assert n_folded(layers, x) == 0


def test_a_kernel_that_failed_its_check_leaves_the_norm_unfolded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, x = Layers().bfloat16(), torch.randn(5, 64).bfloat16()
    monkeypatch.setattr(op_module, "use_block", lambda *_: False)
    assert n_folded(layers, x) == 0
