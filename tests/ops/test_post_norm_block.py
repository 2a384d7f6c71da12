"""Blocks of Swin V2, with the norm after the layers: kernels against timm, parts, errors."""
# pyright: reportArgumentType=false, reportIndexIssue=false
# arguments travel in dicts

import copy
from typing import Any

import pytest
import torch
from swin_v2_models import geometry_of, inputs_of, timm_block
from timm.layers.mlp import Mlp
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn

from fastbb_kernels import mlp_block, swin_attention_block, use_impl
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import trace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = find_op("mlp_block")


class Reference:
    """The MLP half of timm's SwinTransformerV2Block."""

    def __init__(self, channels: int, hidden: int, dtype: torch.dtype) -> None:
        self.mlp, self.norm = Mlp(channels, hidden), nn.LayerNorm(channels)
        for parameter in (*self.mlp.parameters(), *self.norm.parameters()):
            nn.init.normal_(
                parameter, std=1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            )
        self.to(dtype)

    def to(self, dtype: torch.dtype) -> "Reference":
        self.mlp.to(dtype)
        self.norm.to(dtype)
        return self

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return (x if residual is None else residual) + self.norm(self.mlp(x))

    def arguments(self, x: Tensor) -> dict[str, Any]:
        mlp, norm = self.mlp, self.norm
        tensors = {"x": x, "norm_weight": norm.weight, "norm_bias": norm.bias}
        for name in ("fc1", "fc2"):
            layer = mlp.get_submodule(name)
            tensors |= {f"{name}_weight": layer.weight, f"{name}_bias": layer.bias}
        return {name: tensor.detach() for name, tensor in tensors.items()} | {"post_norm": True}


def run(arguments: dict[str, Any]) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = mlp_block(**arguments, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_mlp_block_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(**arguments)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"),
    [((2, 3, 7), 96, 384), ((1,), 32, 64), ((130,), 64, 192)],
    ids=["swinv2-t", "one-row", "rows-over"],
)
def test_kernel_is_as_accurate_as_eager(
    rows: tuple[int, ...], channels: int, hidden: int, dtype: torch.dtype
) -> None:
    reference, x = Reference(channels, hidden, dtype), torch.randn(*rows, channels).to(dtype)
    y = run(reference.arguments(x))
    exact = copy.deepcopy(reference).to(torch.float64)(x.double())
    assert_as_accurate_as_eager("y", y, reference(x), exact)


def test_another_residual_is_as_accurate_as_eager() -> None:
    reference = Reference(32, 64, torch.bfloat16)
    x, residual = torch.randn(2, 9, 32).bfloat16()
    y = run(reference.arguments(x) | {"residual": residual})
    exact = copy.deepcopy(reference).to(torch.float64)(x.double(), residual.double())
    assert_as_accurate_as_eager("y", y, reference(x, residual), exact)


@pytest.mark.parametrize("channels", [40, 32])
def test_parts_run_where_the_kernel_does_not(channels: int) -> None:
    reference, x = Reference(channels, 96, torch.bfloat16), torch.randn(2, 5, channels).bfloat16()
    arguments = reference.arguments(x)
    with torch.no_grad(), trace() as t:
        with pytest.raises(NotImplementedError, match="64 hidden channels"):
            mlp_block(**arguments, impl="triton")
        with use_impl("triton"):
            y = mlp_block(**arguments)
    last = "linear_norm_residual" if channels % 32 == 0 else "layer_norm_residual"
    kernels = ["_conv1x1_bn_act_fwd_kernel", f"_{last}_fwd_kernel"]
    assert [launch.kernel for launch in t.launches] == kernels
    exact = copy.deepcopy(reference).to(torch.float64)(x.double())
    assert_as_accurate_as_eager("y", y, reference(x), exact)


def test_a_layer_scale_is_an_error() -> None:
    arguments = Reference(32, 64, torch.float32).arguments(torch.randn(3, 32))
    with pytest.raises(ValueError, match="scale must be None with post_norm"):
        mlp_block(**arguments, scale=torch.ones(32))


def attention_arguments(block: Any, x: Tensor) -> dict[str, Any]:
    """Arguments of swin_attention_block for a block of timm."""
    inputs, attention = inputs_of(block.attn, x), block.attn
    return {
        "x": x,
        "norm_weight": block.norm1.weight,
        "norm_bias": block.norm1.bias,
        "qkv_weight": attention.qkv.weight,
        "qkv_bias": inputs["qkv_pad"],
        "bias": inputs["bias"],
        "proj_weight": attention.proj.weight,
        "proj_bias": attention.proj.bias,
        "num_heads": attention.num_heads,
        "geometry": geometry_of(block),
        "logit_scale": inputs["logit_scale"],
        "post_norm": True,
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((16, 16), {"shift": 0}),
        ((16, 24), {}),
        ((9, 13), {}),
        ((3, 5), {}),
        ((9, 14), {"window": 7, "shift": 3, "heads": 1}),
    ],
    ids=["whole-windows", "shifted", "padded", "below-a-window", "window-7"],
)
def test_the_attention_half_is_as_accurate_as_timm(
    size: tuple[int, int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    block = timm_block(**options)
    nn.init.normal_(block.norm1.weight)
    nn.init.normal_(block.norm1.bias)
    block, x = block.to(dtype), torch.randn(2, *size, 32).to(dtype)
    arguments = attention_arguments(block, x)
    with trace() as t:
        y = swin_attention_block(**arguments, impl="triton")
    assert [launch.kernel for launch in t.launches] == ["_swin_attention_block_fwd_kernel"]
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == find_op("swin_attention_block").n_bytes(**arguments)
    eager = x + block.norm1(block._attn(x))
    if not eager.isfinite().all():  # see test_cosine_attention
        assert dtype == torch.float16
        eager = swin_attention_block(**arguments, impl="eager")
    exact = block.double()
    truth = x.double() + exact.norm1(exact._attn(x.double()))
    assert_as_accurate_as_eager("y", y, eager, truth)


@torch.no_grad()
def test_parts_of_the_attention_half_run_where_its_kernel_does_not() -> None:
    block = timm_block(window=12, shift=6)
    x = torch.randn(1, 12, 18, 32)
    arguments = attention_arguments(block, x)
    with trace() as t:
        with pytest.raises(NotImplementedError, match="at most 64 tokens, got 144"):
            swin_attention_block(**arguments, impl="triton")
        with use_impl("triton"):
            y = swin_attention_block(**arguments)
    kernels = ["_window_attention_fwd_kernel", "_linear_norm_residual_fwd_kernel"]
    assert [launch.kernel for launch in t.launches] == kernels
    exact = block.double()
    truth = x.double() + exact.norm1(exact._attn(x.double()))
    assert_as_accurate_as_eager("y", y, truth.float(), truth)
